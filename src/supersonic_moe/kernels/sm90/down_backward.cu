// dA[r] = dO[r] * W2[expert of r], and in the epilogue the backward of the activation. See down_backward.py.
//
// After the K blocks of a tile, the loading warpgroup sends the tile's part of H through the same ring: four stages of 64
// activations, gate in the room of A, up in the first half of B's. A math warp owns 16 rows of each: it reads gate and up, writes
// dH in their place and s A behind them, stores all three by TMA and gives the stage back. So the epilogue needs no shared memory
// of its own, H arrives while the last K blocks multiply, and the next tile's operands while this one's gradients leave.
//
// Constants: those of mainloop.cuh, ACTIVATION, INTERLEAVED (columns of H: gate and up alternate).
#include "activation.cuh"
#include "load.cuh"

constexpr u32 CHUNK = 64;  // activations of a stage of H: a room of gate, one of up, one for s A

struct RowPair {  // what one thread knows of its rows r and r + 8
    float score[2];
    float dscore[2];
};

struct Bias {  // of one expert
    const u16* values;  // or null
    i32 width, gate_base, up_base;
};

// Eight activations of a thread: d[0, 1] and d[2, 3] are columns c, c + 1 of rows r and r + 8, d[4..7] the same of c + 8. Gate and up
// come packed and leave as gradients; `scaled` gets s * A.
DEVICE void backward_eight(const float* d, u32 (&gate)[4], u32 (&up)[4], u32 (&scaled)[4], RowPair& rows, const Bias& bias, i32 c,
                           const ActivationConstants& constants) {
    float g[4][2], u[4][2];  // row r + 8 * (i % 2), columns c + 8 * (i / 2) and the next
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        g[i][0] = bf16_low(gate[i]), g[i][1] = bf16_high(gate[i]);
        u[i][0] = bf16_low(up[i]), u[i][1] = bf16_high(up[i]);
    }
    if (bias.values != nullptr) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float of_gate[2], of_up[2];
            load_bias(bias.values, c + static_cast<i32>(half) * 8, bias.width, bias.gate_base, bias.up_base, of_gate, of_up);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) g[half * 2 + i / 2][i % 2] += of_gate[i % 2], u[half * 2 + i / 2][i % 2] += of_up[i % 2];
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const float s = rows.score[i % 2];
        float dgate[2], dup[2], a[2];
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            const GatedSlopes slopes = gated_slopes<static_cast<Act>(ACTIVATION)>(g[i][j], u[i][j], constants);
            const float da = d[i * 2 + j], scaled_da = s * da;
            rows.dscore[i % 2] += da * slopes.value;
            dgate[j] = scaled_da * slopes.by_gate, dup[j] = scaled_da * slopes.by_up, a[j] = s * slopes.value;
        }
        const bool scored = s != 0.0f;  // padding: zeros by selection, whatever H holds
        gate[i] = scored ? pack_bf16(dgate[0], dgate[1]) : 0;
        up[i] = scored ? pack_bf16(dup[0], dup[1]) : 0;
        scaled[i] = scored ? pack_bf16(a[0], a[1]) : 0;
    }
}

// Gate and up where they alternate: this thread's pairs of columns c and c + 8, rows r and r + 8, are 8 bytes each.
DEVICE u32 pair_address(u32 stage_tile, u32 row, u32 part, u32 i, u32 lane) {
    const u32 column = part * 16 + i / 2 * 8 + lane % 4 * 2;  // activation, 0..63: the second 32 live in up's room
    const u32 line = row + i % 2 * 8;
    return stage_tile + column / 32 * ROOM_BYTES + swizzle<LINE>(line * LINE + column % 32 * 4);
}
DEVICE void load_pairs(u32 tile, u32 row, u32 part, u32 lane, u32 (&gate)[4], u32 (&up)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 first, second;
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(first), "=r"(second)
                     : "r"(pair_address(tile, row, part, i, lane))
                     : "memory");
        gate[i] = __byte_perm(first, second, 0x5410), up[i] = __byte_perm(first, second, 0x7632);
    }
}
DEVICE void store_pairs(u32 tile, u32 row, u32 part, u32 lane, const u32 (&gate)[4], const u32 (&up)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(pair_address(tile, row, part, i, lane)),
                     "r"(__byte_perm(gate[i], up[i], 0x5410)), "r"(__byte_perm(gate[i], up[i], 0x7632))
                     : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    down_backward(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_w,
                  const __grid_constant__ TensorMap map_h, const __grid_constant__ TensorMap map_dh,
                  const __grid_constant__ TensorMap map_as, const i32* offsets, const i32* index, const i32 experts,
                  const i32 width, const i32 blocks_k, const u16* b1, const float* scores, u8* dh, u8* as,
                  float* dscores, const i32 rows_allocated, const i32 gate_base, const i32 up_base, const float alpha,
                  const float limit, const float up_offset) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, width, blocks_k};
    const i32 gate_half = gate_base > up_base, up_half = INTERLEAVED ? 0 : 1 - gate_half;

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto load_w = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16 blocks) {
            load_b_mn_major(tile_b, &map_w, full, k, note.column, note.expert, part, blocks);
        };
        const auto load_h = [&](Ring& ring, const TileNote& note, u32 loader) {
            const i32 end = min(note.column + static_cast<i32>(BLOCK_N), width);
            for (i32 column = note.column; column < end; column += CHUNK, ring.advance()) {
                const u32 full = shared.full(ring.stage);
                mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
                if (loader == 0 && elect_one()) {
                    write_note(shared.note(ring.stage), note);
                    mbarrier_arrive_expect_tx(full, 2 * ROOM_BYTES);
                    const i32 first = INTERLEAVED ? 2 * column : column, second = INTERLEAVED ? first + 64 : column;
                    tma_load(shared.tile_a(ring.stage), &map_h, full, first, INTERLEAVED ? 0 : gate_half, note.row);
                    tma_load(shared.tile_a(ring.stage) + ROOM_BYTES, &map_h, full, second, up_half, note.row);
                }
            }
        };
        load_ragged_rows<BLOCK_N>(shared, gemm, &map_do, load_w, load_h);
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
                const i32 columns = min(static_cast<i32>(BLOCK_N), width - first.column);
                skip_stages(shared, ring, blocks_k + (columns + static_cast<i32>(CHUNK) - 1) / static_cast<i32>(CHUNK));
                continue;
            }
            const u32 last = multiply_tile<Major::K, Major::MN>(
                acc, shared, ring, group, blocks_k, [&] { lent.give_back(shared); }, [](u32) {});
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);

            const u32 lane = fresh_thread_index() % 32, line = first_line(group, fresh_thread_index());
            const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
            const Bias bias{b1 == nullptr ? nullptr : b1 + static_cast<i64>(note.expert) * 2 * width, width, gate_base, up_base};
            RowPair pair{{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
            for (i32 i = 0; i < 2; ++i) {
                const i32 at = static_cast<i32>(lane / 4) + 8 * i;
                if (at < rows) pair.score[i] = scores[row + at];
            }
#pragma unroll
            for (u32 chunk = 0; chunk < BLOCK_N / CHUNK; ++chunk) {
                const i32 column = note.column + static_cast<i32>(chunk * CHUNK);
                if (column >= width) break;
                if (chunk == 2) lent.give_back(shared);  // the first two, for the next tile's operands
                const u32 tile = lent.borrow(shared, ring), scaled_tile = tile + 2 * ROOM_BYTES;
                if (rows > 0) {
#pragma unroll
                    for (u32 part = 0; part < 4; ++part) {  // 16 activations
                        float* d = acc + chunk * 32 + part * 8;
                        pin_four(d), pin_four(d + 4);
                        u32 gate[4], up[4], scaled[4];
                        const u32 at = swizzle<LINE>((line + lane % 16) * LINE + (part * 2 + lane / 16) * 16);
                        if constexpr (INTERLEAVED) {
                            load_pairs(tile, line + lane / 4, part, lane, gate, up);
                        } else {
                            load_matrices(gate, tile + at);
                            load_matrices(up, tile + ROOM_BYTES + at);
                        }
                        backward_eight(d, gate, up, scaled, pair, bias, column + static_cast<i32>(part * 16 + lane % 4 * 2), constants);
                        if constexpr (INTERLEAVED) {
                            store_pairs(tile, line + lane / 4, part, lane, gate, up);
                        } else {
                            store_matrices(tile + at, gate);
                            store_matrices(tile + ROOM_BYTES + at, up);
                        }
                        store_matrices(scaled_tile + at, scaled);
                    }
                    fence_proxy_async();
                    __syncwarp();
                    const Rows out_dh{dh, static_cast<i64>(width) * 4, INTERLEAVED ? 2 * width : width};
                    const Rows out_gate{dh + (INTERLEAVED ? 0 : gate_base) * 2, out_dh.row_bytes, out_dh.columns};
                    const Rows out_up{dh + (INTERLEAVED ? 0 : up_base) * 2, out_dh.row_bytes, out_dh.columns};
                    const i32 first = INTERLEAVED ? 2 * column : column, second = INTERLEAVED ? first + 64 : column;
                    const u32 lines = tile + line * LINE;
                    store_lines(&map_dh, out_gate, lines, row, rows, first, INTERLEAVED ? 0 : gate_half, lane);
                    store_lines(&map_dh, out_up, lines + ROOM_BYTES, row, rows, second, up_half, lane);
                    store_lines(&map_as, {as, static_cast<i64>(width) * 2, width}, lines + 2 * ROOM_BYTES, row, rows, column, 0, lane);
                    if (lane == 0) tma_commit();
                }
            }
#pragma unroll
            for (i32 i = 0; i < 2; ++i) {  // the four lanes of a row, then one partial sum for each block of columns
                float sum = pair.dscore[i];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                const i32 at = static_cast<i32>(lane / 4) + 8 * i;
                const i64 block = note.column / static_cast<i32>(BLOCK_N);
                if (lane % 4 == 0 && at < rows) dscores[block * rows_allocated + row + at] = sum;
            }
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
