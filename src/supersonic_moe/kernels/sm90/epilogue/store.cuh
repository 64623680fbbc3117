// Plain store of a tile in bf16, through borrowed stages of the ring.
#pragma once
#include "epilogue/staging.cuh"

template <Config C>
struct Store {
    static constexpr u32 STAGES_USED = 2, BUFFERS_EACH = C.block_n / 64 / STAGES_USED;  // buffers of 64 columns
    static constexpr bool BY_WARPGROUP = false;
    const TensorMap* map_d;
    Rows out;

    DEVICE i32 stages(const WorkTile&) const { return static_cast<i32>(STAGES_USED); }
    DEVICE void operator()(float (&acc)[C.block_n / 2], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring, BorrowedStages<C>& borrowed, u32 group, u32 warp) const {
        const u32 lane = fresh_thread_index() % 32, line = first_line(warp);
        const i32 row = tile.row + static_cast<i32>(line), rows = tile.row_end - row;
#pragma unroll
        for (u32 stage = 0; stage < STAGES_USED; ++stage) {
            const u32 lines = borrowed.borrow(shared, ring) + line * LINE;
            if (rows <= 0) continue;
#pragma unroll
            for (u32 i = 0; i < BUFFERS_EACH; ++i) stage_bf16(acc + (stage * BUFFERS_EACH + i) * 32, lines + i * C.buffer_bytes(), lane);
            fence_proxy_async();
            __syncwarp();
            store_lines<BUFFERS_EACH>(row, rows, lane, [&](u32 i) -> Destination {
                return {map_d, out, lines + i * C.buffer_bytes(), tile.column + static_cast<i32>((stage * BUFFERS_EACH + i) * 64), 0};
            });
        }
    }
};
