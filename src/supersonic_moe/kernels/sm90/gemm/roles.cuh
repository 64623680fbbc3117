// Who does what in a block: four loading warps, then the math warpgroups. Every kernel's body is one call of run_roles.
#pragma once
#include "gemm/shared_memory.cuh"
#include "ptx/copy.cuh"

// `produce(warp)` in the loading warps, 0 to 3; `consume(warp)` in the math warps, 4 and up. Barriers other than the ring's are
// initialised before the call.
template <Config C, typename Produce, typename Consume>
DEVICE void run_roles(const SharedMemory<C>& shared, Produce produce, Consume consume) {
    constexpr u32 registers = C.load_registers() * 128 + C.math_registers() * C.math_threads();
    static_assert(!C.moves_registers() || registers <= C.launch_registers() * C.threads(),
                  "more registers than the block has: register_alloc would wait for ever");
    shared.init_barriers();
    const u32 warp = warp_index();
    if (warp < 4) {
        if constexpr (C.moves_registers()) register_dealloc<C.load_registers()>();
        produce(warp);
    } else {
        if constexpr (C.moves_registers()) register_alloc<C.math_registers()>();
        consume(warp);
        tma_wait_read<0>();  // shared memory lives until TMA has read it
    }
    if constexpr (C.cluster > 1) cluster_sync();  // no block leaves while another may still arrive on its barriers
}
