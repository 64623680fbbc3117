// Block scales of e4m3 operands as loading warps see them: where they lie, and the two of B and one of A that a K block needs, read one
// K block ahead of their use.
//
// Those of A lie by K block, (K blocks, rows), for TMA; or, where rows come through an index, by row, (rows, K blocks), and each lane reads
// its row's. A tile has two of B, for the blocks of 128 columns that `blocks_of(tile)` names; the thread that loads B leaves them
// beside the work tile.
#pragma once
#include "gemm/ready.cuh"

DEVICE float load_scale(u32 address) {
    float scale;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale) : "r"(address) : "memory");
    return scale;
}
DEVICE void store_scale(u32 address, float scale) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(scale) : "memory"); }
DEVICE void store_scales(u32 address, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

// Blocks of 128 columns, as `blocks_of` answers: those of the first and second 128 columns of a tile, or,
struct ColumnBlocks {
    i32 first, second;
};
struct ColumnBlocksOf {
    i32 columns;
    DEVICE ColumnBlocks operator()(const WorkTile& tile) const {
        const i32 first = tile.column / 128, last = (columns - 1) / 128;
        return {min(first, last), min(first + 1, last)};
    }
};
// for `width` activations, of gate and of up; where these alternate in the weight's rows, of the first and second 64 of each.
template <bool Interleaved>
struct GateAndUpBlocks {
    i32 width, gate_base, up_base;
    DEVICE ColumnBlocks operator()(const WorkTile& tile) const {
        const i32 first = Interleaved ? 2 * tile.column / 128 : (gate_base + tile.column) / 128;
        return {first, Interleaved ? min(first + 1, (2 * width - 1) / 128) : (up_base + tile.column) / 128};
    }
};

template <typename BlocksOf>
struct Scales {
    const TensorMap* map_a;
    const float* a;
    i64 a_row;
    const float* b;  // (experts, blocks of columns, K blocks), with these strides
    i64 b_expert;
    i32 b_column, b_k;
    BlocksOf blocks_of;
};
struct Unscaled {};

// The scales of one tile. `row`: of A's matrix, this lane's, with gather.
template <Config C, typename Ready, typename AllScales>
struct TileScales {
    DEVICE TileScales(const AllScales&, const WorkTile&, i32) {}
};
template <Config C, typename Ready, typename BlocksOf>
struct TileScales<C, Ready, Scales<BlocksOf>> {
    const float *a = nullptr, *first, *second;
    float next_a = 0.0f, next_first, next_second;
    DEVICE TileScales(const Scales<BlocksOf>& scales, const WorkTile& tile, i32 row) {
        if constexpr (C.gather) next_a = load_input<Ready>(a = scales.a + max(row, 0) * scales.a_row);
        const ColumnBlocks blocks = scales.blocks_of(tile);
        const float* b = scales.b + tile.expert * scales.b_expert;
        next_first = __ldg(first = b + static_cast<i64>(blocks.first) * scales.b_column);
        next_second = __ldg(second = b + static_cast<i64>(blocks.second) * scales.b_column);
    }
    DEVICE void advance(const Scales<BlocksOf>& scales, u32 warp) {
        if constexpr (C.gather) next_a = load_input<Ready>(++a);
        if (warp == 0) next_first = __ldg(first += scales.b_k), next_second = __ldg(second += scales.b_k);
    }
};
