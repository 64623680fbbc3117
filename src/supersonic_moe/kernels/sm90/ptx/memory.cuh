// Words of global memory that blocks of a running kernel write for one another: counters and flags, and data read behind them.
//
// A writer stores its data, meets the other writers of its block at a barrier, and one thread adds with release; a reader waits with
// acquire, or adds with acquire and release where the last to arrive goes on. Where TMA reads what ordinary stores wrote, each writer
// executes fence_proxy_async_global before that barrier and each reader after its wait.
#pragma once
#include "ptx/barrier.cuh"

DEVICE u32 add_relaxed(u32* counter, u32 value) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
}

DEVICE u32 add_acquire_release(u32* counter, u32 value) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
}

DEVICE void add_release(u32* counter, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Until *counter is `target` or more; traps after WAIT_TIMEOUT_NS.
DEVICE void wait_for_count(const u32* counter, u32 target) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        ".reg .u32 seen;\n"
        ".reg .u64 start, now;\n"
        RETRY_UNTIL_TIMEOUT("ld.acquire.gpu.global.u32 seen, [%0];\n"
                            "setp.ge.u32 p, seen, %1;\n")
        "}\n"
        :
        : "l"(counter), "r"(target), "l"(WAIT_TIMEOUT_NS)
        : "memory");
}

// Past the cache of the multiprocessor, which does not see what others write.
DEVICE float4 load_shared_by_blocks(const float4* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
    return v;
}

// Between ordinary accesses to global memory and those of TMA.
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- words that other GPUs and the host read and write, too ----

// What this GPU has written and read before, by kernels and copies that its stream has finished, is done for whoever sees the value.
DEVICE void store_release_system(u64* word, u64 value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

DEVICE u64 load_acquire_system(const u64* word) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

// Nanoseconds, the same on all multiprocessors.
DEVICE u64 wall_clock() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}
