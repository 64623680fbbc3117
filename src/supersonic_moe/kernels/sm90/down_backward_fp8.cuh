// What both forms of the backward of the down-projection in FP8 share (down_backward_fp8.cu, down_backward_fp8_quantised.cu): where H waits
// in shared memory, and the loading warpgroup's part.
//
// A tile is 128 rows x 256 activations, its epilogue four chunks of 64. The loader asks for H behind the tile's last K block, while three
// stages are still to be multiplied.
//
// Constants: those of mainloop.cuh, ACTIVATION, INTERLEAVED (columns of H: gate and up alternate), SAVED_FP8 (H is e4m3 with scales of
// 1 x 128, else bf16).
#pragma once
#include "activation_backward.cuh"
#include "mainloop_fp8.cuh"

constexpr u32 CHUNKS = BLOCK_N / CHUNK;
constexpr u32 SLOTS = SAVED_FP8 ? CHUNKS : CHUNKS / 2, SLOT_BYTES = (SAVED_FP8 ? 1 : 2) * ROOM_BYTES;
constexpr u32 SCALE_VECTORS = SAVED_FP8 ? (INTERLEAVED ? 1 : 2) : 0;  // of a chunk: gate and up may lie in two blocks of H

// H of a tile, a slot for a chunk: in e4m3 all four chunks, 128 bytes a row; in bf16 two of them, as two rooms. With gate and up in halves
// an e4m3 row is 64 bytes of the first half, then 64 of the second, swizzled in 64 bytes. Behind the slots lie scales of H for each, and
// the rows' scores, which come with chunk 0.
struct Slots {
    Shared shared;
    DEVICE u32 room(u32 slot) const { return shared.staging() + slot * SLOT_BYTES; }
    DEVICE u32 scales(u32 slot, u32 vector) const { return room(SLOTS) + (slot * SCALE_VECTORS + vector) * SCALE_BYTES; }
    DEVICE u32 scores() const { return scales(SLOTS, 0); }
    DEVICE u32 full(u32 slot) const { return shared.row_index(BLOCK_M) + 8 * slot; }
    DEVICE u32 empty(u32 slot) const { return full(SLOTS + slot); }

    DEVICE void prepare() const {  // before that of the ring, which has the fence
        if (threadIdx.x > 0) return;
        for (u32 slot = 0; slot < SLOTS; ++slot) {
            mbarrier_init(full(slot), 1);
            mbarrier_init(empty(slot), MATH_WARPS);
        }
    }
    DEVICE void release(u32 slot) const {
        if (lane_index() == 0) mbarrier_arrive(empty(slot));
    }
};
static_assert((STAGES * (SCALE_BYTES + NOTE_BYTES + 16) + 4 * BLOCK_M) % 1024 + 16 * SLOTS <= 1024, "barriers fit before the staging");

// This lane's part of 16 activations of a chunk. `gate_at`: 0, or 64 where the first half is up.
DEVICE Words load_saved(u32 room, u32 line, u32 part, u32 lane, u32 gate_at) {
    if constexpr (!SAVED_FP8) return load_words(room, line, part, lane);
    Words words;
    if constexpr (INTERLEAVED) {
        load_matrices(words.first, matrix_address(room, line, part, lane));
#pragma unroll
        for (u32 i = 0; i < 4; ++i) words.second[i] = words.first[i] >> 16;
    } else {
        const u32 at = room + (line + lane / 4) * LINE + (part ^ lane / 4 % 4) * 16 + lane % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 from = at + i % 2 * 8 * LINE + i / 2 * 8;
            asm volatile("ld.shared.u16 %0, [%1];" : "=r"(words.first[i]) : "r"(from + gate_at) : "memory");
            asm volatile("ld.shared.u16 %0, [%1];" : "=r"(words.second[i]) : "r"(from + LINE / 2 - gate_at) : "memory");
        }
    }
    return words;
}

// A row of zeros in a room; four lanes.
DEVICE void clear_line(u32 line, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(line + lane % 4 * 32 + i * 16), "r"(0) : "memory");
}

// H, its scales and the rows' scores, as the loading warpgroup reads them.
struct Saved {
    const TensorMap *map_h, *map_scale_h, *map_scores;
    i32 width, gate_base, up_base;

    // A chunk into its slot. `exists`: false where the tile has no such chunk.
    DEVICE void load(const Slots& slots, const TileNote& note, u32 chunk, u32 slot, bool exists) const {
        const u32 full = slots.full(slot), room = slots.room(slot);
        const i32 column = note.column + static_cast<i32>(chunk * CHUNK), aligned_row = note.row / 4 * 4;
        if (!exists) {
            mbarrier_arrive(full);
            return;
        }
        mbarrier_arrive_expect_tx(full, SLOT_BYTES + (SCALE_VECTORS + (chunk == 0 ? 1 : 0)) * SCALE_LOAD_BYTES);
        if (chunk == 0) tma_load(slots.scores(), map_scores, full, aligned_row, 0);
        if constexpr (SAVED_FP8 && INTERLEAVED) {
            tma_load(slots.scales(slot, 0), map_scale_h, full, aligned_row, column / 64);
            tma_load(room, map_h, full, 2 * column, note.row);
        } else if constexpr (SAVED_FP8) {
            tma_load(slots.scales(slot, 0), map_scale_h, full, aligned_row, (gate_base + column) / 128);
            tma_load(slots.scales(slot, 1), map_scale_h, full, aligned_row, (up_base + column) / 128);
            tma_load(room, map_h, full, column, 0, note.row);
        } else {
            const i32 gate_half = gate_base > up_base, first = INTERLEAVED ? 2 * column : column;
            tma_load(room, map_h, full, first, INTERLEAVED ? 0 : gate_half, note.row);
            tma_load(room + ROOM_BYTES, map_h, full, INTERLEAVED ? first + 64 : first, INTERLEAVED ? 0 : 1 - gate_half, note.row);
        }
    }
};

struct BlocksOfW {  // of 128 columns in a tile
    i32 width;
    DEVICE ColumnBlocks operator()(const TileNote& note) const {
        const i32 first = note.column / 128, last = (width - 1) / 128;
        return {min(first, last), min(first + 1, last)};
    }
};

// All tiles of this block: K blocks, H, and a lap of the ring for the epilogue. A tile has the chunks of each `Span` of activations that
// has one of its own; those past the width load as zeros.
template <i32 Span>
DEVICE void load_tiles(const Shared& shared, const Slots& slots, const RaggedGemm& gemm, const TensorMap* map_do, const TensorMap* map_w,
                       const Scales<BlocksOfW>& scales, const Saved& saved) {
    const auto load_w = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16) {
        if (part == 0) tma_load(tile_b, map_w, full, k, note.column, note.expert);
    };
    u32 lap = 0;  // of the slots
    const auto load_tail = [&](Ring& ring, const TileNote& note, u32 loader) {
        const auto load_lap = [&](u32 first) {
            if (loader > 0) return;
#pragma unroll 1
            for (u32 slot = 0; slot < SLOTS; ++slot) {
                const u32 chunk = first + slot;
                mbarrier_wait(slots.empty(slot), lap % 2 ^ 1);
                if (elect_one()) saved.load(slots, note, chunk, slot, note.column + static_cast<i32>(chunk * CHUNK) / Span * Span < saved.width);
                __syncwarp();
            }
            ++lap;
        };
        load_lap(0);
        finish_lap(shared, ring, loader);
        lend_stages(shared, ring, STAGES, loader);
        if constexpr (SLOTS < CHUNKS) load_lap(SLOTS);
    };
    load_ragged_rows<BLOCK_N>(shared, gemm, map_do, scales, load_w, load_tail);
}
