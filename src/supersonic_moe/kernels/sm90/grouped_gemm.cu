// D[r] = A[r] * B[expert of r] for rows sorted by expert, bf16. See grouped_gemm.py for layout, maths, bytes and FLOPs.
//
//   warps 0..3   load: walk the tiles, keep the ring full
//   warps 4..11  two math warpgroups of 64 rows each
//
// Constants: those of mainloop.cuh, and B_MN_MAJOR.
#include "load.cuh"

constexpr u32 LENT_STAGES = 2, ROOMS_EACH = BLOCK_N / 64 / LENT_STAGES;  // rooms of 64 columns

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                 const __grid_constant__ TensorMap map_d, const i32* offsets, const i32* index, const i32 experts, const i32 columns,
                 const i32 blocks_k, u8* d, const i64 d_row_bytes) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, columns, blocks_k};

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto load_b = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16 blocks) {
            if constexpr (B_MN_MAJOR) {
                load_b_mn_major(tile_b, &map_b, full, k, note.column, note.expert, part, blocks);
            } else if constexpr (CLUSTER > 1) {
                const u32 first = part * (BLOCK_N / CLUSTER);
                tma_load_multicast(tile_b + first * LINE, &map_b, full, blocks, k, note.column + first, note.expert);
            } else {
                tma_load(tile_b, &map_b, full, k, note.column, note.expert);
            }
        };
        const auto lend = [&](Ring& ring, const TileNote&, u32 loader) { lend_stages(shared, ring, LENT_STAGES, loader); };
        load_ragged_rows<BLOCK_N>(shared, gemm, &map_a, Unscaled{}, load_b, lend);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        Ring ring;
        Lent lent;
        float acc[BLOCK_N / 2];
        while (true) {
            const TileNote first = await_tile(shared, ring);
            if (first.row == TileNote::STOP_ROW) break;
            if (first.row + static_cast<i32>(group * GROUP_LINES) >= first.row_end) {
                lent.give_back(shared);
                skip_stages(shared, ring, blocks_k + static_cast<i32>(LENT_STAGES));
                continue;
            }
            constexpr Major major_b = B_MN_MAJOR ? Major::MN : Major::K;
            const u32 last = multiply_tile<Major::K, major_b>(
                acc, shared, ring, group, blocks_k, [&] { lent.give_back(shared); }, [](u32) {});
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);

            const u32 lane = fresh_thread_index() % 32, line = first_line(group, fresh_thread_index());
            const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
#pragma unroll
            for (u32 stage = 0; stage < LENT_STAGES; ++stage) {
                const u32 lines = lent.borrow(shared, ring) + line * LINE;
                if (rows <= 0) continue;
#pragma unroll
                for (u32 i = 0; i < ROOMS_EACH; ++i) stage_bf16(acc + (stage * ROOMS_EACH + i) * 32, lines + i * ROOM_BYTES, lane);
                fence_proxy_async();
                __syncwarp();
#pragma unroll
                for (u32 i = 0; i < ROOMS_EACH; ++i) {
                    const i32 column = note.column + static_cast<i32>((stage * ROOMS_EACH + i) * 64);
                    store_lines(&map_d, {d, d_row_bytes, columns}, lines + i * ROOM_BYTES, row, rows, column, 0, lane);
                }
                if (lane == 0) tma_commit();
            }
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // no block leaves while another may still arrive on its barriers
}
