// How B of a tile is loaded: one thread, part `part` of the cluster's, for those `blocks` of it.
#pragma once
#include "gemm/load_rows.cuh"

// (experts, columns, K), K contiguous, or (experts, K, columns).
template <Config C, bool MnMajor>
struct LoadWeight {
    const TensorMap* map;
    DEVICE void operator()(u32 tile_b, u32 full, i32 k, const WorkTile& tile, u32 part, u16 blocks) const {
        if constexpr (MnMajor) {
            load_b_mn_major<C>(tile_b, map, full, k, tile.column, tile.expert, part, blocks);
        } else if constexpr (C.cluster > 1) {
            const u32 first = part * (C.block_n / C.cluster);
            tma_load_multicast(tile_b + first * LINE, map, full, blocks, k, tile.column + first, tile.expert);
        } else {
            tma_load(tile_b, map, full, k, tile.column, tile.expert);
        }
    }
};

// Gate and up rows of a weight seen as (experts, 2, width, K): gate in the first half of the tile, up in the second.
template <Config C>
struct LoadGateAndUp {
    const TensorMap* map;
    i32 gate_base;
    DEVICE void operator()(u32 tile_b, u32 full, i32 k, const WorkTile& tile, u32 part, u16 blocks) const {
        const i32 gate_half = gate_base != 0;  // [up; gate]: the second half of the weight's rows
        if constexpr (C.cluster > 1) {         // part 0 is gate, part 1 is up
            tma_load_multicast(tile_b + part * (C.bytes_b() / 2), map, full, blocks, k, tile.column, static_cast<i32>(part) ^ gate_half, tile.expert);
        } else {
            tma_load(tile_b, map, full, k, tile.column, gate_half, tile.expert);
            tma_load(tile_b + C.bytes_b() / 2, map, full, k, tile.column, 1 - gate_half, tile.expert);
        }
    }
};

// Scales of a weight's 128 columns blocks that a tile needs.
struct ColumnBlocksOf {
    i32 columns;
    DEVICE ColumnBlocks operator()(const WorkTile& tile) const {
        const i32 first = tile.column / 128, last = (columns - 1) / 128;
        return {min(first, last), min(first + 1, last)};
    }
};
template <bool Interleaved>
struct GateAndUpBlocks {
    i32 width, gate_base, up_base;
    DEVICE ColumnBlocks operator()(const WorkTile& tile) const {
        const i32 first = Interleaved ? 2 * tile.column / 128 : (gate_base + tile.column) / 128;
        return {first, Interleaved ? min(first + 1, (2 * width - 1) / 128) : (up_base + tile.column) / 128};
    }
};

// Each block of a cluster has columns of its own: part 0 is all of B.
struct LoadOwnWeight {
    const TensorMap* map;
    DEVICE void operator()(u32 tile_b, u32 full, i32 k, const WorkTile& tile, u32 part, u16) const {
        if (part == 0) tma_load(tile_b, map, full, k, tile.column, tile.expert);
    }
};
template <Config C>
struct LoadOwnGateAndUp {
    const TensorMap* map;
    i32 gate_base, up_base;
    DEVICE void operator()(u32 tile_b, u32 full, i32 k, const WorkTile& tile, u32 part, u16) const {
        if (part != 0) return;
        const i32 gate_half = gate_base > up_base;  // [up; gate]: the second half of the weight's rows
        tma_load(tile_b, map, full, k, tile.column, gate_half, tile.expert);
        tma_load(tile_b + C.bytes_b() / 2, map, full, k, tile.column, 1 - gate_half, tile.expert);
    }
};

// Behind a tile's K blocks: nothing, or stages for the epilogue.
struct NoTail {
    template <typename Cursor>
    DEVICE void operator()(Cursor&, const WorkTile&, u32) const {}
};
template <Config C>
struct OfferStages {
    const SharedMemory<C>& shared;
    u32 count;
    DEVICE void operator()(Ring<C>& ring, const WorkTile&, u32 loader) const { offer_stages(shared, ring, count, loader); }
};
