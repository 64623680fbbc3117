// The math warps' walk over the tiles that the loaders send, bf16: the `consume` of run_roles.
#pragma once
#include "epilogue/staging.cuh"
#include "gemm/k_loop_bf16.cuh"

// What the contraction runs over, as a math warpgroup sees it: the same K for all tiles, here, or the rows of an expert (RaggedDepth).
struct FixedDepth {
    i32 blocks_k;
    static constexpr bool SKIPS = true;  // a warpgroup without rows multiplies none of the tile's stages
    static constexpr Major A = Major::K;
    DEVICE i32 row_end(const WorkTile& tile) const { return tile.row_end; }  // of the output
    DEVICE const FixedDepth& of_tile(const WorkTile&) const { return *this; }
    template <Config C>
    DEVICE void before_last_block(const SharedMemory<C>&, u32, u32) const {}
};

// Every tile of this block. The epilogue is a struct with
//   by_warpgroup()   true: a warpgroup fills its staging buffers together, and one of its threads issues the stores; false: each warp
//   stages(tile)     stages of the ring that follow the K blocks of this tile, for a warpgroup that has no row of it
//   operator()(acc, tile, shared, ring, borrowed, group, warp)
template <Major MajorB, Config C, typename Depth, typename Epilogue>
DEVICE void for_each_tile(const SharedMemory<C>& shared, const u32 warp, const Depth depth, Epilogue epilogue) {
    const u32 group = warp / 4 - 1;
    Ring<C> ring;
    BorrowedStages<C> borrowed;
    float acc[C.accumulators()];
    while (true) {
        const WorkTile first = await_tile(shared, ring);
        if (first.row == WorkTile::STOP_ROW) break;
        const auto extent = depth.of_tile(first);
        const u32 owner = epilogue.by_warpgroup() ? group : BorrowedStages<C>::NONE;
        if constexpr (Depth::SKIPS) {
            if (first.row + static_cast<i32>(group * GROUP_ROWS) >= depth.row_end(first)) {
                borrowed.give_back(shared, owner);
                skip_stages(shared, ring, extent.blocks_k + epilogue.stages(first));
                continue;
            }
        }
        const u32 last = multiply_tile<Depth::A, MajorB>(
            acc, shared, ring, group, extent.blocks_k, [&] { borrowed.give_back(shared, owner); },
            [&](u32 stage) { extent.before_last_block(shared, stage, group); });
        const WorkTile tile = read_work_tile(shared.work_tile(last));
        __syncwarp();
        shared.release(last);
        epilogue(acc, tile, shared, ring, borrowed, group, warp);
    }
}
