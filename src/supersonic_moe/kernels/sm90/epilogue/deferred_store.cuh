// Plain store of a tile in bf16 behind the FP8 loop (gemm/tiles_fp8.cuh). The tile waits in registers until the first product of the next
// one is in flight; then its rows go through staging buffers of their own.
#pragma once
#include "epilogue/staging.cuh"

template <Config C>
struct DeferredStore {
    static constexpr u32 STAGING_BYTES = (C.block_n + 63) / 64 * C.buffer_bytes();
    static constexpr bool RUNS_WITHOUT_ROWS = false;
    const SharedMemory<C> shared;
    const TensorMap* map_d;
    Rows out;
    i32 blocks_k;
    u32 warp;
    WorkTile held{WorkTile::STOP_ROW, 0, 0, 0, 0};  // the tile in the accumulators

    DEVICE void skip(float (&)[C.accumulators()], const WorkTile&, Ring<C>& ring) const { skip_stages(shared, ring, blocks_k); }
    DEVICE void operator()(float (&)[C.accumulators()], const WorkTile& tile, Ring<C>&) { held = tile; }
    DEVICE void finish(float (&acc)[C.accumulators()]) const { overlap(acc); }
    DEVICE void overlap(float (&acc)[C.accumulators()]) const {
        const u32 lane = fresh_thread_index() % 32, line = first_line(warp);
        const i32 row = held.row + static_cast<i32>(line), rows = held.row_end - row;
        if (held.row == WorkTile::STOP_ROW || rows <= 0) return;
        tma_wait_read<0>();
        __syncwarp();
        store_columns<C>(acc, C.block_n, shared.staging() + line * LINE, map_d, out, row, rows, held.column, lane);
    }
};
