// What loading warps tell math warps about a stage: the output tile that it belongs to. 32 bytes beside the stage, written before its full
// barrier is arrived on, read at the first stage of a tile and, where registers are short, again at the last.
//
//   bytes 0..19  WorkTile    20..23  free: a phase, where one launch runs several GEMMs    24..31  the two scales of B (SCALES_OF_B)
#pragma once
#include "gemm/config.cuh"

struct WorkTile {
    i32 row;       // first row of this block's output tile, or STOP_ROW: no more tiles
    i32 row_end;   // rows from here on are not the tile's; with a ragged contraction, see the loader
    i32 column;    // first column
    i32 expert;
    i32 blocks_k;  // stages of the tile
    static constexpr i32 STOP_ROW = -1;
};
constexpr u32 SCALES_OF_B = WORK_TILE_BYTES - 8;

DEVICE void write_work_tile(u32 address, const WorkTile& tile) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(tile.row), "r"(tile.row_end), "r"(tile.column),
                 "r"(tile.expert)
                 : "memory");
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + 16), "r"(tile.blocks_k) : "memory");
}

// This lane's own copy.
DEVICE WorkTile load_work_tile(u32 address) {
    WorkTile tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.row), "=r"(tile.row_end), "=r"(tile.column), "=r"(tile.expert)
                 : "r"(address)
                 : "memory");
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(tile.blocks_k) : "r"(address + 16) : "memory");
    return tile;
}

// The tile as values that the compiler knows to be the same in all lanes of a converged warp. Every lane loads: a load under a
// predicate keeps its destination, five registers, alive through the main loop. The shuffles hold lane 0, which hands the stage back,
// until all have read.
DEVICE WorkTile read_work_tile(u32 address) {
    const WorkTile tile = load_work_tile(address);
    const auto of_lane_0 = [](i32 value) { return __shfl_sync(0xffffffffu, value, 0); };
    return {of_lane_0(tile.row), of_lane_0(tile.row_end), of_lane_0(tile.column), of_lane_0(tile.expert), of_lane_0(tile.blocks_k)};
}
