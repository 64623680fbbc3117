// Weight gradient of a tile behind the FP8 loop, and its walk over the tiles. For grouped_wgrad_fp8.cu.
//
// A tile waits in registers until the next one multiplies: its first 128 columns leave during the first product of that tile, the others
// during the second, each through staging buffers of its own (bf16) or, fp32, through the same 64 KB, once TMA has read them. The walk is
// not for_each_scaled_tile: the last tile leaves as one without positions does, with nothing to hide behind.
#pragma once
#include "epilogue/gradient_staging.cuh"
#include "gemm/k_loop_fp8.cuh"

// A warp's copy of the tile that it holds, in shared memory, where a kernel that gathers has row indices: the tile stands beside its first
// stage, which is handed back before the tile is stored, and in registers it would be three too many in the main loop.
template <Config C>
DEVICE u32 held_tile(const SharedMemory<C>& shared) { return shared.row_index(fresh_thread_index() / 32 * 8); }

template <Config C, bool Fp32>
struct DeferredWeightGradient {
    static_assert(!C.gather && C.cluster == 1 && C.block_n == 256, "whole tiles, each block for itself, a half of each during a product");
    static constexpr u32 BUFFERS_EACH = C.block_n / BUFFER_COLUMNS<Fp32> / 2;  // of half a tile
    static constexpr u32 STAGING_BYTES = (Fp32 ? 1 : 2) * BUFFERS_EACH * C.buffer_bytes();
    const SharedMemory<C> shared;
    Gradient to;
    u32 group, warp;
    bool held = false;  // a tile is in the accumulators; which one, held_tile says to the thread that stores it

    DEVICE void store_half(float (&acc)[C.accumulators()], u32 half) const {
        if (!held) return;
        const u32 thread = fresh_thread_index(), line = own_line(to, warp);
        const u32 lines = shared.staging() + (Fp32 ? 0 : half * BUFFERS_EACH * C.buffer_bytes()) + line * LINE;
        if (Fp32 || half == 0) {
            tma_wait_read<0>();
            sync_writers(to, group);
        }
#pragma unroll
        for (u32 i = 0; i < BUFFERS_EACH; ++i) {
            float* columns = acc + (half * BUFFERS_EACH + i) * (BUFFER_COLUMNS<Fp32> / 2);
            fill_buffer<Fp32>(to, columns, lines + i * C.buffer_bytes(), thread);
        }
        fence_proxy_async();
        sync_writers(to, group);
        in_issuing_thread(to, warp, [&] {
            const WorkTile tile = load_work_tile(held_tile(shared));
#pragma unroll
            for (u32 i = 0; i < BUFFERS_EACH; ++i)
                store_buffer<Fp32>(to, lines + i * C.buffer_bytes(), tile.row + static_cast<i32>(line),
                           tile.column + static_cast<i32>((half * BUFFERS_EACH + i) * BUFFER_COLUMNS<Fp32>), tile.expert);
            tma_commit();
        });
    }
    // The tile whose first stage is this warp's is the one in the accumulators from here on.
    DEVICE void hold(const Ring<C>& ring) {
        in_issuing_thread(to, warp, [&] { write_work_tile(held_tile(shared), load_work_tile(shared.work_tile(ring.stage))); });
        held = true;
    }
    // Every tile of this block.
    DEVICE void run(i32 rows) {
        const OperandAddresses<C> operands(shared, group);
        Ring<C> ring;
        float acc[C.accumulators()];
        while (true) {
            const WorkTile tile = await_tile(shared, ring);
            const bool stop = tile.row == WorkTile::STOP_ROW;
            if (!stop && tile.row + static_cast<i32>(group * GROUP_ROWS) >= rows) {
                skip_stages(shared, ring, max(tile.blocks_k, 1));
                continue;
            }
            if (!stop && tile.blocks_k > 0) {
                multiply_stages<false>(acc, shared, operands.of_tile(tile.row), ring, tile.blocks_k, [&](u32 half) {
                    store_half(acc, half);
                    if (half == 1) hold(ring);
                });
                continue;
            }
            store_half(acc, 0);
            store_half(acc, 1);
            if (stop) break;
            hold(ring);
#pragma unroll
            for (u32 i = 0; i < C.block_n / 2; ++i) acc[i] = 0.0f;
            skip_stages(shared, ring, 1);
        }
    }
};
