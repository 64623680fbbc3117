// A math warpgroup of the streaming kernel: 64 rows of weights (the M operand) times the rows of an item (N), promoted to fp32 after every
// K block, then what becomes of the sums.
//
//   sum[channel][row] = sum over K blocks b of  (scale_w[b] * scale_row[row][b]) * (W[channel][b] . X[row][b])
//
// The order of these operations is the same for every N and tile size, and wgmma's accumulators are the same bits for every N
// (docs/log.md): a row's result depends on no other row.
#pragma once
#include "epilogue/activation.cuh"
#include "epilogue/quantize.cuh"
#include "ptx/wgmma.cuh"
#include "stream/work.cuh"

// One of the two math warpgroups. They have a half of each wide tile; of narrow ones they take turns, a strip each, so that one finishes its
// strip, or waits, while the other multiplies.
struct MathGroup {
    u32 index;
    bool takes_turns;
    DEVICE u32 half() const { return takes_turns ? 0 : index; }
    DEVICE u32 warp() const { return threadIdx.x / 32 % 4; }
    DEVICE void sync() const { named_barrier_sync(1 + index, 128); }
    DEVICE u32 first_channel(const Geometry& g, const Tile& tile) const { return tile.index * (g.tile_rows / 2) + half() * GROUP_CHANNELS; }
};

// Whether registers allow two products under way: a chain of four instructions and their promotion takes longer than a stage.
template <u32 N>
constexpr bool overlaps = N <= 64;

template <u32 N>
struct RowProduct {
    const Block& block;
    const Geometry& g;
    float (&sum)[N / 2];
    u64 weights, rows;  // descriptors of the first stage; those of others follow every g.stage_bytes

    DEVICE RowProduct(const Block& block, const Geometry& g, const MathGroup& group, float (&sum)[N / 2])
        : block(block), g(g), sum(sum) {
        const u32 ring = __shfl_sync(0xffffffffu, block.ring, 0);
        weights = k_major_descriptor(ring + group.half() * (64 * LINE_BYTES));
        rows = k_major_descriptor(ring + g.token_tile());
    }

    // Starts the product of the stage at `ring`, once it is there.
    DEVICE void start(float (&product)[N / 2], const Cursor& ring) const {
        mbarrier_wait_both(block.weights(ring.at), block.tokens(ring.at), ring.phase);
        const u64 a = advance_descriptor(weights, ring.at * g.stage_bytes), b = advance_descriptor(rows, ring.at * g.stage_bytes);
        pin_accumulators(product);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < 4; ++step)
            WgmmaE4m3<N>::multiply(product, advance_descriptor(a, 32 * step), advance_descriptor(b, 32 * step), step > 0);
        wgmma_commit();
    }

    // Adds it, once all but `Pending` of the products that were started are done, and hands the stage back.
    template <u32 Pending>
    DEVICE void finish(float (&product)[N / 2], Cursor& ring) const {
        const u32 lane = lane_index();
        const float upper = block.side.weight_scales[ring.at][0], lower = block.side.weight_scales[ring.at][1];
        const float* const scales = reinterpret_cast<const float*>(block.memory + g.token_scales(ring.at)) + 2 * (lane % 4);
        float2 of_rows[N / 8];
        const auto read_scales = [&] {
#pragma unroll
            for (u32 j = 0; j < N / 8; ++j) of_rows[j] = *reinterpret_cast<const float2*>(scales + 8 * j);
        };
        if (overlaps<N>) read_scales();
        wgmma_wait<Pending>();
        pin_accumulators(product);
        if (!overlaps<N>) read_scales();
#pragma unroll
        for (u32 j = 0; j < N / 8; ++j) {
            const float2 scale = of_rows[j];
            float* const s = sum + 4 * j;
            const float* const d = product + 4 * j;
            s[0] = __fmaf_rn(upper * scale.x, d[0], s[0]);
            s[1] = __fmaf_rn(upper * scale.y, d[1], s[1]);
            s[2] = __fmaf_rn(lower * scale.x, d[2], s[2]);
            s[3] = __fmaf_rn(lower * scale.y, d[3], s[3]);
        }
        block.release_stage(ring, g.stages);
    }
};

template <u32 N>
DEVICE void multiply_rows(float (&sum)[N / 2], const Block& block, const Geometry& g, const MathGroup& group, Cursor& ring, u32 blocks) {
#pragma unroll
    for (u32 i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    const RowProduct<N> product(block, g, group, sum);
    float even[N / 2];
    if constexpr (!overlaps<N>) {
        for (u32 k = 0; k < blocks; ++k) {
            product.start(even, ring);
            product.template finish<0>(even, ring);
        }
    } else {
        float odd[N / 2];
        Cursor next = ring;
        const auto start = [&](float (&d)[N / 2]) {
            product.start(d, next);
            next.advance(g.stages);
        };
        start(even);
        for (u32 k = 1; k < blocks; k += 2) {
            start(odd);
            product.template finish<1>(even, ring);
            if (k + 1 == blocks) {
                product.template finish<0>(odd, ring);
                return;
            }
            start(even);
            product.template finish<1>(odd, ring);
        }
        product.template finish<0>(even, ring);
    }
}

// `store(n, upper, lower)` for the sums of this thread in each of the item's rows: weight rows r and r + 8 of the warp's 16.
template <u32 N, typename Store>
DEVICE void for_each_row(const float (&sum)[N / 2], i32 rows, Store store) {
    const i32 first = 2 * (lane_index() % 4);
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const i32 n = 8 * j + first + i;
            if (n < rows) store(n, sum[4 * j + i], sum[4 * j + 2 + i]);
        }
    }
}

// e4m3 codes and scales of 128 channels (or the last 64) of the item's rows, from fp32. A warp takes a row, a lane four channels.
DEVICE void quantize_block(const Problem& p, const Tile& tile, u32 channel, u32 warp) {
    const u32 lane = lane_index(), at = channel + 4 * lane;
    const bool used = at < static_cast<u32>(p.inter);
    constexpr u32 UNROLL = 4;
    for (i32 first = warp; first < tile.rows; first += 4 * UNROLL) {
        float4 v[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            const i32 n = first + 4 * i;
            v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (used && n < tile.rows)
                v[i] = load_shared_by_blocks(reinterpret_cast<const float4*>(p.c + static_cast<i64>(tile.row + n) * p.inter + at));
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            const i32 n = first + 4 * i;
            if (n >= tile.rows) break;
            const float largest = fmaxf(fmaxf(fabsf(v[i].x), fabsf(v[i].y)), fmaxf(fabsf(v[i].z), fabsf(v[i].w)));  // NaN left out
            const u32 bits = __reduce_max_sync(0xffffffffu, __float_as_uint(fmaxf(largest, 0.0f)));
            const float scale = block_scale(__uint_as_float(bits), p.pow2), inverse = inverse_of_scale(scale);
            const i64 row = tile.row + n;
            const u32 codes = pack_four_e4m3(v[i].x * inverse, v[i].y * inverse, v[i].z * inverse, v[i].w * inverse);
            const u32 block = channel / BLOCK_CHANNELS;
            *reinterpret_cast<u32*>(p.c_rows.chunk(row, block, lane / 4) + lane % 4 * 4) = codes;  // zeros past the last channel
            if (lane == 0) *p.c_rows.scale(row, block) = scale;
        }
    }
}

// The 32 channels of this warpgroup are in c. Whichever warpgroup of the grid completes a block of 128 quantises it and counts it as ready.
DEVICE void finish_channels(const Block& block, const Problem& p, const Tile& tile, const MathGroup& group, u32 channel) {
    const u32 of_block = channel / BLOCK_CHANNELS, first = of_block * BLOCK_CHANNELS;
    group.sync();
    if (threadIdx.x % 128 == 0) {
        const u32 expected = min(BLOCK_CHANNELS, p.inter - first) / GROUP_CHANNELS;
        block.side.last[group.index] = add_acquire_release(p.arrivals(tile.item, of_block), 1) + 1 == expected;
    }
    group.sync();
    if (block.side.last[group.index] == 0) return;
    quantize_block(p, tile, first, group.warp());
    fence_proxy_async_global();  // TMA will read the codes
    group.sync();
    if (threadIdx.x % 128 == 0) add_release(p.ready(tile.item), 1);
}

template <u32 N>
DEVICE void compute_tile(const Block& block, const Problem& p, const Geometry& g, const MathGroup& group, Cursor& ring, const Tile& tile) {
    const u32 warp = group.warp(), lane = lane_index();
    float sum[N / 2];
    multiply_rows<N>(sum, block, g, group, ring, p.blocks_of(tile));
    if (tile.product == 1) {
        float* const c = p.c + static_cast<i64>(tile.row) * p.inter + group.first_channel(g, tile) + 8 * warp + lane / 4;
        const ActivationConstants constants = {1.0f, p.limit, 0.0f};
        for_each_row<N>(sum, tile.rows, [&](i32 n, float upper, float lower) {
            const float gate = p.gate_first ? upper : lower, up = p.gate_first ? lower : upper;
            c[static_cast<i64>(n) * p.inter] = gated<Act::ClampedSwiGLU>(gate, up, constants);
        });
    } else {
        const u32 column = tile.index * g.tile_rows + 64 * group.half();
        float* const y = p.y + static_cast<i64>(tile.row) * p.hidden + column + 16 * warp + lane / 4;
        for_each_row<N>(sum, tile.rows, [&](i32 n, float upper, float lower) {
            float* const at = y + static_cast<i64>(n) * p.hidden;
            at[0] = upper, at[8] = lower;
        });
    }
}

// The other warpgroup's. Both hand back every stage: a wait tells only two uses of a stage from each other.
DEVICE void pass_strip(const Block& block, const Problem& p, const Geometry& g, Cursor& ring, const Tile& tile) {
    const u32 steps = tile.count * p.blocks_of(tile);
    for (u32 step = 0; step < steps; ++step) {
        mbarrier_wait_both(block.weights(ring.at), block.tokens(ring.at), ring.phase);
        block.release_stage(ring, g.stages);
    }
}

DEVICE void compute_strips(const Block& block, const Problem& p, const Geometry& g, u32 index) {
    const MathGroup group = {index, g.narrow()};
    Cursor ring, queue;
    for (u32 turn = 0;; ++turn) {
        Tile tile = block.read_tile(queue);
        if (tile.product == 0) return;
        if (group.takes_turns && turn % 2 != index) {
            pass_strip(block, p, g, ring, tile);
            continue;
        }
        const u32 first = tile.index, end = first + tile.count;
        for (; tile.index < end; ++tile.index) {
            switch (columns_for(tile.rows)) {
                case 8: compute_tile<8>(block, p, g, group, ring, tile); break;
                case 16: compute_tile<16>(block, p, g, group, ring, tile); break;
                case 24: compute_tile<24>(block, p, g, group, ring, tile); break;
                case 32: compute_tile<32>(block, p, g, group, ring, tile); break;
                case 48: compute_tile<48>(block, p, g, group, ring, tile); break;
                case 64: compute_tile<64>(block, p, g, group, ring, tile); break;
                case 96: compute_tile<96>(block, p, g, group, ring, tile); break;
                default: compute_tile<128>(block, p, g, group, ring, tile); break;
            }
            if (tile.product == 1) finish_channels(block, p, tile, group, group.first_channel(g, tile));
        }
        if (tile.product == 2) {
            group.sync();
            const u32 stored = first + threadIdx.x % 128;
            if (stored < end) add_release(p.stored(stored * g.tile_rows / BLOCK_CHANNELS), 1);
        }
    }
}
