// A contraction over the positions of an expert, e4m3: the weight gradient in FP8, as its loading warp sees it. Both operands lie along the
// positions, of which every expert fills whole K blocks. Called as the `produce` of run_roles, by warp 0.
//
// In the work tile, row_end is the number of rows of D, and blocks_k is 0 where an expert has no position.
#pragma once
#include "gemm/scales.cuh"
#include "gemm/shared_memory.cuh"
#include "ptx/copy.cuh"

struct ScaledDepthGemm {
    const i32* offsets;  // (experts + 1), positions: multiples of 128
    const i32* source;   // (blocks of positions) the block of A to load in place of each, or null: itself
    i32 experts, rows, columns;
    const float* scale_b;  // (blocks of columns, blocks of positions), with these strides
    i64 scale_column, scale_k;
};

struct DepthTile {
    WorkTile tile;
    i32 first_k;  // K block, of all experts'
    bool found;
};

// The two scales of B, one K block ahead of their use.
struct DepthScales {
    const float *first = nullptr, *second = nullptr;
    float next_first = 0.0f, next_second = 0.0f;
    DEVICE DepthScales(const ScaledDepthGemm& gemm, const DepthTile& of) {
        if (!of.found || of.tile.blocks_k == 0) return;  // its positions may start where the scales end
        const i32 column = of.tile.column / 128, last = (gemm.columns - 1) / 128;
        const float* at = gemm.scale_b + of.first_k * gemm.scale_k;
        next_first = __ldg(first = at + column * gemm.scale_column);
        next_second = __ldg(second = at + min(column + 1, last) * gemm.scale_column);
    }
    DEVICE void advance(const ScaledDepthGemm& gemm) {
        next_first = __ldg(first += gemm.scale_k), next_second = __ldg(second += gemm.scale_k);
    }
};

// Loads all tiles of this block: the K blocks of its expert, or one stage with nothing but a work tile. The next tile's offsets are read
// while the current one is loaded, its sources and first scales behind that: each of these reads takes as long as a K block.
template <Config C, typename Schedule = AllTiles<C>>
DEVICE void load_scaled_depth(const SharedMemory<C>& shared, const ScaledDepthGemm& gemm, const TensorMap* map_a,
                              const TensorMap* map_scale_a, const TensorMap* map_b, const bool adds, const Schedule schedule = {}) {
    static_assert(C.cluster == 1 && C.load_warps() == 1, "one warp loads for its block alone");
    const i32 blocks_m = (gemm.rows + static_cast<i32>(C.block_m) - 1) / static_cast<i32>(C.block_m);
    const i32 blocks_n = (gemm.columns + static_cast<i32>(C.block_n) - 1) / static_cast<i32>(C.block_n);
    const i32 tiles_each = blocks_m * blocks_n;
    i32 index = schedule.first();
    const auto find = [&]() -> DepthTile {
        for (; index < gemm.experts * tiles_each; index = schedule.next(index)) {
            const i32 expert = index / tiles_each;
            i32 begin = gemm.offsets[expert], end = gemm.offsets[expert + 1];
            if constexpr (Schedule::CLIPS) schedule.clip(expert, begin, end);
            const i32 blocks_k = (end - begin) / 128;
            if (adds && blocks_k == 0) continue;  // nothing to add
            i32 m, n;
            grouped_order<C.group_m>(index % tiles_each, blocks_m, blocks_n, m, n);
            index = schedule.next(index);
            return {{m * static_cast<i32>(C.block_m), gemm.rows, n * static_cast<i32>(C.block_n), expert, blocks_k}, begin / 128, true};
        }
        return {{WorkTile::STOP_ROW, 0, 0, 0, 0}, 0, false};
    };
    const auto sources = [&](i32 first, i32 end) {  // of 32 K blocks, one a lane: a uniform load would be waited for at once
        const i32 block = min(first + static_cast<i32>(lane_index()), end - 1);
        return gemm.source == nullptr || first >= end ? block : __ldg(gemm.source + block);
    };
    const auto first_sources = [&](const DepthTile& of) { return sources(of.first_k, of.first_k + of.tile.blocks_k); };
    Ring<C> ring;
    DepthTile now = find();
    DepthScales scales(gemm, now);
    i32 mine = first_sources(now), source = __shfl_sync(0xffffffffu, mine, 0);
    while (now.found) {
        const WorkTile tile = now.tile;
        const i32 first_k = now.first_k, stages = max(tile.blocks_k, 1);
        for (i32 block = 0; block < stages; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage);
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (elect_one()) {
                write_work_tile(shared.work_tile(ring.stage), tile);
                if (tile.blocks_k == 0) {
                    mbarrier_arrive(full);
                } else {
                    const i32 k = (first_k + block) * static_cast<i32>(C.block_k());
                    store_scales(shared.scale_b(ring.stage), scales.next_first, scales.next_second);
                    mbarrier_arrive_expect_tx(full, C.stage_bytes() + C.scale_load_bytes());
                    tma_load(shared.scale_a(ring.stage), map_scale_a, full, tile.row, source);
                    tma_load(shared.tile_a(ring.stage), map_a, full, source * static_cast<i32>(C.block_k()), tile.row);
                    tma_load(shared.tile_b(ring.stage), map_b, full, k, tile.column);
                }
            }
            if (block + 1 < stages) scales.advance(gemm);
            if (block == 0) now = find();
            if (block % 32 == 31) mine = sources(first_k + block + 1, first_k + stages);
            source = __shfl_sync(0xffffffffu, mine, (block + 1) % 32);
        }
        scales = DepthScales(gemm, now), mine = first_sources(now);
        source = __shfl_sync(0xffffffffu, mine, 0);
    }
    announce_end(shared, ring, 0);
}
