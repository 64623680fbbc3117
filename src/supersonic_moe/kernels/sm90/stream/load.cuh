// The loading warps of the streaming kernel: one for weights, which never waits for data, and three for the rows that they multiply.
#pragma once
#include "stream/work.cuh"

// Weights of the routed experts, or of the shared one, as maps with boxes of as many rows as a tile has.
struct WeightMaps {
    const TensorMap *w13, *w2;
};

// One thread. Takes tiles from the counter, tells the other warps, and loads a K block of the tile into each stage. Weights of W2 are
// loaded before what they multiply is there. The next tile is asked for while this one is loaded: the answer takes as long as a K block.
DEVICE void load_weights(const Block& block, const Problem& p, const Geometry& g, const WeightMaps& routed, const WeightMaps& shared) {
    const u64 policy = evict_first();
    const u32 bytes = g.tile_rows * LINE_BYTES;
    Cursor ring, queue;
    const auto announce = [&](const Tile& tile) {
        mbarrier_wait(block.queue_empty(queue.at), queue.phase ^ 1);
        block.side.queue[queue.at] = tile;
        mbarrier_arrive(block.queue_full(queue.at));
        queue.advance(QUEUE);
    };
    Tile tile = find_tile(p, g, blockIdx.x);  // the counter hands out what is behind the first of each block
    announce(tile);
    while (tile.product != 0) {
        const bool first_product = tile.product == 1, own = tile.expert >= p.routed;
        const TensorMap* const map = first_product ? (own ? shared.w13 : routed.w13) : (own ? shared.w2 : routed.w2);
        const i32 expert = own ? 0 : tile.expert;
        const i32 row = tile.index * (first_product ? g.tile_rows / 16 : g.tile_rows);
        const u32 blocks = first_product ? p.blocks_hidden() : p.blocks_inter();
        const u32 ask = add_relaxed(p.next_tile(), 1) + gridDim.x;
        for (u32 k = 0; k < blocks; ++k) {
            const u32 full = block.full(ring.at), stage = block.ring + ring.at * g.stage_bytes;
            mbarrier_wait(block.empty(ring.at), ring.phase ^ 1);
            mbarrier_arrive_expect_tx(full, bytes);
            if (first_product) {
                tma_load_once(stage, map, full, policy, k * LINE_BYTES, 0, 0, row, expert);
            } else {
                tma_load_once(stage, map, full, policy, k * LINE_BYTES, row, expert);
            }
            ring.advance(g.stages);
        }
        tile = find_tile(p, g, ask);
        announce(tile);
    }
}

// The scales of `Ahead` K blocks of a row, read together.
constexpr u32 AHEAD = 4;

// Warp `part` of three. Rows of x come through their index, one by one: lane l has row 3 l + part, and the one 96 further on. Rows of c lie
// together and come eight at a time, once all blocks of the item are there; what follows the item's last row is multiplied and dropped.
// A lane reads the scales of its rows. The first warp adds those of the weights, 32 K blocks at a time.
DEVICE void load_tokens(const Block& block, const Problem& p, const Geometry& g, const TensorMap* map_x, const TensorMap* map_codes, u32 part) {
    const u32 lane = lane_index();
    Cursor ring, queue;
    while (true) {
        const Tile tile = block.read_tile(queue);
        if (tile.product == 0) return;
        const bool first_product = tile.product == 1;
        const u32 blocks = first_product ? p.blocks_hidden() : p.blocks_inter();
        const i64 scale_k = first_product ? p.x_scale_k : 1;

        const float* weight_scale[2];
        if (part == 0) {
            const bool own = tile.expert >= p.routed;
            const i64 expert = own ? 0 : tile.expert;
            if (first_product) {
                const u32 channel = tile.index * (g.tile_rows / 2);
                const u32 lines = p.interleaved ? (2 * p.inter + 127) / 128 : 2 * p.blocks_inter();
                const float* all = (own ? p.shared_w13_scale : p.w13_scale) + expert * lines * blocks;
                const u32 line = p.interleaved ? 2 * channel / 128 : channel / 128;
                weight_scale[0] = all + line * blocks;
                weight_scale[1] = p.interleaved ? weight_scale[0] : all + (line + p.blocks_inter()) * blocks;
            } else {
                const float* all = (own ? p.shared_w2_scale : p.w2_scale) + expert * p.blocks_hidden() * blocks;
                weight_scale[0] = weight_scale[1] = all + tile.index * g.tile_rows / 128 * blocks;
            }
        } else {
            weight_scale[0] = weight_scale[1] = nullptr;
        }

        if (!first_product) {
            wait_for_count(p.ready(tile.item), p.blocks_inter());
            fence_proxy_async_global();
        }
        bool used[2];
        i32 row[2];
        const float* scale[2];
        float factor[2];
        u32 bytes = 0;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 at = TOKEN_WARPS * (32 * i + lane) + part;
            used[i] = at < static_cast<u32>(tile.rows);
            row[i] = 0, scale[i] = p.x_scale, factor[i] = 1.0f;
            if (used[i]) {
                row[i] = tile.row + at;
                if (first_product) {
                    row[i] = p.row_slot[row[i]] / p.choices;
                    if (p.x_weight && tile.expert < p.routed) factor[i] = p.x_weight[row[i]];
                    scale[i] = p.x_scale + row[i] * p.x_scale_row;
                } else {
                    scale[i] = p.c_scale + static_cast<i64>(row[i]) * blocks;
                }
            }
            if (first_product) bytes += __popc(__ballot_sync(0xffffffffu, used[i])) * LINE_BYTES;
        }
        const i32 box_row = 8 * (TOKEN_WARPS * lane + part);
        const bool has_box = !first_product && box_row < tile.rows;
        if (!first_product) bytes = __popc(__ballot_sync(0xffffffffu, has_box)) * 8 * LINE_BYTES;
        const auto read_scales = [&](float (&values)[2][AHEAD], u32 k) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
#pragma unroll
                for (u32 j = 0; j < AHEAD; ++j)
                    values[i][j] = used[i] && k + j < blocks ? load_shared_by_blocks(scale[i] + (k + j) * scale_k) : 0.0f;
        };
        float next[2][AHEAD], weight_scales[2] = {};
        read_scales(next, 0);
        for (u32 first = 0; first < blocks; first += AHEAD) {
            float now[2][AHEAD];
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
#pragma unroll
                for (u32 j = 0; j < AHEAD; ++j) now[i][j] = next[i][j];
            read_scales(next, first + AHEAD);
            if (part == 0 && first % 32 == 0 && first + lane < blocks) {
                weight_scales[0] = __ldg(weight_scale[0] + first + lane);
                weight_scales[1] = __ldg(weight_scale[1] + first + lane);
            }
#pragma unroll
            for (u32 j = 0; j < AHEAD; ++j) {
                const u32 k = first + j;
                if (k >= blocks) break;
                const u32 full = block.full(ring.at), tokens = block.ring + ring.at * g.stage_bytes + g.token_tile();
                mbarrier_wait(block.empty(ring.at), ring.phase ^ 1);
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    const u32 at = TOKEN_WARPS * (32 * i + lane) + part;
                    if (used[i]) {
                        if (first_product) tma_load(tokens + at * LINE_BYTES, map_x, full, k * LINE_BYTES, row[i]);
                        block.side.token_scales[ring.at][at] = now[i][j] * factor[i];
                    }
                }
                if (has_box) tma_load(tokens + box_row * LINE_BYTES, map_codes, full, k * LINE_BYTES, tile.row + box_row);
                if (part == 0) {
                    const float upper = __shfl_sync(0xffffffffu, weight_scales[0], k % 32);
                    const float lower = __shfl_sync(0xffffffffu, weight_scales[1], k % 32);
                    if (lane == 0) block.side.weight_scales[ring.at][0] = upper, block.side.weight_scales[ring.at][1] = lower;
                }
                __syncwarp();
                if (lane == 0) mbarrier_arrive_expect_tx(full, bytes);
                ring.advance(g.stages);
            }
        }
    }
}
