// Stands in for ptx/wgmma.cuh of the kernels: see types.cuh. e4m3 only; a descriptor is an address. Each thread computes its accumulators when
// it issues the instruction, which is not what a tensor core rounds.
#pragma once
#include "epilogue/quantize.cuh"
#include "ptx/barrier.cuh"

inline u64 k_major_descriptor(u32 tile) { return tile; }
inline u64 advance_descriptor(u64 descriptor, u32 bytes) { return descriptor + bytes; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <u32> void wgmma_wait() {}
template <class D> void pin_accumulators(D&) {}

template <int N> struct WgmmaE4m3 {
    static void multiply(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
        const auto element = [](u64 descriptor, u32 row, u32 k) {
            const u32 at = static_cast<u32>(descriptor) + row * 128 + k;
            return from_e4m3(dynamic_shared_memory[at ^ (at >> 7 & 7) << 4]);
        };
        const u32 lane = lane_index(), warp = running / 32 % 4;
        for (u32 i = 0; i < N / 2; ++i) {
            const u32 row = 16 * warp + lane / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            float sum = accumulate ? d[i] : 0.0f;
            for (u32 k = 0; k < 32; ++k) sum += element(a, row, k) * element(b, column, k);
            d[i] = sum;
        }
    }
};
