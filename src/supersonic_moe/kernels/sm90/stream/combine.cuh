// The last thing that the math warps of the streaming kernel do: each token's weighted sum of its rows of y, in fp32 and in ascending order
// of the choices. A warp takes 128 columns of a batch of tokens. A token without rows gets +0.
#pragma once
#include "stream/work.cuh"

constexpr u32 COMBINE_AHEAD = 8;  // rows of y that a lane has asked for

// The slots of a batch of tokens, spread over the lanes of a warp.
struct Slots {
    i32 row[BATCH_SLOTS / 32];
    float weight[BATCH_SLOTS / 32];

    DEVICE Slots(const Problem& p, u32 first_token, u32 tokens) {
#pragma unroll
        for (u32 i = 0; i < BATCH_SLOTS / 32; ++i) {
            const u32 at = 32 * i + lane_index();
            const i64 slot = static_cast<i64>(first_token) * p.choices + at;
            const bool used = at < tokens * p.choices;
            row[i] = used ? __ldg(p.slot_row + slot) : -1;
            weight[i] = used ? __ldg(p.slot_weight + slot) : 0.0f;
        }
    }

    // What a warp adds, in order: those that have a row. Returns how many.
    DEVICE u32 list(const Problem& p, RowList& list) const {
        const u32 lane = lane_index();
        u32 rows = 0;
#pragma unroll
        for (u32 i = 0; i < BATCH_SLOTS / 32; ++i) {
            const u32 used = __ballot_sync(0xffffffffu, row[i] >= 0);
            const u32 at = rows + __popc(used & ((1u << lane) - 1));
            if (row[i] >= 0) list.row[at] = row[i], list.weight[at] = weight[i], list.token[at] = (32 * i + lane) / p.choices;
            rows += __popc(used);
        }
        __syncwarp();
        return rows;
    }
};

// `y`, `out`: this lane's four columns, of the first row and of the first token of the batch.
DEVICE void add_rows(const Problem& p, const RowList& list, u32 rows, u32 tokens, const float* y, u16* out) {
    float4 ahead[COMBINE_AHEAD];
    const auto ask = [&](float4& place, u32 i) {
        if (i < rows) place = load_shared_by_blocks(reinterpret_cast<const float4*>(y + static_cast<i64>(list.row[i]) * p.hidden));
    };
#pragma unroll
    for (u32 i = 0; i < COMBINE_AHEAD; ++i) ask(ahead[i], i);
    u32 token = 0;
    float4 sum = {};
    bool has_row = Tokens::writes_zeros;
    const auto finish_until = [&](u32 next) {
        for (; token < next; ++token, out += p.hidden, sum = float4{}, has_row = Tokens::writes_zeros)
            if (has_row) *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    };
    for (u32 first = 0; first < rows; first += COMBINE_AHEAD) {
#pragma unroll
        for (u32 i = 0; i < COMBINE_AHEAD; ++i) {
            if (first + i >= rows) break;
            finish_until(list.token[first + i]);
            has_row = true;
            const float weight = list.weight[first + i];
            sum.x = __fmaf_rn(weight, ahead[i].x, sum.x), sum.y = __fmaf_rn(weight, ahead[i].y, sum.y);
            sum.z = __fmaf_rn(weight, ahead[i].z, sum.z), sum.w = __fmaf_rn(weight, ahead[i].w, sum.w);
            ask(ahead[i], first + i + COMBINE_AHEAD);
        }
    }
    finish_until(tokens);
}

// Up to `each` tokens of one rank, whose outputs follow each other.
struct Batches {
    u32 each, ranks, of_rank, batches_of_rank;

    DEVICE Batches(const Tokens& tokens, u32 each)
        : each(each), ranks(tokens.ranks()), of_rank(tokens.of_rank()), batches_of_rank((of_rank + each - 1) / each) {}
    DEVICE u32 count() const { return ranks * batches_of_rank; }
    DEVICE u32 rank(u32 batch) const { return ranks == 1 ? 0 : batch / batches_of_rank; }
    DEVICE u32 inside(u32 batch) const { return (batch - rank(batch) * batches_of_rank) * each; }  // of the rank's tokens
    DEVICE u32 first(u32 batch) const { return rank(batch) * of_rank + inside(batch); }
    DEVICE u32 tokens(u32 batch) const { return min(each, of_rank - inside(batch)); }
};

DEVICE void combine_tokens(const Block& block, const Problem& p, const Geometry& g) {
    const u32 columns = p.blocks_hidden(), warps = gridDim.x * MATH_WARPS;
    // As many tokens a batch as give each warp one, up to what a list holds.
    const u32 share = (static_cast<u64>(p.tokens) * columns + warps - 1) / warps;
    const u32 each = max(1, min(share, BATCH_SLOTS / p.choices));
    const Batches batches(p.of_tokens, each);
    RowList& list = block.side.lists[threadIdx.x / 32];
    const u64 units = static_cast<u64>(batches.count()) * columns;
    const auto slots_of = [&](u64 unit) {
        const u32 batch = unit / columns;
        return Slots(p, batches.first(batch), unit < units ? batches.tokens(batch) : 0);
    };
    u64 unit = blockIdx.x + gridDim.x * (threadIdx.x / 32);
    Slots next = slots_of(unit);
    for (; unit < units; unit += warps) {
        const u32 of_columns = unit % columns, column = of_columns * BLOCK_CHANNELS + 4 * lane_index();
        const u32 batch = unit / columns, tokens = batches.tokens(batch);
        const u32 rows = next.list(p, list);
        next = slots_of(unit + warps);
        wait_for_count(p.stored(of_columns), 2 * g.items);
        add_rows(p, list, rows, tokens, p.y + column, p.of_tokens.out(batches.first(batch)) + column);
        __syncwarp();  // the next batch writes the list again
    }
}
