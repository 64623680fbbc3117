// The two loading warps of the streaming kernel: one for weights, which never waits for data, and one for the rows that they multiply.
#pragma once
#include "stream/gather.cuh"

// Weights of the routed experts, or of the shared one, as maps with boxes of as many rows as a tile has.
struct WeightMaps {
    const TensorMap *w13, *w2;
};

// One thread. Takes strips from the counter, tells the other warps, and loads a K block of a tile into each stage. Weights of W2 are
// loaded before what they multiply is there, as far as the ring goes. The next strip is asked for while this one is loaded: the answer takes as
// long as some K blocks, and nothing is loaded while it is waited for, so it is looked up behind the last.
DEVICE void load_weights(const Block& block, const Problem& p, const Geometry& g, const WeightMaps& routed, const WeightMaps& shared) {
    const u64 read_once = evict_first(), read_again = evict_normal();
    const u32 bytes = g.tile_rows * LINE_BYTES;
    Cursor ring, landed, queue;
    u32 before_waiting = g.stages_on_the_way();
    const auto announce = [&](const Tile& tile) {
        mbarrier_wait(block.queue_empty(queue.at), queue.phase ^ 1);
        block.side.queue[queue.at] = tile;
        mbarrier_arrive(block.queue_full(queue.at));
        queue.advance(QUEUE);
    };
    u32 number = blockIdx.x;  // the counter hands out what is behind the first of each block; narrow strips are dealt in turns
    Tile tile = block.find_strip(p, g, number);
    announce(tile);
    while (tile.product != 0) {
        const bool first_product = tile.product == 1, own = tile.expert >= p.routed;
        const TensorMap* const map = first_product ? (own ? shared.w13 : routed.w13) : (own ? shared.w2 : routed.w2);
        const i32 expert = own ? 0 : tile.expert;
        const u32 blocks = first_product ? p.blocks_hidden() : p.blocks_inter(), steps = tile.count * blocks;
        const u64 policy = tile.shares ? read_again : read_once;
        number = (g.narrow() ? number : add_relaxed(p.next_strip(), 1)) + gridDim.x;
        i32 row = tile.index * (first_product ? g.tile_rows / 16 : g.tile_rows);
        u32 k = 0;
        for (u32 step = 0; step < steps; ++step) {
            const u32 full = block.weights(ring.at), stage = block.ring + ring.at * g.stage_bytes;
            mbarrier_wait(block.empty(ring.at), ring.phase ^ 1);
            if (before_waiting > 0) {
                --before_waiting;
            } else {
                mbarrier_wait(block.weights(landed.at), landed.phase);
                landed.advance(g.stages);
            }
            mbarrier_arrive_expect_tx(full, bytes);
            if (first_product) {
                tma_load_once(stage, map, full, policy, k * LINE_BYTES, 0, 0, row, expert);
            } else {
                tma_load_once(stage, map, full, policy, k * LINE_BYTES, row, expert);
            }
            ring.advance(g.stages);
            if (++k == blocks) k = 0, row += g.tile_rows;
        }
        tile = block.find_strip(p, g, number);
        announce(tile);
    }
}

// Where the scales of a strip's weights are: of row r and of row r + 8 of each 16, a K block after the other.
struct WeightScales {
    const float *upper, *lower;  // of the first rows of W2, or of the tile's in W13
    u32 blocks, tile_rows, index;

    DEVICE WeightScales(const Problem& p, const Geometry& g, const Tile& tile) : tile_rows(g.tile_rows), index(tile.index) {
        const bool own = tile.expert >= p.routed;
        const i64 expert = own ? 0 : tile.expert;
        if (tile.product == 1) {
            blocks = p.blocks_hidden();
            const u32 channel = tile.index * (g.tile_rows / 2);
            const u32 lines = p.interleaved ? (2 * p.inter + 127) / 128 : 2 * p.blocks_inter();
            const u32 line = p.interleaved ? 2 * channel / 128 : channel / 128;
            upper = (own ? p.shared_w13_scale : p.w13_scale) + (expert * lines + line) * blocks;
            lower = p.interleaved ? upper : upper + p.blocks_inter() * blocks;
        } else {
            blocks = p.blocks_inter();
            upper = lower = (own ? p.shared_w2_scale : p.w2_scale) + expert * p.blocks_hidden() * blocks;
        }
    }
    // Of the strip's K block `step`, tile by tile.
    DEVICE u32 at(const Tile& tile, u32 step) const {
        return tile.product == 1 ? step : (index + step / blocks) * tile_rows / 128 * blocks + step % blocks;
    }
};

// One warp: into each stage the item's rows and their scales, once they are there, and the two scales of the weights, of which a lane reads
// one in 32 ahead.
DEVICE void load_tokens(const Block& block, const Problem& p, const Geometry& g) {
    const u32 lane = lane_index();
    u32 seen = 0xffffffffu;  // item whose rows of x are there
    Cursor ring, queue;
    while (true) {
        const Tile tile = block.read_tile(queue);
        if (tile.product == 0) return;
        const bool first_product = tile.product == 1;
        const WeightScales scales(p, g, tile);
        const Planes rows = {first_product ? p.x_rows.codes : p.c_rows.codes, first_product ? p.x_rows.scales : p.c_rows.scales, p.x_rows.rows};
        const u32 columns = columns_for(tile.rows), code_bytes = columns * LINE_BYTES, scale_bytes = columns * 4;
        const u32 steps = tile.count * scales.blocks;
        const u8 *first_line = rows.line(tile.row, 0), *line = first_line;
        const float *first_scale = rows.scale(tile.row, 0), *scale = first_scale;
        float upper = 0.0f, lower = 0.0f;
        u32 k = 0;
        for (u32 step = 0; step < steps; ++step) {
            if (step % 32 == 0 && step + lane < steps) {
                const u32 at = scales.at(tile, step + lane);
                upper = __ldg(scales.upper + at), lower = __ldg(scales.lower + at);
            }
            if (step == 0) {
                if (!first_product) {
                    wait_for_count(p.ready(tile.item), p.blocks_inter());
                } else if (tile.item != seen) {
                    wait_for_rows(p, g, tile);
                    seen = tile.item;
                }
                fence_proxy_async_global();
            }
            const u32 full = block.tokens(ring.at);
            mbarrier_wait(block.empty(ring.at), ring.phase ^ 1);
            const float of_upper = __shfl_sync(0xffffffffu, upper, step % 32), of_lower = __shfl_sync(0xffffffffu, lower, step % 32);
            if (elect_one()) {
                block.side.weight_scales[ring.at][0] = of_upper, block.side.weight_scales[ring.at][1] = of_lower;
                mbarrier_arrive_expect_tx(full, code_bytes + scale_bytes);
                bulk_load(block.ring + ring.at * g.stage_bytes + g.token_tile(), line, code_bytes, full);
                bulk_load(block.ring + g.token_scales(ring.at), scale, scale_bytes, full);
            }
            __syncwarp();
            ring.advance(g.stages);
            line += rows.rows * LINE_BYTES, scale += rows.rows;
            if (++k == scales.blocks) k = 0, line = first_line, scale = first_scale;
        }
    }
}
