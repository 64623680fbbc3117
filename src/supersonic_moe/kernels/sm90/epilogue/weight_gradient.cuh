// Weight gradient of a tile, bf16 operands: stored, or added, through borrowed stages of the ring.
#pragma once
#include "epilogue/gradient_staging.cuh"

template <Config C, Output O>
struct WeightGradient {
    static constexpr u32 ROOMS_USED = C.block_n / O.room_columns();
    static constexpr u32 ROOMS_EACH = O.format == Format::BF16 ? ROOMS_USED / 2 : C.rooms();
    static constexpr u32 TURNS = (ROOMS_USED + ROOMS_EACH - 1) / ROOMS_EACH, LENT_STAGES = TURNS < C.stages ? TURNS : C.stages - 1;
    static constexpr bool BY_WARPGROUP = O.transposed;
    const TensorMap* map;

    DEVICE void operator()(float (&acc)[C.block_n / 2], const TileNote& note, const Shared<C>& shared, Ring<C>& ring, Lent<C>& lent, u32 group, u32) const {
        if (O.format == Format::FP32_ADD && note.row_end == 0) return;
#pragma unroll
        for (u32 turn = 0; turn < TURNS; ++turn) {
            const u32 thread = fresh_thread_index(), line = own_line<C, O>(group, thread);
            const i32 row = note.row + static_cast<i32>(line);
            if (turn >= LENT_STAGES) {  // a stage again, once TMA has read it
                tma_wait_read<LENT_STAGES - 1>();
                meet_writers<O>(group);
            }
            const u32 rooms = turn < LENT_STAGES ? lent.borrow(shared, ring) : shared.tile_a(lent.stage_of(turn - LENT_STAGES));
            const u32 lines = rooms + line * LINE;
#pragma unroll
            for (u32 i = 0; i < ROOMS_EACH; ++i) {
                const u32 room = turn * ROOMS_EACH + i;
                if (room < ROOMS_USED) fill_room<O>(acc + room * (O.room_columns() / 2), lines + i * C.room_bytes(), thread);
            }
            fence_proxy_async();
            meet_writers<O>(group);
            if (hands_over<O>(thread)) {
#pragma unroll
                for (u32 i = 0; i < ROOMS_EACH; ++i) {
                    const u32 room = turn * ROOMS_EACH + i;
                    if (room < ROOMS_USED)
                        store_room<O>(map, lines + i * C.room_bytes(), row, note.column + static_cast<i32>(room * O.room_columns()), note.expert);
                }
                tma_commit();
            }
        }
    }
};
