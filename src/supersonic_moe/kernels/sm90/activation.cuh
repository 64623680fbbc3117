// Expert activations in fp32, as supersonic_moe/activation.py defines them. ACTIVATION is the index in its ActivationType.
#pragma once
#include "types.cuh"

enum class Act : int { SwiGLU = 0, GeGLU = 1, ReGLU = 2, ReLUSquared = 3, ReLU = 4, GELU = 5, SiLU = 6 };

struct ActivationConstants {  // of SwiGLU; limit is infinite where nothing is clamped
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
DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays

template <Act Kind>
DEVICE float gated(float gate, float up, const ActivationConstants& c) {
    if constexpr (Kind == Act::SwiGLU) {
        const float g = min_nan(gate, c.limit), u = -min_nan(-min_nan(up, c.limit), c.limit);
        return g * sigmoid(c.alpha * g) * (u + c.up_offset);
    } else if constexpr (Kind == Act::GeGLU) {
        return gelu(gate) * up;
    } else {
        return relu(gate) * up;
    }
}
