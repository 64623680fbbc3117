// Squared ReLU without a gate behind the bf16 loop: Z and A = relu(Z + b1)^2 of a tile, both in bf16 through borrowed stages of the ring.
// For up_projection_ungated.cu.
#pragma once
#include "epilogue/activation.cuh"
#include "epilogue/staging.cuh"

template <Config C>
struct UngatedActivation {
    static_assert((C.block_n == 256 || C.block_n == 320) && C.stage_buffers() == 3, "four or five buffers of Z and of A, three to a stage");
    const TensorMap *map_z, *map_a;
    u8 *z, *a;  // z may be null
    const u16* b1;
    i32 width;

    u32 used;  // stages of the ring
    // Z Z Z | Z A A | A A, or A A | A A; with 320 columns Z Z Z | Z Z | A A A | A A, or A A A | A A
    DEVICE static u32 stages_used(const u8* z) { return z == nullptr ? 2 : C.block_n == 256 ? 3 : 4; }
    DEVICE static constexpr bool by_warpgroup() { return false; }
    DEVICE i32 stages(const WorkTile&) const { return static_cast<i32>(used); }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32, u32 warp) const {
        if constexpr (C.block_n == 320) {
            if (z != nullptr) {
                store_stage<0, 3, false>(acc, tile, shared, ring, borrowed, warp);
                store_stage<3, 2, false>(acc, tile, shared, ring, borrowed, warp);
                borrowed.give_back(shared);  // else none would be left for the next tile's operands
            }
            store_stage<0, 3, true>(acc, tile, shared, ring, borrowed, warp);
            store_stage<3, 2, true>(acc, tile, shared, ring, borrowed, warp);
            return;
        }
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
        const auto buffer_of = [&](const TensorMap* map, u8* out, u32 lines, u32 column) -> Destination {
            return {map, {out, static_cast<i64>(width) * 2, width}, lines, tile.column + static_cast<i32>(column), 0};
        };
        u32 lines = borrowed.borrow(shared, ring) + line * LINE;
        if (z != nullptr) {
            if (rows > 0) {
#pragma unroll
                for (u32 i = 0; i < 3; ++i) stage_bf16(acc + i * 32, lines + i * C.buffer_bytes(), lane);
                fence_proxy_async();
                __syncwarp();
                store_lines(3, row, rows, lane, [&](u32 i) { return buffer_of(map_z, z, lines + i * C.buffer_bytes(), i * 64); });
            }
            lines = borrowed.borrow(shared, ring) + line * LINE;
            if (rows > 0) stage_bf16(acc + 96, lines, lane);
        }
        const u32 first_of_a = lines + (z == nullptr ? 0 : C.buffer_bytes());
        if (rows > 0) {
            stage_half(acc, tile, 0, first_of_a, lane);
            if (z != nullptr) store_lines(1, row, rows, lane, [&](u32) { return buffer_of(map_z, z, lines, 192); });
            store_lines(2, row, rows, lane, [&](u32 i) { return buffer_of(map_a, a, first_of_a + i * C.buffer_bytes(), i * 64); });
        }
        lines = borrowed.borrow(shared, ring) + line * LINE;
        if (rows <= 0) return;
        stage_half(acc, tile, 1, lines, lane);
        store_lines(2, row, rows, lane, [&](u32 i) { return buffer_of(map_a, a, lines + i * C.buffer_bytes(), 128 + i * 64); });
    }

    // Count buffers of Z, or of A, from buffer First of the tile on, through one stage.
    template <u32 First, u32 Count, bool Activated>
    DEVICE void store_stage(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                            BorrowedStages<C>& borrowed, u32 warp) const {
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
        const u32 lines = borrowed.borrow(shared, ring) + line * LINE;
        if (rows <= 0) return;
        const i32 column = tile.column + static_cast<i32>(First * 64);
        if constexpr (Activated) activate<Count * 32>(acc + First * 32, tile.expert, column + static_cast<i32>(lane % 4 * 2));
#pragma unroll
        for (u32 i = 0; i < Count; ++i) stage_bf16(acc + (First + i) * 32, lines + i * C.buffer_bytes(), lane);
        fence_proxy_async();
        __syncwarp();
        store_lines(Count, row, rows, lane, [&](u32 i) -> Destination {
            const Rows out{Activated ? a : z, static_cast<i64>(width) * 2, width};
            return {Activated ? map_a : map_z, out, lines + i * C.buffer_bytes(), column + static_cast<i32>(i * 64), 0};
        });
    }

    // A of 128 columns of this warp's tile, the first half or the second, into two buffers, ready for TMA.
    DEVICE void stage_half(float* acc, const WorkTile& tile, u32 half, u32 lines, u32 lane) const {
        float* z = acc + half * 64;
        activate<64>(z, tile.expert, tile.column + static_cast<i32>(half * 128 + lane % 4 * 2));
#pragma unroll
        for (u32 i = 0; i < 2; ++i) stage_bf16(z + i * 32, lines + i * C.buffer_bytes(), lane);
        fence_proxy_async();
        __syncwarp();
    }

    // Z becomes A, for Count accumulators of a thread, the first of which belongs to `column`.
    template <u32 Count>
    DEVICE void activate(float* z, i32 expert, i32 column) const {
        if (b1 != nullptr) {
            const u16* bias = b1 + static_cast<i64>(expert) * width;
#pragma unroll
            for (u32 i = 0; i < Count; i += 4) {
                pin_four(z + i);
                const u32 pair = load_bias_pair(bias, column + static_cast<i32>(i * 2), width);
#pragma unroll
                for (u32 j = 0; j < 4; ++j) z[i + j] += j % 2 == 0 ? bf16_low(pair) : bf16_high(pair);  // rows r and r + 8
            }
        }
#pragma unroll
        for (u32 i = 0; i < Count; i += 4) {
            pin_four(z + i);
#pragma unroll
            for (u32 j = i; j < i + 4; ++j) z[j] = relu(z[j]) * relu(z[j]);
        }
    }
};
