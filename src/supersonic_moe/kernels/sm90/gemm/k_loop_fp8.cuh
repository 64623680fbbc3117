// The main loop of a math warpgroup, e4m3 operands with fp32 block scales: promoted to fp32 after every K block.
//
//   D[r][c] = sum over K blocks b of  scale_a[r][b] * scale_b[block of c][b] * (A[r][b] . B[c][b]),   128 of K each
//
// wgmma sums e4m3 products with about 14 bits, so the product of a K block starts from zero and is added to the accumulators in
// fp32 registers (DeepSeek-V3, arXiv 2412.19437 §3.3.2). A tile is 128 x 256. Each of the two math warpgroups owns 64 rows and works
// in two halves of 128 columns: 64 registers for a product, 128 for the sums. While one warpgroup promotes, the other multiplies.
//
// Why this loop and k_loop_bf16.cuh are two. The tensor cores wait whenever a promotion is not hidden, so what stands between two products
// is as short as can be, and that was measured piece by piece (docs/log.md): laps of the ring are unrolled, so that the stage is a
// constant and addresses are immediates; the scales of B lie beside the work tile, read from global memory by the loading thread; the first
// K block assigns, the others add. The bf16 loop keeps a batch of wgmma in flight across stages instead, and takes its stage at run time.
// From that loop come two ways to use the ring: multiply_stages, from any stage on, and multiply_tile_in_laps, whole laps from stage 0, for
// epilogues that need to know their stages.
#pragma once
#include "gemm/scales.cuh"
#include "gemm/shared_memory.cuh"
#include "ptx/wgmma.cuh"

// Where a math warpgroup finds its operands in stage 0: low words of the matrix descriptors, which have to be in uniform registers,
// and the scale of this thread's first row.
template <Config C>
struct OperandAddresses {
    static_assert(C.scaled() && C.mma_n <= 128 && 128 % C.mma_n == 0 && C.parts() <= 2,
                  "a part has one scale of B, and a tile two at most");
    u32 a, b, scale;
    DEVICE OperandAddresses(const SharedMemory<C>& shared, u32 group)
        : a(__shfl_sync(0xffffffffu, static_cast<u32>(k_major_descriptor(shared.tile_a(0) + group * (GROUP_ROWS * LINE))), 0)),
          b(__shfl_sync(0xffffffffu, static_cast<u32>(k_major_descriptor(shared.tile_b(0))), 0)),
          scale(shared.scale_a(0) + (group * GROUP_ROWS + threadIdx.x % 128 / 32 * WARP_ROWS + threadIdx.x % 32 / 4) * 4) {}

    // For a tile that starts at `row`. The address passes through an opaque move, or the compiler computes it anew each time.
    DEVICE OperandAddresses<C> of_tile(i32 row) const {
        OperandAddresses<C> tile = *this;
        if (!C.gather) tile.scale += row % 4 * 4;
        asm volatile("mov.u32 %0, %0;" : "+r"(tile.scale));
        return tile;
    }
};
DEVICE u64 operand_descriptor(u32 low) { return (k_major_descriptor(0) & ~0xffffffffull) | low; }

// `overlap` as the parts of a tile's first K block call it: once in each if it takes the part's number, else in the first.
template <typename Overlap>
DEVICE void run_overlap(Overlap& overlap, u32 part) {
    if constexpr (requires { overlap(part); }) {
        overlap(part);
    } else {
        if (part == 0) overlap();
    }
}

// One K block, that of stage `stage`; False once it was the tile's last. `ready`: its loads are known to be complete. With
// `Alternating` the two scales of B belong to the first and second half of each part's columns, else to the parts.
template <bool First, bool Alternating, Config C, typename Overlap>
DEVICE bool multiply_block(float (&acc)[C.accumulators()], const SharedMemory<C>& shared, const OperandAddresses<C>& at, const u32 stage,
                           const u32 phase, bool& ready, i32& left, Overlap overlap) {
    if (!ready) mbarrier_wait(shared.full(stage), phase);
    const u32 a = at.a + stage * (C.stage_bytes() / 16), b = at.b + stage * (C.stage_bytes() / 16);
    const float upper = load_scale(at.scale + stage * C.scale_bytes()), lower = load_scale(at.scale + stage * C.scale_bytes() + 32);
    const float scale_b[2] = {load_scale(shared.scale_b(stage)), load_scale(shared.scale_b(stage) + 4)};
#pragma unroll
    for (u32 part = 0; part < C.parts(); ++part) {
        float product[C.mma_n / 2];
        pin_accumulators(product);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < 4; ++step)
            WgmmaE4m3<C.mma_n>::multiply(product, operand_descriptor(a + step * 2),
                                         operand_descriptor(b + part * (C.mma_n * LINE / 16) + step * 2), step > 0);
        wgmma_commit();
        if constexpr (First) run_overlap(overlap, part);
        wgmma_wait<0>();
        pin_accumulators(product);
        if (part == C.parts() - 1) {
            __syncwarp();
            shared.release(stage);
            const u32 next = stage + 1 == C.stages ? 0 : stage + 1;
            ready = mbarrier_test(shared.full(next), phase ^ (next == 0));
        }
#pragma unroll
        for (u32 i = 0; i < C.mma_n / 2; i += 4) {
            const float scale = scale_b[Alternating ? i / (C.mma_n / 4) : part], x = upper * scale, y = lower * scale;
            float* sum = acc + part * (C.mma_n / 2) + i;
            const float* d = product + i;
            if constexpr (First) {
                sum[0] = x * d[0], sum[1] = x * d[1], sum[2] = y * d[2], sum[3] = y * d[3];
            } else {
                sum[0] += x * d[0], sum[1] += x * d[1], sum[2] += y * d[2], sum[3] += y * d[3];
            }
        }
    }
    return --left > 0;
}

// All K blocks of a tile, from stage 0, whose loads are complete; the stages that it used of its last lap. Flips `phase` with each
// lap. `overlap` runs while the first product does; one that takes an argument, while those of part 0 and 1 do, each before that part's
// columns of `acc` are assigned.
template <bool Alternating, Config C, typename Overlap>
DEVICE u32 multiply_laps(float (&acc)[C.accumulators()], const SharedMemory<C>& shared, const OperandAddresses<C>& at, u32& phase, i32 left,
                         Overlap overlap) {
    bool ready = true;
    if (!multiply_block<true, Alternating>(acc, shared, at, 0, phase, ready, left, overlap)) return 1;
    while (true) {
#pragma unroll
        for (u32 stage = 1; stage < C.stages; ++stage)
            if (!multiply_block<false, Alternating>(acc, shared, at, stage, phase, ready, left, overlap)) return stage + 1;
        phase ^= 1;
        if (!multiply_block<false, Alternating>(acc, shared, at, 0, phase, ready, left, overlap)) return 1;
    }
}

// The same from any stage of the ring, without the rest of a lap: K blocks one by one up to stage 0, laps from there. A tile that takes
// the rest of its lap as well keeps the loading warps from the next one: with one K block in its last lap nothing is loaded ahead.
template <bool Alternating, Config C, typename Overlap>
DEVICE void multiply_stages(float (&acc)[C.accumulators()], const SharedMemory<C>& shared, const OperandAddresses<C>& at, Ring<C>& ring,
                            i32 left, Overlap overlap) {
    bool ready = true;
    const u32 first = __shfl_sync(0xffffffffu, ring.stage, 0);
    bool more = multiply_block<true, Alternating>(acc, shared, at, first, ring.phase, ready, left, overlap);
    for (ring.advance(); more && ring.stage != 0; ring.advance()) {
        const u32 stage = __shfl_sync(0xffffffffu, ring.stage, 0);
        more = multiply_block<false, Alternating>(acc, shared, at, stage, ring.phase, ready, left, overlap);
    }
    if (!more) return;
    while (true) {
#pragma unroll
        for (u32 stage = 0; stage < C.stages; ++stage) {
            if (!multiply_block<false, Alternating>(acc, shared, at, stage, ring.phase, ready, left, overlap)) {
                ring.stage = stage;
                ring.advance();
                return;
            }
        }
        ring.phase ^= 1;
    }
}

// acc = `tile`, whose first stage is the ring's next; hands back every stage of its laps.
template <bool Alternating, Config C, typename Overlap>
DEVICE void multiply_tile_in_laps(float (&acc)[C.accumulators()], const SharedMemory<C>& shared, Ring<C>& ring,
                                  const OperandAddresses<C>& at, const WorkTile& tile, Overlap overlap) {
    ring.stage = multiply_laps<Alternating>(acc, shared, at.of_tile(tile.row), ring.phase, tile.blocks_k, overlap) % C.stages;
    if (ring.stage == 0) ring.phase ^= 1;
    while (ring.stage != 0) skip_stages(shared, ring, 1);
}

// The loading warps' part: stages that the tile leaves of its last lap stay empty.
template <Config C>
DEVICE void finish_lap(const SharedMemory<C>& shared, Ring<C>& ring, u32 warp) {
    if (ring.stage != 0) offer_stages(shared, ring, C.stages - ring.stage, warp);
}

template <Config C>
DEVICE i32 stages_of_laps(i32 blocks_k) {
    constexpr i32 stages = C.stages;
    return (blocks_k + stages - 1) / stages * stages;
}
