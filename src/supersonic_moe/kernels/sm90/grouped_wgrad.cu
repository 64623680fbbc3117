// D[e] = or += A[rows of e]^T * B[rows of e], bf16 operands, bf16 or fp32 output. See grouped_wgrad.py.
//
// The contraction runs over the rows of an expert, which are the outer dimension of both operands, so both are MN-major: lines of
// 64 elements of M or N, one for each row. Roles as in grouped_gemm.cu.
//
// Constants: BLOCK_N, STAGES, CLUSTER (blocks along M that share B), GROUP_M, OUTPUT (0: bf16, 1: fp32, 2: fp32 +=).
#include "mainloop.cuh"

constexpr i32 ROWS = BLOCK_M * CLUSTER;
constexpr u32 PANEL_COLUMNS = OUTPUT == 0 ? 64 : 32;

// Rows past the expert's end belong to the next one, or to nobody: zero them in both operands (0 * NaN is NaN). Each warpgroup
// clears its slab of A and half of B's slabs; both meet before either multiplies.
DEVICE void clear_rows(const Shared& shared, u32 stage, u32 group, u32 valid) {
    constexpr u32 slabs = 1 + SLABS_N / 2;
    const u32 thread = fresh_thread_index() % 128;
    const u32 a = shared.tile_a(stage) + group * SLAB_BYTES, b = shared.tile_b(stage) + group * (SLABS_N / 2) * SLAB_BYTES;
    for (u32 unit = thread; unit < slabs * 512; unit += 128) {  // 512 units of 16 bytes a slab
        const u32 slab = unit / 512, line = unit % 512 / 8;
        const u32 at = (slab == 0 ? a : b + (slab - 1) * SLAB_BYTES) + unit % 512 * 16;
        if (line >= valid) asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_proxy_async();
    named_barrier_sync(3, 256);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                  const __grid_constant__ TensorMap map_d, const i32* offsets, const i32 experts, const i32 blocks_m,
                  const i32 blocks_n) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();

    const u32 warp = warp_index();
    const u32 rank = CLUSTER > 1 ? cluster_block_rank() : 0;
    Ring ring;

    if (warp < 4) {
        register_dealloc<40>();
        if (warp == 0 && elect_one()) {
            const i32 tiles = experts * blocks_m * blocks_n;
            for (i32 tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
                const i32 expert = tile / (blocks_m * blocks_n);
                const i32 begin = offsets[expert], end = offsets[expert + 1];
                i32 m, n;
                grouped_order<GROUP_M / CLUSTER>(tile % (blocks_m * blocks_n), blocks_m, blocks_n, m, n);
                const i32 row = m * ROWS + rank * BLOCK_M, column = n * BLOCK_N;
                const i32 blocks_k = max((end - begin + BLOCK_K - 1) / BLOCK_K, 1);  // an empty expert multiplies zeros once
                for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
                    const u32 full = shared.full(ring.stage);
                    mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
                    write_note(shared.note(ring.stage), {row, end - begin, column, expert, blocks_k});
                    if (begin == end) {
                        mbarrier_arrive(full);
                        continue;
                    }
                    mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                    const i32 k = begin + block * BLOCK_K;
#pragma unroll
                    for (u32 slab = 0; slab < 2; ++slab)
                        tma_load(shared.tile_a(ring.stage) + slab * SLAB_BYTES, &map_a, full, row + slab * 64, k);
#pragma unroll
                    for (u32 i = 0; i < SLABS_N / CLUSTER; ++i) {
                        const u32 slab = rank * (SLABS_N / CLUSTER) + i, at = shared.tile_b(ring.stage) + slab * SLAB_BYTES;
                        if constexpr (CLUSTER > 1) {
                            tma_load_multicast(at, &map_b, full, (1 << CLUSTER) - 1, column + slab * 64, k);
                        } else {
                            tma_load(at, &map_b, full, column + slab * 64, k);
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
            const TileNote first = read_note(shared.note(ring.stage));
            if (__shfl_sync(0xffffffffu, first.row, 0) == TileNote::STOP_ROW) break;
            const i32 blocks_k = __shfl_sync(0xffffffffu, first.blocks_k, 0);
            const i32 valid = first.row_end - (blocks_k - 1) * static_cast<i32>(BLOCK_K);  // rows of the last block
            const u32 last = multiply_tile<Major::MN, Major::MN>(acc, shared, ring, group, blocks_k, [&](u32 stage) {
                if (valid < static_cast<i32>(BLOCK_K)) clear_rows(shared, stage, group, valid);
            });
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);
            if (OUTPUT == 2 && note.row_end == 0) continue;

            const u32 thread = fresh_thread_index();
#pragma unroll
            for (u32 column = 0; column < BLOCK_N; column += PANEL_COLUMNS) {
                const u32 panel = next_panel(shared, group, panel_index, thread);
                if constexpr (OUTPUT == 0) {
                    stage_bf16(acc + column / 2, panel, thread);
                } else {
                    stage_f32(acc + column / 2, panel, thread);
                }
                finish_panel(group);
                if (thread % 128 == 0) {
                    const i32 row = note.row + group * 64;
                    if constexpr (OUTPUT == 2) {
                        tma_reduce_add(&map_d, panel, note.column + column, row, note.expert);
                    } else {
                        tma_store(&map_d, panel, note.column + column, row, note.expert);
                    }
                    tma_commit();
                }
            }
        }
        if (threadIdx.x % 128 == 0) tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
