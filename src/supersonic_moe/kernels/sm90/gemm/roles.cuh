// Who does what in a block: four loading warps, then the math warpgroups.
#pragma once
#include "gemm/load_rows.cuh"

// The prologue and epilogue of every kernel: `produce(warp)` in the loading warps, 0 to 3, `consume(warp)` in math warp `warp`, 4 and up.
template <Config C, typename Produce, typename Consume>
DEVICE void run_roles(const SharedMemory<C>& shared, Produce produce, Consume consume) {
    static_assert(C.load_registers() * 128 + C.math_registers() * 128 * C.math_groups <= 168 * C.threads(), "more registers than the block has");
    shared.prepare();
    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<C.load_registers()>();
        produce(warp);
    } else {
        register_alloc<C.math_registers()>();
        consume(warp);
        tma_wait_read<0>();
    }
    if constexpr (C.cluster > 1) cluster_sync();  // no block leaves while another may still arrive on its barriers
}
