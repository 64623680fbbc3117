// The bf16 main loop of the GEMMs: a ring of stages, each one K block of 64 of an A tile (128 rows) and a B tile (BLOCK_N).
//
// Two math warpgroups own 64 rows each and share B, so an instruction is m64 n256 k16: 2 KB of A and 8 KB of B from shared memory
// for 0.5 MFLOP, the widest there is. With a cluster of two blocks that work on neighbouring row blocks of one expert, each
// block loads half of B for both: a third less L2 traffic.
//
// Constants of every kernel built on it: BLOCK_N, STAGES, CLUSTER (blocks along M that share B), GROUP_M (row blocks walked before
// the next column), GATHER (rows of A come through an index, see load.cuh).
#pragma once
#include "barrier.cuh"
#include "copy.cuh"
#include "schedule.cuh"
#include "types.cuh"
#include "wgmma.cuh"

constexpr u32 LINE = 128;                              // bytes of a swizzled line
constexpr u32 BLOCK_M = 128, BLOCK_K = 64;
constexpr u32 SLAB_BYTES = BLOCK_K * LINE;             // MN-major: 64 elements of M or N, one line for each k
constexpr u32 SLABS_N = BLOCK_N / 64;
constexpr u32 BYTES_A = BLOCK_M * LINE;                // 128 lines of 64 k, or two slabs
constexpr u32 BYTES_B = BLOCK_N * LINE;
constexpr u32 STAGE_BYTES = BYTES_A + BYTES_B;
constexpr u32 PANEL_BYTES = 64 * LINE;                 // output staging: 64 rows of one line
constexpr u32 PANELS = 2;                              // per math warpgroup: one is written while the other is stored
constexpr u32 MATH_WARPS = 8, THREADS = 384;
// Registers of a loading and of a math thread: 128 and 256 of them share 64 K.
constexpr u32 LOAD_REGISTERS = 56, MATH_REGISTERS = 224;

// Shared memory, from its base: stages | panels of the two warpgroups | notes | full barriers | empty barriers | 64 row indices.
struct Shared {
    u32 base;
    DEVICE u32 tile_a(u32 stage) const { return base + stage * STAGE_BYTES; }
    DEVICE u32 tile_b(u32 stage) const { return tile_a(stage) + BYTES_A; }
    DEVICE u32 panel(u32 group, u32 index) const { return base + STAGES * STAGE_BYTES + (group * PANELS + index) * PANEL_BYTES; }
    DEVICE u32 note(u32 stage) const { return base + STAGES * STAGE_BYTES + 2 * PANELS * PANEL_BYTES + stage * NOTE_BYTES; }
    DEVICE u32 full(u32 stage) const { return note(STAGES) + 8 * stage; }
    DEVICE u32 empty(u32 stage) const { return full(STAGES) + 8 * stage; }
    DEVICE u32 row_index(u32 row) const { return empty(STAGES) + 4 * row; }

    // Barriers of the ring, ready for the whole cluster on return.
    DEVICE void prepare() const {
        if (threadIdx.x == 0) {
            for (u32 stage = 0; stage < STAGES; ++stage) {
                mbarrier_init(full(stage), 1);
                mbarrier_init(empty(stage), MATH_WARPS * CLUSTER);
            }
            fence_mbarrier_init();
        }
        if constexpr (CLUSTER > 1) {
            cluster_sync();
        } else {
            __syncthreads();
        }
    }

    // One arrival of this warp for each block that loads into this stage. All lanes have waited for their wgmma.
    DEVICE void release(u32 stage) const {
        if constexpr (CLUSTER > 1) {
            if (lane_index() < CLUSTER) mbarrier_arrive_remote(empty(stage), lane_index());
        } else {
            if (lane_index() == 0) mbarrier_arrive(empty(stage));
        }
    }
};

using Ring = RingCursor<STAGES>;

// acc (+)= 64 rows of A times B over one stage. The stage index passes through a shuffle, because the descriptors have to be in
// uniform registers and the compiler cannot see that all lanes agree on it.
template <Major MajorA, Major MajorB>
DEVICE void multiply_stage(float (&acc)[BLOCK_N / 2], const Shared& shared, u32 stage, u32 group, bool accumulate) {
    const u32 uniform_stage = __shfl_sync(0xffffffffu, stage, 0);
    const u32 a = shared.tile_a(uniform_stage) + group * (BYTES_A / 2), b = shared.tile_b(uniform_stage);
#pragma unroll
    for (u32 step = 0; step < BLOCK_K / 16; ++step) {
        const u64 step_a = MajorA == Major::K ? k_major_descriptor(a + step * 32) : mn_major_descriptor(a + step * 16 * LINE, SLAB_BYTES);
        const u64 step_b = MajorB == Major::K ? k_major_descriptor(b + step * 32) : mn_major_descriptor(b + step * 16 * LINE, SLAB_BYTES);
        WgmmaBf16<BLOCK_N, MajorA, MajorB>::multiply(acc, step_a, step_b, accumulate || step > 0);
    }
}

// All stages of a tile; releases each stage but the last, one step late so that one batch of wgmma is always in flight. Returns
// the last stage, complete and not yet released: its note is the tile's.
template <Major MajorA, Major MajorB, typename Prepare>
DEVICE u32 multiply_tile(float (&acc)[BLOCK_N / 2], const Shared& shared, Ring& ring, u32 group, i32 blocks_k, Prepare prepare) {
    u32 last = ring.stage;
    for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (block == blocks_k - 1) prepare(ring.stage);
        pin_accumulators(acc);
        wgmma_fence();
        multiply_stage<MajorA, MajorB>(acc, shared, ring.stage, group, block > 0);
        wgmma_commit();
        wgmma_wait<1>();
        pin_accumulators(acc);
        if (block > 0) shared.release(last);
        last = ring.stage;
    }
    wgmma_wait<0>();
    pin_accumulators(acc);
    return last;
}

// Lane and row of the output that this thread handles. Read from the special register each time, or the compiler keeps every
// address of the epilogue in registers across the main loop.
DEVICE u32 fresh_thread_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Four accumulators as they are from here on: what packs them cannot move ahead of this point. Without it the compiler converts
// all panels before the first store and runs out of registers.
DEVICE void pin_four(float* acc) { asm volatile("" : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])::"memory"); }

// 64 columns of a warpgroup's accumulators, rounded to bf16, into a panel: 64 lines of 128 bytes, swizzled as TMA reads them.
DEVICE void stage_bf16(float* acc, u32 panel, u32 thread) {
    const u32 row = thread % 128 / 32 * 16 + thread % 16, half = thread % 32 / 16;
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {
        float* d = acc + part * 8;
        pin_four(d), pin_four(d + 4);
        const u32 matrices[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7])};
        store_matrices(panel + swizzle<128>(row * LINE + (part * 2 + half) * 16), matrices);
    }
}

// 32 columns, fp32, likewise.
DEVICE void stage_f32(const float* acc, u32 panel, u32 thread) {
    const u32 row = thread % 128 / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {
        const u32 byte = part * 32 + thread % 4 * 8;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(panel + swizzle<128>(row * LINE + byte)), "f"(acc[part * 4]),
                     "f"(acc[part * 4 + 1])
                     : "memory");
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(panel + swizzle<128>((row + 8) * LINE + byte)), "f"(acc[part * 4 + 2]),
                     "f"(acc[part * 4 + 3])
                     : "memory");
    }
}

// An output as the tail path sees it: TMA would write the rows past an expert's end into the next expert.
struct Rows {
    u8* pointer;
    i64 row_bytes;
    i32 columns;
};

// Of `Lines` lines of a staged panel those that lie inside the expert, by `Threads` threads, 16 bytes each at a time.
template <u32 Threads = 128, u32 Lines = 64>
DEVICE void store_tail(const Rows& out, u32 panel, i32 row, i32 rows, i32 column, u32 thread) {
#pragma unroll
    for (u32 part = 0; part < Lines * 8 / Threads; ++part) {
        const u32 unit = part * Threads + thread % Threads, line = unit / 8, chunk = unit % 8;
        if (static_cast<i32>(line) < rows && column + static_cast<i32>(chunk) * 8 < out.columns) {
            u32 v[4];
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                         : "r"(panel + swizzle<128>(line * LINE + chunk * 16))
                         : "memory");
            u8* target = out.pointer + (row + static_cast<i32>(line)) * out.row_bytes + (column + static_cast<i32>(chunk) * 8) * 2;
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                         : "memory");
        }
    }
}

// A finished panel to (row, column): by TMA where all 64 rows are the expert's, else line by line. One bulk group either way.
DEVICE void store_rows(const TensorMap* map, const Rows& out, u32 panel, i32 row, i32 rows, i32 column, u32 thread) {
    if (rows < 64) store_tail(out, panel, row, rows, column, thread);
    if (thread % 128 == 0) {
        if (rows >= 64) tma_store(map, panel, column, row);
        tma_commit();
    }
}

// Wait for a free panel of this warpgroup; all its threads may write to it on return.
DEVICE u32 next_panel(const Shared& shared, u32 group, u32& index, u32 thread) {
    const u32 panel = shared.panel(group, index);
    index = (index + 1) % PANELS;
    if (thread % 128 == 0) tma_wait_read<PANELS - 1>();
    named_barrier_sync(1 + group, 128);
    return panel;
}

// The panel is written: make it visible to TMA and to all threads of the warpgroup.
DEVICE void finish_panel(u32 group) {
    fence_proxy_async();
    named_barrier_sync(1 + group, 128);
}
