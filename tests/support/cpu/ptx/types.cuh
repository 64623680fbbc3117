// Device code on a CPU: the names of CUDA C++ that kernels use, for g++. A thread of a block is a fiber that runs until it waits for others
// of its warp or block; blocks run one after the other, or each in a thread of its own. Stands in for ptx/types.cuh of the kernels.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE inline
#ifndef __shared__
#define __shared__ static
#endif
#define __align__(bytes) __attribute__((aligned(bytes)))

struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
struct int4 { i32 x, y, z, w; };
struct int2 { i32 x, y; };
struct float2 { float x, y; };
struct uint2 { u32 x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int4 make_int4(i32 x, i32 y, i32 z, i32 w) { return {x, y, z, w}; }
inline int2 make_int2(i32 x, i32 y) { return {x, y}; }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }

// ---- fibers ----

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(65536);
    bool done;
    u64 warp_waits, block_waits;
};
struct Warp {
    std::array<std::array<u64, 32>, 2> values;  // of this wait and the next
    std::array<u32, 2> arrived;
    u64 passed;
};

inline thread_local std::vector<Fiber> fibers(512);
inline thread_local std::array<Warp, 16> warps;
inline thread_local std::function<void()> body;
inline thread_local ucontext_t finished;
inline thread_local u32 running, threads, block_arrived;
inline thread_local u64 block_passed;

inline void next_fiber() {
    const u32 from = running;
    do running = (running + 1) % threads;
    while (fibers[running].done && running != from);
    if (running != from) swapcontext(&fibers[from].context, &fibers[running].context);
}
inline void fiber() {
    body();
    fibers[running].done = true;
    next_fiber();
    setcontext(&finished);
}
template <class F> void run_block(u32 count, F f) {
    body = f, threads = count, running = 0, block_arrived = 0, block_passed = 0, warps = {};
    for (u32 i = 0; i < count; ++i) {
        Fiber& made = fibers[i];
        made.done = false, made.warp_waits = made.block_waits = 0;
        getcontext(&made.context);
        made.context.uc_stack.ss_sp = made.stack.data(), made.context.uc_stack.ss_size = made.stack.size();
        makecontext(&made.context, fiber, 0);
    }
    swapcontext(&finished, &fibers[0].context);
}

// ---- identity, warps, blocks ----

struct ThreadIdx { operator u32() const { return running; } };
inline struct { ThreadIdx x; } threadIdx;
struct Index { u32 x; };
inline thread_local Index blockIdx;
inline Index gridDim, blockDim;
inline u32 lane_index() { return running % 32; }
inline u32 warp_index() { return running / 32; }
inline bool elect_one() { return lane_index() == 0; }

// What each lane of this thread's warp brings.
template <class T> std::array<T, 32> of_warp(T value) {
    Warp& warp = warps[running / 32];
    const u64 wait = fibers[running].warp_waits++;
    auto& values = warp.values[wait % 2];
    std::memcpy(&values[lane_index()], &value, sizeof value);
    if (++warp.arrived[wait % 2] == 32) warp.arrived[wait % 2] = 0, warp.passed = wait + 1;
    while (warp.passed <= wait) next_fiber();
    std::array<T, 32> all;
    for (u32 lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], &values[lane], sizeof value);
    return all;
}
inline void __syncwarp() { of_warp(0); }
inline void __syncthreads() {
    const u64 wait = fibers[running].block_waits++;
    if (++block_arrived == threads) block_arrived = 0, block_passed = wait + 1;
    while (block_passed <= wait) next_fiber();
}
template <class T> T __shfl_sync(u32, T v, u32 lane) { return of_warp(v)[lane % 32]; }
template <class T> T __shfl_xor_sync(u32, T v, u32 mask) { return of_warp(v)[lane_index() ^ mask]; }
template <class T> T __shfl_up_sync(u32, T v, u32 by) { return of_warp(v)[lane_index() < by ? lane_index() : lane_index() - by]; }
inline u32 __match_any_sync(u32, u32 v) {
    u32 same = 0;
    const auto all = of_warp(v);
    for (u32 lane = 0; lane < 32; ++lane) same |= (all[lane] == v) << lane;
    return same;
}
inline u32 __ballot_sync(u32, bool v) {
    u32 found = 0;
    const auto all = of_warp<u32>(v);
    for (u32 lane = 0; lane < 32; ++lane) found |= all[lane] << lane;
    return found;
}
inline u32 __reduce_max_sync(u32, u32 v) { return std::ranges::max(of_warp(v)); }
inline u32 __reduce_min_sync(u32, u32 v) { return std::ranges::min(of_warp(v)); }

// ---- numbers and memory ----

template <class To, class From> To bits_of(From v) {
    To bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline float __uint_as_float(u32 v) { return bits_of<float>(v); }
inline u32 __float_as_uint(float v) { return bits_of<u32>(v); }
inline i32 __float_as_int(float v) { return bits_of<i32>(v); }
inline float bf16_low(u32 packed) { return __uint_as_float(packed << 16); }
inline float bf16_high(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }
inline u32 bf16_bits(float v) {
    const u32 bits = __float_as_uint(v);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline i32 __popc(u32 v) { return __builtin_popcount(v); }
inline i32 __clz(i32 v) { return v == 0 ? 32 : __builtin_clz(v); }
inline i32 __ffs(u32 v) { return __builtin_ffs(v); }
inline void atomicAdd(u32* to, u32 v) { *to += v; }
template <class T> T __ldg(const T* from) { return *from; }
