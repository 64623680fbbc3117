// A chunk of x: 16 elements, of which eight lanes that share a scale have one each.
#pragma once
#include "epilogue/quantize.cuh"

DEVICE uint4 load_chunk(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

// Codes of 16 elements; `scale` is that of the eight lanes' 128 elements.
DEVICE uint4 quantize_chunk(const uint4& first, const uint4& second, bool pow2, float& scale) {
    const u32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    float v[16], largest = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) v[2 * i] = bf16_low(words[i]), v[2 * i + 1] = bf16_high(words[i]);
#pragma unroll
    for (u32 i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(v[i]));
#pragma unroll
    for (u32 lanes = 1; lanes < 8; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    scale = block_scale(largest, pow2);
    const float inverse = inverse_of_scale(scale);
    u32 codes[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        codes[i] = pack_four_e4m3(v[4 * i] * inverse, v[4 * i + 1] * inverse, v[4 * i + 2] * inverse, v[4 * i + 3] * inverse);
    return make_uint4(codes[0], codes[1], codes[2], codes[3]);
}
