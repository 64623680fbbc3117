// When A of a tile may be read: a policy of the loader.
#pragma once
#include "ptx/barrier.cuh"
#include "gemm/schedule.cuh"

// A was complete before the kernel started.
struct ReadyAtStart {
    static constexpr bool WAITS = false;
    DEVICE void wait(const WorkTile&) const {}
};

// Rows arrive while the kernel runs: `arrived[b]` counts those of block b of `block_rows` rows, and its writer adds to it with release. All
// lanes wait, so that each may then read A by ordinary loads, or issue TMA, which reads through the async proxy: hence the fence. One asm
// block, for the reason given at mbarrier_wait.
struct ReadyByCount {
    static constexpr bool WAITS = true;
    const u32* arrived;
    const u32* expected;
    i32 block_rows;
    DEVICE void wait(const WorkTile& tile) const {
        const i32 block = tile.row / block_rows;
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            ".reg .u32 seen;\n"
            ".reg .u64 start, now;\n"
            "mov.u64 start, %%globaltimer;\n"
            "RETRY:\n"
            "ld.acquire.sys.global.u32 seen, [%0];\n"
            "setp.ge.u32 p, seen, %1;\n"
            "@p bra DONE;\n"
            "mov.u64 now, %%globaltimer;\n"
            "sub.u64 now, now, start;\n"
            "setp.gt.u64 p, now, %2;\n"
            "@p trap;\n"
            "bra RETRY;\n"
            "DONE:\n"
            "fence.proxy.async.global;\n"
            "}\n"
            :
            : "l"(arrived + block), "r"(expected[block]), "l"(WAIT_TIMEOUT_NS)
            : "memory");
    }
};
