// e4m3 of rows gathered by an index, transposed, one scale for each column and 128 positions. See quantize_columns.py.
//
// A block owns 128 positions x 128 columns. A thread reads 8 consecutive positions of 8 columns, 16 bytes of each row, and keeps them as
// pairs of bf16: 32 registers. So the 8 codes of a column are consecutive bytes of the output, and nothing is exchanged to transpose; they
// pass through shared memory only to leave in whole lines.
//
//   warp w: positions 64 (w % 2) .., columns 32 (w / 2) ..      lane l: positions + 8 (l / 4), columns + 8 (l % 4)
#include "epilogue/quantize.cuh"

constexpr u32 BLOCK = 128, THREADS = 256, EACH = 8;

// Lines of codes: a column each, 16-byte chunks; every second group of 8 columns has its halves exchanged, or four lanes would write to
// the same banks.
DEVICE u32 code_address(u32 codes, u32 column, u32 chunk) { return codes + column * BLOCK + (chunk ^ column / EACH % 2 * 4) * 16; }

// Larger magnitudes of two pairs of bf16; the signs mean nothing.
DEVICE u32 largest(u32 a, u32 b) {
    u32 result;
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    quantize_columns(const u16* x, const i64 x_row, const i32* index, const i32* offsets, const i32 segments, const i32* source, u8* q,
                     const i64 q_column, float* scales, const i64 scales_block, const i32 columns, const i32 pow2) {
    __shared__ __align__(16) u8 lines[BLOCK * BLOCK];
    __shared__ __align__(16) u32 maxima[2][BLOCK / 2];  // pairs of columns, by half of the positions
    __shared__ __align__(16) float inverses[BLOCK];
    const u32 warp = threadIdx.x / 32, lane = lane_index();
    const u32 half = warp % 2, position = half * 64 + lane / 4 * EACH, column = warp / 2 * 32 + lane % 4 * EACH;
    const i64 block = blockIdx.x;
    const i32 first_column = static_cast<i32>(blockIdx.y * BLOCK), mine = first_column + static_cast<i32>(column);

    u32 pairs[EACH][4];
    const int4* rows = reinterpret_cast<const int4*>(index + block * BLOCK + position);
    const int4 low = __ldg(rows), high = __ldg(rows + 1);
    if (offsets != nullptr && block * BLOCK >= __ldg(offsets + segments)) return;  // no segment has these positions
    if (source != nullptr && __ldg(source + block) != block) return;               // another block holds the same
    const i32 row[EACH] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
        int4 words = {0, 0, 0, 0};
        if (row[i] >= 0 && mine < columns) words = __ldg(reinterpret_cast<const int4*>(x + row[i] * x_row + mine));
        pairs[i][0] = words.x, pairs[i][1] = words.y, pairs[i][2] = words.z, pairs[i][3] = words.w;
    }

    u32 most[4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        most[j] = largest(pairs[0][j], pairs[1][j]);
#pragma unroll
        for (u32 i = 2; i < EACH; ++i) most[j] = largest(most[j], pairs[i][j]);
#pragma unroll
        for (u32 lanes = 4; lanes < 32; lanes *= 2) most[j] = largest(most[j], __shfl_xor_sync(0xffffffffu, most[j], lanes));
    }
    if (lane < 4) *reinterpret_cast<int4*>(&maxima[half][column / 2]) = {static_cast<i32>(most[0]), static_cast<i32>(most[1]),
                                                                         static_cast<i32>(most[2]), static_cast<i32>(most[3])};
    __syncthreads();
    if (threadIdx.x < BLOCK) {
        const u32 pair = largest(maxima[0][threadIdx.x / 2], maxima[1][threadIdx.x / 2]);
        const float scale = block_scale(fabsf(threadIdx.x % 2 == 0 ? bf16_low(pair) : bf16_high(pair)), pow2 != 0);
        inverses[threadIdx.x] = inverse_of_scale(scale);
        if (first_column + static_cast<i32>(threadIdx.x) < columns) scales[block * scales_block + first_column + threadIdx.x] = scale;
    }
    __syncthreads();

    const u32 codes = smem_address(lines);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        const float2 inverse = *reinterpret_cast<const float2*>(&inverses[column + 2 * j]);
#pragma unroll
        for (u32 side = 0; side < 2; ++side) {
            const float by = side == 0 ? inverse.x : inverse.y;
            float v[EACH];
#pragma unroll
            for (u32 i = 0; i < EACH; ++i) v[i] = __fmul_rn(side == 0 ? bf16_low(pairs[i][j]) : bf16_high(pairs[i][j]), by);
            const u32 at = code_address(codes, column + 2 * j + side, position / 16) + position % 16;
            asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(pack_four_e4m3(v[0], v[1], v[2], v[3])),
                         "r"(pack_four_e4m3(v[4], v[5], v[6], v[7]))
                         : "memory");
        }
    }
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < BLOCK * EACH / THREADS; ++i) {  // 16 bytes a thread, a column for eight
        const u32 c = i * (THREADS / EACH) + threadIdx.x / EACH, chunk = threadIdx.x % EACH;
        if (first_column + static_cast<i32>(c) >= columns) break;
        const int4 words = *reinterpret_cast<const int4*>(lines + (code_address(codes, c, chunk) - codes));
        __stcs(reinterpret_cast<int4*>(q + (first_column + static_cast<i32>(c)) * q_column + block * BLOCK + chunk * 16), words);
    }
}
