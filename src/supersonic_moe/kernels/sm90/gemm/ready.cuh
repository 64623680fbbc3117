// When A of a tile may be read: a policy of the loader of rows (load_rows.cuh).
#pragma once
#include "gemm/schedule.cuh"
#include "ptx/barrier.cuh"

// A was complete before the kernel started.
struct ReadyAtStart {
    static constexpr bool WAITS = false;
    DEVICE void wait(const WorkTile&) const {}
};

// Rows arrive while the kernel runs: `arrived[b]` counts those of block b of `block_rows` rows, and whoever writes them adds to it with
// release; a tile waits until `expected[b]` are there. All lanes wait, so that each may then read A, its scales and its index by
// ordinary loads, or issue TMA, which reads through the async proxy: hence the fence.
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
            RETRY_UNTIL_TIMEOUT("ld.acquire.sys.global.u32 seen, [%0];\n"
                                "setp.ge.u32 p, seen, %1;\n")
            "fence.proxy.async.global;\n"
            "}\n"
            :
            : "l"(arrived + block), "r"(expected[block]), "l"(WAIT_TIMEOUT_NS)
            : "memory");
    }
};

// A word that a loading warp reads ahead of TMA: a scale or a row index. Through the read-only cache, unless it may be written while the
// kernel runs: that cache is not coherent.
template <typename Ready, typename T>
DEVICE T load_input(const T* address) {
    if constexpr (Ready::WAITS) {
        static_assert(sizeof(T) == 4);
        u32 bits;
        asm volatile("ld.global.b32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
        return __builtin_bit_cast(T, bits);
    } else {
        return __ldg(address);
    }
}
