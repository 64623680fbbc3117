// Weight gradient of a tile, bf16 operands: stored, or added, through borrowed stages of the ring.
#pragma once
#include "epilogue/gradient_staging.cuh"

template <Config C, Output O>
struct WeightGradient {
    static constexpr u32 BUFFERS = C.block_n / O.buffer_columns();
    static constexpr u32 BUFFERS_EACH = O.format == Format::BF16 ? (BUFFERS + 1) / 2 : C.stage_buffers();
    static constexpr u32 ROUNDS = (BUFFERS + BUFFERS_EACH - 1) / BUFFERS_EACH, BORROWED_STAGES = ROUNDS < C.stages ? ROUNDS : C.stages - 1;
    static_assert(BUFFERS_EACH <= C.stage_buffers() && C.block_n % 64 == 0, "a round fills buffers of one stage");
    static constexpr bool BY_WARPGROUP = O.transposed;
    const TensorMap* map;

    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring, BorrowedStages<C>& borrowed, u32 group, u32 warp) const {
        if (O.format == Format::FP32_ADD && tile.row_end == 0) return;
#pragma unroll
        for (u32 round = 0; round < ROUNDS; ++round) {
            const u32 thread = fresh_thread_index(), line = own_line<O>(warp);
            const i32 row = tile.row + static_cast<i32>(line);
            if (round >= BORROWED_STAGES) {  // a stage again, once TMA has read it
                tma_wait_read<BORROWED_STAGES - 1>();
                sync_writers<O>(group);
            }
            const u32 buffers = round < BORROWED_STAGES ? borrowed.borrow(shared, ring) : shared.tile_a(borrowed.stage_of(round - BORROWED_STAGES));
            const u32 lines = buffers + line * LINE;
#pragma unroll
            for (u32 i = 0; i < BUFFERS_EACH; ++i) {
                const u32 buffer = round * BUFFERS_EACH + i;
                if (buffer < BUFFERS) fill_buffer<O>(acc + buffer * (O.buffer_columns() / 2), lines + i * C.buffer_bytes(), thread);
            }
            fence_proxy_async();
            sync_writers<O>(group);
            in_issuing_thread<O>(warp, [&] {
#pragma unroll
                for (u32 i = 0; i < BUFFERS_EACH; ++i) {
                    const u32 buffer = round * BUFFERS_EACH + i;
                    if (buffer < BUFFERS)
                        store_buffer<O>(map, lines + i * C.buffer_bytes(), row, tile.column + static_cast<i32>(buffer * O.buffer_columns()), tile.expert);
                }
                tma_commit();
            });
        }
    }
};
