// Stands in for epilogue/quantize.cuh of the kernels: see ../ptx/types.cuh.
#pragma once
#include "ptx/types.cuh"

inline float block_scale(float amax, bool pow2) {
    const u32 scale = __float_as_uint(std::max(amax, 0x1p-100f) * 0x1.24924ap-9f);
    return __uint_as_float(pow2 ? (scale + 0x7fffff) & 0x7f800000 : scale);
}
inline float inverse_of_scale(float scale) { return 1.0f / scale; }

inline float from_e4m3(u8 code) {
    static const auto table = [] {
        std::array<float, 256> made;
        for (u32 i = 0; i < 256; ++i) {
            const i32 exponent = i >> 3 & 15, mantissa = i & 7;
            const float v = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
            made[i] = (i & 127) == 127 ? NAN : i & 128 ? -v : v;
        }
        return made;
    }();
    return table[code];
}
// To nearest, ties to even, up to 448.
inline u8 to_e4m3(float v) {
    if (v != v) return 127;
    const float size = std::min(std::fabs(v), 448.0f);
    i32 exponent;
    std::frexp(size, &exponent);
    const i32 unit = std::max(exponent - 4, -9);
    const i32 steps = static_cast<i32>(std::nearbyint(std::ldexp(size, -unit)));  // 8 to 16 of a normal number
    return (std::signbit(v) ? 128 : 0) | (unit == -9 ? steps : (unit + 9) * 8 + steps);
}
inline u32 pack_four_e4m3(float a, float b, float c, float d) { return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24; }
