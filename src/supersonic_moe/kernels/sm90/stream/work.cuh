// What the streaming kernel computes, in tiles, and how its blocks share shared memory. See stream_experts.py.
//
// An item is up to 128 rows of an expert, as the routing kernels list them. A tile is `tile_rows` rows of a weight times all rows of an
// item. A strip is one tile of W13 or so many tiles of W2, one below the other, that they are about as long. Strips are numbered, first W13
// of all items, then W2 of all items, and taken from a counter or, where tiles are narrow, dealt in turns; items of one expert take turns,
// so that its weights come from DRAM once. A tile of W13 is for tile_rows / 2 channels: each 16 lines of it are 8 rows of one half of W13 and
// the 8 rows of the other half for the same channels.
#pragma once
#include "ptx/copy.cuh"
#include "ptx/memory.cuh"
#include "stream/tokens.cuh"

constexpr u32 LINE_BYTES = 128;         // of K: a K block, one swizzled line
constexpr u32 WIDE = 128, NARROW = 64;  // rows of a tile
constexpr u32 BLOCK_CHANNELS = 128;     // one scale of c; a block of columns of y that is combined at a time
constexpr u32 GROUP_CHANNELS = 32;      // of a warpgroup's 64 rows of W13
constexpr u32 GATHER_BLOCKS = 16;       // K blocks of x that a warp gathers at a time: eight lanes a block, 16 elements a lane, four times
constexpr u32 GATHER_ROWS = 64;         // rows of x that are waited for together
constexpr u32 MAX_STAGES = 24;
constexpr u32 QUEUE = 4;       // strips known ahead
constexpr u32 KNOWN_ITEMS = 64;  // in shared memory; what is behind them is read from global memory
constexpr u32 RING_BYTES = 216 * 1024;
// Weights that a block has asked for and not got, at most. 33 KB would keep DRAM busy (4.4 TB/s for a microsecond, by 132); a full ring of
// requests is no faster and makes everything else wait 6 us behind them.
// Narrow tiles leave less for others to wait behind.
constexpr u32 BYTES_ON_THE_WAY = 64 * 1024, NARROW_BYTES_ON_THE_WAY = 40 * 1024;

// Of W2 in a strip, if all multiprocessors have two: what comes with one (the counter, its item, whether c is there, scales, a release
// behind y) takes some microseconds, as 16 K blocks do.
constexpr u32 STRIP_BLOCKS = 16;

constexpr u32 MATH_WARPS = 8, WEIGHT_WARP = 8, TOKEN_WARP = 9;
constexpr u32 STREAM_THREADS = 32 * 10;
constexpr u32 QUEUE_READERS = 1 + MATH_WARPS;

// Rows of e4m3 in planes: plane b holds the K block b of every row, 128 bytes each, swizzled as TMA would have it, and their scales. So the
// rows of an item are one copy of N * 128 bytes and one of N * 4. Rows up to the next multiple of N are read, multiplied and dropped.
struct Planes {
    u8* codes;
    float* scales;
    i64 rows;  // of a plane

    DEVICE u8* line(i64 row, u32 block) const { return codes + (block * rows + row) * LINE_BYTES; }
    DEVICE float* scale(i64 row, u32 block) const { return scales + block * rows + row; }
    // Of 16-byte chunk `chunk` of a line.
    DEVICE u8* chunk(i64 row, u32 block, u32 chunk) const { return line(row, block) + (chunk ^ static_cast<u32>(row) % 8) * 16; }
};

// A tile and those below it that are taken with it.
struct Tile {
    u32 product;  // 1: W13, 2: W2, 0: no tile is left
    u32 index;    // of the item's
    u32 count;
    u32 item;
    i32 expert, row, rows;
    bool shares;  // its weights with the tiles next to it, of other rows of the same expert
};

struct Problem {
    const int4* items;  // header, then {expert, first row, rows, which << 16 | of} of each: one of the expert's
    const i32* row_slot;
    const i32* slot_row;
    const float* slot_weight;
    i32 tokens, choices;  // choices: slots of a token
    i32 hidden, inter, routed;
    bool interleaved, gate_first;
    Tokens of_tokens;
    const float* x_weight;  // of each token, multiplies x for routed experts; null: 1
    const float *w13_scale, *w2_scale, *shared_w13_scale, *shared_w2_scale;
    Planes x_rows;  // x of each row
    float* c;       // (rows, inter)
    Planes c_rows;  // c of each row
    float* y;       // (rows, hidden)
    u32* counters;
    i32 max_items;
    float limit;
    bool pow2;

    bool shared_expert;

    DEVICE i32 shared() const { return shared_expert; }  // slots of a token that are no choice of the router
    DEVICE u32 blocks_hidden() const { return hidden / LINE_BYTES; }
    DEVICE u32 blocks_inter() const { return (inter + LINE_BYTES - 1) / LINE_BYTES; }
    // K blocks of a tile.
    DEVICE u32 blocks_of(const Tile& tile) const { return tile.product == 1 ? blocks_hidden() : blocks_inter(); }
    // Counters, all zero at the start: the next strip; warpgroups that have stored their part of a block of columns of y; blocks of c of each
    // item that are ready; arrivals at each of these blocks; parts of each 64 rows of x that are gathered.
    DEVICE u32* next_strip() const { return counters; }
    DEVICE u32* stored(u32 block) const { return counters + 4 + block; }
    DEVICE u32* ready(u32 item) const { return counters + 4 + blocks_hidden() + item; }
    DEVICE u32* arrivals(u32 item, u32 block) const {
        return counters + 4 + blocks_hidden() + max_items + item * blocks_inter() + block;
    }
    DEVICE u32* gathered(u32 group) const { return arrivals(max_items, 0) + group; }
    // Of a row of x; a warp gathers one at a time.
    DEVICE u32 gather_parts() const { return (blocks_hidden() + GATHER_BLOCKS - 1) / GATHER_BLOCKS; }
};

// Columns of the instruction that holds `rows` rows: one of 8, 16, 24, 32, 48, 64, 96, 128.
DEVICE u32 columns_for(u32 rows) {
    const u32 step = rows <= 32 ? 8 : rows <= 64 ? 16 : 32;
    return (rows + step - 1) / step * step;
}

// Known once the router is done, the same in every thread.
struct Geometry {
    u32 items, padded_rows, tile_rows, tiles1, tiles2;  // tiles of an item in W13 and in W2
    u32 strip, strips2;                                 // tiles in a strip of W2, strips of an item in W2
    u32 stage_bytes, stages, token_scale_bytes;

    DEVICE Geometry(const Problem& p, const int4& header) {
        items = header.x, padded_rows = header.z;
        // With few tiles, smaller ones fill the multiprocessors better; with many, larger ones stream better (docs/log.md).
        tile_rows = items * (p.inter / 64) * 2 <= gridDim.x * 3 ? NARROW : WIDE;
        tiles1 = 2 * p.inter / tile_rows;
        tiles2 = p.hidden / tile_rows;
        strip = max(1, min(STRIP_BLOCKS / p.blocks_inter(), items * tiles2 / (2 * gridDim.x)));
        strips2 = (tiles2 + strip - 1) / strip;
        const u32 columns = columns_for(max(header.y, 1));
        stage_bytes = (tile_rows + columns) * LINE_BYTES;
        token_scale_bytes = columns * 4;
        stages = min(MAX_STAGES, RING_BYTES / (stage_bytes + token_scale_bytes));
    }
    DEVICE bool narrow() const { return tile_rows == NARROW; }
    DEVICE u32 strips() const { return items * (tiles1 + strips2); }
    DEVICE u32 stages_on_the_way() const { return min(stages, (narrow() ? NARROW_BYTES_ON_THE_WAY : BYTES_ON_THE_WAY) / (tile_rows * LINE_BYTES)); }
    DEVICE u32 token_tile() const { return tile_rows * LINE_BYTES; }  // behind the weights of a stage
    // Of the tokens in a stage, behind all stages.
    DEVICE u32 token_scales(u32 stage) const { return stages * stage_bytes + stage * token_scale_bytes; }
};

// Places in a ring of `size`, which is not known at compile time.
struct Cursor {
    u32 at = 0, phase = 0;
    DEVICE void advance(u32 size) {
        if (++at == size) at = 0, phase ^= 1;
    }
};

constexpr u32 BATCH_SLOTS = 128;  // of the tokens that a warp combines at a time

struct RowList {
    i32 row[BATCH_SLOTS];
    float weight[BATCH_SLOTS];
    u8 token[BATCH_SLOTS];  // of the batch
};

struct alignas(128) Side {
    RowList lists[MATH_WARPS];
    int4 items[1 + KNOWN_ITEMS];         // as in global memory
    float weight_scales[MAX_STAGES][2];  // of the two row sets of a thread's accumulators: r and r + 8
    Tile queue[QUEUE];
    u64 weights[MAX_STAGES], tokens[MAX_STAGES], empty[MAX_STAGES];  // of each stage: the two have landed; both have been used
    u64 queue_full[QUEUE], queue_empty[QUEUE];
    u32 last[2];  // whether a warpgroup was the last to reach a block of c
};

struct Block {
    u8* memory;
    u32 ring;
    Side& side;

    DEVICE u32 weights(u32 stage) const { return smem_address(&side.weights[stage]); }
    DEVICE u32 tokens(u32 stage) const { return smem_address(&side.tokens[stage]); }
    DEVICE u32 empty(u32 stage) const { return smem_address(&side.empty[stage]); }
    DEVICE u32 queue_full(u32 place) const { return smem_address(&side.queue_full[place]); }
    DEVICE u32 queue_empty(u32 place) const { return smem_address(&side.queue_empty[place]); }

    // Made visible by the barrier behind read_items.
    DEVICE void init_barriers() const {
        if (threadIdx.x == 0) {
            for (u32 i = 0; i < MAX_STAGES; ++i) {
                mbarrier_init(weights(i), 1);
                mbarrier_init(tokens(i), 1);
                mbarrier_init(empty(i), MATH_WARPS);
            }
            for (u32 i = 0; i < QUEUE; ++i) {
                mbarrier_init(queue_full(i), 1);
                mbarrier_init(queue_empty(i), QUEUE_READERS);
            }
            fence_mbarrier_init();
        }
    }

    DEVICE void read_items(const Problem& p) const {
        const i32 i = threadIdx.x;
        if (i <= min(p.max_items, static_cast<i32>(KNOWN_ITEMS))) side.items[i] = p.items[i];
        __syncthreads();
    }

    DEVICE Tile find_strip(const Problem& p, const Geometry& g, u32 number) const {
        if (number >= g.strips()) return {};
        const bool second = number >= g.items * g.tiles1;
        const u32 inside = second ? number - g.items * g.tiles1 : number, each = second ? g.strips2 : g.tiles1;
        u32 item = inside / each, index = inside % each;
        int4 rows = item_at(p, item);
        const u32 which = static_cast<u32>(rows.w) >> 16, of = rows.w & 0xffff;
        if (of > 1) {
            const u32 first_item = item - which, number_in_expert = inside - first_item * each;
            item = first_item + number_in_expert % of, index = number_in_expert / of;
            rows = item_at(p, item);
        }
        const u32 first = second ? index * g.strip : index;
        return {second ? 2u : 1u, first, second ? min(g.strip, g.tiles2 - first) : 1, item, rows.x, rows.y, rows.z, of > 1};
    }

    DEVICE int4 item_at(const Problem& p, u32 item) const { return item < KNOWN_ITEMS ? side.items[1 + item] : p.items[1 + item]; }

    // All lanes of a warp.
    DEVICE void release_stage(Cursor& ring, u32 stages) const {
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(empty(ring.at));
        ring.advance(stages);
    }

    // All lanes of a warp; the entry is handed back.
    DEVICE Tile read_tile(Cursor& queue) const {
        mbarrier_wait(queue_full(queue.at), queue.phase);
        const Tile tile = side.queue[queue.at];
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(queue_empty(queue.at));
        queue.advance(QUEUE);
        return tile;
    }
};
