// The ring that every GEMM here multiplies from, and the bf16 main loop. A stage is one K block, 128 bytes wide (64 bf16 or 128 e4m3),
// of an A tile (128 rows) and a B tile (BLOCK_N). The FP8 loop is in mainloop_fp8.cuh.
//
// Two math warpgroups own 64 rows each and share B: with BLOCK_N 256 an instruction is m64 n256 k16, 2 KB of A and 8 KB of B from shared
// memory for 0.5 MFLOP, the widest there is; with 384 it is two of n192. With a cluster of two blocks that work on neighbouring
// row blocks of one expert, each block loads half of B for both: a third less L2 traffic.
//
// The chip is limited by power, and a GEMM that skips its loads runs 1.29 times as fast (docs/log.md): 128 x 384, as large as the
// registers allow, loads 17 % less for a product than 128 x 256. It leaves buffer for one stage less, so short products keep 256.
#pragma once
#include "gemm/shared_memory.cuh"
#include "ptx/copy.cuh"
#include "ptx/wgmma.cuh"

// 16 of k, the `step`-th, of an operand's tile.
template <Config C, Major Order>
DEVICE u64 step_descriptor(u32 tile, u32 step) {
    return Order == Major::K ? k_major_descriptor(tile + step * 32) : mn_major_descriptor(tile + step * 16 * LINE, C.slab_bytes());
}

// acc (+)= 64 rows of A times B over one stage. The stage index passes through a shuffle, because the descriptors have to be in
// uniform registers and the compiler cannot see that all lanes agree on it.
template <Major MajorA, Major MajorB, Config C>
DEVICE void multiply_stage(float (&acc)[C.block_n / 2], const SharedMemory<C>& shared, u32 stage, u32 group, bool accumulate) {
    const u32 uniform_stage = __shfl_sync(0xffffffffu, stage, 0);
    const u32 a = shared.tile_a(uniform_stage) + group * (C.group_lines() * LINE), b = shared.tile_b(uniform_stage);
#pragma unroll
    for (u32 step = 0; step < C.block_k() / 16; ++step) {
        const u64 step_a = step_descriptor<C, MajorA>(a, step);
#pragma unroll
        for (u32 part = 0; part < C.parts(); ++part) {
            const u64 step_b = step_descriptor<C, MajorB>(b + part * C.part_n() * LINE, step);
            float(&d)[C.part_n() / 2] = *reinterpret_cast<float(*)[C.part_n() / 2]>(acc + part * (C.part_n() / 2));
            WgmmaBf16<C.part_n(), MajorA, MajorB>::multiply(d, step_a, step_b, accumulate || step > 0);
        }
    }
}

// All stages of a tile; releases each stage but the last, one step late so that one batch of wgmma is always in flight. Returns
// the last stage, complete and not yet released: its tile is the tile's. `overlap` runs once the first batch is in flight,
// `prepare(stage)` before the last.
template <Major MajorA, Major MajorB, Config C, typename Overlapped, typename Prepare>
DEVICE u32 multiply_tile(float (&acc)[C.block_n / 2], const SharedMemory<C>& shared, Ring<C>& ring, u32 group, i32 blocks_k, Overlapped overlap,
                         Prepare prepare) {
    u32 last = ring.stage;
    for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (block == blocks_k - 1) prepare(ring.stage);
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
