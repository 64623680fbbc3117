// The math warps' walk over the tiles that the loaders send, e4m3 with block scales: the `consume` of run_roles.
#pragma once
#include "gemm/k_loop_fp8.cuh"

// How the K blocks of a tile use the ring: from any stage on, or whole laps of it from stage 0, so that the epilogue knows its stages.
enum class Walk : int { Stages, Laps };

// Every tile of this block. The epilogue is a struct with
//   overlap(acc)                 runs while the first product of a tile does
//   skip(acc, tile, ring)        instead of the K loop, for a warpgroup that has no row of the tile
//   operator()(acc, tile, ring)  acc = the tile's sums; after a skip only if RUNS_WITHOUT_ROWS
//   finish(acc)                  behind the last tile
template <Walk How, bool Alternating, Config C, typename Epilogue>
DEVICE void for_each_scaled_tile(const SharedMemory<C>& shared, const u32 warp, Epilogue epilogue) {
    const u32 group = warp / 4 - 1;
    const OperandAddresses<C> operands(shared, group);
    Ring<C> ring;
    float acc[C.accumulators()];
    while (true) {
        const WorkTile tile = await_tile(shared, ring);
        if (tile.row == WorkTile::STOP_ROW) break;
        if (tile.row + static_cast<i32>(group * GROUP_ROWS) >= tile.row_end) {
            epilogue.skip(acc, tile, ring);
            if constexpr (!Epilogue::RUNS_WITHOUT_ROWS) continue;
        } else if constexpr (How == Walk::Stages) {
            multiply_stages<Alternating>(acc, shared, operands.of_tile(tile.row), ring, tile.blocks_k, [&] { epilogue.overlap(acc); });
        } else {
            multiply_tile_in_laps<Alternating>(acc, shared, ring, operands, tile, [&] { epilogue.overlap(acc); });
        }
        epilogue(acc, tile, ring);
    }
    epilogue.finish(acc);
}
