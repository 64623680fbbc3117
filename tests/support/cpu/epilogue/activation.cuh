// Stands in for epilogue/activation.cuh of the kernels: see ../ptx/types.cuh.
#pragma once
#include "ptx/types.cuh"

enum class Act : int { ClampedSwiGLU = 3 };
struct ActivationConstants { float alpha, limit, up_offset; };

template <Act> float gated(float gate, float up, const ActivationConstants& c) {
    const float g = gate > c.limit ? c.limit : gate, u = up > c.limit ? c.limit : up < -c.limit ? -c.limit : up;
    return g / (1.0f + std::exp(-c.alpha * g)) * (u + c.up_offset);
}
