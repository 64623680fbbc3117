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

// ---- int8 in groups of 32 columns, one step 2^-6 of the power of two that the largest magnitude has: the *saved* format ----

// Larger magnitude, NaN if either is; the sign means nothing.
DEVICE float larger_or_nan(float a, float b) {
    float result;
    asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// Exponents of a group in rows r (bits 0..7) and r + 8 (16..23), from this lane's largest magnitudes: a lane has a quarter of each row.
// The upper 16 bits of an fp32 number are enough: a mantissa whose upper seven bits are ones would round to a code of 128.
DEVICE u32 group_exponents(float of_row, float of_row_8) {
    u32 pair, at_most = 0x7f807f80, at_least = 0x0d800d80;  // infinity, 2^-100
    asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(pair) : "r"(__float_as_uint(of_row)), "r"(__float_as_uint(of_row_8)));
    pair &= 0x7fff7fff;
#pragma unroll
    for (u32 lanes = 1; lanes < 4; lanes *= 2) {
        const u32 other = __shfl_xor_sync(0xffffffffu, pair, lanes);
        asm("max.u16x2 %0, %0, %1;" : "+r"(pair) : "r"(other));
    }
    asm("min.u16x2 %0, %0, %1;" : "+r"(pair) : "r"(at_most));
    asm("max.u16x2 %0, %0, %1;" : "+r"(pair) : "r"(at_least));
    return (pair + 0x00010001) >> 7 & 0x00ff00ff;
}

// 64 over the power of two, for codes of x; and what a code counts. `exponent`: of the group.
DEVICE float inverse_of_exponent(u32 exponent) { return __uint_as_float((260 - exponent) << 23); }
DEVICE float step_of_exponent(u32 exponent) { return __uint_as_float(exponent << 23) * 0.015625f; }

// Code of x in the lowest byte: adding 1.5 * 2^23 rounds to the nearest even integer.
DEVICE u32 int8_code(float x, float inverse) { return __float_as_uint(__fmaf_rn(x, inverse, 12582912.0f)); }
DEVICE u32 pack_int8(u32 first, u32 second) {
    u32 word;
    asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(word) : "r"(first), "r"(second));
    return word;
}
DEVICE u32 pack_four_int8(float a, float b, float c, float d, float inverse) {
    u32 word;
    const u32 low = pack_int8(int8_code(a, inverse), int8_code(b, inverse)), high = pack_int8(int8_code(c, inverse), int8_code(d, inverse));
    asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(word) : "r"(low), "r"(high));
    return word;
}

// Two codes in the low half of `packed` as 1152 + code, by way of f16: 0x6400 is 1024. `packed` has the sign bits of its codes inverted.
constexpr float INT8_OFFSET = 1152.0f;
constexpr u32 INT8_SIGNS = 0x80808080;
DEVICE void unpack_int8(u32 packed, float& low, float& high) {
    asm("{\n"
        ".reg .b16 l, h;\n"
        ".reg .b32 both;\n"
        "prmt.b32 both, %2, 0x64646464, 0x4140;\n"
        "mov.b32 {l, h}, both;\n"
        "cvt.f32.f16 %0, l;\n"
        "cvt.f32.f16 %1, h;\n"
        "}\n"
        : "=f"(low), "=f"(high)
        : "r"(packed));
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
