// Everything that orders or blocks: mbarriers and the ring built on them, fences between proxies, named barriers, clusters,
// register reallocation, dependent launch.
//
// Barriers are named by their shared-memory address (u32, see smem_address). An mbarrier counts arrivals and bytes: a phase
// completes when all expected threads have arrived and all expected bytes have landed; phases alternate parity 0, 1, 0, ...
// and waiting for parity p returns once the phase of parity p is complete. On a fresh barrier, waiting for parity 1 returns
// at once, which is how a producer passes its first round through an empty ring.
//
// No wait is unbounded: after WAIT_TIMEOUT_NS the kernel traps, and the host gets an error instead of a hang.
#pragma once
#include "ptx/types.cuh"

#ifndef WAIT_TIMEOUT_NS
#define WAIT_TIMEOUT_NS 10000000000ull  // waits inside a kernel take microseconds; 10 s leaves room for debuggers
#endif

// ---- mbarrier ----

DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers initialised by this thread visible to the async proxy and to the cluster; a block or cluster barrier follows.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void mbarrier_arrive(u32 barrier, u32 count) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// One arrival that also announces `bytes` of asynchronous copies into this phase.
DEVICE void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Address, in the cluster's shared-memory window, of `address` in block `rank` of the cluster.
DEVICE u32 map_to_block(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

// Arrive on the barrier at the same address in block `rank` of the cluster (this block's own rank is allowed): how a consumer
// hands a multicast buffer back to its producer, after wgmma_wait has seen its reads done. It orders no ordinary writes between
// blocks; `.release.cluster` would, and costs a memory barrier at GPU scope each time (MEMBAR.ALL.GPU).
DEVICE void mbarrier_arrive_remote(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_to_block(barrier, rank)) : "memory");
}

// The word at `address` in block `rank` of the cluster. Between two cluster barriers: one after it was written, one before its block exits.
DEVICE u32 load_remote(u32 address, u32 rank) {
    u32 word;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(map_to_block(address, rank)) : "memory");
    return word;
}

// PTX that tries until the predicate p holds, and traps after WAIT_TIMEOUT_NS, which is operand 2. Whoever waits writes one asm block
// with this text in it: a `trap` that the compiler can see on a branch of its own makes ptxas allocate the whole role for the
// launch's register count instead of the one given to register_alloc (350 bytes of spills in a promoted FP8 main loop).
#define RETRY_UNTIL_TIMEOUT(ATTEMPT)      \
    "mov.u64 start, %%globaltimer;\n"     \
    "RETRY:\n" ATTEMPT                    \
    "@p bra DONE;\n"                      \
    "mov.u64 now, %%globaltimer;\n"       \
    "sub.u64 now, now, start;\n"          \
    "setp.gt.u64 p, now, %2;\n"           \
    "@p trap;\n"                          \
    "bra RETRY;\n"                        \
    "DONE:\n"

// Suspended by the hardware for a while at a time, until the phase of this parity is complete; traps after WAIT_TIMEOUT_NS.
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
#define TRY_WAIT "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        ".reg .u64 start, now;\n" TRY_WAIT
        "@p bra DONE;\n"  // the clock is read by those who wait only
        RETRY_UNTIL_TIMEOUT(TRY_WAIT)
        "}\n"
        :
        : "r"(barrier), "r"(parity), "l"(WAIT_TIMEOUT_NS)
        : "memory");
#undef TRY_WAIT
}

// True if the phase of this parity is complete: a look, not a wait.
DEVICE bool mbarrier_test(u32 barrier, u32 parity) {
    u32 complete;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
    return complete;
}

// The same of two barriers, whose answers come together.
DEVICE bool mbarrier_test_both(u32 first, u32 second, u32 parity) {
    u32 complete;
    asm volatile(
        "{\n"
        ".reg .pred p, q;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %3;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 q, [%2], %3;\n"
        "and.pred p, p, q;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(complete)
        : "r"(first), "r"(second), "r"(parity)
        : "memory");
    return complete;
}

DEVICE void mbarrier_wait_both(u32 first, u32 second, u32 parity) {
    if (mbarrier_test_both(first, second, parity)) return;
    mbarrier_wait(first, parity);
    mbarrier_wait(second, parity);
}

// Position in a ring of Stages buffers with one `full` and one `empty` barrier each. Producer and consumer both start at
// {0, 0} and advance once a buffer:
//   producer: mbarrier_wait(empty[stage], phase ^ 1); fill, completing on full[stage]
//   consumer: mbarrier_wait(full[stage], phase);      use, then mbarrier_arrive(empty[stage])
template <u32 Stages>
struct RingCursor {
    u32 stage = 0;
    u32 phase = 0;
    DEVICE void advance() {
        if (++stage == Stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// ---- fences and barriers ----

// Orders ordinary shared-memory accesses (st, stmatrix) before later ones of wgmma and TMA. Each writing thread executes it, then
// a barrier, then the wgmma or TMA instruction follows.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads, a multiple of 32. Whole warps take part.
DEVICE void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts this warp in without waiting; others wait for it with named_barrier_sync of the same id and count.
DEVICE void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- cluster ----

DEVICE u32 cluster_block_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster. No block may touch another's shared memory, remote barriers included, before the
// first cluster_sync, nor after its owner may have exited: kernels that do so also end with one.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The same without an order of memory: the others may go on, and what this block wrote before may be seen later.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// ---- registers of a warpgroup ----

// All four warps of a warpgroup change their register limit. The kernel needs __launch_bounds__(threads, 1), or ptxas ignores
// both; the totals must fit the 64 K registers that the block got at launch, or register_alloc waits for ever.
template <u32 Count>
DEVICE void register_alloc() {
    static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "setmaxnreg takes a multiple of 8 in [24, 256]");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <u32 Count>
DEVICE void register_dealloc() {
    static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "setmaxnreg takes a multiple of 8 in [24, 256]");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- words in global memory ----

// Until a word is at least `least`; whoever writes it does so after the data, with release at system scope or in the order of a stream.
// All lanes wait, so that each may then read the data by ordinary loads, or issue TMA, which reads through the async proxy: hence the
// fence. Traps after WAIT_TIMEOUT_NS.
DEVICE void wait_for_word(const u32* word, u32 least) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        ".reg .u32 seen;\n"
        ".reg .u64 start, now;\n"
        RETRY_UNTIL_TIMEOUT("ld.acquire.sys.global.u32 seen, [%0];\n"
                            "setp.ge.u32 p, seen, %1;\n")
        "fence.proxy.async.global;\n"
        "}\n"
        :
        : "l"(word), "r"(least), "l"(WAIT_TIMEOUT_NS)
        : "memory");
}

// ---- programmatic dependent launch (KernelSpec.pdl) ----

// Wait until the kernels this one depends on have finished and their writes are visible; before it, read nothing of theirs.
DEVICE void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Once all blocks have called this or exited, the next kernel of the stream may start (and must itself dependency_wait).
DEVICE void dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
