// What a GEMM is made of, as one compile-time value. `Config` is the first template parameter of every part, so that GEMMs of different
// configuration fit in one translation unit; functions deduce it from their SharedMemory<C>. Choices come first; every number that
// follows from them is a member function, shared-memory bytes included.
//
// A block has four loading warps and one or two math warpgroups, each of which owns 64 rows of the output tile, block_m x block_n. A stage
// of the ring holds 128 bytes of K of an A tile (block_m) and a B tile (block_n) in swizzled lines of 128 bytes: a line is a row of A or
// column of B, or, MN-major, one k of 64 of them (a slab has all k of the stage).
#pragma once
#include "ptx/types.cuh"

constexpr u32 LINE = 128;            // bytes of a swizzled line
constexpr u32 WARP_ROWS = 16;        // rows of a tile that a math warp owns
constexpr u32 GROUP_ROWS = 64;       // and a math warpgroup: what one wgmma multiplies
constexpr u32 WORK_TILE_BYTES = 32;  // beside a stage: see WorkTile

enum class Operand : int { BF16 = 0, E4M3 = 1 };  // E4M3: with block scales, one for each 128 of K

struct Config {
    // Choices.
    u32 block_n;
    u32 stages;
    u32 block_m = 128;
    u32 math_groups = block_m / GROUP_ROWS;
    Operand operand = Operand::BF16;
    u32 mma_n = operand == Operand::E4M3 && block_n > 128 ? 128 : block_n > 256 ? 192 : block_n;  // most columns of a wgmma, 8 to 256
    u32 cluster = 1;      // blocks of a cluster: along M, sharing B; or, with share_a, along N, sharing gathered rows of A
    u32 group_m = 16;     // row blocks walked before the next column
    bool gather = false;  // rows of A come through an index
    bool share_a = false;
    u32 arrivals = 1;  // lanes of a warp that arrive on a barrier for it: 1, or 32 for the race detector, which misses the others

    // Tile and stage.
    DEVICE constexpr bool scaled() const { return operand == Operand::E4M3; }
    DEVICE constexpr u32 block_k() const { return scaled() ? LINE : LINE / 2; }  // elements
    DEVICE constexpr u32 parts() const { return (block_n + mma_n - 1) / mma_n; }  // instructions for a step along K
    DEVICE constexpr u32 slabs_m() const { return block_m / 64; }                // of an MN-major operand
    DEVICE constexpr u32 slabs_n() const { return block_n / 64; }
    DEVICE constexpr u32 slab_bytes() const { return block_k() * LINE; }
    DEVICE constexpr u32 bytes_a() const { return block_m * LINE; }
    DEVICE constexpr u32 bytes_b() const { return block_n * LINE; }
    DEVICE constexpr u32 stage_bytes() const { return bytes_a() + bytes_b(); }
    DEVICE constexpr u32 accumulators() const { return block_n / 2; }  // of a math thread

    // Block scales of a stage: of A, one for each row; the two of B stand at the end of the work tile. TMA wants a box to start at a
    // multiple of 16 bytes, so it loads four scales more, from the multiple of four rows at or before the tile's first.
    DEVICE constexpr u32 scale_load_bytes() const { return (block_m + 4) * 4; }
    DEVICE constexpr u32 scale_bytes() const { return scaled() ? (scale_load_bytes() + LINE - 1) / LINE * LINE : 0; }

    // Threads and who arrives on which barrier.
    DEVICE constexpr u32 math_warps() const { return 4 * math_groups; }
    DEVICE constexpr u32 math_threads() const { return 128 * math_groups; }
    DEVICE constexpr u32 threads() const { return 128 + math_threads(); }
    DEVICE constexpr u32 load_warps() const { return gather ? 4 : 1; }                 // that load, of the four
    DEVICE constexpr u32 full_warps() const { return scaled() ? load_warps() : 1; }    // that arrive on a full barrier
    DEVICE constexpr u32 full_arrivals() const { return scaled() && gather ? full_warps() * arrivals : 1; }
    DEVICE constexpr u32 empty_arrivals() const { return math_warps() * cluster * arrivals; }
    DEVICE constexpr u32 box_rows() const { return block_m / (share_a ? 4 * cluster : 4); }  // that a loading warp gathers in a stage

    // Registers of a loading and of a math thread. A block is launched with the same number for all its threads, 168 where there are 384;
    // with 256 threads that is as many as a thread can have, and none change hands.
    DEVICE constexpr u32 launch_registers() const { return threads() > 256 ? 65536 / threads() / 8 * 8 : 255; }
    DEVICE constexpr bool moves_registers() const { return math_registers() > launch_registers(); }
    DEVICE constexpr u32 load_registers() const { return scaled() ? 56 : 40; }
    DEVICE constexpr u32 math_registers() const { return scaled() ? 224 : 232; }

    // A staging buffer: 128 bytes of output for each row of the tile. Epilogues borrow stages of the ring for them, or have some of their
    // own: `staging_bytes` behind everything else.
    DEVICE constexpr u32 buffer_bytes() const { return block_m * LINE; }
    DEVICE constexpr u32 stage_buffers() const { return stage_bytes() / buffer_bytes(); }
    DEVICE constexpr u32 ring_bytes() const { return stages * stage_bytes(); }
    DEVICE constexpr u32 side_bytes() const { return stages * (scale_bytes() + WORK_TILE_BYTES + 16) + 4 * block_m; }
    DEVICE constexpr u32 staging_offset() const { return ring_bytes() + (side_bytes() + 1023) / 1024 * 1024; }
    DEVICE constexpr u32 shared_bytes(u32 staging_bytes = 0) const {
        return staging_bytes == 0 ? ring_bytes() + side_bytes() : staging_offset() + staging_bytes;
    }
};
