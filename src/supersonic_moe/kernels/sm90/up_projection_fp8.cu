// H[r] = X[r] * W1[expert of r]^T and A[r] = act(H[r] + b1), e4m3 operands, A and if wanted H quantised 1 x 128, for rows sorted by
// expert and gated activations. See up_projection_fp8.py.
//
// A tile is 128 rows x 128 activations: gate in the first half of the accumulators, up in the second, as in up_projection.cu. So a row
// of a tile is one block of A and two of H, whose maxima are found among the four lanes that hold the row. Results go through staging:
// A in room 0, H behind it. (A tile cannot wait in registers for the next product to run, as in grouped_gemm_fp8.cu: the
// epilogue needs those that the product takes.)
//
// Constants: those of mainloop.cuh, ACTIVATION, INTERLEAVED (columns of H: gate and up alternate).
#include "activation.cuh"
#include "mainloop_fp8.cuh"
#include "quantize.cuh"

constexpr u32 WIDTH = HALF_N;                      // activations of a tile
constexpr u32 EACH = WIDTH / 2;                    // accumulators of gate, and of up, that a thread holds
constexpr i32 NOTHING = 0, IN_FP8 = 1, IN_BF16 = 2;  // what of H is stored

// Reciprocals of the scales of this thread's rows r and r + 8, whose largest magnitudes these are; stores the scales of those that exist.
DEVICE void scale_rows(float (&inverse)[2], float upper, float lower, bool pow2, float* scales, i32 rows, u32 lane) {
    const float amax[2] = {quad_max(upper), quad_max(lower)};
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        const float scale = block_scale(amax[i], pow2);
        inverse[i] = inverse_of_scale(scale);
        const i32 at = static_cast<i32>(lane / 4) + 8 * i;
        if (lane % 4 == 0 && at < rows) scales[at] = scale;
    }
}

// Maxima of the magnitudes of 32 accumulators: those of row r (0, 1 of each four) and of row r + 8 (2, 3).
DEVICE void row_maxima(const float* d, float& upper, float& lower) {
#pragma unroll
    for (u32 i = 0; i < 32; i += 4) {
        upper = fmaxf(upper, fmaxf(fabsf(d[i]), fabsf(d[i + 1])));
        lower = fmaxf(lower, fmaxf(fabsf(d[i + 2]), fabsf(d[i + 3])));
    }
}

// Where this thread writes in a warp's lines, swizzled: 16-byte chunk c of row r is at start ^ 16 c, and that of row r + 8 eight lines
// further on. `bytes`: what a lane stores at a time.
DEVICE u32 chunk_start(u32 lines, u32 lane, u32 bytes) { return lines + lane / 4 * LINE + ((lane / 4 * 16) ^ (lane % 4 * bytes)); }

// 64 columns of e4m3 in four chunks from `chunk` on: `d` are this thread's accumulators of them.
DEVICE void stage_e4m3(float* d, const float (&inverse)[2], u32 start, u32 chunk) {
#pragma unroll
    for (u32 i = 0; i < 32; i += 4) {
        pin_four(d + i);
        const u32 at = (start ^ (chunk + i / 8) * 16) + i % 8 * 2;
        store_shared(at, pack_e4m3(d[i] * inverse[0], d[i + 1] * inverse[0]));
        store_shared(at + 8 * LINE, pack_e4m3(d[i + 2] * inverse[1], d[i + 3] * inverse[1]));
    }
}

// 64 activations' gate and up, alternating: a whole line, 8 activations a chunk.
DEVICE void stage_e4m3_pairs(float* gate, float* up, const float (&inverse)[2], u32 start) {
#pragma unroll
    for (u32 i = 0; i < 32; i += 4) {
        pin_four(gate + i), pin_four(up + i);
        const u32 at = start ^ i / 4 * 16;
#pragma unroll
        for (u32 j = 0; j < 4; j += 2) {  // rows r and r + 8, activations c and c + 1
            const float by = inverse[j / 2], *g = gate + i + j, *u = up + i + j;
            const u32 first = pack_e4m3(g[0] * by, u[0] * by), second = pack_e4m3(g[1] * by, u[1] * by);
            store_shared(at + j / 2 * 8 * LINE, first | second << 16);
        }
    }
}

// 32 activations' worth of gate and up, alternating, in bf16: a whole line, 4 activations a chunk.
DEVICE void stage_bf16_pairs(float* gate, float* up, u32 start) {
#pragma unroll
    for (u32 i = 0; i < 16; i += 4) {
        pin_four(gate + i), pin_four(up + i);
#pragma unroll
        for (u32 j = 0; j < 4; ++j)  // activation c or c + 1 of row r or r + 8; c + 1 is in this lane's 8 bytes too
            store_shared((start ^ (i / 4 * 2 * 16)) + j % 2 * 4 + j / 2 * 8 * LINE, pack_bf16(gate[i + j], up[i + j]));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    up_projection_fp8(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_scale_x,
                      const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_h,
                      const __grid_constant__ TensorMap map_a, const i32* offsets, const i32* index, const i32 experts, const i32 width,
                      const i32 blocks_k, const float* scale_x, const i64 scale_x_row, const float* scale_w, const i64 scale_w_expert,
                      const i32 scale_w_column, const i32 scale_w_k, const u16* b1, u8* h, float* scale_h, u8* a, float* scale_a,
                      const i64 h_row_bytes, const i64 a_row_bytes, const i64 scale_stride, const i32 saved, const i32 pow2,
                      const i32 gate_base, const i32 up_base, const float alpha, const float limit, const float up_offset) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, width, blocks_k};

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto blocks_of = [&](const TileNote& note) -> ColumnBlocks {
            const i32 first = INTERLEAVED ? 2 * note.column / 128 : (gate_base + note.column) / 128;
            return {first, INTERLEAVED ? min(first + 1, (2 * width - 1) / 128) : (up_base + note.column) / 128};
        };
        const Scales<decltype(blocks_of)> scales{&map_scale_x, scale_x, scale_x_row, scale_w, scale_w_expert, scale_w_column, scale_w_k, blocks_of};
        const auto load_b = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16) {
            if (part != 0) return;
            const i32 gate_half = gate_base > up_base;  // [up; gate]: the second half of the weight's rows
            tma_load(tile_b, &map_w, full, k, note.column, gate_half, note.expert);
            tma_load(tile_b + BYTES_B / 2, &map_w, full, k, note.column, 1 - gate_half, note.expert);
        };
        const auto nothing_more = [](Ring&, const TileNote&, u32) {};
        load_ragged_rows<WIDTH>(shared, gemm, &map_x, scales, load_b, nothing_more);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        const ActivationConstants constants{alpha, limit, up_offset};
        const Operands operands(shared, group);
        Ring ring;
        float acc[BLOCK_N / 2];
        while (true) {
            const TileNote note = await_note(shared, ring);
            if (note.row == TileNote::STOP_ROW) break;
            if (note.row + static_cast<i32>(group * GROUP_LINES) >= note.row_end) {
                skip_stages(shared, ring, blocks_k);
                continue;
            }
            multiply_stages<INTERLEAVED>(acc, shared, operands.of_tile(note.row), ring, note.blocks_k, [] {});

            float *gate = acc, *up = acc + EACH;
            const u32 lane = fresh_thread_index() % 32, line = first_line(group, fresh_thread_index());
            const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
            if (rows <= 0) continue;
            const u32 room_of_a = shared.staging() + line * LINE, rooms_of_h = room_of_a + ROOM_BYTES;
            tma_wait_read<0>();
            __syncwarp();
            float inverse[2];
            if (saved == IN_FP8) {
#pragma unroll
                for (u32 block = 0; block < 2; ++block) {  // 128 columns of H
                    float* first = INTERLEAVED ? gate + block * 32 : acc + block * EACH;
                    float* second = INTERLEAVED ? up + block * 32 : first + 32;
                    float upper = 0.0f, lower = 0.0f;
                    row_maxima(first, upper, lower);
                    row_maxima(second, upper, lower);
                    const i32 base = INTERLEAVED ? 2 * note.column + static_cast<i32>(block) * 128 : note.column + (block == 0 ? gate_base : up_base);
                    const bool exists = base < 2 * width;  // the second block of the last tile may not
                    scale_rows(inverse, upper, lower, pow2, scale_h + base / 128 * scale_stride + row, exists ? rows : 0, lane);
                    const u32 lines = rooms_of_h + block * ROOM_BYTES;
                    const u32 start = chunk_start(lines, lane, INTERLEAVED ? 4 : 2);
                    if constexpr (INTERLEAVED) {
                        stage_e4m3_pairs(first, second, inverse, start);
                    } else {
                        stage_e4m3(first, inverse, start, 0);
                        stage_e4m3(second, inverse, start, 4);
                    }
                }
            } else if (saved == IN_BF16) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {  // 64 columns of H
                    if constexpr (INTERLEAVED) {
                        stage_bf16_pairs(gate + i * 16, up + i * 16, chunk_start(rooms_of_h + i * ROOM_BYTES, lane, 8));
                    } else {
                        stage_bf16(acc + i * 32, rooms_of_h + i * ROOM_BYTES, lane);
                    }
                }
            }
            if (b1 != nullptr) {
                const u16* bias = b1 + static_cast<i64>(note.expert) * 2 * width;
                const i32 first = note.column + static_cast<i32>(lane % 4 * 2);
#pragma unroll
                for (u32 i = 0; i < EACH; i += 4) {
                    float g[2], u[2];
                    pin_four(gate + i), pin_four(up + i);
                    load_bias(bias, first + static_cast<i32>(i * 2), width, gate_base, up_base, g, u);
#pragma unroll
                    for (u32 j = 0; j < 4; ++j) gate[i + j] += g[j % 2], up[i + j] += u[j % 2];  // rows r and r + 8
                }
            }
#pragma unroll
            for (u32 i = 0; i < EACH; i += 4) {
                pin_four(gate + i), pin_four(up + i);
#pragma unroll
                for (u32 j = i; j < i + 4; ++j) gate[j] = gated<static_cast<Act>(ACTIVATION)>(gate[j], up[j], constants);
            }
            float upper = 0.0f, lower = 0.0f;
            row_maxima(gate, upper, lower);
            row_maxima(gate + 32, upper, lower);
            scale_rows(inverse, upper, lower, pow2, scale_a + note.column / 128 * scale_stride + row, rows, lane);
            const u32 start = chunk_start(room_of_a, lane, 2);
            stage_e4m3(gate, inverse, start, 0);
            stage_e4m3(gate + 32, inverse, start, 4);
            fence_proxy_async();
            __syncwarp();
            store_lines<1>(&map_a, {a, a_row_bytes, width}, room_of_a, row, rows, note.column, 0, lane);
            if (saved != NOTHING) {
                const i32 gate_half = gate_base > up_base;
                const u32 size = saved == IN_FP8 ? 1 : 2;
                for (u32 i = 0; i < 2 * size; ++i) {  // 128 bytes of H: columns of one half of it, or of both alternating
                    const i32 half = INTERLEAVED ? 0 : static_cast<i32>(i / size) ^ gate_half;
                    const i32 in_half = static_cast<i32>((INTERLEAVED ? i : i % size) * (LINE / size));
                    const i32 column = INTERLEAVED ? 2 * note.column + in_half : note.column + in_half;
                    const Rows out{h + static_cast<i64>(half) * width * size, h_row_bytes, INTERLEAVED ? 2 * width : width};
                    const u32 lines = rooms_of_h + i * ROOM_BYTES;
                    if (saved == IN_FP8) {
                        store_lines<1>(&map_h, out, lines, row, rows, column, half, lane);
                    } else {
                        store_lines<2>(&map_h, out, lines, row, rows, column, half, lane);
                    }
                }
            }
            if (lane == 0) tma_commit();
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
