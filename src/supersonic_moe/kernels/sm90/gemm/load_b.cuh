// How B of a stage is loaded, as the loaders call it: `load_b(tile_b, full, k, tile, part, blocks)`, by one thread, for K from `k` on.
// Blocks of a cluster with the same columns load a part of B each, part `part` of as many as there are blocks, for those `blocks` of
// them.
#pragma once
#include "gemm/work_tile.cuh"
#include "ptx/copy.cuh"

// Part of an N-contiguous B: columns in slabs of 64, rows k.. of slice `slice`.
template <Config C>
DEVICE void load_b_mn_major(u32 tile_b, const TensorMap* map, u32 full, i32 k, i32 first_column, i32 slice, u32 part, u16 blocks) {
    static_assert(C.block_n % 64 == 0, "each block of a cluster loads whole slabs of 64 columns");
    constexpr u32 slabs = (C.slabs_n() + C.cluster - 1) / C.cluster;
#pragma unroll
    for (u32 i = 0; i < slabs; ++i) {
        if (C.slabs_n() % C.cluster > 0 && part * slabs + i >= C.slabs_n()) break;  // the last part has one less
        const u32 at = tile_b + (part * slabs + i) * C.slab_bytes();
        const i32 column = first_column + static_cast<i32>((part * slabs + i) * 64);
        if constexpr (C.cluster > 1) {
            tma_load_multicast(at, map, full, blocks, column, k, slice);
        } else {
            tma_load(at, map, full, column, k, slice);
        }
    }
}

// A weight (experts, columns, K), K contiguous, or MN-major (experts, K, columns).
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

// How a weight of gates and ups lies: (experts, 2 * width, K), K contiguous, seen as (experts, 2, width, K); or with K outermost, (experts,
// K, 2, width) in halves, or (experts, K, 2 * width) where gates and ups alternate.
enum class GateAndUp : int { Rows = 0, Halves = 1, Pairs = 2 };

// Gates in the first half of the tile and ups in the second; of Pairs all columns as they lie.
template <Config C, GateAndUp Order = GateAndUp::Rows>
struct LoadGateAndUp {
    const TensorMap* map;
    i32 gate_base;
    DEVICE void operator()(u32 tile_b, u32 full, i32 k, const WorkTile& tile, u32 part, u16 blocks) const {
        const i32 gate_half = gate_base != 0;  // [up; gate]: the second half of the weight's rows
        if constexpr (Order == GateAndUp::Pairs) {
            load_b_mn_major<C>(tile_b, map, full, k, 2 * tile.column, tile.expert, part, blocks);
        } else if constexpr (Order == GateAndUp::Halves) {
            constexpr u32 slabs = C.slabs_n() / C.cluster;
#pragma unroll
            for (u32 i = 0; i < slabs; ++i) {
                const u32 slab = part * slabs + i, at = tile_b + slab * C.slab_bytes();
                const i32 half = static_cast<i32>(slab / (C.slabs_n() / 2)) ^ gate_half;
                const i32 column = tile.column + static_cast<i32>(slab % (C.slabs_n() / 2) * 64);
                if constexpr (C.cluster > 1) {
                    tma_load_multicast(at, map, full, blocks, column, half, k, tile.expert);
                } else {
                    tma_load(at, map, full, column, half, k, tile.expert);
                }
            }
        } else if constexpr (C.cluster > 1) {  // part 0 is gate, part 1 is up
            tma_load_multicast(tile_b + part * (C.bytes_b() / 2), map, full, blocks, k, tile.column, static_cast<i32>(part) ^ gate_half,
                               tile.expert);
        } else {
            tma_load(tile_b, map, full, k, tile.column, gate_half, tile.expert);
            tma_load(tile_b + C.bytes_b() / 2, map, full, k, tile.column, 1 - gate_half, tile.expert);
        }
    }
};

// Both weights, K contiguous, where each block of a cluster has columns of its own (share_a): part 0 is all of B.
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
