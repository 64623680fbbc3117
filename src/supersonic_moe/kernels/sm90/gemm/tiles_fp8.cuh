// The math warpgroups' walk over the tiles that the loaders send, e4m3 with block scales.
#pragma once
#include "gemm/k_loop_fp8.cuh"

// How the K blocks of a tile use the ring: from any stage on, or whole laps of it from stage 0, so that the epilogue knows its stages.
enum class Walk : int { Stages, Laps };

// Every tile of this block. The epilogue is a struct with
//   underway(acc)              runs while the first product of a tile does
//   skip(acc, note, ring)      instead of the K loop, for a warpgroup that has no row of the tile
//   operator()(acc, note, ring)  acc = the tile's sums; after a skip only if RUNS_WITHOUT_ROWS
//   finish(acc)                behind the last tile
template <Walk How, bool Alternating, Config C, typename Epilogue>
DEVICE void for_each_scaled_tile(const Shared<C>& shared, const u32 warp, Epilogue epilogue) {
    const u32 group = warp / 4 - 1;
    const Operands<C> operands(shared, group);
    Ring<C> ring;
    float acc[C.block_n / 2];
    while (true) {
        const TileNote note = await_note(shared, ring);
        if (note.row == TileNote::STOP_ROW) break;
        if (note.row + static_cast<i32>(group * C.group_lines()) >= note.row_end) {
            epilogue.skip(acc, note, ring);
            if constexpr (!Epilogue::RUNS_WITHOUT_ROWS) continue;
        } else if constexpr (How == Walk::Stages) {
            multiply_stages<Alternating>(acc, shared, operands.of_tile(note.row), ring, note.blocks_k, [&] { epilogue.underway(acc); });
        } else {
            multiply_scaled_tile<Alternating>(acc, shared, ring, operands, note, [&] { epilogue.underway(acc); });
        }
        epilogue(acc, note, ring);
    }
    epilogue.finish(acc);
}
