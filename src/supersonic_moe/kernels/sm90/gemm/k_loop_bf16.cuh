// The main loop of a math warpgroup, bf16: multiplies the stages of a tile into its accumulators. The loop for e4m3 with block scales is
// k_loop_fp8.cuh, whose head says why they are two.
//
// Warpgroups own 64 rows each and share B: with block_n 256 an instruction is m64 n256 k16, 2 KB of A and 8 KB of B from shared
// memory for 0.5 MFLOP, the widest there is; with 384 it is two of n192, with 320 one of n192 and one of n128. With a cluster of two blocks that work on neighbouring
// row blocks of one expert, each block loads half of B for both: a third less L2 traffic.
//
// The chip is limited by power, and a GEMM that skips its loads runs 1.29 times as fast (docs/log.md): 128 x 384, as large as the
// registers allow, loads 17 % less for a product than 128 x 256. It leaves room for one stage less, so short products keep 256. With 320,
// 10 % less, there is room for all four.
#pragma once
#include "gemm/shared_memory.cuh"
#include "ptx/wgmma.cuh"

// 16 of k, the `step`-th, of an operand's tile.
template <Config C, Major Order>
DEVICE u64 step_descriptor(u32 tile, u32 step) {
    return Order == Major::K ? k_major_descriptor(tile + step * 32) : mn_major_descriptor(tile + step * 16 * LINE, C.slab_bytes());
}

// acc (+)= 64 rows of A times the tile's columns from First on, for 16 of k. `b`: the whole tile's.
template <Major MajorA, Major MajorB, u32 First, Config C>
DEVICE void multiply_columns(float (&acc)[C.accumulators()], u64 step_a, u32 b, u32 step, bool accumulate) {
    constexpr u32 columns = C.block_n - First < C.mma_n ? C.block_n - First : C.mma_n;
    float(&d)[columns / 2] = *reinterpret_cast<float(*)[columns / 2]>(acc + First / 2);
    WgmmaBf16<columns, MajorA, MajorB>::multiply(d, step_a, step_descriptor<C, MajorB>(b + First * LINE, step), accumulate);
    if constexpr (First + columns < C.block_n) multiply_columns<MajorA, MajorB, First + columns, C>(acc, step_a, b, step, accumulate);
}

// acc (+)= 64 rows of A times B over one stage. The stage index passes through a shuffle, because the descriptors have to be in
// uniform registers and the compiler cannot see that all lanes agree on it.
template <Major MajorA, Major MajorB, Config C>
DEVICE void multiply_stage(float (&acc)[C.accumulators()], const SharedMemory<C>& shared, u32 stage, u32 group, bool accumulate) {
    static_assert(MajorB == Major::K || C.block_n % 64 == 0, "an MN-major B has whole slabs of 64 columns");
    const u32 uniform_stage = __shfl_sync(0xffffffffu, stage, 0);
    const u32 a = shared.tile_a(uniform_stage) + group * (GROUP_ROWS * LINE), b = shared.tile_b(uniform_stage);
#pragma unroll
    for (u32 step = 0; step < C.block_k() / 16; ++step)
        multiply_columns<MajorA, MajorB, 0, C>(acc, step_descriptor<C, MajorA>(a, step), b, step, accumulate || step > 0);
}

// All stages of a tile; releases each stage but the last, one step late so that one batch of wgmma is always in flight. Returns the last
// stage, complete and not yet released: the work tile beside it is this one. `overlap()` runs once the first batch is in flight,
// `before_last_block(stage)` before the last is multiplied.
template <Major MajorA, Major MajorB, Config C, typename Overlap, typename BeforeLastBlock>
DEVICE u32 multiply_tile(float (&acc)[C.accumulators()], const SharedMemory<C>& shared, Ring<C>& ring, u32 group, i32 blocks_k,
                         Overlap overlap, BeforeLastBlock before_last_block) {
    u32 last = ring.stage;
    for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (block == blocks_k - 1) before_last_block(ring.stage);
        pin_accumulators(acc);
        wgmma_fence();
        multiply_stage<MajorA, MajorB>(acc, shared, ring.stage, group, block > 0);
        wgmma_commit();
        if (block == 0) overlap();
        wgmma_wait<1>();
        pin_accumulators(acc);
        if (block > 0) shared.release(last);
        last = ring.stage;
    }
    wgmma_wait<0>();
    pin_accumulators(acc);
    return last;
}
