// The loading warpgroup: tiles of A and B into the ring, for kernels whose A has ragged rows, and rows of A by an index.
//
// Without GATHER one thread issues TMA loads of whole tiles. With GATHER, A comes row by row: TMA on sm_90 has no gather, but a box
// of one row works, 128 of them a stage. The engine keeps up with the tensor cores as long as four warps issue boxes back to back, with
// the indices of their rows at hand in shared memory. With a shuffle for each box the GEMM falls to 0.9 of its speed, with a box a
// lane to 0.55; cp.async, 16 bytes a thread, gives 0.92 (docs/log.md). An index of -1 lies outside the
// tensor and gives zeros, but such boxes are slow: lines past the expert's end repeat its last row, or are not loaded where a warp
// has no other. What they hold reaches no row that is stored.
#pragma once
#include "epilogue.cuh"

// Registers of a loading and of a math thread. The block is launched with 168 for each of its threads, and register_alloc waits for
// ever if the two roles ask for more than that.
constexpr u32 LOAD_REGISTERS = 40, MATH_REGISTERS = 232;
static_assert(LOAD_REGISTERS * 128 + MATH_REGISTERS * 256 <= 168 * THREADS, "more registers than the block has");
constexpr u32 LOAD_WARPS = GATHER ? 4 : 1;
constexpr u32 BOXES = 32;  // of a warp in a stage, with GATHER
constexpr u32 HELD = 8;    // row indices in registers at a time

DEVICE void store_index(u32 address, i32 index) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(index) : "memory"); }
DEVICE void load_indices(i32 (&rows)[HELD], u32 address) {
#pragma unroll
    for (u32 i = 0; i < HELD; i += 4)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(rows[i]), "=r"(rows[i + 1]), "=r"(rows[i + 2]), "=r"(rows[i + 3])
                     : "r"(address + i * 4)
                     : "memory");
}

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

// Bytes of A that the loading warps fetch for a stage of a tile: those that have a row of it, with GATHER.
DEVICE u32 bytes_of_a(const TileNote& note) {
    const u32 rows = static_cast<u32>(max(min(note.row_end - note.row, static_cast<i32>(BLOCK_M)), 0));
    return GATHER ? (rows + BOXES - 1) / BOXES * (BOXES * LINE) : BYTES_A;
}

// Loads all tiles of this block: `blocks_k` stages each, of BLOCK_M rows of A and of a B of TileColumns columns, then what
// `load_tail` adds to a tile.
//   load_b(tile_b, full, k, note, part, blocks)  one thread: part `part` of CLUSTER of B, for those `blocks` of the cluster
//   load_tail(ring, note, warp)       all warps that load: they wait for each stage; advances the ring
template <i32 TileColumns, typename LoadB, typename LoadTail>
DEVICE void load_ragged_rows(const Shared& shared, const RaggedGemm& gemm, const TensorMap* map_a, LoadB load_b, LoadTail load_tail) {
    const u32 warp = warp_index();
    if (warp >= LOAD_WARPS) return;
    constexpr i32 rows = BLOCK_M * CLUSTER;
    const i32 rank = CLUSTER > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    RaggedRows<rows, TileColumns, GROUP_M / CLUSTER, CLUSTER == 2> tiles(gemm.offsets, gemm.experts, gemm.columns);
    Ring ring;
    i32 m, n;
    for (i32 tile = blockIdx.x / CLUSTER; tiles.find(tile, m, n); tile += gridDim.x / CLUSTER) {
        // Blocks with the same columns load a part of B each, for all of them; one that has its columns for itself loads every part.
        const u32 first_part = tiles.split ? 0 : static_cast<u32>(rank), parts = tiles.split ? CLUSTER : 1;
        const u16 sharers = static_cast<u16>(tiles.split ? 1 << rank : (1 << CLUSTER) - 1);
        const i32 row = tiles.begin + m * rows + (tiles.split ? 0 : rank * static_cast<i32>(BLOCK_M));
        const TileNote note{row, tiles.end, (tiles.split ? n + rank : n) * TileColumns, tiles.expert, gemm.blocks_k};
        const bool has_rows = note.row + static_cast<i32>(warp * BOXES) < note.row_end;
        if (GATHER && has_rows) {
            const u32 line = warp * BOXES + lane_index();
            store_index(shared.row_index(line), gemm.index[min(note.row + static_cast<i32>(line), note.row_end - 1)]);
            __syncwarp();
        }
        for (i32 block = 0; block < gemm.blocks_k; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
            const i32 k = block * BLOCK_K;
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (warp == 0 && elect_one()) {
                write_note(shared.note(ring.stage), note);
                mbarrier_arrive_expect_tx(full, bytes_of_a(note) + BYTES_B);
                if constexpr (!GATHER) tma_load(tile_a, map_a, full, k, note.row);
#pragma unroll 1
                for (u32 part = first_part; part < first_part + parts; ++part)
                    load_b(shared.tile_b(ring.stage), full, k, note, part, sharers);
            }
            if constexpr (GATHER) {
                if (has_rows && elect_one()) {
#pragma unroll
                    for (u32 first = warp * BOXES; first < (warp + 1) * BOXES; first += HELD) {
                        i32 rows_of_a[HELD];
                        load_indices(rows_of_a, shared.row_index(first));
#pragma unroll
                        for (u32 i = 0; i < HELD; ++i) tma_load(tile_a + (first + i) * LINE, map_a, full, k, rows_of_a[i]);
                    }
                }
                __syncwarp();
            }
        }
        load_tail(ring, note, warp);
    }
    announce_end(shared, ring, warp);
}

// Part `part` of CLUSTER of an N-contiguous B, BLOCK_N columns from first_column on in slabs of 64: rows k.. of slice `slice`.
DEVICE void load_b_mn_major(u32 tile_b, const TensorMap* map, u32 full, i32 k, i32 first_column, i32 slice, u32 part, u16 blocks) {
    constexpr u32 slabs = SLABS_N / CLUSTER;
#pragma unroll
    for (u32 i = 0; i < slabs; ++i) {
        const u32 at = tile_b + (part * slabs + i) * SLAB_BYTES;
        const i32 column = first_column + static_cast<i32>((part * slabs + i) * 64);
        if constexpr (CLUSTER > 1) {
            tma_load_multicast(at, map, full, blocks, column, k, slice);
        } else {
            tma_load(at, map, full, column, k, slice);
        }
    }
}
