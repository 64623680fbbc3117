// Stands in for ptx/memory.cuh of the kernels: see types.cuh. Blocks are threads.
#pragma once
#include <atomic>

#include "ptx/barrier.cuh"

inline u32 add_relaxed(u32* counter, u32 value) { return std::atomic_ref(*counter).fetch_add(value); }
inline u32 add_acquire_release(u32* counter, u32 value) { return std::atomic_ref(*counter).fetch_add(value); }
inline void add_release(u32* counter, u32 value) { std::atomic_ref(*counter).fetch_add(value); }
inline void wait_for_count(const u32* counter, u32 target) {
    wait_until([&] { return std::atomic_ref(*const_cast<u32*>(counter)).load() >= target; });
}
inline float4 load_shared_by_blocks(const float4* address) { return *address; }
inline void fence_proxy_async_global() {}
