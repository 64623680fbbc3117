// Expert activations and their derivatives in fp32 registers, as config/activation.py defines them.
#pragma once
#include "epilogue/staging.cuh"

enum class Act : int { SwiGLU = 0, GeGLU = 1, ReGLU = 2, ClampedSwiGLU = 3, TanhGeGLU = 4 };

struct ActivationConstants {  // of ClampedSwiGLU; limit is infinite where nothing is clamped
    float alpha, limit, up_offset;
};

// 1 / (1 + 2^(-x log2 e)) by the two special-function instructions as they are: about 1e-7, and without the branches for
// denormal arguments that the intrinsics bring.
DEVICE float sigmoid(float x) {
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
    return result;
}
// The smaller of the two, NaN if one is.
DEVICE float min_nan(float x, float y) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
    return result;
}

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
// GELU's tanh form is x * tanh_cdf(x): 0.5 (1 + tanh u) = sigmoid(2 u), and 2 sqrt(2 / pi) = 1.59576912.
DEVICE float tanh_cdf(float x) { return sigmoid(1.59576912f * x * (1.0f + 0.044715f * x * x)); }
DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays

template <Act Kind>
DEVICE float gated(float gate, float up, const ActivationConstants& c) {
    if constexpr (Kind == Act::SwiGLU) {
        return gate * sigmoid(gate) * up;
    } else if constexpr (Kind == Act::ClampedSwiGLU) {
        const float g = min_nan(gate, c.limit), u = -min_nan(-min_nan(up, c.limit), c.limit);
        return g * sigmoid(c.alpha * g) * (u + c.up_offset);
    } else if constexpr (Kind == Act::GeGLU) {
        return gelu(gate) * up;
    } else if constexpr (Kind == Act::TanhGeGLU) {
        return gate * tanh_cdf(gate) * up;
    } else {
        return relu(gate) * up;
    }
}

// How a kernel's activation is compiled: its kind, and whether gate and up alternate in the columns of Z.
struct Gate {
    Act kind;
    bool interleaved;
};

struct GatedSlopes {
    float value, by_gate, by_up;
};

// Value and partial derivatives. A clamp passes the gradient where it is inactive, bounds included.
template <Act Kind>
DEVICE GatedSlopes gated_slopes(float gate, float up, const ActivationConstants& c) {
    if constexpr (Kind == Act::SwiGLU) {
        const float s = sigmoid(gate), silu = gate * s;
        return {silu * up, (s + (silu - silu * s)) * up, silu};
    } else if constexpr (Kind == Act::ClampedSwiGLU) {
        const float g = min_nan(gate, c.limit), u = -min_nan(-min_nan(up, c.limit), c.limit) + c.up_offset;
        const float s = sigmoid(c.alpha * g), by_up = g * s;
        const float by_gate = (s + c.alpha * by_up * (1.0f - s)) * u;
        return {by_up * u, gate > c.limit ? 0.0f : by_gate, fabsf(up) > c.limit ? 0.0f : by_up};
    } else if constexpr (Kind == Act::GeGLU) {
        const float cdf = 0.5f * (1.0f + erff(gate * 0.70710678f)), density = 0.39894228f * __expf(-0.5f * gate * gate);
        return {gate * cdf * up, (cdf + gate * density) * up, gate * cdf};
    } else if constexpr (Kind == Act::TanhGeGLU) {
        const float cdf = tanh_cdf(gate), inner = 1.59576912f * gate * (1.0f + 0.134145f * gate * gate);
        return {gate * cdf * up, (cdf + inner * (cdf - cdf * cdf)) * up, gate * cdf};
    } else {
        return {relu(gate) * up, gate > 0.0f ? up : 0.0f, relu(gate)};
    }
}

// Bias of activations `column` and `column` + 1 of an expert whose biases start at `bias`; zeros past the width.
DEVICE void load_bias(bool interleaved, const u16* bias, i32 column, i32 width, i32 gate_base, i32 up_base, float (&gate)[2],
                      float (&up)[2]) {
    u32 first = 0, second = 0;
    if (column < width) {  // both or none: the width is a multiple of 8
        const u16* at = interleaved ? bias + 2 * column : bias + gate_base + column;
        first = *reinterpret_cast<const u32*>(at);
        second = *reinterpret_cast<const u32*>(interleaved ? at + 2 : bias + up_base + column);
    }
    gate[0] = bf16_low(first), up[1] = bf16_high(second);
    gate[1] = interleaved ? bf16_low(second) : bf16_high(first);
    up[0] = interleaved ? bf16_high(first) : bf16_low(second);
}

// Bias of columns `column` and `column` + 1 where nothing is gated, as a pair of bf16; zeros past the width.
DEVICE u32 load_bias_pair(const u16* bias, i32 column, i32 width) {
    return column < width ? *reinterpret_cast<const u32*>(bias + column) : 0;
}

// Adds the bias to this thread's accumulators of gate and of up, Count each, of a tile whose activations start at `column`. b1: (experts,
// 2 * width), or null.
template <u32 Count>
DEVICE void add_bias(float* gate, float* up, bool interleaved, const u16* b1, i32 expert, i32 column, i32 width, i32 gate_base, i32 up_base,
                     u32 lane) {
    if (b1 == nullptr) return;
    const u16* bias = b1 + static_cast<i64>(expert) * 2 * width;
    const i32 first = column + static_cast<i32>(lane % 4 * 2);
#pragma unroll
    for (u32 i = 0; i < Count; i += 4) {
        float g[2], u[2];
        pin_four(gate + i), pin_four(up + i);
        load_bias(interleaved, bias, first + static_cast<i32>(i * 2), width, gate_base, up_base, g, u);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) gate[i + j] += g[j % 2], up[i + j] += u[j % 2];  // rows r and r + 8
    }
}

// gate[i] = act(gate[i], up[i]), Count of each.
template <Act Kind, u32 Count>
DEVICE void activate(float* gate, float* up, const ActivationConstants& constants) {
#pragma unroll
    for (u32 i = 0; i < Count; i += 4) {
        pin_four(gate + i), pin_four(up + i);
#pragma unroll
        for (u32 j = i; j < i + 4; ++j) gate[j] = gated<Kind>(gate[j], up[j], constants);
    }
}
