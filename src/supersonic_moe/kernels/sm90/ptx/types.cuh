// Scalar types, addresses, lane identity, number formats and the shared-memory swizzle: what every kernel here builds on.
//
// NVRTC compiles these files without any toolkit header, so the few names that <cstdint> and cuda_bf16.h would give are
// defined below. Values of bf16 and fp8 travel packed in integer registers; arithmetic happens in fp32.
//
// The constants of a KernelSpec are macros (BLOCK_N, STAGES, CLUSTER, ..): no name in a header may be one of theirs, which is why
// members of Config are lower case.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE __device__ __forceinline__

// A tensor map as cuTensorMapEncodeTiled writes it; kernels take it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// ---- addresses and identity ----

// Address of `pointer`, which points into this block's shared memory, in the 32-bit window that PTX instructions use.
DEVICE u32 smem_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

DEVICE u32 lane_index() { return threadIdx.x & 31; }

// Warp of this thread as a value the compiler knows to be the same in all lanes, so that role branches stay uniform.
DEVICE u32 warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// True in exactly one lane of a converged warp.
DEVICE bool elect_one() {
    u32 elected;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

// Stops the grid with an error that the host sees at its next synchronisation.
DEVICE void trap() { asm volatile("trap;"); }

// ---- number formats; `low` is the element at the lower address ----

DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float bf16_low(u32 packed) { return __uint_as_float(packed << 16); }
DEVICE float bf16_high(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }

// Two e4m3 values, rounded to nearest even; beyond +-448 they saturate.
DEVICE u16 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

// Two e4m3 values in the low half of `packed`, by way of f16, which holds each of them.
DEVICE void unpack_e4m3(u32 packed, float& low, float& high) {
    asm("{\n"
        ".reg .b16 pair, ignored, l, h;\n"
        ".reg .b32 both;\n"
        "mov.b32 {pair, ignored}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 both, pair;\n"
        "mov.b32 {l, h}, both;\n"
        "cvt.f32.f16 %0, l;\n"
        "cvt.f32.f16 %1, h;\n"
        "}\n"
        : "=f"(low), "=f"(high)
        : "r"(packed));
}

// ---- shared-memory swizzle ----

// Where the TMA engine puts byte `offset` of a tile whose rows are Span bytes and whose base is aligned to 8 * Span:
// within each group of eight 16-byte columns, the column index is XORed with the index of the 128-byte line.
//   Span 128: bits 4..6 ^= bits 7..9     Span 64: bits 4..5 ^= bits 7..8     Span 32: bit 4 ^= bit 7
template <u32 Span>
DEVICE u32 swizzle(u32 offset) {
    static_assert(Span == 32 || Span == 64 || Span == 128, "TMA swizzles rows of 32, 64 or 128 bytes");
    return offset ^ ((offset >> 3) & (Span - 16));
}
