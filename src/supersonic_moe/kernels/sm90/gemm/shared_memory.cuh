// Shared memory of a GEMM: the ring of stages that loaders fill and math warps multiply, the barriers and notes of its stages.
#pragma once
#include "gemm/schedule.cuh"
#include "ptx/barrier.cuh"

// Index of this thread, read from the special register each time: where registers are short, an address that is computed anew
// is better than one that the compiler keeps across the main loop.
DEVICE u32 fresh_thread_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Shared memory, from its base: stages | scales of A | notes | full barriers | empty barriers | row indices | staging, where a kernel
// has it.
template <Config C>
struct SharedMemory {
    u32 base;
    static constexpr Config CONFIG = C;
    DEVICE u32 tile_a(u32 stage) const { return base + stage * C.stage_bytes(); }
    DEVICE u32 tile_b(u32 stage) const { return tile_a(stage) + C.bytes_a(); }
    DEVICE u32 scale_a(u32 stage) const { return base + C.stages * C.stage_bytes() + stage * C.scale_bytes(); }
    DEVICE u32 work_tile(u32 stage) const { return scale_a(C.stages) + stage * WORK_TILE_BYTES; }
    DEVICE u32 scale_b(u32 stage) const { return work_tile(stage) + WORK_TILE_BYTES - 8; }
    DEVICE u32 full(u32 stage) const { return work_tile(C.stages) + 8 * stage; }
    DEVICE u32 empty(u32 stage) const { return full(C.stages) + 8 * stage; }
    DEVICE u32 row_index(u32 row) const { return empty(C.stages) + 4 * row; }
    DEVICE u32 staging() const { return base + C.stages * C.stage_bytes() + (C.side_bytes() + 1023) / 1024 * 1024; }

    // Barriers of the ring, ready for the whole cluster on return.
    DEVICE void prepare() const {
        if (threadIdx.x == 0) {
            for (u32 stage = 0; stage < C.stages; ++stage) {
                mbarrier_init(full(stage), C.full_arrivals());
                mbarrier_init(empty(stage), C.math_warps() * C.cluster * C.arrivals);
            }
            fence_mbarrier_init();
        }
        if constexpr (C.cluster > 1) {
            cluster_sync();
        } else {
            __syncthreads();
        }
    }

    // One arrival of this warp for each block that loads into this stage, lane 0's for its own. All lanes have waited for their wgmma.
    DEVICE void release(u32 stage) const {
        if constexpr (C.arrivals > 1) {
            for (u32 block = 1; block < C.cluster; ++block) mbarrier_arrive_remote(empty(stage), cluster_block_rank() ^ block);
            mbarrier_arrive(empty(stage));
        } else if constexpr (C.cluster > 1) {
            const u32 lane = fresh_thread_index() % 32;
            if (lane < C.cluster) mbarrier_arrive_remote(empty(stage), cluster_block_rank() ^ lane);
        } else {
            if (lane_index() == 0) mbarrier_arrive(empty(stage));
        }
    }
};

// Whether this lane arrives on a full barrier for its loading warp.
template <Config C>
DEVICE bool arrives_full() { return C.full_arrivals() > C.full_warps() || elect_one(); }

template <Config C>
using Ring = RingCursor<C.stages>;

// Waits for the first stage of the next tile; its tile.
template <Config C>
DEVICE WorkTile await_tile(const SharedMemory<C>& shared, const Ring<C>& ring) {
    mbarrier_wait(shared.full(ring.stage), ring.phase);
    return read_work_tile(shared.work_tile(ring.stage));
}

// Consumes `count` stages without reading them: those of a tile of which this warpgroup has no row.
template <Config C>
DEVICE void skip_stages(const SharedMemory<C>& shared, Ring<C>& ring, i32 count) {
    for (i32 i = 0; i < count; ++i, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        __syncwarp();
        shared.release(ring.stage);
    }
}
