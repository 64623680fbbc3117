// D[r] = s[r] * (A[r] * B[expert of r]) for rows sorted by expert, bf16: a plain store with a scale for each row. See row_scaled_gemm.py.
#include "epilogue/store.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;

// The epilogue: scales a finished tile, then does what Store does.
template <Config C>
struct ScaledStore {
    const Store<C> store;
    const float* scales;  // (P)

    DEVICE static constexpr bool by_warpgroup() { return Store<C>::by_warpgroup(); }
    DEVICE i32 stages(const WorkTile& tile) const { return store.stages(tile); }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32 group, u32 warp) const {
        const i32 row = tile.row + static_cast<i32>(first_line(warp) + lane_index() / 4);  // a thread has rows r and r + 8: wgmma.cuh
        float scale[2];
#pragma unroll
        for (i32 i = 0; i < 2; ++i) scale[i] = row + 8 * i < tile.row_end ? scales[row + 8 * i] : 0.0f;
#pragma unroll
        for (u32 i = 0; i < C.accumulators(); ++i) acc[i] *= scale[i / 2 % 2];
        store(acc, tile, shared, ring, borrowed, group, warp);
    }
};

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    row_scaled_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_a_run,
                    const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets,
                    const i32* index, const i32 experts, const i32 columns, const i32 blocks_k, const float* scales, u8* d,
                    const i64 d_row_bytes) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_a_run, experts, columns, blocks_k};
    const ScaledStore<CONFIG> epilogue{{&map_d, {d, d_row_bytes, columns}}, scales};
    const auto produce = [&](u32) {  // warps 0 to 3: operands into the ring, and stages for the epilogue to borrow
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_a, Unscaled{}, LoadWeight<CONFIG, false>{&map_b},
                                         OfferStages<CONFIG>{shared, Store<CONFIG>::STAGES_USED});
    };
    const auto consume = [&](u32 warp) { for_each_tile<Major::K>(shared, warp, FixedDepth{blocks_k}, epilogue); };
    run_roles(shared, produce, consume);
}
