// C(M x N, bf16) = A(M x K) * B(N x K)^T: the smallest kernel with every moving part of a GEMM on Hopper, and none of gemm/. See
// self_test.py.
//
//   warps 0..3   front end: one thread keeps a ring of STAGES tiles full with TMA loads
//   warps 4..11  two math warpgroups: wgmma over 64 rows each, then stmatrix and a TMA store
//
// Constants: E4M3 (0: bf16), BLOCK_N, A_MN_MAJOR, B_MN_MAJOR, STAGES. The ring runs on from one tile of a block to the next.
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/wgmma.cuh"

constexpr u32 LINE = 128, BLOCK_M = 128;               // bytes of a swizzled line; rows, 64 for each math warpgroup
constexpr u32 BLOCK_K = E4M3 ? 128 : 64, STEPS_K = 4;  // elements, a line where K is contiguous; instructions for them
constexpr u32 SLABS_N = (BLOCK_N + 63) / 64;           // MN-major B: slabs of 64 columns,
constexpr u32 SLAB_BYTES = BLOCK_K * LINE;             // with a line for each k
constexpr u32 BYTES_A = BLOCK_M * LINE;                // two slabs when MN-major: the same number
constexpr u32 BYTES_B = B_MN_MAJOR ? SLABS_N * SLAB_BYTES : BLOCK_N * LINE;
constexpr u32 STAGE_BYTES = BYTES_A + BYTES_B;
constexpr u32 BYTES_C = 64 * BLOCK_N * 2;                                // of one warpgroup
constexpr u32 STORE_COLUMNS = 32, STORE_BYTES = 64 * STORE_COLUMNS * 2;  // of a TMA store: 64 lines of 64 bytes, 64-byte swizzle

static_assert(!E4M3 || !(A_MN_MAJOR || B_MN_MAJOR), "e4m3 operands are K-major");
static_assert(STAGE_BYTES % 1024 == 0 && BYTES_C % 512 == 0, "tiles keep the alignment of their swizzle");

// acc (+)= the 64 rows of `tile_a` times `tile_b`, over BLOCK_K.
DEVICE void multiply_block(float (&acc)[BLOCK_N / 2], u32 tile_a, u32 tile_b, bool accumulate) {
    constexpr Major A = A_MN_MAJOR ? Major::MN : Major::K, B = B_MN_MAJOR ? Major::MN : Major::K;
    const u64 a = A_MN_MAJOR ? mn_major_descriptor(tile_a, SLAB_BYTES) : k_major_descriptor(tile_a);
    const u64 b = B_MN_MAJOR ? mn_major_descriptor(tile_b, SLAB_BYTES) : k_major_descriptor(tile_b);
#pragma unroll
    for (u32 step = 0; step < STEPS_K; ++step) {
        const u64 step_a = advance_descriptor(a, step * (A_MN_MAJOR ? 16 * LINE : 32));
        const u64 step_b = advance_descriptor(b, step * (B_MN_MAJOR ? 16 * LINE : 32));
        if constexpr (E4M3) {
            WgmmaE4m3<BLOCK_N>::multiply(acc, step_a, step_b, accumulate || step > 0);
        } else {
            WgmmaBf16<BLOCK_N, A, B>::multiply(acc, step_a, step_b, accumulate || step > 0);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    self_test(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
              const __grid_constant__ TensorMap map_c, const i32 tiles_m, const i32 tiles_n, const i32 blocks_k) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = smem_address(shared), output = base + STAGES * STAGE_BYTES;
    const u32 full = output + 2 * BYTES_C, empty = full + 8 * STAGES;  // barriers: 8 bytes each
    if (threadIdx.x == 0) {
        if (base % 1024 != 0) trap();
        for (u32 stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, 8);  // math warps
        }
        fence_mbarrier_init();
        prefetch_tensor_map(&map_a), prefetch_tensor_map(&map_b), prefetch_tensor_map(&map_c);
    }
    __syncthreads();

    const i32 tiles = tiles_m * tiles_n;
    const u32 warp = warp_index();
    RingCursor<STAGES> ring;
    if (warp < 4) {
        register_dealloc<40>();
        // One operand's part of a stage, from row `x` of A or B and `k` on.
        const auto load = [&](u32 tile, const TensorMap& map, u32 barrier, bool mn_major, u32 slabs, i32 x, i32 k) {
            if (!mn_major) return tma_load(tile, &map, barrier, k, x);
            for (u32 slab = 0; slab < slabs; ++slab) tma_load(tile + slab * SLAB_BYTES, &map, barrier, x + 64 * slab, k);
        };
        if (warp == 0 && elect_one()) {
            for (i32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const i32 m = tile / tiles_n * BLOCK_M, n = tile % tiles_n * BLOCK_N;
                for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
                    const u32 tile_a = base + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
                    mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                    mbarrier_arrive_expect_tx(barrier, STAGE_BYTES);
                    load(tile_a, map_a, barrier, A_MN_MAJOR, 2, m, block * BLOCK_K);
                    load(tile_a + BYTES_A, map_b, barrier, B_MN_MAJOR, SLABS_N, n, block * BLOCK_K);
                }
            }
        }
        return;
    }
    register_alloc<232>();
    const u32 group = warp / 4 - 1, row = 16 * (warp % 4) + lane_index() % 16;  // row that this lane stores
    const u32 group_output = output + group * BYTES_C;
    for (i32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i32 m = tile / tiles_n * BLOCK_M, n = tile % tiles_n * BLOCK_N;
        float acc[BLOCK_N / 2];
        for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
            const u32 tile_a = base + ring.stage * STAGE_BYTES;
            mbarrier_wait(full + 8 * ring.stage, ring.phase);
            pin_accumulators(acc);
            wgmma_fence();
            multiply_block(acc, tile_a + group * (BYTES_A / 2), tile_a + BYTES_A, block > 0);
            wgmma_commit();
            wgmma_wait<0>();
            pin_accumulators(acc);
            if (lane_index() == 0) mbarrier_arrive(empty + 8 * ring.stage);
        }
        tma_wait_read<0>();  // the stores of the tile before have left shared memory
        named_barrier_sync(1 + group, 128);
#pragma unroll
        for (u32 column = 0; column < BLOCK_N; column += 16) {  // 16 x 16 of this warp: four 8 x 8 matrices
            const float* d = acc + column / 2;
            const u32 matrices[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7])};
            const u32 unit = column % STORE_COLUMNS / 8 + lane_index() / 16;  // 16-byte unit of the 64-byte line
            store_matrices(group_output + column / STORE_COLUMNS * STORE_BYTES + swizzle<64>(row * 64 + unit * 16), matrices);
        }
        fence_proxy_async();
        named_barrier_sync(1 + group, 128);
        if (warp % 4 == 0) {
            if (elect_one()) {  // a condition of its own: see in_issuing_thread
                for (u32 column = 0; column < BLOCK_N; column += STORE_COLUMNS)
                    tma_store(&map_c, group_output + column / STORE_COLUMNS * STORE_BYTES, n + column, m + 64 * group);
                tma_commit();
            }
        }
    }
    tma_wait_read<0>();  // shared memory lives until its last tile has been read
}
