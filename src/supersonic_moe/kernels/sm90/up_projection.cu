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

// 32 activations' worth of gate and up, alternating, rounded to bf16, into a panel of 64 columns of H.
DEVICE void stage_interleaved(float* gate, float* up, u32 panel, u32 thread) {
    const u32 row = thread % 128 / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {  // 8 activations: this thread has two of row and two of row + 8
        float *g = gate + part * 4, *u = up + part * 4;
        pin_four(g), pin_four(u);
        const u32 byte = part * 32 + thread % 4 * 8;
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(panel + swizzle<128>(row * LINE + byte)), "r"(pack_bf16(g[0], u[0])),
                     "r"(pack_bf16(g[1], u[1]))
                     : "memory");
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(panel + swizzle<128>((row + 8) * LINE + byte)),
                     "r"(pack_bf16(g[2], u[2])), "r"(pack_bf16(g[3], u[3]))
                     : "memory");
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    up_projection(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w,
                  const __grid_constant__ TensorMap map_h, const __grid_constant__ TensorMap map_a, const i32* offsets, const i32* index, const i32 experts, const i32 width,
                  const i32 blocks_k, u8* h, u8* a, const u16* b1, const i32 gate_base, const i32 up_base,
                  const float alpha, const float limit, const float up_offset) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, width, blocks_k};

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto load_b = [&](u32 tile_b, u32 full, i32 k, const TileNote& note) {
            const i32 gate_half = gate_base != 0;  // [up; gate]: the second half of the weight's rows
            if constexpr (CLUSTER > 1) {  // this block loads the gate half (rank 0) or the up half for both
                const u32 rank = cluster_block_rank();
                tma_load_multicast(tile_b + rank * (BYTES_B / 2), &map_w, full, (1 << CLUSTER) - 1, k, note.column,
                                   static_cast<i32>(rank) ^ gate_half, note.expert);
            } else {
                tma_load(tile_b, &map_w, full, k, note.column, gate_half, note.expert);
                tma_load(tile_b + BYTES_B / 2, &map_w, full, k, note.column, 1 - gate_half, note.expert);
            }
        };
        load_ragged_rows<WIDTH>(shared, gemm, &map_x, load_b, [](Ring&, const TileNote&, u32) {});
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        Ring ring;
        u32 panel_index = 0;
        float acc[BLOCK_N / 2];
        while (true) {
            mbarrier_wait(shared.full(ring.stage), ring.phase);
            if (__shfl_sync(0xffffffffu, read_note(shared.note(ring.stage)).row, 0) == TileNote::STOP_ROW) break;
            const u32 last = multiply_tile<Major::K, Major::K>(acc, shared, ring, group, blocks_k, [](u32) {});
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);

            const i32 row = note.row + static_cast<i32>(group * 64), rows = note.row_end - row;
            if (rows <= 0) continue;
            float *gate = acc, *up = acc + WIDTH / 2;
            if (h != nullptr) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const u32 thread = fresh_thread_index();
                    const u32 panel = next_panel(shared, group, panel_index, thread);
                    i32 column, half;  // of H, seen as (P, 2, I) or, when interleaved, as (P, 1, 2 I)
                    if constexpr (INTERLEAVED) {
                        stage_interleaved(gate + i * 16, up + i * 16, panel, thread);
                        column = 2 * note.column + static_cast<i32>(i) * 64, half = 0;
                    } else {
                        stage_bf16(acc + i * 32, panel, thread);
                        column = note.column + static_cast<i32>(i % 2) * 64, half = i / 2;
                    }
                    finish_panel(group);
                    const i32 base = INTERLEAVED ? 0 : half == 0 ? gate_base : up_base;
                    if (rows >= 64) {
                        if (thread % 128 == 0) tma_store(&map_h, panel, column, base == 0 ? 0 : 1, row);
                    } else {
                        store_tail({h + base * 2, static_cast<i64>(width) * 4, INTERLEAVED ? 2 * width : width}, panel, row, rows, column,
                                   thread);
                    }
                    if (thread % 128 == 0) tma_commit();
                }
            }
            const ActivationConstants constants{alpha, limit, up_offset};
            if (b1 != nullptr) {
                const u16* bias = b1 + static_cast<i64>(note.expert) * 2 * width;
                const i32 first = note.column + static_cast<i32>(fresh_thread_index() % 4 * 2);
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
#pragma unroll
            for (u32 column = 0; column < WIDTH; column += 64) {
                const u32 thread = fresh_thread_index();
                const u32 panel = next_panel(shared, group, panel_index, thread);
                stage_bf16(acc + column / 2, panel, thread);
                finish_panel(group);
                store_rows(&map_a, {a, static_cast<i64>(width) * 2, width}, panel, row, rows, note.column + static_cast<i32>(column),
                           thread);
            }
        }
        if (threadIdx.x % 128 == 0) tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
