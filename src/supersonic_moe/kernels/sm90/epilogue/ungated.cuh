// Squared ReLU without a gate behind the bf16 loop: Z and A = relu(Z + b1)^2 of a tile, both in bf16 through borrowed stages of the ring.
// For up_projection_ungated.cu.
#pragma once
#include "epilogue/activation.cuh"
#include "epilogue/staging.cuh"

template <Config C>
struct UngatedActivation {
    static constexpr u32 BUFFERS = C.block_n / 64, EACH = C.stage_buffers();  // of Z, and of A; of a stage
    static_assert(C.block_n % 64 == 0, "whole buffers");
    const TensorMap *map_z, *map_a;
    u8 *z, *a;  // z may be null
    const u16* b1;
    i32 width;

    u32 used;  // stages of the ring
    DEVICE static u32 stages_used(const u8* z) { return ((z == nullptr ? BUFFERS : 2 * BUFFERS) + EACH - 1) / EACH; }
    DEVICE static constexpr bool by_warpgroup() { return false; }
    DEVICE i32 stages(const WorkTile&) const { return static_cast<i32>(used); }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32, u32 warp) const {
        if (z != nullptr) {
            store<BUFFERS>(acc, tile, shared, ring, borrowed, warp);
        } else {
            store<0>(acc, tile, shared, ring, borrowed, warp);
        }
    }

    // Buffers of Z, then those of A, as many to a stage as fit: Z Z Z | Z A A | A A of 256 columns.
    template <u32 OfZ>
    DEVICE void store(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                      BorrowedStages<C>& borrowed, u32 warp) const {
        constexpr u32 all = OfZ + BUFFERS;
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
#pragma unroll
        for (u32 first = 0; first < all; first += EACH) {
            if (all > (C.stages - 1) * EACH && first == 2 * EACH) borrowed.give_back(shared);  // else none is left for the next tile
            const u32 lines = borrowed.borrow(shared, ring) + line * LINE, count = min(EACH, all - first);
            if (rows <= 0) continue;
#pragma unroll
            for (u32 i = 0; i < count; ++i) {
                const u32 part = first + i < OfZ ? first + i : first + i - OfZ;
                if (first + i >= OfZ) activate(acc + part * 32, tile.expert, tile.column + static_cast<i32>(part * 64 + lane % 4 * 2));
                stage_bf16(acc + part * 32, lines + i * C.buffer_bytes(), lane);
            }
            fence_proxy_async();
            __syncwarp();
            store_lines(count, row, rows, lane, [&](u32 i) -> Destination {
                const bool of_z = first + i < OfZ;
                const u32 part = of_z ? first + i : first + i - OfZ;
                const Rows out{of_z ? z : a, static_cast<i64>(width) * 2, width};
                return {of_z ? map_z : map_a, out, lines + i * C.buffer_bytes(), tile.column + static_cast<i32>(part * 64), 0};
            });
        }
    }

    // Z becomes A: a thread's part of 64 columns, its first being `column`.
    DEVICE void activate(float* z, i32 expert, i32 column) const {
        if (b1 != nullptr) {
            const u16* bias = b1 + static_cast<i64>(expert) * width;
#pragma unroll
            for (u32 i = 0; i < 32; i += 4) {
                pin_four(z + i);
                const u32 pair = load_bias_pair(bias, column + static_cast<i32>(i * 2), width);
#pragma unroll
                for (u32 j = 0; j < 4; ++j) z[i + j] += j % 2 == 0 ? bf16_low(pair) : bf16_high(pair);  // rows r and r + 8
            }
        }
#pragma unroll
        for (u32 i = 0; i < 32; i += 4) {
            pin_four(z + i);
#pragma unroll
            for (u32 j = i; j < i + 4; ++j) z[j] = relu(z[j]) * relu(z[j]);
        }
    }
};
