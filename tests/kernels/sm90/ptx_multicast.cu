// Instruction wrappers of clusters that the self test does not use; tests/jit/test_gpu_jit.py checks the results.
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/types.cuh"

#ifndef RANK
#define RANK 3
#endif

// Clusters of two blocks; cluster b reads in[b] (64 x 64 bf16): each block loads 32 rows and sends them to both. Each block
// stores what it has, so out[2b] == out[2b + 1] == in[b], and adds in32[b] (32 x 32 fp32) to `total`.
// RANK 3: tensors are (batch, row, column); RANK 2: the first two dimensions are one.
extern "C" __global__ void __launch_bounds__(128, 1)
    multicast(const __grid_constant__ TensorMap map_in, const __grid_constant__ TensorMap map_out,
              const __grid_constant__ TensorMap map_in32, const __grid_constant__ TensorMap map_total) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 tile = smem_address(shared), tile32 = tile + 8192;
    const u32 full = tile32 + 4096, full32 = full + 8, done = full + 16;
    const i32 rank = cluster_block_rank(), batch = blockIdx.x / 2;

    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(full32, 1);
        mbarrier_init(done, 2);
        fence_mbarrier_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(full, 8192);  // 4096 bytes from each block
        mbarrier_arrive_expect_tx(full32, 4096);
#if RANK == 3
        tma_load_multicast(tile + rank * 4096, &map_in, full, 0b11, 0, 32 * rank, batch);
        tma_load(tile32, &map_in32, full32, 0, 0, batch);
        mbarrier_wait(full, 0);
        tma_store(&map_out, tile, 0, 0, 2 * batch + rank);
        mbarrier_wait(full32, 0);
        tma_reduce_add(&map_total, tile32, 0, 0, 0);
#else
        tma_load_multicast(tile + rank * 4096, &map_in, full, 0b11, 0, 64 * batch + 32 * rank);
        tma_load(tile32, &map_in32, full32, 0, 32 * batch);
        mbarrier_wait(full, 0);
        tma_store(&map_out, tile, 0, 64 * (2 * batch + rank));
        mbarrier_wait(full32, 0);
        tma_reduce_add(&map_total, tile32, 0, 0);
#endif
        tma_commit();
        tma_wait<0>();
        mbarrier_arrive_remote(done, 0);
        if (rank == 0) mbarrier_wait(done, 0);
    }
    cluster_sync();
}
