// Shared memory of a GEMM block: the ring of stages that the loading warps fill and the math warps multiply, with a barrier pair and a
// work tile for each. Everything else is built on it.
//
// From the base: stages | scales of A | work tiles | full barriers | empty barriers | row indices | staging, where an epilogue has it.
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

template <Config C>
struct SharedMemory {
    static_assert(C.block_m == GROUP_ROWS * C.math_groups && (C.math_groups == 1 || C.math_groups == 2), "a math warpgroup owns 64 rows");
    static_assert(C.mma_n % 8 == 0 && C.mma_n >= 8 && C.mma_n <= 256 && C.block_n % 8 == 0, "wgmma has 8 to 256 columns, in steps of 8");
    static_assert(C.parts() == 1 || (C.scaled() ? C.block_n % C.mma_n : C.mma_n % 64) == 0, "parts are equal in e4m3, else whole slabs");
    static_assert(C.cluster == 1 || C.cluster == 2, "operands are shared by pairs of blocks");
    static_assert(!C.share_a || (C.gather && C.cluster > 1), "only gathered rows are shared, and only inside a cluster");
    static_assert(C.block_n % (8 * C.cluster) == 0, "each block of a cluster loads whole groups of 8 lines of B");

    u32 base;
    static constexpr Config CONFIG = C;
    DEVICE u32 tile_a(u32 stage) const { return base + stage * C.stage_bytes(); }
    DEVICE u32 tile_b(u32 stage) const { return tile_a(stage) + C.bytes_a(); }
    DEVICE u32 scale_a(u32 stage) const { return base + C.ring_bytes() + stage * C.scale_bytes(); }
    DEVICE u32 work_tile(u32 stage) const { return scale_a(C.stages) + stage * WORK_TILE_BYTES; }
    DEVICE u32 scale_b(u32 stage) const { return work_tile(stage) + SCALES_OF_B; }
    DEVICE u32 full(u32 stage) const { return work_tile(C.stages) + 8 * stage; }
    DEVICE u32 empty(u32 stage) const { return full(C.stages) + 8 * stage; }
    DEVICE u32 row_index(u32 row) const { return empty(C.stages) + 4 * row; }
    DEVICE u32 staging() const { return base + C.staging_offset(); }

    // Barriers of the ring, ready for the whole cluster on return. All threads.
    DEVICE void init_barriers() const {
        if (threadIdx.x == 0) {
            for (u32 stage = 0; stage < C.stages; ++stage) {
                mbarrier_init(full(stage), C.full_arrivals());
                mbarrier_init(empty(stage), C.empty_arrivals());
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

// The block's dynamic shared memory. HostBytes: what the launch reserves (-DSMEM_BYTES); StagingBytes: what the epilogue has of its own.
template <Config C, u32 HostBytes, u32 StagingBytes = 0>
DEVICE SharedMemory<C> shared_memory() {
    static_assert(C.shared_bytes(StagingBytes) == HostBytes,
                  "the host reserves another number of bytes than gemm/config.cuh computes: its configuration is not this one");
    extern __shared__ __align__(1024) u8 dynamic_shared_memory[];
    return {smem_address(dynamic_shared_memory)};
}

template <Config C>
using Ring = RingCursor<C.stages>;

// Named barriers of the math warps; 0 is __syncthreads.
constexpr u32 WARPGROUP_BARRIER = 1;  // and 2: of one warpgroup each
constexpr u32 MATH_BARRIER = 3;       // of all math warps
constexpr u32 TILE_END_BARRIER = 4;   // of all math warps, most of which only arrive

DEVICE void sync_warpgroup(u32 group) { named_barrier_sync(WARPGROUP_BARRIER + group, 128); }
template <Config C>
DEVICE void sync_math_warps() {
    named_barrier_sync(MATH_BARRIER, C.math_threads());
}

// ---- the ring as loading warps see it ----

// Whether this lane arrives on a full barrier for its loading warp.
template <Config C>
DEVICE bool arrives_full() {
    return C.full_arrivals() > C.full_warps() || elect_one();
}

// Passes the next `count` stages on empty, for an epilogue to borrow. All warps that load.
template <Config C>
DEVICE void offer_stages(const SharedMemory<C>& shared, Ring<C>& ring, u32 count, u32 warp) {
    for (u32 i = 0; i < count; ++i, ring.advance()) {
        mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
        if (warp < C.full_warps() && arrives_full<C>()) mbarrier_arrive(shared.full(ring.stage));
    }
}

// The last word: one more stage, empty, whose work tile says that none follows. All warps that load.
template <Config C>
DEVICE void announce_end(const SharedMemory<C>& shared, const Ring<C>& ring, u32 warp) {
    mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
    if (warp >= C.full_warps()) return;
    if (warp == 0 && elect_one()) write_work_tile(shared.work_tile(ring.stage), {WorkTile::STOP_ROW, 0, 0, 0, 0});
    __syncwarp();
    if (arrives_full<C>()) mbarrier_arrive(shared.full(ring.stage));
}

// ---- the ring as math warps see it ----

// Waits for the first stage of the next tile.
template <Config C>
DEVICE WorkTile await_tile(const SharedMemory<C>& shared, const Ring<C>& ring) {
    mbarrier_wait(shared.full(ring.stage), ring.phase);
    return read_work_tile(shared.work_tile(ring.stage));
}

// Consumes `count` stages without multiplying them: those of a tile of which this warpgroup has no row.
template <Config C>
DEVICE void skip_stages(const SharedMemory<C>& shared, Ring<C>& ring, i32 count) {
    for (i32 i = 0; i < count; ++i, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        __syncwarp();
        shared.release(ring.stage);
    }
}
