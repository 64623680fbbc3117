// Gated activation behind the FP8 loop, quantized: gate and up of a tile to A = act(Z + b1) in e4m3 with scales of 1 x 128, and Z in e4m3
// or bf16 if it is wanted. A row of a tile is one scale block of A and two of Z, whose maxima are found among the four lanes that hold
// the row. Results go through staging buffers of its own: A in the first, Z behind it. For up_projection_fp8.cu.
//
// An activation takes the special-function unit for 16 cycles, two operations of 8, which for 64 of them is the time that the rest of a
// tile's end needs. So both are in one piece of straight code, without a branch, where the compiler lets them overlap. A is quantized
// and stored while the first product of the next tile runs; until then it waits in registers.
#pragma once
#include "epilogue/activation.cuh"
#include "epilogue/quantize.cuh"
#include "epilogue/staging.cuh"

constexpr i32 NOTHING = 0, IN_FP8 = 1, IN_BF16 = 2;  // what of Z is stored

// Reciprocals of the scales of this thread's rows r and r + 8, whose largest magnitudes these are; stores the scales of those that exist.
DEVICE void scale_rows(float (&inverse)[2], const float (&largest)[2], bool pow2, float* scales, i32 rows, u32 lane) {
    const float amax[2] = {quad_max(largest[0]), quad_max(largest[1])};
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        const float scale = block_scale(amax[i], pow2);
        inverse[i] = inverse_of_scale(scale);
        const i32 at = static_cast<i32>(lane / 4) + 8 * i;
        if (lane % 4 == 0 && at < rows) scales[at] = scale;
    }
}

// Raises `largest` to the magnitudes of `count` accumulators: those of row r (0, 1 of each four) and of row r + 8 (2, 3).
DEVICE void row_maxima(const float* d, u32 count, float (&largest)[2]) {
#pragma unroll
    for (u32 i = 0; i < count; i += 2) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fmaxf(fabsf(d[i]), fabsf(d[i + 1])));
}

// Where this thread writes in a warp's lines, swizzled: 16-byte chunk c of row r is at start ^ 16 c, and that of row r + 8 eight lines
// further on. `bytes`: what a lane stores at a time.
DEVICE u32 chunk_start(u32 lines, u32 lane, u32 bytes) { return lines + lane / 4 * LINE + ((lane / 4 * 16) ^ (lane % 4 * bytes)); }

// 16 columns of e4m3, the chunk `chunk`: `d` are this thread's eight accumulators of them.
DEVICE void stage_e4m3(const float* d, const float (&inverse)[2], u32 start, u32 chunk) {
#pragma unroll
    for (u32 i = 0; i < 8; i += 4) {
        const u32 at = (start ^ chunk * 16) + i * 2;
        store_shared(at, pack_e4m3(d[i] * inverse[0], d[i + 1] * inverse[0]));
        store_shared(at + 8 * LINE, pack_e4m3(d[i + 2] * inverse[1], d[i + 3] * inverse[1]));
    }
}

// The same in int8, where the 16 columns are half of a group.
DEVICE void stage_int8(const float* d, const float (&inverse)[2], u32 start, u32 chunk) {
#pragma unroll
    for (u32 i = 0; i < 8; i += 4) {
        const u32 at = (start ^ chunk * 16) + i * 2;
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            const float* two = d + i + 2 * row;
            const u32 codes = pack_int8(int8_code(two[0], inverse[row]), int8_code(two[1], inverse[row]));
            store_shared(at + row * 8 * LINE, static_cast<u16>(codes));
        }
    }
}

// Gate and up of 16 activations, alternating: 32 columns, which are two chunks, from `matrices` on, a matrix_address.
template <bool Int8>
DEVICE void stage_pairs(const float* gate, const float* up, const float (&inverse)[2], u32 matrices) {
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {  // rows r and r + 8, activations c and c + 1, then c + 8 and c + 9
        const float by = inverse[i % 2], *g = gate + i * 2, *u = up + i * 2;
        words[i] = Int8 ? pack_four_int8(g[0], u[0], g[1], u[1], by) : pack_four_e4m3(g[0] * by, u[0] * by, g[1] * by, u[1] * by);
    }
    store_matrices(matrices, words);
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

template <Config C, Gate G, bool Int8 = false>  // Int8: Z with scales of 1 x 32, in place of e4m3
struct GatedActivationQuantized {
    static constexpr u32 STAGING_BYTES = 5 * C.buffer_bytes();  // A, and Z in bf16
    static constexpr bool RUNS_WITHOUT_ROWS = false;
    static_assert(C.block_n == 256, "a row of a tile is one scale block of A and two of Z");
    static constexpr u32 WIDTH = C.block_n / 2, EACH = WIDTH / 2;  // activations of a tile; accumulators of gate, and of up, of a thread
    static constexpr u32 EARLY = 16;  // of these, activated before Z has its scales
    const SharedMemory<C> shared;
    const TensorMap *map_z, *map_a;
    const u16* b1;
    u8* z;
    float* scale_z;
    u8* a;
    float* scale_a;
    i64 z_row_bytes, a_row_bytes, scale_stride;
    i32 saved, pow2, gate_base, up_base, width, blocks_k;
    ActivationConstants constants;
    u32 warp;
    WorkTile held{WorkTile::STOP_ROW, 0, 0, 0, 0};  // the tile whose activations are in the accumulators
    float largest_a[2];                             // their largest magnitudes in rows r and r + 8

    DEVICE void skip(float (&)[C.accumulators()], const WorkTile&, Ring<C>& ring) const { skip_stages(shared, ring, blocks_k); }
    DEVICE void finish(float (&acc)[C.accumulators()]) const { overlap(acc); }
    // Z to its staging buffers, and A in place of its gates.
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, Ring<C>&) {
        held = tile;
        float *gate = acc, *up = acc + EACH;
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
        if (rows <= 0) return;
        const u32 buffers_of_z = shared.staging() + C.buffer_bytes() + line * LINE;
        tma_wait_read<0>();
        __syncwarp();
        float inverse_z[2][2];  // of two blocks of 128 columns
        u32 exponents_z[2][2];  // in int8 instead, of two groups of 32 columns each: byte 2 * row + group
        const auto scale_z_groups = [&] {
#pragma unroll
            for (u32 block = 0; block < 2; ++block) {
#pragma unroll
                for (u32 group = 0; group < 4; ++group) {
                    const float* first = G.interleaved ? gate + block * 32 + group * 8 : acc + block * EACH + group * 16;
                    const float* second = G.interleaved ? up + block * 32 + group * 8 : first + 8;
                    float largest[2] = {0.0f, 0.0f};
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) {
                        float& of_row = largest[i / 2 % 2];
                        of_row = larger_or_nan(larger_or_nan(of_row, first[i]), second[i]);
                    }
                    const u32 both = group_exponents(largest[0], largest[1]);
                    u32& pair = exponents_z[block][group / 2];
                    pair = group % 2 == 0 ? both : pair | both << 8;
                }
                const i32 base = G.interleaved ? 2 * tile.column + static_cast<i32>(block) * 128
                                               : tile.column + (block == 0 ? gate_base : up_base);
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    u32 word;
                    const u32(&pairs)[2] = exponents_z[block];
                    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(pairs[0]), "r"(pairs[1]), "r"(i == 0 ? 0x5410 : 0x7632));
                    const i32 at = static_cast<i32>(lane / 4 + 8 * i);
                    if (lane % 4 == 0 && at < rows && base < 2 * width) scale_z[base / 128 * scale_stride + row + at] = __uint_as_float(word);
                }
            }
        };
        const auto inverse_of_group = [&](u32 block, u32 group, u32 row_of_two) {
            return inverse_of_exponent(exponents_z[block][group / 2] >> (16 * row_of_two + 8 * (group % 2)) & 0xff);
        };
        const auto scale_z_blocks = [&] {
            if constexpr (Int8) return scale_z_groups();
#pragma unroll
            for (u32 block = 0; block < 2; ++block) {
                const float* first = G.interleaved ? gate + block * 32 : acc + block * EACH;
                const float* second = G.interleaved ? up + block * 32 : first + 32;
                float largest[2] = {0.0f, 0.0f};
                row_maxima(first, 32, largest), row_maxima(second, 32, largest);
                const i32 base = G.interleaved ? 2 * tile.column + static_cast<i32>(block) * 128
                                               : tile.column + (block == 0 ? gate_base : up_base);
                const bool exists = base < 2 * width;  // the second block of the last tile may not
                scale_rows(inverse_z[block], largest, pow2, scale_z + base / 128 * scale_stride + row, exists ? rows : 0, lane);
            }
        };
        const u32 z_matrices = matrix_address(shared.staging() + C.buffer_bytes(), line, 0, lane);
        const u32 z_start = chunk_start(buffers_of_z, lane, 2);
        const auto stage_fp8_z = [&](u32 i) {  // of eight accumulators of gate and of up
            const u32 to = (z_matrices ^ i % 32 * 4) + i / 32 * C.buffer_bytes();
            if constexpr (Int8 && G.interleaved) {
                const float inverse[2] = {inverse_of_group(i / 32, i / 8 % 4, 0), inverse_of_group(i / 32, i / 8 % 4, 1)};
                stage_pairs<true>(gate + i, up + i, inverse, to);
            } else if constexpr (Int8) {
#pragma unroll
                for (u32 block = 0; block < 2; ++block) {
                    const float inverse[2] = {inverse_of_group(block, i / 16, 0), inverse_of_group(block, i / 16, 1)};
                    stage_int8((block == 0 ? gate : up) + i, inverse, z_start + block * C.buffer_bytes(), i / 8);
                }
            } else if constexpr (G.interleaved) {
                stage_pairs<false>(gate + i, up + i, inverse_z[i / 32], to);
            } else {
                stage_e4m3(gate + i, inverse_z[0], z_start, i / 8);
                stage_e4m3(up + i, inverse_z[1], z_start + C.buffer_bytes(), i / 8);
            }
        };
        largest_a[0] = largest_a[1] = 0.0f;
        if (saved == IN_FP8 && b1 == nullptr) {
            float first[EARLY];  // meanwhile Z is scaled and staged: that takes all units but the one for special functions
#pragma unroll
            for (u32 i = 0; i < EARLY; ++i) first[i] = gated<G.kind>(gate[i], up[i], constants);
            scale_z_blocks();
#pragma unroll
            for (u32 i = 0; i < EACH; i += 8) {
                pin_four(gate + i), pin_four(gate + i + 4), pin_four(up + i), pin_four(up + i + 4);
                stage_fp8_z(i);
#pragma unroll
                for (u32 j = i; j < i + 8; ++j) gate[j] = j < EARLY ? first[j] : gated<G.kind>(gate[j], up[j], constants);
            }
            row_maxima(gate, EACH, largest_a);
        } else {
            if (saved == IN_FP8) {
                scale_z_blocks();
#pragma unroll
                for (u32 i = 0; i < EACH; i += 8) {
                    pin_four(gate + i), pin_four(gate + i + 4), pin_four(up + i), pin_four(up + i + 4);
                    stage_fp8_z(i);
                }
            } else if (saved == IN_BF16) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {  // 64 columns of Z
                    if constexpr (G.interleaved) {
                        stage_bf16_pairs(gate + i * 16, up + i * 16, chunk_start(buffers_of_z + i * C.buffer_bytes(), lane, 8));
                    } else {
                        stage_bf16(acc + i * 32, buffers_of_z + i * C.buffer_bytes(), lane);
                    }
                }
            }
            add_bias<EACH>(gate, up, G.interleaved, b1, tile.expert, tile.column, width, gate_base, up_base, lane);
            activate<G.kind, EACH>(gate, up, constants);
            row_maxima(gate, EACH, largest_a);
        }
    }
    // A of the tile held, quantized, and its Z: to TMA.
    DEVICE void overlap(float (&acc)[C.accumulators()]) const {
        const auto [lane, line, row, rows] = warp_rows(held, warp);
        if (held.row == WorkTile::STOP_ROW || rows <= 0) return;
        const u32 buffer_of_a = shared.staging() + line * LINE, buffers_of_z = buffer_of_a + C.buffer_bytes();
        float inverse[2];
        scale_rows(inverse, largest_a, pow2, scale_a + held.column / 128 * scale_stride + row, rows, lane);
        const u32 start = chunk_start(buffer_of_a, lane, 2);
#pragma unroll
        for (u32 i = 0; i < EACH; i += 8) {
            pin_four(acc + i), pin_four(acc + i + 4);
            stage_e4m3(acc + i, inverse, start, i / 8);
        }
        fence_proxy_async();
        __syncwarp();
        const u32 size = saved == IN_BF16 ? 2 : 1, buffers = saved == NOTHING ? 0 : 2 * size;
        const auto place_of_z = [&](u32 i) -> Destination {  // 128 bytes of Z: columns of one half of it, or of both alternating
            const i32 half = G.interleaved ? 0 : static_cast<i32>(i / size) ^ (gate_base > up_base);
            const i32 in_half = static_cast<i32>((G.interleaved ? i : i % size) * (LINE / size));
            const Rows out{z + static_cast<i64>(half) * width * size, z_row_bytes, G.interleaved ? 2 * width : width};
            const i32 column = (G.interleaved ? 2 : 1) * held.column + in_half;
            return {map_z, out, buffers_of_z + i * C.buffer_bytes(), column, half};
        };
        if (rows >= static_cast<i32>(WARP_ROWS)) {
            if (elect_one()) {
                tma_store(map_a, buffer_of_a, held.column, 0, row);
#pragma unroll 1
                for (u32 i = 0; i < buffers; ++i) {
                    const Destination to = place_of_z(i);
                    tma_store(to.map, to.lines, to.column, to.half, row);
                }
                tma_commit();
            }
            return;
        }
        store_rows<1>({a, a_row_bytes, width}, buffer_of_a, row, rows, held.column, lane);
#pragma unroll 1
        for (u32 i = 0; i < buffers; ++i) {
            const Destination to = place_of_z(i);
            if (saved == IN_FP8) {
                store_rows<1>(to.out, to.lines, row, rows, to.column, lane);
            } else {
                store_rows<2>(to.out, to.lines, row, rows, to.column, lane);
            }
        }
    }
};
