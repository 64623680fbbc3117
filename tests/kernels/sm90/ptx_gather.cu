// Instruction wrappers of gathers, matrices and formats that the self test does not use; tests/jit/test_gpu_jit.py checks the results.
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/types.cuh"
#include "ptx/wgmma.cuh"

// One thread gathers A[i] = rows[index[i]] (64 x 64 bf16, zero where index < 0) row by row and loads B (64 x 64, K-major); then
// out (fp32) += A B^T, rounded = e4m3(A B^T), copy = A, transposed = A^T. Launched twice with programmatic dependent launch, the
// second waits for the first.
extern "C" __global__ void __launch_bounds__(128, 1)
    gather(const __grid_constant__ TensorMap map_rows, const __grid_constant__ TensorMap map_b,
           const __grid_constant__ TensorMap map_out, const __grid_constant__ TensorMap map_transposed, const i32* index,
           u16* copy, u16* rounded) {
    extern __shared__ __align__(1024) u8 shared[];
    constexpr u32 TILE = 8192;
    const u32 tile_a = smem_address(shared), tile_b = tile_a + TILE, tile_c = tile_b + TILE;
    const u32 tile_transposed = tile_c + 2 * TILE, full = tile_transposed + TILE;
    const u32 warp = warp_index(), lane = lane_index();

    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    dependency_wait();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(full, 2 * TILE);
        tma_load(tile_b, &map_b, full, 0, 0);
        for (u32 row = 0; row < 64; ++row) tma_load(tile_a + row * 128, &map_rows, full, 0, index[row]);
    }
    mbarrier_wait(full, 0);
    dependency_launch();

    float acc[32];
    pin_accumulators(acc);
    wgmma_fence();
    for (u32 step = 0; step < 4; ++step) {
        WgmmaBf16<64>::multiply(acc, advance_descriptor(k_major_descriptor(tile_a), 32 * step),
                                advance_descriptor(k_major_descriptor(tile_b), 32 * step), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin_accumulators(acc);

#pragma unroll
    for (u32 i = 0; i < 32; i += 2) {
        const u32 row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
        const u32 offset = column / 32 * TILE + swizzle<128>(row * 128 + column % 32 * 4);
        float* out = reinterpret_cast<float*>(shared + 2 * TILE + offset);
        out[0] = acc[i];
        out[1] = acc[i + 1];
        rounded[(row * 64 + column) / 2] = pack_e4m3(acc[i], acc[i + 1]);
    }
    for (u32 j = 0; j < 4; ++j) {  // 16 x 16 blocks of this warp's rows of A
        u32 matrices[4];
        const u32 address = tile_a + swizzle<128>((16 * warp + lane % 16) * 128 + (2 * j + lane / 16) * 16);
        load_matrices<true>(matrices, address);
        for (u32 i = 0; i < 4; ++i) {
            u16* element = copy + (16 * warp + i % 2 * 8 + lane % 4 * 2) * 64 + 16 * j + i / 2 * 8 + lane / 4;
            element[0] = static_cast<u16>(matrices[i]);
            element[64] = static_cast<u16>(matrices[i] >> 16);
        }
        load_matrices(matrices, address);
        const u32 row = 16 * j + lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
        store_matrices<true>(tile_transposed + swizzle<128>(row * 128 + unit * 16), matrices);
    }
    fence_proxy_async();
    named_barrier_sync(1, 128);
    if (threadIdx.x == 0) {
        tma_reduce_add(&map_out, tile_c, 0, 0);
        tma_reduce_add(&map_out, tile_c + TILE, 32, 0);
        tma_store(&map_transposed, tile_transposed, 0, 0);
        tma_commit();
        tma_wait_read<0>();
    }
}
