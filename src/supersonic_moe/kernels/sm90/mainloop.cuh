// The ring that every GEMM here multiplies from, and the bf16 main loop. A stage is one K block, 128 bytes wide (64 bf16 or 128 e4m3),
// of an A tile (128 rows) and a B tile (BLOCK_N). The FP8 loop is in mainloop_fp8.cuh.
//
// Two math warpgroups own 64 rows each and share B: with BLOCK_N 256 an instruction is m64 n256 k16, 2 KB of A and 8 KB of B from shared
// memory for 0.5 MFLOP, the widest there is; with 384 it is two of n192. With a cluster of two blocks that work on neighbouring
// row blocks of one expert, each block loads half of B for both: a third less L2 traffic.
//
// The chip is limited by power, and a GEMM that skips its loads runs 1.29 times as fast (docs/log.md): 128 x 384, as large as the
// registers allow, loads 17 % less for a product than 128 x 256. It leaves room for one stage less, so short products keep 256.
//
// Constants of every kernel built on it: BLOCK_N, STAGES, CLUSTER (blocks along M that share B), SHARE_A (blocks along N that share
// gathered rows of A instead), GROUP_M (row blocks walked before the next column), GATHER (rows of A come through an index, see
// load.cuh), SCALED (e4m3 with block scales), ARRIVALS (lanes of a warp that arrive on a barrier for it: 1; 32 for racecheck, which takes
// an arrival to order its own lane's accesses only, also after __syncwarp).
#pragma once
#include "barrier.cuh"
#include "copy.cuh"
#include "schedule.cuh"
#include "types.cuh"
#include "wgmma.cuh"

constexpr u32 LINE = 128;                              // bytes of a swizzled line
constexpr u32 BLOCK_M = 128, BLOCK_K = SCALED ? LINE : LINE / 2;
constexpr u32 SLAB_BYTES = BLOCK_K * LINE;             // MN-major: 64 elements of M or N, one line for each k
constexpr u32 SLABS_N = BLOCK_N / 64;
constexpr u32 BYTES_A = BLOCK_M * LINE;                // 128 lines of 64 k, or two slabs
constexpr u32 BYTES_B = BLOCK_N * LINE;
constexpr u32 STAGE_BYTES = BYTES_A + BYTES_B;
// Scales of A in a stage; the two of B stand at the end of the note. TMA wants a box to start at a multiple of 16 bytes, so it loads
// four scales more, from the multiple of four rows at or before the tile's first.
constexpr u32 SCALE_LOAD_BYTES = (BLOCK_M + 4) * 4, SCALE_BYTES = SCALED ? (SCALE_LOAD_BYTES + 127) / 128 * 128 : 0;
constexpr u32 MATH_WARPS = 8, THREADS = 384;
constexpr u32 LOAD_WARPS = GATHER ? 4 : 1;
constexpr u32 FULL_WARPS = SCALED ? LOAD_WARPS : 1;  // that arrive on a full barrier: with GATHER each stores the scales of its rows
constexpr u32 FULL_ARRIVALS = SCALED && GATHER ? FULL_WARPS * ARRIVALS : 1;
constexpr u32 PARTS = BLOCK_N > 256 ? 2 : 1, PART_N = BLOCK_N / PARTS;  // instructions a step, and their columns

// Index of this thread, read from the special register each time: where registers are short, an address that is computed anew
// is better than one that the compiler keeps across the main loop.
DEVICE u32 fresh_thread_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Shared memory, from its base: stages | scales of A | notes | full barriers | empty barriers | row indices | staging, where a kernel
// has it.
struct Shared {
    u32 base;
    DEVICE u32 tile_a(u32 stage) const { return base + stage * STAGE_BYTES; }
    DEVICE u32 tile_b(u32 stage) const { return tile_a(stage) + BYTES_A; }
    DEVICE u32 scale_a(u32 stage) const { return base + STAGES * STAGE_BYTES + stage * SCALE_BYTES; }
    DEVICE u32 note(u32 stage) const { return scale_a(STAGES) + stage * NOTE_BYTES; }
    DEVICE u32 scale_b(u32 stage) const { return note(stage) + NOTE_BYTES - 8; }
    DEVICE u32 full(u32 stage) const { return note(STAGES) + 8 * stage; }
    DEVICE u32 empty(u32 stage) const { return full(STAGES) + 8 * stage; }
    DEVICE u32 row_index(u32 row) const { return empty(STAGES) + 4 * row; }
    DEVICE u32 staging() const { return base + STAGES * STAGE_BYTES + (STAGES * (SCALE_BYTES + NOTE_BYTES + 16) + 4 * BLOCK_M + 1023) / 1024 * 1024; }

    // Barriers of the ring, ready for the whole cluster on return.
    DEVICE void prepare() const {
        if (threadIdx.x == 0) {
            for (u32 stage = 0; stage < STAGES; ++stage) {
                mbarrier_init(full(stage), FULL_ARRIVALS);
                mbarrier_init(empty(stage), MATH_WARPS * CLUSTER * ARRIVALS);
            }
            fence_mbarrier_init();
        }
        if constexpr (CLUSTER > 1) {
            cluster_sync();
        } else {
            __syncthreads();
        }
    }

    // One arrival of this warp for each block that loads into this stage, lane 0's for its own. All lanes have waited for their wgmma.
    DEVICE void release(u32 stage) const {
        if constexpr (ARRIVALS > 1) {
            for (u32 block = 1; block < CLUSTER; ++block) mbarrier_arrive_remote(empty(stage), cluster_block_rank() ^ block);
            mbarrier_arrive(empty(stage));
        } else if constexpr (CLUSTER > 1) {
            const u32 lane = fresh_thread_index() % 32;
            if (lane < CLUSTER) mbarrier_arrive_remote(empty(stage), cluster_block_rank() ^ lane);
        } else {
            if (lane_index() == 0) mbarrier_arrive(empty(stage));
        }
    }
};

// Whether this lane arrives on a full barrier for its loading warp.
DEVICE bool arrives_full() { return FULL_ARRIVALS > FULL_WARPS || elect_one(); }

using Ring = RingCursor<STAGES>;

// 16 of k, the `step`-th, of an operand's tile.
template <Major Order>
DEVICE u64 step_descriptor(u32 tile, u32 step) {
    return Order == Major::K ? k_major_descriptor(tile + step * 32) : mn_major_descriptor(tile + step * 16 * LINE, SLAB_BYTES);
}

// acc (+)= 64 rows of A times B over one stage. The stage index passes through a shuffle, because the descriptors have to be in
// uniform registers and the compiler cannot see that all lanes agree on it.
template <Major MajorA, Major MajorB>
DEVICE void multiply_stage(float (&acc)[BLOCK_N / 2], const Shared& shared, u32 stage, u32 group, bool accumulate) {
    const u32 uniform_stage = __shfl_sync(0xffffffffu, stage, 0);
    const u32 a = shared.tile_a(uniform_stage) + group * (BYTES_A / 2), b = shared.tile_b(uniform_stage);
#pragma unroll
    for (u32 step = 0; step < BLOCK_K / 16; ++step) {
        const u64 step_a = step_descriptor<MajorA>(a, step);
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part) {
            const u64 step_b = step_descriptor<MajorB>(b + part * PART_N * LINE, step);
            float(&d)[PART_N / 2] = *reinterpret_cast<float(*)[PART_N / 2]>(acc + part * (PART_N / 2));
            WgmmaBf16<PART_N, MajorA, MajorB>::multiply(d, step_a, step_b, accumulate || step > 0);
        }
    }
}

// Waits for the first stage of the next tile; its note.
DEVICE TileNote await_tile(const Shared& shared, const Ring& ring) {
    mbarrier_wait(shared.full(ring.stage), ring.phase);
    return read_note(shared.note(ring.stage));
}

// Consumes `count` stages without reading them: those of a tile of which this warpgroup has no row.
DEVICE void skip_stages(const Shared& shared, Ring& ring, i32 count) {
    for (i32 i = 0; i < count; ++i, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        __syncwarp();
        shared.release(ring.stage);
    }
}

// All stages of a tile; releases each stage but the last, one step late so that one batch of wgmma is always in flight. Returns
// the last stage, complete and not yet released: its note is the tile's. `underway` runs once the first batch is in flight,
// `prepare(stage)` before the last.
template <Major MajorA, Major MajorB, typename Underway, typename Prepare>
DEVICE u32 multiply_tile(float (&acc)[BLOCK_N / 2], const Shared& shared, Ring& ring, u32 group, i32 blocks_k, Underway underway,
                         Prepare prepare) {
    u32 last = ring.stage;
    for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (block == blocks_k - 1) prepare(ring.stage);
        pin_accumulators(acc);
        wgmma_fence();
        multiply_stage<MajorA, MajorB>(acc, shared, ring.stage, group, block > 0);
        wgmma_commit();
        if (block == 0) underway();
        wgmma_wait<1>();
        pin_accumulators(acc);
        if (block > 0) shared.release(last);
        last = ring.stage;
    }
    wgmma_wait<0>();
    pin_accumulators(acc);
    return last;
}
