// Single instructions that no expression of C++ compiles to.
#pragma once
#include "ptx/types.cuh"

// 1 / v with an error of 1 ulp; subnormal numbers count as zero.
DEVICE float reciprocal_approx(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// count += a > b, in two instructions; the compiler takes three.
DEVICE void count_if_greater(u32& count, u32 a, u32 b) {
    asm("{ .reg .pred p; setp.gt.u32 p, %1, %2; @p add.u32 %0, %0, 1; }" : "+r"(count) : "r"(a), "r"(b));
}
