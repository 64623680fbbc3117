// Stands in for ptx/barrier.cuh of the kernels: see types.cuh. Clusters are declared, not there. An mbarrier lies at its address of shared
// memory, which counts from the start of `dynamic_shared_memory`.
#pragma once
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

#include "ptx/types.cuh"

u32 cluster_block_rank();
void cluster_sync();
void cluster_arrive_relaxed();
void cluster_wait();
u32 load_remote(u32 address, u32 rank);

alignas(1024) inline thread_local u8 dynamic_shared_memory[227 * 1024];
inline u32 smem_address(const void* pointer) { return static_cast<u32>(static_cast<const u8*>(pointer) - dynamic_shared_memory); }

// Lets other fibers and threads run until `done`.
template <class Done> void wait_until(Done done) {
    const auto start = std::chrono::steady_clock::now();
    while (!done()) {
        next_fiber();
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60)) {
            std::fprintf(stderr, "block %u thread %u waits in vain\n", blockIdx.x, running);
            std::abort();
        }
    }
}

struct Mbarrier {
    i32 expected, pending, bytes;
    u32 phase;

    void change(i32 arrivals, i32 more_bytes) {
        pending -= arrivals, bytes += more_bytes;
        if (pending < 0) std::fprintf(stderr, "too many arrivals\n"), std::abort();
        if (pending == 0 && bytes == 0) pending = expected, phase ^= 1;
    }
};
inline thread_local std::unordered_map<u32, Mbarrier> mbarriers;

inline void mbarrier_init(u32 barrier, u32 arrivals) { mbarriers[barrier] = {static_cast<i32>(arrivals), static_cast<i32>(arrivals), 0, 0}; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(u32 barrier, u32 count = 1) { mbarriers.at(barrier).change(count, 0); }
inline void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) { mbarriers.at(barrier).change(1, bytes); }
inline void mbarrier_wait(u32 barrier, u32 phase) {
    const Mbarrier& waited = mbarriers.at(barrier);
    wait_until([&] { return waited.phase != phase; });
}
inline void mbarrier_wait_both(u32 first, u32 second, u32 phase) { mbarrier_wait(first, phase), mbarrier_wait(second, phase); }

struct NamedBarrier { u32 arrived, passed; };
inline thread_local std::array<NamedBarrier, 16> named_barriers;
inline void named_barrier_sync(u32 id, u32 count) {
    NamedBarrier& barrier = named_barriers[id];
    const u32 wait = barrier.passed;
    if (++barrier.arrived == count) barrier.arrived = 0, ++barrier.passed;
    wait_until([&] { return barrier.passed != wait; });
}
inline void fence_proxy_async() {}
inline void dependency_launch() {}
inline void dependency_wait() {}
