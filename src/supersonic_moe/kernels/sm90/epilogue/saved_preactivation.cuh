// Where the saved pre-activation Z waits in shared memory for the two FP8 backwards (gated_backward_fp8.cuh,
// gated_backward_quantize.cuh), and how it gets there: their loading warps' part.
//
// A tile is 128 rows x 256 activations, its epilogue four chunks of 64. The loader asks for Z behind the tile's last K block, while three
// stages are still to be multiplied.
#pragma once
#include "epilogue/activation_backward.cuh"
#include "epilogue/quantize.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/tiles_fp8.cuh"

struct SavedFormat {  // how Z was kept for the backward
    bool fp8;           // e4m3 with scales of 1 x 128, else bf16
    bool interleaved;   // gate and up alternate
    bool int8 = false;  // and fp8: codes are int8 instead, and what is a scale elsewhere are the exponents of four groups of 32 columns
};
template <Config C>
constexpr u32 chunks = C.block_n / CHUNK;
template <Config C, SavedFormat S>
constexpr u32 slots_of = S.fp8 ? chunks<C> : chunks<C> / 2;
template <Config C, SavedFormat S>
constexpr u32 slot_bytes = (S.fp8 ? 1 : 2) * C.buffer_bytes();
template <SavedFormat S>
constexpr u32 scale_vectors = S.fp8 ? (S.interleaved ? 1 : 2) : 0;  // of a chunk: gate and up may lie in two blocks of Z

// Z of a tile, a slot for a chunk: in e4m3 all four chunks, 128 bytes a row; in bf16 two of them, as two buffers. With gate and up in
// halves an e4m3 row is 64 bytes of the first half, then 64 of the second, swizzled in 64 bytes. Behind the slots lie scales of Z for
// each, and the rows' scores, which come with chunk 0.
template <Config C, SavedFormat S>
struct SavedSlots {
    static constexpr u32 BYTES = slots_of<C, S> * slot_bytes<C, S> + (slots_of<C, S> * scale_vectors<S> + 1) * C.scale_bytes();
    static_assert(C.side_bytes() % 1024 + 16 * slots_of<C, S> <= 1024, "barriers fit before the staging");
    SharedMemory<C> shared;
    DEVICE u32 buffer(u32 slot) const { return shared.staging() + slot * slot_bytes<C, S>; }
    DEVICE u32 scales(u32 slot, u32 vector) const { return buffer(slots_of<C, S>) + (slot * scale_vectors<S> + vector) * C.scale_bytes(); }
    DEVICE u32 scores() const { return scales(slots_of<C, S>, 0); }
    DEVICE u32 full(u32 slot) const { return shared.row_index(C.block_m) + 8 * slot; }
    DEVICE u32 empty(u32 slot) const { return full(slots_of<C, S> + slot); }

    DEVICE void init_barriers() const {  // before those of the ring, behind which a fence stands
        if (threadIdx.x > 0) return;
        for (u32 slot = 0; slot < slots_of<C, S>; ++slot) {
            mbarrier_init(full(slot), 1);
            mbarrier_init(empty(slot), C.math_warps());
        }
    }
    DEVICE void release(u32 slot) const {
        if (lane_index() == 0) mbarrier_arrive(empty(slot));
    }
};

// This thread's lane, read from a special register of its own: ptxas takes what is computed from the thread's index in two places for one
// value, and keeps addresses for staging in registers while a chunk is computed.
DEVICE u32 hardware_lane() {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// This lane's part of 16 activations of a chunk. `gate_at`: 0, or 64 where the first half is up.
template <Config C, SavedFormat S>
DEVICE PackedFragment load_saved(u32 buffer, u32 line, u32 part, u32 lane, u32 gate_at) {
    if constexpr (!S.fp8) return load_packed<C, Gate{Act::SwiGLU, S.interleaved}>(buffer, line, part, lane);
    PackedFragment words;
    if constexpr (S.interleaved) {
        load_matrices(words.first, matrix_address(buffer, line, part, lane));
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if constexpr (S.int8) words.first[i] ^= INT8_SIGNS;
            words.second[i] = words.first[i] >> 16;
        }
    } else {
        const u32 at = buffer + (line + lane / 4) * LINE + (part ^ lane / 4 % 4) * 16 + lane % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 from = at + i % 2 * 8 * LINE + i / 2 * 8;
            asm volatile("ld.shared.u16 %0, [%1];" : "=r"(words.first[i]) : "r"(from + gate_at) : "memory");
            asm volatile("ld.shared.u16 %0, [%1];" : "=r"(words.second[i]) : "r"(from + LINE / 2 - gate_at) : "memory");
            if constexpr (S.int8) words.first[i] ^= INT8_SIGNS, words.second[i] ^= INT8_SIGNS;
        }
    }
    return words;
}

// How a thread's part of Z becomes numbers, of rows r and r + 8 of a chunk. `words`: what stands for the scales of its columns.
template <SavedFormat S>
struct SavedScales {
    u32 words[2];
    DEVICE SavedScales(u32 first, u32 second) {  // shared addresses
        if constexpr (S.fp8) words[0] = __float_as_uint(load_scale(first)), words[1] = __float_as_uint(load_scale(second));
    }
    // Eight numbers z[column pair][..], as unpack gave them, of the 32 columns of `group`, a number from 0 to 3.
    DEVICE void apply(float (&z)[4][2], u32 group) const {
        if constexpr (!S.fp8) return;
        float step[2], offset[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            step[i] = S.int8 ? step_of_exponent(words[i] >> 8 * group & 0xff) : __uint_as_float(words[i]);
            offset[i] = -INT8_OFFSET * step[i];
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            float& number = z[i / 2][i % 2];
            number = S.int8 ? __fmaf_rn(number, step[i / 2 % 2], offset[i / 2 % 2]) : number * step[i / 2 % 2];
        }
    }
};
template <SavedFormat S>
DEVICE void unpack_saved(u32 word, float& low, float& high) {
    if constexpr (!S.fp8) {
        low = bf16_low(word), high = bf16_high(word);
    } else if constexpr (S.int8) {
        unpack_int8(word, low, high);
    } else {
        unpack_e4m3(word, low, high);
    }
}

// Z, its scales and the rows' scores, as the loading warpgroup reads them.
template <Config C, SavedFormat S>
struct LoadSavedSlots {
    const TensorMap *map_z, *map_scale_z, *map_scores;
    i32 width, gate_base, up_base;

    // A chunk into its slot. `exists`: false where the tile has no such chunk.
    DEVICE void load(const SavedSlots<C, S>& slots, const WorkTile& tile, u32 chunk, u32 slot, bool exists) const {
        const u32 full = slots.full(slot), buffer = slots.buffer(slot);
        const i32 column = tile.column + static_cast<i32>(chunk * CHUNK), aligned_row = tile.row / 4 * 4;
        if (!exists) {
            mbarrier_arrive(full);
            return;
        }
        mbarrier_arrive_expect_tx(full, slot_bytes<C, S> + (scale_vectors<S> + (chunk == 0 ? 1 : 0)) * C.scale_load_bytes());
        if (chunk == 0) tma_load(slots.scores(), map_scores, full, aligned_row, 0);
        if constexpr (S.fp8 && S.interleaved) {
            tma_load(slots.scales(slot, 0), map_scale_z, full, aligned_row, column / 64);
            tma_load(buffer, map_z, full, 2 * column, tile.row);
        } else if constexpr (S.fp8) {
            tma_load(slots.scales(slot, 0), map_scale_z, full, aligned_row, (gate_base + column) / 128);
            tma_load(slots.scales(slot, 1), map_scale_z, full, aligned_row, (up_base + column) / 128);
            tma_load(buffer, map_z, full, column, 0, tile.row);
        } else {
            const i32 gate_half = gate_base > up_base, first = S.interleaved ? 2 * column : column;
            tma_load(buffer, map_z, full, first, S.interleaved ? 0 : gate_half, tile.row);
            const i32 second = S.interleaved ? first + 64 : first, up_half = S.interleaved ? 0 : 1 - gate_half;
            tma_load(buffer + C.buffer_bytes(), map_z, full, second, up_half, tile.row);
        }
    }
};

// All tiles of this block: K blocks, Z, and a lap of the ring for the epilogue. A tile has the chunks of each `Span` of activations that
// has one of its own; those past the width load as zeros.
template <i32 Span, Config C, SavedFormat S, typename Schedule = AllTiles<C>>
DEVICE void load_tiles_with_saved(const SharedMemory<C>& shared, const SavedSlots<C, S>& slots, const RaggedGemm& gemm,
                                  const TensorMap* map_do, const TensorMap* map_w, const Scales<ColumnBlocksOf>& scales,
                                  const LoadSavedSlots<C, S>& saved, const Schedule schedule = {}) {
    u32 lap = 0;  // of the slots
    const auto load_tail = [&](Ring<C>& ring, const WorkTile& tile, u32 loader) {
        const auto load_lap = [&](u32 first) {
            if (loader > 0) return;
#pragma unroll 1
            for (u32 slot = 0; slot < slots_of<C, S>; ++slot) {
                const u32 chunk = first + slot;
                mbarrier_wait(slots.empty(slot), lap % 2 ^ 1);
                const bool exists = tile.column + static_cast<i32>(chunk * CHUNK) / Span * Span < saved.width;
                if (elect_one()) saved.load(slots, tile, chunk, slot, exists);
                __syncwarp();
            }
            ++lap;
        };
        load_lap(0);
        finish_lap(shared, ring, loader);
        offer_stages(shared, ring, C.stages, loader);
        if constexpr (slots_of<C, S> < chunks<C>) load_lap(slots_of<C, S>);
    };
    load_ragged_rows<C.block_n>(shared, gemm, map_do, scales, LoadOwnWeight{map_w}, load_tail, ReadyAtStart{}, schedule);
}
