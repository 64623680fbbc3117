// Weight gradient of a tile behind the bf16 loop: stored, or added, through borrowed stages of the ring. For grouped_wgrad.cu.
#pragma once
#include "epilogue/gradient_staging.cuh"

template <Config C, bool Fp32>
struct WeightGradient {
    static constexpr u32 BUFFERS = C.block_n / BUFFER_COLUMNS<Fp32>;
    static constexpr u32 BUFFERS_EACH = Fp32 ? C.stage_buffers() : (BUFFERS + 1) / 2;
    static constexpr u32 ROUNDS = (BUFFERS + BUFFERS_EACH - 1) / BUFFERS_EACH, BORROWED_STAGES = ROUNDS < C.stages ? ROUNDS : C.stages - 1;
    static_assert(BUFFERS_EACH <= C.stage_buffers() && C.block_n % 64 == 0, "a round fills buffers of one stage");
    const Gradient to;

    DEVICE bool by_warpgroup() const { return to.transposed; }
    DEVICE i32 stages(const WorkTile& tile) const { return Fp32 && to.adds && tile.row_end == 0 ? 0 : static_cast<i32>(BORROWED_STAGES); }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32 group, u32 warp) const {
        if (Fp32 && to.adds && tile.row_end == 0) return;
#pragma unroll
        for (u32 round = 0; round < ROUNDS; ++round) {
            const u32 thread = fresh_thread_index(), line = own_line(to, warp);
            const i32 row = tile.row + static_cast<i32>(line);
            if (round >= BORROWED_STAGES) {  // a stage again, once TMA has read it
                tma_wait_read<BORROWED_STAGES - 1>();
                sync_writers(to, group);
            }
            const u32 lines = line * LINE + (round < BORROWED_STAGES ? borrowed.borrow(shared, ring)
                                                                     : shared.tile_a(borrowed.stage_of(round - BORROWED_STAGES)));
#pragma unroll
            for (u32 i = 0; i < BUFFERS_EACH; ++i) {
                const u32 buffer = round * BUFFERS_EACH + i;
                if (buffer < BUFFERS)
                    fill_buffer<Fp32>(to, acc + buffer * (BUFFER_COLUMNS<Fp32> / 2), lines + i * C.buffer_bytes(), thread);
            }
            fence_proxy_async();
            sync_writers(to, group);
            in_issuing_thread(to, warp, [&] {
#pragma unroll
                for (u32 i = 0; i < BUFFERS_EACH; ++i) {
                    const u32 buffer = round * BUFFERS_EACH + i;
                    const i32 column = tile.column + static_cast<i32>(buffer * BUFFER_COLUMNS<Fp32>);
                    if (buffer < BUFFERS) store_buffer<Fp32>(to, lines + i * C.buffer_bytes(), row, column, tile.expert);
                }
                tma_commit();
            });
        }
    }
};
