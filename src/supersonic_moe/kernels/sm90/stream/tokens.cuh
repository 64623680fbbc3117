// Where x of a token lies and where its output goes: in the tensors of a caller or, with RANKS, where other ranks have written it and where
// they read it.
#pragma once
#include "stream/chunk.cuh"
#if RANKS
#include "exchange/flags.cuh"

// The tokens of all ranks, `places` for each, in order of ranks. This rank's block holds x of those that have an expert here, codes and scales
// by rows. The block of a token's rank, as this GPU reaches it, has a row of `hidden` for what each rank makes of the token.
struct Tokens {
    static constexpr bool x_bf16 = false;
    static constexpr bool writes_zeros = false;  // the others know which of their tokens have no row here
    Wait flags;
    u64 epoch;  // of x
    i32 places, hidden;
    u64 codes_at, scales_at, out_at;  // bytes from the start of a block
    mutable u32 there = 0;            // ranks whose x is known to be there

    DEVICE u32 ranks() const { return flags.ranks; }
    DEVICE u32 of_rank() const { return places; }
    DEVICE u8* block(i64 rank) const { return reinterpret_cast<u8*>(flags.words[rank]); }

    // A warp, before it reads x of the token.
    DEVICE void wait(i32 token) const {
        const u32 bit = 1u << token / places;
        if (there & bit) return;
        wait_for_written(flags, bit, epoch);
        there |= bit;
    }
    DEVICE const u8* codes(i64 token) const { return block(flags.rank) + codes_at + token * hidden; }
    // No cache that is not coherent: another GPU has written it while this kernel ran.
    DEVICE uint4 load(const void* address) const {
        uint4 v;
        asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
        return v;
    }
    DEVICE float scale(i64 token, u32 k) const {
        const float* const at = reinterpret_cast<const float*>(block(flags.rank) + scales_at) + token * (hidden / 128) + k;
        float v;
        asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
        return v;
    }
    DEVICE u16* out(i64 token) const {
        const i64 place = static_cast<i64>(flags.rank) * places + token % places;
        return reinterpret_cast<u16*>(block(token / places) + out_at) + place * hidden;
    }
};
#else
struct Tokens {
    static constexpr bool writes_zeros = true;
    const void* x;  // (tokens, hidden) e4m3 with scales, or bf16
    bool x_bf16;
    const float* x_scale;
    i64 x_scale_row, x_scale_k;
    u16* to;  // (tokens, hidden) bf16
    i32 tokens, hidden;

    DEVICE static constexpr u32 ranks() { return 1; }
    DEVICE u32 of_rank() const { return tokens; }
    DEVICE void wait(i32) const {}
    DEVICE const u8* codes(i64 token) const { return static_cast<const u8*>(x) + token * hidden; }
    DEVICE uint4 load(const void* address) const { return load_chunk(address); }
    DEVICE float scale(i64 token, u32 k) const { return __ldg(x_scale + token * x_scale_row + k * x_scale_k); }
    DEVICE u16* out(i64 token) const { return to + token * hidden; }
};
#endif
