// Stands in for ptx/scalar.cuh of the kernels: see types.cuh.
#pragma once
#include "ptx/types.cuh"

inline float reciprocal_approx(float v) { return 1.0f / v; }
inline void count_if_greater(u32& count, u32 a, u32 b) { count += a > b; }
