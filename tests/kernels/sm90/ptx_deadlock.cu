// The limit of a wait; tests/jit/test_gpu_jit.py checks the results.
#include "ptx/barrier.cuh"
#include "ptx/types.cuh"

// Waits for an arrival that never comes: must end with an error after WAIT_TIMEOUT_NS. The idle warp uses what is left.
extern "C" __global__ void __launch_bounds__(64, 1) deadlock() {
    __shared__ u64 barrier;
    if (threadIdx.x == 0) {
        mbarrier_init(smem_address(&barrier), 2);
        fence_mbarrier_init();
        mbarrier_arrive(smem_address(&barrier));
    }
    if (warp_index() == 0) {
        named_barrier_sync(1, 64);
        mbarrier_wait(smem_address(&barrier), 0);
    } else {
        named_barrier_arrive(1, 64);
    }
}
