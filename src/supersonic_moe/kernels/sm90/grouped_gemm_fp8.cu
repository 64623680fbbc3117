// D[r] = A[r] * B[expert of r] for rows sorted by expert, e4m3 with block scales. See grouped_gemm_fp8.py for layout, maths, bytes and
// FLOPs. Roles as in grouped_gemm.cu.
//
// A tile waits in registers until the first product of the next one is in flight; then its rows go through 64 KB of staging to TMA.
//
// Constants: those of mainloop.cuh.
#include "mainloop_fp8.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm_fp8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_scale_a,
                     const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets, const i32* index,
                     const i32 experts, const i32 columns, const i32 blocks_k, const float* scale_a, const i64 scale_a_row,
                     const float* scale_b, const i64 scale_b_expert, const i32 scale_b_column, const i32 scale_b_k, u8* d,
                     const i64 d_row_bytes) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, columns, blocks_k};

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto blocks_of = [&](const TileNote& note) -> ColumnBlocks {
            const i32 first = note.column / 128, last = (columns - 1) / 128;
            return {min(first, last), min(first + 1, last)};
        };
        const Scales<decltype(blocks_of)> scales{&map_scale_a, scale_a, scale_a_row, scale_b, scale_b_expert, scale_b_column, scale_b_k, blocks_of};
        const auto load_b = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16) {
            if (part == 0) tma_load(tile_b, &map_b, full, k, note.column, note.expert);
        };
        const auto nothing_more = [](Ring&, const TileNote&, u32) {};
        load_ragged_rows<BLOCK_N>(shared, gemm, &map_a, scales, load_b, nothing_more);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        const Operands operands(shared, group);
        Ring ring;
        TileNote held{TileNote::STOP_ROW, 0, 0, 0, 0};  // the tile in the accumulators
        float acc[BLOCK_N / 2];
        const auto store_tile = [&] {
            const u32 lane = fresh_thread_index() % 32, line = first_line(group, fresh_thread_index());
            const i32 row = held.row + static_cast<i32>(line), rows = held.row_end - row;
            if (held.row == TileNote::STOP_ROW || rows <= 0) return;
            const u32 lines = shared.staging() + line * LINE;
            tma_wait_read<0>();
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < BLOCK_N / 64; ++i) stage_bf16(acc + i * 32, lines + i * ROOM_BYTES, lane);
            fence_proxy_async();
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < BLOCK_N / 64; ++i)
                store_lines(&map_d, {d, d_row_bytes, columns}, lines + i * ROOM_BYTES, row, rows, held.column + static_cast<i32>(i * 64), 0, lane);
            if (lane == 0) tma_commit();
        };
        while (true) {
            const TileNote note = await_note(shared, ring);
            if (note.row == TileNote::STOP_ROW) break;
            if (note.row + static_cast<i32>(group * GROUP_LINES) >= note.row_end) {
                skip_stages(shared, ring, blocks_k);
                continue;
            }
            multiply_stages<false>(acc, shared, operands.of_tile(note.row), ring, note.blocks_k, store_tile);
            held = note;
        }
        store_tile();
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
