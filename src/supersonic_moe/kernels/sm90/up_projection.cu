// H[r] = X[r] * W1[expert of r]^T and A[r] = act(H[r] + b1), for rows sorted by expert and gated activations. See
// up_projection.py.
//
// A tile is 128 rows x 128 activations. Its B is 128 gate rows and 128 up rows of W1, so gate and up of an activation sit in one
// thread at the same place of the two halves of its accumulators, whatever the order in which the weight stores them.
//
// Constants: those of mainloop.cuh, ACTIVATION, INTERLEAVED (columns of H: gate and up alternate).
#include "activation.cuh"
#include "load.cuh"

constexpr u32 WIDTH = BLOCK_N / 2;  // activations of a tile

// 32 activations' worth of gate and up, alternating, rounded to bf16, into this warp's lines of 64 columns of H.
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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    up_projection(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w,
                  const __grid_constant__ TensorMap map_h, const __grid_constant__ TensorMap map_a, const i32* offsets,
                  const i32* index, const i32 experts, const i32 width, const i32 blocks_k, u8* h, u8* a, const u16* b1,
                  const i32 gate_base, const i32 up_base, const float alpha, const float limit, const float up_offset) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, width, blocks_k};

    const u32 lent_stages = h == nullptr ? 1 : 2;  // six rooms: four of H, two of A

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto load_b = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16 blocks) {
            const i32 gate_half = gate_base != 0;  // [up; gate]: the second half of the weight's rows
            if constexpr (CLUSTER > 1) {           // part 0 is gate, part 1 is up
                tma_load_multicast(tile_b + part * (BYTES_B / 2), &map_w, full, blocks, k, note.column,
                                   static_cast<i32>(part) ^ gate_half, note.expert);
            } else {
                tma_load(tile_b, &map_w, full, k, note.column, gate_half, note.expert);
                tma_load(tile_b + BYTES_B / 2, &map_w, full, k, note.column, 1 - gate_half, note.expert);
            }
        };
        const auto lend = [&](Ring& ring, const TileNote&, u32 loader) { lend_stages(shared, ring, lent_stages, loader); };
        load_ragged_rows<WIDTH>(shared, gemm, &map_x, Unscaled{}, load_b, lend);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        const ActivationConstants constants{alpha, limit, up_offset};
        Ring ring;
        Lent lent;
        float acc[BLOCK_N / 2];
        while (true) {
            const TileNote first = await_tile(shared, ring);
            if (first.row == TileNote::STOP_ROW) break;
            if (first.row + static_cast<i32>(group * GROUP_LINES) >= first.row_end) {
                lent.give_back(shared);
                skip_stages(shared, ring, blocks_k + static_cast<i32>(lent_stages));
                continue;
            }
            const u32 last = multiply_tile<Major::K, Major::K>(
                acc, shared, ring, group, blocks_k, [&] { lent.give_back(shared); }, [](u32) {});
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);

            const u32 lane = fresh_thread_index() % 32, line = first_line(group, fresh_thread_index());
            const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
            float *gate = acc, *up = acc + WIDTH / 2;
            const auto stage_h = [&](u32 i, u32 lines) {
                if constexpr (INTERLEAVED) {
                    stage_interleaved(gate + i * 16, up + i * 16, lines, lane);
                } else {
                    stage_bf16(acc + i * 32, lines, lane);
                }
            };
            const auto store_h = [&](u32 i, u32 lines) {  // column and half of H, seen as (P, 2, I) or, interleaved, as (P, 1, 2 I)
                const i32 column = INTERLEAVED ? 2 * note.column + static_cast<i32>(i) * 64 : note.column + static_cast<i32>(i % 2) * 64;
                const i32 base = INTERLEAVED ? 0 : i < 2 ? gate_base : up_base;
                const Rows out{h + base * 2, static_cast<i64>(width) * 4, INTERLEAVED ? 2 * width : width};
                store_lines(&map_h, out, lines, row, rows, column, base != 0, lane);
            };
            u32 lines = lent.borrow(shared, ring) + line * LINE;
            if (h != nullptr) {
                if (rows > 0) {
#pragma unroll
                    for (u32 i = 0; i < ROOMS; ++i) stage_h(i, lines + i * ROOM_BYTES);
                    fence_proxy_async();
                    __syncwarp();
#pragma unroll
                    for (u32 i = 0; i < ROOMS; ++i) store_h(i, lines + i * ROOM_BYTES);
                    if (lane == 0) tma_commit();
                }
                lines = lent.borrow(shared, ring) + line * LINE;
                if (rows > 0) stage_h(ROOMS, lines);
            }
            if (rows <= 0) continue;
            if (b1 != nullptr) {
                const u16* bias = b1 + static_cast<i64>(note.expert) * 2 * width;
                const i32 first = note.column + static_cast<i32>(lane % 4 * 2);
#pragma unroll
                for (u32 i = 0; i < WIDTH / 2; i += 4) {
                    float g[2], u[2];
                    pin_four(gate + i), pin_four(up + i);
                    load_bias(bias, first + static_cast<i32>(i * 2), width, gate_base, up_base, g, u);
#pragma unroll
                    for (u32 j = 0; j < 4; ++j) gate[i + j] += g[j % 2], up[i + j] += u[j % 2];  // rows r and r + 8
                }
            }
#pragma unroll
            for (u32 i = 0; i < WIDTH / 2; i += 4) {
                pin_four(gate + i), pin_four(up + i);
#pragma unroll
                for (u32 j = i; j < i + 4; ++j) gate[j] = gated<static_cast<Act>(ACTIVATION)>(gate[j], up[j], constants);
            }
            const u32 room_of_a = lines + (h == nullptr ? 0 : ROOM_BYTES);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) stage_bf16(acc + i * 32, room_of_a + i * ROOM_BYTES, lane);
            fence_proxy_async();
            __syncwarp();
            if (h != nullptr) store_h(ROOMS, lines);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const i32 column = note.column + static_cast<i32>(i * 64);
                store_lines(&map_a, {a, static_cast<i64>(width) * 2, width}, room_of_a + i * ROOM_BYTES, row, rows, column, 0, lane);
            }
            if (lane == 0) tma_commit();
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
