// Transposes e4m3 codes in shared memory, a warp its 16 lines of 128 codes. For gated_backward_quantize.cuh.
//
// ldmatrix.trans transposes elements of two bytes: a register gets a pair of neighbouring columns c, c + 1 of two rows. Two registers, of
// rows that are next to each other, hold four rows of both columns, and a byte permutation makes a word of four rows of each; that word
// is what stmatrix wants of a lane whose matrix row is a column. So 16 rows x 128 columns are 4 ldmatrix, 16 permutations and 4 stmatrix.
//
// Which rows and columns make up a matrix is free, an address a lane says it. They are chosen so that the eight 16-byte rows of a matrix
// lie in different banks, swizzled as they are: rows 0 1 4 5 10 11 14 15 | 2 3 6 7 8 9 12 13 are read together, and of the eight
// pairs of columns half give the even one to the first matrix, half the odd one.
#pragma once
#include "epilogue/staging.cuh"

// Bytes of two registers by four selectors.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selectors) {
    u32 word;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(selectors));
    return word;
}

// This warp's 16 lines at `lines` into 16 bytes, the `place`-th, of each of the 128 lines of `columns`, a buffer. Spread: of each 16
// columns the lines hold 0 1 8 9, 2 3 10 11, .., as a thread has them in accumulators.
template <bool Spread>
DEVICE void transpose_lines(u32 lines, u32 columns, u32 place, u32 lane) {
    const u32 t = lane % 8, second = lane / 8 % 2;  // matrix row; of the two matrices that are read, or written, together
    const u32 row = t / 2 * 4 + (second ^ t / 4) * 2 + t % 2;
    const u32 from = lines + row * LINE + (lane / 16 * 16 ^ row % 8 * 16);
    const u32 column = lane / 16 * 16 + (Spread ? t / 2 * 2 + t % 2 * 8 : t * 2) + ((t ^ t / 4) % 2 ^ second);
    const u32 to = columns + column * LINE + (place ^ column % 8) * 16;
    // Rows 8 and up come from the registers in reverse order; bytes 0 2 4 6 are the even column, 1 3 5 7 the odd one.
    const u32 pick = 0x6420 ^ lane % 4 / 2 * 0x4444 ^ (lane / 4 ^ lane / 16) % 2 * 0x1111;
    u32 pairs[4][4];
#pragma unroll
    for (u32 part = 0; part < 4; ++part) load_matrices<true>(pairs[part], from ^ part * 32);
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {  // 32 columns
        const u32(&p)[4] = pairs[part];
        const u32 words[4] = {permute_bytes(p[0], p[1], pick), permute_bytes(p[0], p[1], pick ^ 0x1111), permute_bytes(p[2], p[3], pick),
                              permute_bytes(p[2], p[3], pick ^ 0x1111)};
        store_matrices(to + part * 32 * LINE, words);
    }
}
