// The backward of an activation inside an epilogue: a gated one's for three of them (gated_backward.cuh, gated_backward_fp8.cuh,
// gated_backward_quantize.cuh), a thread's eight activations at a time, whose gates and ups lie in shared memory; and, for
// ungated_backward.cuh too, what a row's score does to the gradients.
//
// An epilogue takes its tile in chunks of 64 activations. In bf16 a chunk's part of Z fills two staging buffers: 32 activations each, gate
// and up alternating, where Z is interleaved, else gates and ups. A thread has rows r and r + 8 of its warp's 16 lines, as in an
// accumulator fragment.
#pragma once
#include "epilogue/activation.cuh"
#include "epilogue/staging.cuh"

constexpr u32 CHUNK = 64;

struct RowScores {  // what one thread knows of its rows r and r + 8
    float score[2];
    float dscore[2];
};

// Eight activations of a thread, or their gradients: [i][j] is column c + 8 * (i / 2) + j of row r + 8 * (i % 2).
struct GateUpFragment {
    float gate[4][2], up[4][2];
};

// The same in pairs, as Z stores them: where gate and up alternate the two of column c | of c + 1, else the gates of both | their ups.
struct PackedFragment {
    u32 first[4], second[4];
};

template <Gate G>
struct Bias {
    const u16* b1;  // (experts, 2 * width), or null
    i32 expert, width, gate_base, up_base;

    // To the eight activations from column c on.
    DEVICE void add(i32 c, GateUpFragment& z) const {
        if (b1 == nullptr) return;
        const u16* values = b1 + static_cast<i64>(expert) * 2 * width;
        float of_gate[2][2], of_up[2][2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            load_bias(G.interleaved, values, c + static_cast<i32>(half) * 8, width, gate_base, up_base, of_gate[half], of_up[half]);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
#pragma unroll
            for (u32 j = 0; j < 2; ++j) z.gate[i][j] += of_gate[i / 2][j], z.up[i][j] += of_up[i / 2][j];
        }
    }
};

template <Gate G>
DEVICE PackedFragment pack_fragment(const GateUpFragment& z) {
    PackedFragment words;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        words.first[i] = G.interleaved ? pack_bf16(z.gate[i][0], z.up[i][0]) : pack_bf16(z.gate[i][0], z.gate[i][1]);
        words.second[i] = G.interleaved ? pack_bf16(z.gate[i][1], z.up[i][1]) : pack_bf16(z.up[i][0], z.up[i][1]);
    }
    return words;
}

// `unpack(word, low, high)` gives the two values of a word.
template <Gate G, typename Unpack>
DEVICE GateUpFragment unpack_fragment(const PackedFragment& words, Unpack unpack) {
    GateUpFragment z;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        unpack(words.first[i], z.gate[i][0], G.interleaved ? z.up[i][0] : z.gate[i][1]);
        unpack(words.second[i], G.interleaved ? z.gate[i][1] : z.up[i][0], z.up[i][1]);
    }
    return z;
}

// Eight activations at `z`, bias included; d[0, 1] and d[2, 3] are dA of columns c, c + 1 of rows r and r + 8, d[4..7] the same
// of c + 8. Z becomes its gradient, `scaled` gets s * A.
template <Gate G>
DEVICE void backward_fragment(const float* d, GateUpFragment& z, float (&scaled)[4][2], RowScores& rows,
                              const ActivationConstants& constants) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const float s = rows.score[i % 2];
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            const GatedSlopes slopes = gated_slopes<G.kind>(z.gate[i][j], z.up[i][j], constants);
            const float da = d[i * 2 + j], scaled_da = s * da;
            rows.dscore[i % 2] += da * slopes.value;
            z.gate[i][j] = scaled_da * slopes.by_gate, z.up[i][j] = scaled_da * slopes.by_up, scaled[i][j] = s * slopes.value;
        }
    }
}

// `row`: the warp's first, of which and what follows the expert has `rows`.
DEVICE RowScores load_scores(const float* scores, i32 row, i32 rows, u32 lane) {
    RowScores pair{{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        const i32 at = static_cast<i32>(lane / 4) + 8 * i;
        if (at < rows) pair.score[i] = scores[row + at];
    }
    return pair;
}

// Rows of score 0 are padding: zeros by selection, whatever Z holds there.
DEVICE void select_scored(u32 (&words)[4], const RowScores& rows) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) words[i] = rows.score[i % 2] != 0.0f ? words[i] : 0;
}

// Partial score gradients of a tile: summed over the four lanes of a row, then written for the rows that the expert has.
DEVICE void store_dscores(const RowScores& pair, float* dscores, i32 rows, u32 lane) {
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        float sum = pair.dscore[i];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const i32 at = static_cast<i32>(lane / 4) + 8 * i;
        if (lane % 4 == 0 && at < rows) dscores[at] = sum;
    }
}

// The products of a tile's next chunk, to where those of this one were. Pinned, or the compiler moves them in each branch of what comes
// before.
template <Config C>
DEVICE void next_products(float (&acc)[C.accumulators()]) {
#pragma unroll
    for (u32 i = 0; i + CHUNK / 2 < C.accumulators(); i += 4) {
#pragma unroll
        for (u32 j = i; j < i + 4; ++j) acc[j] = acc[j + CHUNK / 2];
        pin_four(acc + i);
    }
}

// ---- shared memory. `line`: first of this warp's 16; `part`: 16 activations of the chunk. A swizzled line is 128 bytes at a multiple of
// 1024, so what `part` adds to an address is XORed to the lane's, one instruction, and rows r + 8 and buffers are immediate offsets. ----

// A row of zeros in a buffer; four lanes.
DEVICE void clear_line(u32 line, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(line + lane % 4 * 32 + i * 16), "r"(0) : "memory");
}

// Gate and up where they alternate: this thread's two columns are 8 bytes.
template <Config C>
DEVICE u32 pair_address(u32 buffers, u32 line, u32 part, u32 i, u32 lane) {
    const u32 at = (buffers + (line + lane / 4) * LINE + (lane % 4 * 8 ^ lane / 4 * 16)) ^ (part % 2 * 64 + i / 2 * 32);
    return at + part / 2 * C.buffer_bytes() + i % 2 * 8 * LINE;
}

template <Config C, Gate G>
DEVICE PackedFragment load_packed(u32 buffers, u32 line, u32 part, u32 lane) {
    PackedFragment words;
    if constexpr (G.interleaved) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                         : "=r"(words.first[i]), "=r"(words.second[i])
                         : "r"(pair_address<C>(buffers, line, part, i, lane))
                         : "memory");
    } else {
        load_matrices(words.first, matrix_address(buffers, line, part, lane));
        load_matrices(words.second, matrix_address(buffers + C.buffer_bytes(), line, part, lane));
    }
    return words;
}

template <Config C, Gate G>
DEVICE void store_packed(u32 buffers, u32 line, u32 part, u32 lane, const PackedFragment& words) {
    if constexpr (G.interleaved) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(pair_address<C>(buffers, line, part, i, lane)), "r"(words.first[i]),
                         "r"(words.second[i])
                         : "memory");
    } else {
        store_matrices(matrix_address(buffers, line, part, lane), words.first);
        store_matrices(matrix_address(buffers + C.buffer_bytes(), line, part, lane), words.second);
    }
}

// ---- global memory ----

// dZ (rows, 2 * width), seen as (rows, 1, 2 * width) or (rows, 2, width), and s * A (rows, width).
template <Config C, Gate G>
struct Gradients {
    const TensorMap *map_dz, *map_as;
    u8 *dz, *as;
    i32 width, gate_base, up_base;

    // This warp's lines of a chunk, staged in two buffers and in one, for rows `row`.. and activations `column`.. All but `lane` are the
    // same in the warp, and known to be: TMA takes uniform registers.
    DEVICE void store(u32 dz_lines, u32 as_lines, i32 row, i32 rows, i32 column, u32 lane) const {
        const i32 gate_half = G.interleaved ? 0 : gate_base > up_base, up_half = G.interleaved ? 0 : 1 - gate_half;
        const i32 first = G.interleaved ? 2 * column : column, second = G.interleaved ? first + 64 : column;
        if (rows >= static_cast<i32>(WARP_ROWS)) {
            if (elect_one()) {
                tma_store(map_dz, dz_lines, first, gate_half, row);
                tma_store(map_dz, dz_lines + C.buffer_bytes(), second, up_half, row);
                tma_store(map_as, as_lines, column, 0, row);
                tma_commit();
            }
            return;
        }
        const i64 row_bytes = static_cast<i64>(width) * 4;
        const i32 columns = G.interleaved ? 2 * width : width;
        store_rows({dz + (G.interleaved ? 0 : gate_base) * 2, row_bytes, columns}, dz_lines, row, rows, first, lane);
        store_rows({dz + (G.interleaved ? 0 : up_base) * 2, row_bytes, columns}, dz_lines + C.buffer_bytes(), row, rows, second, lane);
        store_rows({as, static_cast<i64>(width) * 2, width}, as_lines, row, rows, column, lane);
    }
};
