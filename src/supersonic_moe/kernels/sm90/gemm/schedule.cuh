// Which output tile comes next: persistent blocks walk the tiles of all experts in one order that every cluster knows.
//
// Tiles are numbered expert by expert. Inside an expert the order is grouped: group_m blocks of rows at a time, all columns of
// those rows before the next ones, rows innermost. Tiles that run together then share few rows and few columns, so operands come
// from L2. Only the loading warps walk; they tell the math warps what they loaded (work_tile.cuh).
#pragma once
#include "gemm/work_tile.cuh"
#include "ptx/barrier.cuh"

// Grouped order of a grid of `blocks_m` x `blocks_n` tiles.
template <i32 GroupM>
DEVICE void grouped_order(i32 index, i32 blocks_m, i32 blocks_n, i32& m, i32& n) {
    const i32 first = index / (GroupM * blocks_n) * GroupM;
    const i32 rows = min(GroupM, blocks_m - first);
    const i32 inside = index - first * blocks_n;
    m = first + inside % rows;
    n = inside / rows;
}

// Tile `inside` of a grid of `full_m` x `blocks_n` in grouped order, and behind it one more row of tiles that fills only one block of a
// cluster of two: there the two take neighbouring columns of the same rows, `pairs_n` times (true; n is the first of the two).
template <i32 GroupM>
DEVICE bool paired_order(i32 inside, i32 full_m, i32 blocks_n, i32 pairs_n, i32& m, i32& n) {
    const i32 full_tiles = full_m * blocks_n;
    const bool split = inside >= full_tiles && inside - full_tiles < pairs_n;
    if (inside < full_tiles) {
        grouped_order<GroupM>(inside, full_m, blocks_n, m, n);
    } else {
        m = full_m;
        n = inside - full_tiles + min(inside - full_tiles, pairs_n);
    }
    return split;
}

// ---- which tiles a block takes: policies of the loaders. All loading warps ask, and get the same numbers in increasing order ----

// Every tile: tile i is that of cluster i modulo their number.
template <Config C>
struct AllTiles {
    static constexpr bool CLIPS = false;
    DEVICE i32 first() const { return blockIdx.x / C.cluster; }
    DEVICE i32 next(i32 index) const { return index + gridDim.x / C.cluster; }
};

// Of each expert the blocks [begin_block[e], end_block[e]) of `block_rows` rows, a multiple of what a cluster takes, in `parts` rounds over
// the experts, each with limits of its own. Rounds that have each block once write the bits of AllTiles, in one launch or in several.
// Rows of A may come while the kernel runs: those of round p > 0 are there once arrived[p] is not zero (null: all are there). In a ragged
// contraction there is one round, and launches add up in their order.
template <Config C>
struct RowBlocks : AllTiles<C> {
    static constexpr bool CLIPS = true;
    const i32 *begin_block, *end_block;  // (parts, experts)
    const u32* arrived;                  // (parts)
    i32 parts, block_rows;
    DEVICE RowBlocks(const i32* begin_block_, const i32* end_block_, const u32* arrived_, i32 parts_, i32 block_rows_)
        : begin_block(begin_block_), end_block(end_block_), arrived(arrived_), parts(parts_), block_rows(block_rows_) {}
    DEVICE void clip(i32 at, i32& begin, i32& end) const {
        const i32 from = begin;
        begin = min(end, from + begin_block[at] * block_rows);
        end = min(end, from + end_block[at] * block_rows);
    }
    // All lanes, before a warp loads A of the first tile of a round.
    DEVICE void wait_for(i32 part) const {
        if (part > 0 && arrived != nullptr) wait_for_word(arrived + part, 1);
    }
};

// Every tile, handed out by a counter in global memory that starts at zero, so that blocks which start late or run slowly take fewer.
template <Config C>
struct TileCounter {
    static_assert(C.cluster == 1 && C.load_warps() == 1, "one warp of one block asks: its lanes share the number by a shuffle");
    static constexpr bool CLIPS = false;
    i32* counter;
    DEVICE i32 first() const { return next(0); }
    DEVICE i32 next(i32) const {
        i32 index = 0;
        if (lane_index() == 0) asm volatile("atom.global.relaxed.gpu.add.s32 %0, [%1], 1;" : "=r"(index) : "l"(counter) : "memory");
        return __shfl_sync(0xffffffffu, index, 0);
    }
};

// ---- where a tile lies ----

// Ragged rows: expert e has ceil(rows of e / BlockM) x ceil(columns / BlockN) tiles, BlockM rows for a cluster. Where the last rows of
// an expert fit into one block of a cluster of two, the second would idle: there the two take neighbouring columns of the same rows
// (`split`), and the tile counts for two. Only full columns are paired, so both blocks of a cluster use as many stages of their
// rings, whatever a tile's columns cost. Ask for tiles in increasing order.
template <i32 BlockM, i32 BlockN, i32 GroupM, bool Pairs, typename Schedule>
struct RaggedRows {
    const i32* offsets;  // (experts + 1)
    i32 experts, blocks_n, pairs_n;
    i32 expert = 0, first_tile = 0, begin, end;
    bool split = false;

    Schedule schedule;
    i32 whole_end = 0, part = 0;  // end of the expert, and round, where the schedule clips it

    DEVICE RaggedRows(const i32* offsets_, i32 experts_, i32 columns, Schedule schedule_)
        : offsets(offsets_), experts(experts_), blocks_n((columns + BlockN - 1) / BlockN), pairs_n(columns / (2 * BlockN)),
          schedule(schedule_) {
        begin = offsets[0];
        end = offsets[1];
        clip();
    }
    DEVICE void clip() {
        if constexpr (Schedule::CLIPS) whole_end = end, schedule.clip(part * experts + expert, begin, end);
    }
    // False past the last expert, of the last round.
    DEVICE bool to_next_expert() {
        if (++expert == experts) {
            if constexpr (!Schedule::CLIPS) return false;
            if (!next_round()) return false;
        } else {
            begin = Schedule::CLIPS ? whole_end : end;
        }
        end = offsets[expert + 1];
        clip();
        return true;
    }
    DEVICE bool next_round() {
        if constexpr (Schedule::CLIPS) {
            if (++part == schedule.parts) return false;
        }
        expert = 0;
        begin = offsets[0];
        return true;
    }

    // False past the last tile; else m and n, in blocks, of number `index` inside the current expert. Of a split tile, n is the first of
    // two.
    DEVICE bool find(i32 index, i32& m, i32& n) {
        while (true) {
            const i32 blocks_m = (end - begin + BlockM - 1) / BlockM;
            const bool short_tail = Pairs && blocks_m > 0 && end - begin <= (blocks_m - 1) * BlockM + BlockM / 2;
            const i32 full_m = short_tail ? blocks_m - 1 : blocks_m, full_tiles = full_m * blocks_n;
            const i32 tiles = full_tiles + (short_tail ? blocks_n - pairs_n : 0);
            const i32 inside = index - first_tile;
            if (inside < tiles) {
                split = paired_order<GroupM>(inside, full_m, blocks_n, pairs_n, m, n);
                return true;
            }
            first_tile += tiles;
            if (!to_next_expert()) return false;
        }
    }
};
