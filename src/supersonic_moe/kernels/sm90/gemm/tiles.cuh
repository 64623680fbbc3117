// The math warpgroups' walk over the tiles that the loaders send, bf16.
#pragma once
#include "epilogue/staging.cuh"
#include "gemm/k_loop_bf16.cuh"

// What the contraction runs over, as a math warpgroup sees it. Rows of an expert's tile are ragged, the depth is the same for all tiles:
struct FixedDepth {
    i32 blocks_k;
    static constexpr bool SKIPS = true;  // a warpgroup without rows reads none of the tile's stages
    static constexpr Major A = Major::K;
    DEVICE const FixedDepth& of_tile(const TileNote&) const { return *this; }
    template <Config C>
    DEVICE void prepare(const Shared<C>&, u32, u32) const {}  // before the last K block
};

// Every tile of this block. The epilogue is a struct with
//   OWNER            NONE, or: all its stores are issued by the first thread of the warpgroup (see Lent::give_back)
//   stages(note)     stages of the ring that follow the K blocks of this tile, for a warpgroup that has no row of it
//   operator()(acc, note, shared, ring, lent, group, warp)
template <Major MajorB, Config C, typename Depth, typename Epilogue>
DEVICE void for_each_tile(const Shared<C>& shared, const u32 warp, const Depth depth, Epilogue epilogue) {
    const u32 group = warp / 4 - 1;
    Ring<C> ring;
    Lent<C> lent;
    float acc[C.block_n / 2];
    while (true) {
        const TileNote first = await_tile(shared, ring);
        if (first.row == TileNote::STOP_ROW) break;
        if constexpr (Depth::SKIPS) {
            if (first.row + static_cast<i32>(group * C.group_lines()) >= first.row_end) {
                lent.give_back(shared);
                skip_stages(shared, ring, depth.of_tile(first).blocks_k + epilogue.stages(first));
                continue;
            }
        }
        const auto tile = depth.of_tile(first);
        const u32 owner = Epilogue::BY_WARPGROUP ? group : Lent<C>::NONE;
        const u32 last = multiply_tile<Depth::A, MajorB>(
            acc, shared, ring, group, tile.blocks_k, [&] { lent.give_back(shared, owner); },
            [&](u32 stage) { tile.prepare(shared, stage, group); });
        const TileNote note = read_note(shared.note(last));
        __syncwarp();
        shared.release(last);
        epilogue(acc, note, shared, ring, lent, group, warp);
    }
}
