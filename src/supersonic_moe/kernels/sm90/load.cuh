// The loading warpgroup: tiles of A and B into the ring, for kernels whose A has ragged rows, and rows of A by an index.
//
// Without GATHER one thread issues TMA loads of whole tiles. With GATHER, A comes row by row: TMA on sm_90 has no gather, but a box
// of one row works, 128 of them a stage, and an index below zero lies outside the tensor, hence gives zeros. The engine keeps up
// (1.0 of the speed without gather) as long as the four warps issue boxes back to back: each warp takes a quarter of the rows, and
// has their indices in registers before the stage is free. With a shuffle for each box it falls to 0.9, with a box a lane to 0.55;
// cp.async, 16 bytes a thread, gives 0.92 (docs/log.md).
#pragma once
#include "mainloop.cuh"

constexpr u32 LOAD_WARPS = GATHER ? 4 : 1;
constexpr u32 BOXES = 32;  // of a warp in a stage, with GATHER

// The loading thread's last word: one more stage, empty, whose note says that no tile follows.
DEVICE void announce_end(const Shared& shared, const Ring& ring, u32 warp) {
    mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
    if (warp == 0 && elect_one()) {
        write_note(shared.note(ring.stage), {TileNote::STOP_ROW, 0, 0, 0, 0});
        mbarrier_arrive(shared.full(ring.stage));
    }
}

// A GEMM with ragged rows as the loading warpgroup sees it.
struct RaggedGemm {
    const i32* offsets;  // (experts + 1)
    const i32* index;    // row -> row of A's matrix, with GATHER
    i32 experts, columns, blocks_k;
};

// Loads all tiles of this block: `blocks_k` stages each, of BLOCK_M rows of A and of a B of TileColumns columns, then what
// `load_tail` adds to a tile.
//   load_b(tile_b, full, k, note)     one thread: this block's share of B
//   load_tail(ring, note, warp)       all warps that load: they wait for each stage; advances the ring
template <i32 TileColumns, typename LoadB, typename LoadTail>
DEVICE void load_ragged_rows(const Shared& shared, const RaggedGemm& gemm, const TensorMap* map_a, LoadB load_b, LoadTail load_tail) {
    const u32 warp = warp_index();
    if (warp >= LOAD_WARPS) return;
    constexpr i32 rows = BLOCK_M * CLUSTER;
    const i32 rank = CLUSTER > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    RaggedRows<rows, GROUP_M / CLUSTER> tiles(gemm.offsets, gemm.experts, (gemm.columns + TileColumns - 1) / TileColumns);
    Ring ring;
    i32 m, n;
    for (i32 tile = blockIdx.x / CLUSTER; tiles.find(tile, m, n); tile += gridDim.x / CLUSTER) {
        const TileNote note{tiles.begin + m * rows + rank * static_cast<i32>(BLOCK_M), tiles.end, n * TileColumns, tiles.expert,
                            gemm.blocks_k};
        i32 lines[BOXES];  // rows of A of this warp's lines
        if constexpr (GATHER) {
#pragma unroll
            for (u32 i = 0; i < BOXES; ++i) {
                const i32 row = note.row + static_cast<i32>(warp * BOXES + i);
                lines[i] = row < note.row_end ? gemm.index[row] : -1;
            }
        }
        for (i32 block = 0; block < gemm.blocks_k; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
            const i32 k = block * BLOCK_K;
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (warp == 0 && elect_one()) {
                write_note(shared.note(ring.stage), note);
                mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                if constexpr (!GATHER) tma_load(tile_a, map_a, full, k, note.row);
                load_b(shared.tile_b(ring.stage), full, k, note);
            }
            if constexpr (GATHER) {
                if (elect_one()) {
#pragma unroll
                    for (u32 i = 0; i < BOXES; ++i) tma_load(tile_a + (warp * BOXES + i) * LINE, map_a, full, k, lines[i]);
                }
            }
        }
        load_tail(ring, note, warp);
    }
    announce_end(shared, ring, warp);
}

// This block's share of an N-contiguous B, BLOCK_N columns from first_column on in slabs of 64: rows k.. of slice `slice`.
DEVICE void load_b_mn_major(u32 tile_b, const TensorMap* map, u32 full, i32 k, i32 first_column, i32 slice) {
    constexpr u32 share = SLABS_N / CLUSTER;
    const u32 first = CLUSTER > 1 ? cluster_block_rank() * share : 0;
#pragma unroll
    for (u32 i = 0; i < share; ++i) {
        const u32 at = tile_b + (first + i) * SLAB_BYTES;
        const i32 column = first_column + static_cast<i32>((first + i) * 64);
        if constexpr (CLUSTER > 1) {
            tma_load_multicast(at, map, full, (1 << CLUSTER) - 1, column, k, slice);
        } else {
            tma_load(at, map, full, column, k, slice);
        }
    }
}
