// Gated activation behind the bf16 loop: gate and up of a tile, which sit in one thread at the same place of the two halves of its
// accumulators, or in pairs next to each other, to A = act(Z + b1), and Z if it is wanted, both in bf16 through borrowed stages of the
// ring. For up_projection.cu.
#pragma once
#include "epilogue/activation.cuh"
#include "epilogue/staging.cuh"

// 32 activations' worth of gate and up, alternating, rounded to bf16, into this warp's lines of 64 columns of Z.
DEVICE void stage_interleaved(float* gate, float* up, u32 lines, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 16; i += 2) {  // row r (i % 4 == 0) or r + 8, activations c and c + 1
        if (i % 4 == 0) pin_four(gate + i), pin_four(up + i);
        const u32 at = swizzle<LINE>((lane / 4 + i % 4 / 2 * 8) * LINE + i / 4 * 32 + lane % 4 * 8);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(lines + at), "r"(pack_bf16(gate[i], up[i])),
                     "r"(pack_bf16(gate[i + 1], up[i + 1]))
                     : "memory");
    }
}

// Activations of a thread that has gate and up in pairs, in place: acc[4 * j], acc[4 * j + 1] of row r and the next two of row r + 8 become
// activation 4 * j + lane % 4 of both rows, acc[2 * j] and acc[2 * j + 1]. b1: (experts, 2 * width), alternating, or null.
template <Act Kind, u32 Count>
DEVICE void activate_pairs(float* acc, const u16* b1, i32 expert, i32 column, i32 width, const ActivationConstants& constants, u32 lane) {
    const u16* bias = b1 == nullptr ? nullptr : b1 + static_cast<i64>(expert) * 2 * width;
    const i32 first = 2 * (column + static_cast<i32>(lane % 4));
#pragma unroll
    for (u32 i = 0; i < Count; i += 4) {
        pin_four(acc + i);
        const u32 pair = bias == nullptr ? 0 : load_bias_pair(bias, first + static_cast<i32>(i * 2), 2 * width);
#pragma unroll
        for (u32 row = 0; row < 2; ++row)
            acc[i / 2 + row] = gated<Kind>(acc[i + 2 * row] + bf16_low(pair), acc[i + 2 * row + 1] + bf16_high(pair), constants);
    }
}

// 64 of these activations, rounded to bf16, into this warp's lines. Of two lanes with neighbouring columns the even one takes row r of
// both, the odd one row r + 8; they write to different halves of 16 bytes, since rows r and r + 8 lie in the same banks.
DEVICE void stage_every_fourth(float* a, u32 lines, u32 lane) {
    const bool odd = lane % 2 != 0;
    const u32 first = odd ? 0x3276 : 0x5410, second = odd ? 0x1054 : 0x7632;  // the lower column in the lower half
#pragma unroll
    for (u32 j = 0; j < 16; j += 2) {
        float* d = a + 2 * j;
        pin_four(d);
        const u32 row = pack_bf16(d[0], d[2]), row_8 = pack_bf16(d[1], d[3]);  // columns 4 j and 4 j + 4
        const u32 own = odd ? row_8 : row, other = __shfl_xor_sync(0xffffffffu, odd ? row : row_8, 1);
        const u32 at = lines + (swizzle<LINE>((lane / 4 + lane % 2 * 8) * LINE + j * 8 + lane % 4 / 2 * 4) ^ lane % 2 * 8);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(__byte_perm(own, other, first)) : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at ^ 8), "r"(__byte_perm(own, other, second)) : "memory");
    }
}

// Pairs: gate and up of an activation are columns 2 i and 2 i + 1 of the tile.
template <Config C, Act Kind, bool Pairs = false>
struct GatedActivation {
    static constexpr u32 WIDTH = C.block_n / 2;  // activations of a tile
    static_assert(C.block_n == 256 && C.stage_buffers() == 3, "four buffers of Z and two of A, three to a stage");
    const TensorMap *map_z, *map_a;
    u8 *z, *a;  // z may be null
    const u16* b1;
    i32 width, gate_base, up_base;
    bool interleaved;
    ActivationConstants constants;

    u32 used;  // stages of the ring
    DEVICE static u32 stages_used(const u8* z) { return z == nullptr ? 1 : 2; }  // six buffers: four of Z, two of A
    DEVICE static constexpr bool by_warpgroup() { return false; }
    DEVICE i32 stages(const WorkTile&) const { return static_cast<i32>(used); }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32, u32 warp) const {
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
        float *gate = acc, *up = acc + WIDTH / 2;
        const auto stage_z = [&](u32 i, u32 lines) {
            if constexpr (Pairs) {
                stage_bf16(acc + i * 32, lines, lane);
            } else if (interleaved) {
                stage_interleaved(gate + i * 16, up + i * 16, lines, lane);
            } else {
                stage_bf16(acc + i * 32, lines, lane);
            }
        };
        const auto place_of_z = [&](u32 i, u32 lines) -> Destination {  // of Z, seen as (P, 2, I) or, interleaved, as (P, 1, 2 I)
            const i32 column = interleaved ? 2 * tile.column + static_cast<i32>(i) * 64 : tile.column + static_cast<i32>(i % 2) * 64;
            const i32 base = interleaved ? 0 : i < 2 ? gate_base : up_base;
            const Rows out{z + base * 2, static_cast<i64>(width) * 4, interleaved ? 2 * width : width};
            return {map_z, out, lines, column, base != 0};
        };
        u32 lines = borrowed.borrow(shared, ring) + line * LINE;
        if (z != nullptr) {
            if (rows > 0) {
#pragma unroll
                for (u32 i = 0; i < C.stage_buffers(); ++i) stage_z(i, lines + i * C.buffer_bytes());
                fence_proxy_async();
                __syncwarp();
                store_lines(C.stage_buffers(), row, rows, lane, [&](u32 i) { return place_of_z(i, lines + i * C.buffer_bytes()); });
            }
            lines = borrowed.borrow(shared, ring) + line * LINE;
            if (rows > 0) stage_z(C.stage_buffers(), lines);
        }
        if (rows <= 0) return;
        if constexpr (Pairs) {
            activate_pairs<Kind, C.accumulators()>(acc, b1, tile.expert, tile.column, width, constants, lane);
        } else {
            add_bias<WIDTH / 2>(gate, up, interleaved, b1, tile.expert, tile.column, width, gate_base, up_base, lane);
            activate<Kind, WIDTH / 2>(gate, up, constants);
        }
        const u32 buffer_of_a = lines + (z == nullptr ? 0 : C.buffer_bytes());
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 buffer = buffer_of_a + i * C.buffer_bytes();
            Pairs ? stage_every_fourth(acc + i * 32, buffer, lane) : stage_bf16(acc + i * 32, buffer, lane);
        }
        fence_proxy_async();
        __syncwarp();
        if (z != nullptr) store_lines(1, row, rows, lane, [&](u32) { return place_of_z(C.stage_buffers(), lines); });
        store_lines(2, row, rows, lane, [&](u32 i) -> Destination {
            const Rows out{a, static_cast<i64>(width) * 2, width};
            return {map_a, out, buffer_of_a + i * C.buffer_bytes(), tile.column + static_cast<i32>(i * 64), 0};
        });
    }
};
