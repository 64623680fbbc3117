// Plain store of a tile in bf16 behind the bf16 loop (gemm/tiles.cuh), through borrowed stages of the ring.
#pragma once
#include "epilogue/staging.cuh"

template <Config C>
struct Store {
    static constexpr u32 BUFFERS = (C.block_n + 63) / 64, STAGES_USED = (BUFFERS + C.stage_buffers() - 1) / C.stage_buffers();
    static constexpr u32 COLUMNS_EACH = (BUFFERS + STAGES_USED - 1) / STAGES_USED * 64;  // of a borrowed stage; the last may have fewer
    static_assert(STAGES_USED < C.stages, "the loading warps keep a stage");
    const TensorMap* map_d;
    Rows out;

    DEVICE static constexpr bool by_warpgroup() { return false; }
    DEVICE i32 stages(const WorkTile&) const { return static_cast<i32>(STAGES_USED); }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32, u32 warp) const {
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
#pragma unroll
        for (u32 stage = 0; stage < STAGES_USED; ++stage) {
            const u32 lines = borrowed.borrow(shared, ring) + line * LINE;
            if (rows <= 0) continue;
            const u32 first = stage * COLUMNS_EACH, columns = min(C.block_n - first, COLUMNS_EACH);
            store_columns<C>(acc + first / 2, columns, lines, map_d, out, row, rows, tile.column + static_cast<i32>(first), lane);
        }
    }
};
