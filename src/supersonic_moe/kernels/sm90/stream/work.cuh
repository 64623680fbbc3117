// What the streaming kernel computes, in tiles, and how its blocks share shared memory. See stream_experts.py.
//
// An item is up to 128 rows of an expert, as the routing kernels list them. A tile is `tile_rows` rows of a weight times all rows of an
// item: first W13 of all items, then W2 of all items, numbered in this order, taken from a counter. A tile of W13 is for tile_rows / 2
// channels: each 16 lines of it are 8 rows of one half of W13 and the 8 rows of the other half for the same channels.
#pragma once
#include "ptx/copy.cuh"
#include "ptx/memory.cuh"

constexpr u32 LINE_BYTES = 128;  // of K: a K block, one swizzled line
constexpr u32 WIDE = 128, NARROW = 64;  // rows of a tile
constexpr u32 MAX_COLUMNS = 128;        // rows of an item
constexpr u32 BLOCK_CHANNELS = 128;     // one scale of c
constexpr u32 GROUP_CHANNELS = 32;      // of a warpgroup's 64 rows of W13
constexpr u32 MAX_STAGES = 16;
constexpr u32 QUEUE = 4;  // tiles known ahead
constexpr u32 RING_BYTES = 216 * 1024;

constexpr u32 TOKEN_WARPS = 3, MATH_WARPS = 8;
constexpr u32 FULL_ARRIVALS = 1 + TOKEN_WARPS, QUEUE_READERS = TOKEN_WARPS + MATH_WARPS;
constexpr u32 STREAM_THREADS = 32 * (1 + TOKEN_WARPS + MATH_WARPS);

struct Problem {
    const int4* items;  // header, then {expert, first row, rows, 0} of each
    const i32* row_slot;
    const float* x_weight;  // of each token, multiplies x for routed experts; null: 1
    i32 choices;              // slots of a token
    i32 hidden, inter, routed;
    bool interleaved, gate_first;
    const float* x_scale;
    i64 x_scale_row, x_scale_k;
    const float *w13_scale, *w2_scale, *shared_w13_scale, *shared_w2_scale;
    float* c;         // (rows, inter)
    u8* codes;        // (rows, inter) e4m3 of c
    float* c_scale;   // (rows, blocks of inter)
    float* y;         // (rows, hidden)
    u32* counters;    // next tile; 3 unused; ready blocks of each item; arrivals at each block of each item
    i32 max_items;
    float limit;
    bool pow2;

    DEVICE u32 blocks_hidden() const { return hidden / LINE_BYTES; }
    DEVICE u32 blocks_inter() const { return (inter + LINE_BYTES - 1) / LINE_BYTES; }
    DEVICE u32* next_tile() const { return counters; }
    DEVICE u32* ready(u32 item) const { return counters + 4 + item; }
    DEVICE u32* arrivals(u32 item, u32 block) const { return counters + 4 + max_items + item * blocks_inter() + block; }
};

// Columns of the instruction that holds `rows` rows: one of 8, 16, 24, 32, 48, 64, 96, 128.
DEVICE u32 columns_for(u32 rows) {
    const u32 step = rows <= 32 ? 8 : rows <= 64 ? 16 : 32;
    return (rows + step - 1) / step * step;
}

// Known once the router is done, the same in every thread.
struct Geometry {
    u32 items, tile_rows, tiles1, tiles2;  // tiles of an item in W13 and in W2
    u32 stage_bytes, stages;

    DEVICE Geometry(const Problem& p) {
        const int4 header = p.items[0];
        items = header.x;
        // With few tiles, smaller ones fill the multiprocessors better; with many, larger ones stream better (docs/log.md).
        tile_rows = items * (p.inter / 64) * 2 <= gridDim.x * 3 ? NARROW : WIDE;
        tiles1 = 2 * p.inter / tile_rows;
        tiles2 = p.hidden / tile_rows;
        stage_bytes = (tile_rows + columns_for(max(header.y, 1))) * LINE_BYTES;
        stages = min(MAX_STAGES, RING_BYTES / stage_bytes);
    }
    DEVICE bool narrow() const { return tile_rows == NARROW; }
    DEVICE u32 tiles() const { return items * (tiles1 + tiles2); }
    DEVICE u32 token_tile() const { return tile_rows * LINE_BYTES; }  // behind the weights of a stage
};

struct Tile {
    u32 product;  // 1: W13, 2: W2, 0: no tile is left
    u32 index;    // of the item's
    u32 item;
    i32 expert, row, rows;
};

DEVICE Tile find_tile(const Problem& p, const Geometry& g, u32 number) {
    if (number >= g.tiles()) return {};
    const bool second = number >= g.items * g.tiles1;
    const u32 inside = second ? number - g.items * g.tiles1 : number, each = second ? g.tiles2 : g.tiles1;
    const u32 item = inside / each;
    const int4 rows = p.items[1 + item];
    return {second ? 2u : 1u, inside % each, item, rows.x, rows.y, rows.z};
}

// Places in a ring of `size`, which is not known at compile time.
struct Cursor {
    u32 at = 0, phase = 0;
    DEVICE void advance(u32 size) {
        if (++at == size) at = 0, phase ^= 1;
    }
};

struct alignas(128) Side {
    float token_scales[MAX_STAGES][MAX_COLUMNS];
    float weight_scales[MAX_STAGES][2];  // of the two row sets of a thread's accumulators: r and r + 8
    Tile queue[QUEUE];
    u64 full[MAX_STAGES], empty[MAX_STAGES];
    u64 queue_full[QUEUE], queue_empty[QUEUE];
    u32 last[2];  // whether a warpgroup was the last to reach a block of c
};

struct Block {
    u32 ring;
    Side& side;

    DEVICE u32 full(u32 stage) const { return smem_address(&side.full[stage]); }
    DEVICE u32 empty(u32 stage) const { return smem_address(&side.empty[stage]); }
    DEVICE u32 queue_full(u32 place) const { return smem_address(&side.queue_full[place]); }
    DEVICE u32 queue_empty(u32 place) const { return smem_address(&side.queue_empty[place]); }

    DEVICE void init_barriers() const {
        if (threadIdx.x == 0) {
            for (u32 i = 0; i < MAX_STAGES; ++i) {
                mbarrier_init(full(i), FULL_ARRIVALS);
                mbarrier_init(empty(i), MATH_WARPS);
            }
            for (u32 i = 0; i < QUEUE; ++i) {
                mbarrier_init(queue_full(i), 1);
                mbarrier_init(queue_empty(i), QUEUE_READERS);
            }
            fence_mbarrier_init();
        }
        __syncthreads();
    }

    // All lanes of a warp; the entry is handed back, `arrivals` for this warp.
    DEVICE Tile read_tile(Cursor& queue, u32 arrivals = 1) const {
        mbarrier_wait(queue_full(queue.at), queue.phase);
        const Tile tile = side.queue[queue.at];
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(queue_empty(queue.at), arrivals);
        queue.advance(QUEUE);
        return tile;
    }
};
