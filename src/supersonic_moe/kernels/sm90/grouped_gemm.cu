// D[r] = A[r] * B[expert of r] for rows sorted by expert, bf16. See grouped_gemm.py for layout, maths, bytes and FLOPs.
//
//   warp 0       loads: walks the tiles, keeps the ring full
//   warps 4..11  two math warpgroups of 64 rows each
//
// Constants: BLOCK_N, STAGES, CLUSTER (blocks along M that share B), B_MN_MAJOR, GROUP_M.
#include "mainloop.cuh"

constexpr i32 ROWS = BLOCK_M * CLUSTER;  // rows of a cluster's tile

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                 const __grid_constant__ TensorMap map_d, const i32* offsets, const i32 experts, const i32 columns,
                 const i32 blocks_k, u8* d, const i64 d_row_bytes) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();

    const u32 warp = warp_index();
    const u32 rank = CLUSTER > 1 ? cluster_block_rank() : 0;
    Ring ring;

    if (warp < 4) {
        register_dealloc<40>();
        if (warp == 0 && elect_one()) {
            RaggedRows<ROWS, GROUP_M / CLUSTER> tiles(offsets, experts, (columns + BLOCK_N - 1) / BLOCK_N);
            i32 m, n;
            for (i32 tile = blockIdx.x / CLUSTER; tiles.find(tile, m, n); tile += gridDim.x / CLUSTER) {
                const i32 row = tiles.begin + m * ROWS + rank * BLOCK_M, column = n * BLOCK_N;
                for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
                    const u32 full = shared.full(ring.stage), tile_b = shared.tile_b(ring.stage);
                    const i32 k = block * BLOCK_K;
                    mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
                    write_note(shared.note(ring.stage), {row, tiles.end, column, tiles.expert, blocks_k});
                    mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                    tma_load(shared.tile_a(ring.stage), &map_a, full, k, row);
                    constexpr u32 share = BLOCK_N / CLUSTER;  // columns of B that this block loads
                    const u32 first = rank * share;
                    if constexpr (B_MN_MAJOR) {
#pragma unroll
                        for (u32 slab = 0; slab < share / 64; ++slab) {
                            const u32 at = tile_b + (first / 64 + slab) * SLAB_BYTES;
                            const i32 c = column + static_cast<i32>(first + slab * 64);
                            if constexpr (CLUSTER > 1) {
                                tma_load_multicast(at, &map_b, full, (1 << CLUSTER) - 1, c, k, tiles.expert);
                            } else {
                                tma_load(at, &map_b, full, c, k, tiles.expert);
                            }
                        }
                    } else {
                        const u32 at = tile_b + first * LINE;
                        if constexpr (CLUSTER > 1) {
                            tma_load_multicast(at, &map_b, full, (1 << CLUSTER) - 1, k, column + first, tiles.expert);
                        } else {
                            tma_load(at, &map_b, full, k, column + first, tiles.expert);
                        }
                    }
                }
            }
            announce_end(shared, ring);
        }
    } else {
        register_alloc<232>();
        const u32 group = warp / 4 - 1;
        u32 panel_index = 0;
        float acc[BLOCK_N / 2];
        while (true) {
            mbarrier_wait(shared.full(ring.stage), ring.phase);
            if (__shfl_sync(0xffffffffu, read_note(shared.note(ring.stage)).row, 0) == TileNote::STOP_ROW) break;
            constexpr Major major_b = B_MN_MAJOR ? Major::MN : Major::K;
            const u32 last = multiply_tile<Major::K, major_b>(acc, shared, ring, group, blocks_k, [](u32) {});
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);

            const u32 thread = fresh_thread_index();
            const i32 row = note.row + static_cast<i32>(group * 64), rows = note.row_end - row;
            if (rows <= 0) continue;
#pragma unroll
            for (u32 column = 0; column < BLOCK_N; column += 64) {
                const u32 panel = next_panel(shared, group, panel_index, thread);
                stage_bf16(acc + column / 2, panel, thread);
                finish_panel(group);
                store_rows(&map_d, {d, d_row_bytes, columns}, panel, row, rows, note.column + static_cast<i32>(column), thread);
            }
        }
        if (threadIdx.x % 128 == 0) tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // no block leaves while another may still arrive on its barriers
}
