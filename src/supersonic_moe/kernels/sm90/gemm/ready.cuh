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
// release; a tile waits until `expected[b]` are there.
struct ReadyByCount {
    static constexpr bool WAITS = true;
    const u32* arrived;
    const u32* expected;
    i32 block_rows;
    DEVICE void wait(const WorkTile& tile) const {
        const i32 block = tile.row / block_rows;
        wait_for_word(arrived + block, expected[block]);
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
