// Which output tile comes next: persistent blocks walk the tiles of all experts in one order that every cluster knows.
//
// Tiles are numbered expert by expert. Inside an expert the order is grouped: GROUP_M blocks of rows at a time, all columns of
// those rows before the next ones, rows innermost. Tiles that run together then share few rows and few columns, so operands come
// from L2. Only the loading thread walks; it tells the math warps what it loaded (TileNote).
#pragma once
#include "types.cuh"

// What the loading thread leaves beside a stage for those who multiply it. Written before it arrives on the full barrier.
struct TileNote {
    i32 row;        // first row of this block's output tile; STOP: no more tiles
    i32 row_end;    // rows from here on are not the tile's
    i32 column;     // first column
    i32 expert;
    i32 blocks_k;   // stages of the tile
    static constexpr i32 STOP_ROW = -1;
};
constexpr u32 NOTE_BYTES = 32;

DEVICE void write_note(u32 address, const TileNote& note) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(note.row), "r"(note.row_end), "r"(note.column),
                 "r"(note.expert)
                 : "memory");
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + 16), "r"(note.blocks_k) : "memory");
}

// All lanes of a warp get the note. Lane 0 alone reads it: it is the one that later hands the stage back.
DEVICE TileNote read_note(u32 address) {
    i32 v[5];
    asm volatile(
        "{\n"
        ".reg .pred first;\n"
        "setp.eq.u32 first, %6, 0;\n"
        "@first ld.shared.v4.b32 {%0, %1, %2, %3}, [%5];\n"
        "@first ld.shared.b32 %4, [%5 + 16];\n"
        "}\n"
        : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]), "=r"(v[4])
        : "r"(address), "r"(lane_index())
        : "memory");
#pragma unroll
    for (u32 i = 0; i < 5; ++i) v[i] = __shfl_sync(0xffffffffu, v[i], 0);
    return {v[0], v[1], v[2], v[3], v[4]};
}

// Grouped order of a grid of `blocks_m` x `blocks_n` tiles.
template <i32 GroupM>
DEVICE void grouped_order(i32 tile, i32 blocks_m, i32 blocks_n, i32& m, i32& n) {
    const i32 first = tile / (GroupM * blocks_n) * GroupM;
    const i32 rows = min(GroupM, blocks_m - first);
    const i32 inside = tile - first * blocks_n;
    m = first + inside % rows;
    n = inside / rows;
}

// Ragged rows: expert e has ceil(rows of e / BlockM) x ceil(columns / BlockN) tiles, BlockM rows for a cluster. Where the last rows of
// an expert fit into one block of a cluster of two, the second would idle: there the two take neighbouring columns of the same rows
// (`split`), and the tile counts for two. Only full columns are paired, so both blocks of a cluster use as many stages of their
// rings, whatever a tile's columns cost. Ask for tiles in increasing order.
template <i32 BlockM, i32 BlockN, i32 GroupM, bool Pairs>
struct RaggedRows {
    const i32* offsets;  // (experts + 1)
    i32 experts, blocks_n, pairs_n;
    i32 expert = 0, first_tile = 0, begin, end;
    bool split = false;

    DEVICE RaggedRows(const i32* offsets_, i32 experts_, i32 columns)
        : offsets(offsets_), experts(experts_), blocks_n((columns + BlockN - 1) / BlockN), pairs_n(columns / (2 * BlockN)) {
        begin = offsets[0];
        end = offsets[1];
    }

    // False past the last tile; else m and n, in blocks, of `tile` inside the current expert. Of a split tile, n is the first of two.
    DEVICE bool find(i32 tile, i32& m, i32& n) {
        while (true) {
            const i32 blocks_m = (end - begin + BlockM - 1) / BlockM;
            const bool short_tail = Pairs && blocks_m > 0 && end - begin <= (blocks_m - 1) * BlockM + BlockM / 2;
            const i32 full_m = short_tail ? blocks_m - 1 : blocks_m, full_tiles = full_m * blocks_n;
            const i32 tiles = full_tiles + (short_tail ? blocks_n - pairs_n : 0);
            const i32 inside = tile - first_tile;
            if (inside < tiles) {
                split = inside >= full_tiles && inside - full_tiles < pairs_n;
                if (inside < full_tiles) {
                    grouped_order<GroupM>(inside, full_m, blocks_n, m, n);
                } else {
                    m = full_m;
                    n = inside - full_tiles + min(inside - full_tiles, pairs_n);
                }
                return true;
            }
            first_tile += tiles;
            if (++expert == experts) return false;
            begin = end;
            end = offsets[expert + 1];
        }
    }
};
