// Quantizing to e4m3 in registers: the arithmetic of quantization/block_format.py, bit for bit.
#pragma once
#include "ptx/types.cuh"

constexpr float SMALLEST_AMAX = 7.888609052210118e-31f;  // 2^-100
constexpr float INVERSE_MAX = 0x1.24924ap-9f;            // fp32(1 / 448)

// Scale of a block whose largest magnitude is `amax`; fmaxf leaves NaN out.
DEVICE float block_scale(float amax, bool pow2) {
    const u32 scale = __float_as_uint(__fmul_rn(fmaxf(amax, SMALLEST_AMAX), INVERSE_MAX));
    return __uint_as_float((scale + (pow2 ? 0x7fffffu : 0)) & (pow2 ? 0x7f800000u : 0x7fffffffu));  // no branch
}

// fp32(1 / scale). What __frcp_rn does for the numbers that a finite scale can be, 2^-109 to 2^120, without its call for the others.
DEVICE float inverse_of_scale(float scale) {
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(scale));
    const float inverse = __fmaf_rn(guess, __fmaf_rn(-scale, guess, 1.0f), guess);
    return guess == 0.0f ? 0.0f : inverse;
}

// Largest of the four lanes that share a row of the accumulators.
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

DEVICE void store_shared(u32 address, u16 value) { asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory"); }
DEVICE void store_shared(u32 address, u32 value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory"); }

// Codes of four values, the first in the lowest byte.
DEVICE u32 pack_four_e4m3(float a, float b, float c, float d) {
    u32 word;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}
