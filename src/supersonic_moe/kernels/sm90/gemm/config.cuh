// What a GEMM is made of, as one compile-time value: every part takes it as its first template parameter, so that two GEMMs of different
// configuration fit in one translation unit.
#pragma once
#include "ptx/types.cuh"

constexpr u32 LINE = 128;  // bytes of a swizzled line
constexpr u32 WARP_ROWS = 16;
constexpr u32 WORK_TILE_BYTES = 32;

struct Config {
    // Choices.
    u32 block_n;
    u32 stages;
    u32 cluster = 1;       // blocks of a cluster: along M, sharing B; or, with share_a, along N, sharing gathered rows of A
    u32 group_m = 16;      // row blocks walked before the next column
    bool gather = false;   // rows of A come through an index
    bool share_a = false;
    bool scaled = false;   // e4m3 operands with block scales
    u32 arrivals = 1;      // lanes of a warp that arrive on a barrier for it
    u32 block_m = 128;
    u32 math_groups = 2;   // math warpgroups, side by side along M

    // What follows from them.
    DEVICE constexpr u32 group_lines() const { return block_m / math_groups; }  // rows of a math warpgroup
    DEVICE constexpr u32 block_k() const { return scaled ? LINE : LINE / 2; }
    DEVICE constexpr u32 slab_bytes() const { return block_k() * LINE; }  // MN-major: 64 elements of M or N, one line for each k
    DEVICE constexpr u32 slabs_n() const { return block_n / 64; }
    DEVICE constexpr u32 bytes_a() const { return block_m * LINE; }  // 128 lines of 64 k, or two slabs
    DEVICE constexpr u32 bytes_b() const { return block_n * LINE; }
    DEVICE constexpr u32 stage_bytes() const { return bytes_a() + bytes_b(); }
    // Scales of A in a stage; the two of B stand at the end of the tile. TMA wants a box to start at a multiple of 16 bytes, so it loads
    // four scales more, from the multiple of four rows at or before the tile's first.
    DEVICE constexpr u32 scale_load_bytes() const { return (block_m + 4) * 4; }
    DEVICE constexpr u32 scale_bytes() const { return scaled ? (scale_load_bytes() + 127) / 128 * 128 : 0; }
    DEVICE constexpr u32 side_bytes() const { return stages * (scale_bytes() + WORK_TILE_BYTES + 16) + 4 * block_m; }  // behind the stages
    DEVICE constexpr u32 math_warps() const { return 4 * math_groups; }
    DEVICE constexpr u32 threads() const { return 128 * (1 + math_groups); }
    DEVICE constexpr u32 load_warps() const { return gather ? 4 : 1; }
    DEVICE constexpr u32 full_warps() const { return scaled ? load_warps() : 1; }  // that arrive on a full barrier
    DEVICE constexpr u32 full_arrivals() const { return scaled && gather ? full_warps() * arrivals : 1; }
    DEVICE constexpr u32 parts() const { return block_n > 256 ? 2 : 1; }  // instructions a step, and their columns
    DEVICE constexpr u32 part_n() const { return block_n / parts(); }
    DEVICE constexpr u32 half_n() const { return block_n / 2; }
    DEVICE constexpr u32 accumulators() const { return block_n / 2; }  // of a thread
    DEVICE constexpr u32 buffer_bytes() const { return block_m * LINE; }
    DEVICE constexpr u32 buffers() const { return stage_bytes() / buffer_bytes(); }  // of a stage
    DEVICE constexpr u32 boxes() const { return share_a ? 32 / cluster : 32; }   // of a warp in a stage, with gather
    // Registers of a loading and of a math thread. The block is launched with 168 for each of its threads, and register_alloc waits for
    // ever if the two roles ask for more than that.
    DEVICE constexpr u32 load_registers() const { return scaled ? 56 : 40; }
    DEVICE constexpr u32 math_registers() const { return scaled ? 224 : 232; }
};
