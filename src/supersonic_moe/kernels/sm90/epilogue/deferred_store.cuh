// Plain store of a tile in bf16 that waits in registers until the first product of the next one is in flight; then its rows go through
// staging buffers of their own.
#pragma once
#include "epilogue/staging.cuh"

template <Config C>
struct DeferredStore {
    static constexpr bool RUNS_WITHOUT_ROWS = false;
    const SharedMemory<C> shared;
    const TensorMap* map_d;
    Rows out;
    i32 blocks_k;
    u32 warp;
    WorkTile held{WorkTile::STOP_ROW, 0, 0, 0, 0};  // the tile in the accumulators

    DEVICE void skip(float (&)[C.block_n / 2], const WorkTile&, Ring<C>& ring) const { skip_stages(shared, ring, blocks_k); }
    DEVICE void operator()(float (&)[C.block_n / 2], const WorkTile& tile, Ring<C>&) { held = tile; }
    DEVICE void finish(float (&acc)[C.block_n / 2]) const { overlap(acc); }
    DEVICE void overlap(float (&acc)[C.block_n / 2]) const {
        const u32 lane = fresh_thread_index() % 32, line = first_line(warp);
        const i32 row = held.row + static_cast<i32>(line), rows = held.row_end - row;
        if (held.row == WorkTile::STOP_ROW || rows <= 0) return;
        const u32 lines = shared.staging() + line * LINE;
        tma_wait_read<0>();
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < C.block_n / 64; ++i) stage_bf16(acc + i * 32, lines + i * C.buffer_bytes(), lane);
        fence_proxy_async();
        __syncwarp();
        store_lines<C.block_n / 64>(row, rows, lane, [&](u32 i) -> Destination {
            return {map_d, out, lines + i * C.buffer_bytes(), held.column + static_cast<i32>(i * 64), 0};
        });
    }
};
