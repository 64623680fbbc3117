// The first thing that the math warps of the streaming kernel do, while the first weights arrive: x of each row into planes.
#pragma once
#include "stream/chunk.cuh"
#include "stream/work.cuh"

// K blocks `first` and on of the row of a slot.
DEVICE void gather_part(const Problem& p, u32 row, i32 slot, u32 first) {
    const u32 lane = lane_index(), blocks = p.blocks_hidden();
    const i64 token = slot / p.choices;
    const bool routed = slot % p.choices < p.choices - p.shared();
    const float factor = p.x_weight && routed ? __ldg(p.x_weight + token) : 1.0f;
    const Tokens& tokens = p.of_tokens;
    if (!tokens.x_bf16) {
        uint4 chunks[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 block = first + 4 * i + lane / 8;
            if (block < blocks) chunks[i] = tokens.load(tokens.codes(token) + block * LINE_BYTES + lane % 8 * 16);
        }
        if (lane < GATHER_BLOCKS && first + lane < blocks)
            *p.x_rows.scale(row, first + lane) = tokens.scale(token, first + lane) * factor;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 block = first + 4 * i + lane / 8;
            if (block < blocks) *reinterpret_cast<uint4*>(p.x_rows.chunk(row, block, lane % 8)) = chunks[i];
        }
    } else {
        uint4 chunks[4][2] = {};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 block = first + 4 * i + lane / 8;
            if (block < blocks) {
                const u16* const at = reinterpret_cast<const u16*>(tokens.codes(2 * token)) + block * LINE_BYTES + lane % 8 * 16;
                chunks[i][0] = load_chunk(at), chunks[i][1] = load_chunk(at + 8);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 block = first + 4 * i + lane / 8;
            float scale;
            const uint4 codes = quantize_chunk(chunks[i][0], chunks[i][1], p.pow2, scale);
            if (block < blocks) {
                *reinterpret_cast<uint4*>(p.x_rows.chunk(row, block, lane % 8)) = codes;
                if (lane % 8 == 0) *p.x_rows.scale(row, block) = scale * factor;
            }
        }
    }
}

// Until x of all rows of a tile is there.
DEVICE void wait_for_rows(const Problem& p, const Geometry& g, const Tile& tile) {
    const u32 first = tile.row / GATHER_ROWS, last = (tile.row + tile.rows - 1) / GATHER_ROWS;
    for (u32 group = first; group <= last; ++group)
        wait_for_count(p.gathered(group), min(GATHER_ROWS, g.padded_rows - group * GATHER_ROWS) * p.gather_parts());
}

// All math warps of the grid share the work, first rows first.
DEVICE void gather_rows(const Problem& p, const Geometry& g) {
    const u32 lane = lane_index(), parts = p.gather_parts();
    const u32 warp = threadIdx.x / 32, units = g.padded_rows * parts;
    const u32 step = gridDim.x * MATH_WARPS;
    const auto slot_of = [&](u32 unit) { return unit < units ? p.row_slot[unit / parts] : -1; };
    u32 unit = blockIdx.x + gridDim.x * warp;
    i32 next_slot = slot_of(unit);
    for (; unit < units; unit += step) {
        const u32 row = unit / parts, first = unit % parts * GATHER_BLOCKS;
        const i32 slot = next_slot;
        next_slot = slot_of(unit + step);
        if (slot >= 0) {
            p.of_tokens.wait(slot / p.choices);
            gather_part(p, row, slot, first);
        }
        fence_proxy_async_global();  // TMA will read the row
        __syncwarp();
        if (lane == 0) add_release(p.gathered(row / GATHER_ROWS), 1);
    }
}
