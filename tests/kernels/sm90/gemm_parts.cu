// GEMMs from the parts of kernels/sm90, in configurations and with policies that no kernel of the package has yet: test_gemm_parts.py compiles
// them, two in one translation unit where CONFIG_B is given.
//
// Constants: CONFIG_A and CONFIG_B, the choices of a Config each; B_MN_MAJOR; SCHEDULE and READY, expressions of C and `policies`.
#include "epilogue/deferred_store.cuh"
#include "epilogue/store.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/tiles.cuh"
#include "gemm/tiles_fp8.cuh"

struct Policies {
    const i32 *begin_block, *end_block;
    i32* counter;
    const u32 *arrived, *expected;
};

// Rows of A times B, stored as they are.
template <Config C>
DEVICE void plain(const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_d, const Policies& policies, const i32* offsets,
                  const i32* index, i32 experts, i32 columns, i32 blocks_k, const float* scales_a, const float* scales_b, u8* d) {
    const RaggedGemm gemm{offsets, index, map_a, experts, columns, blocks_k};
    const Rows out{d, static_cast<i64>(columns) * 2, columns};
    if constexpr (C.scaled()) {
        using Epilogue = DeferredStore<C>;
        const auto shared = shared_memory<C, C.shared_bytes(Epilogue::STAGING_BYTES), Epilogue::STAGING_BYTES>();
        const Scales<ColumnBlocksOf> scales{map_a, scales_a, blocks_k, scales_b, 0, blocks_k, 1, {columns}};
        const auto produce = [&](u32) { load_ragged_rows<C.block_n>(shared, gemm, map_a, scales, LoadOwnWeight{map_b}, NoTail{}, READY, SCHEDULE); };
        run_roles(shared, produce, [&](u32 warp) {
            for_each_scaled_tile<Walk::Stages, false>(shared, warp, Epilogue{shared, map_d, out, blocks_k, warp});
        });
    } else {
        using Epilogue = Store<C>;
        const auto shared = shared_memory<C, C.shared_bytes()>();
        const auto produce = [&](u32) {
            load_ragged_rows<C.block_n>(shared, gemm, map_a, Unscaled{}, LoadWeight<C, B_MN_MAJOR>{map_b}, OfferStages<C>{shared, Epilogue::STAGES_USED},
                                        READY, SCHEDULE);
        };
        run_roles(shared, produce, [&](u32 warp) {
            for_each_tile<B_MN_MAJOR ? Major::MN : Major::K>(shared, warp, FixedDepth{blocks_k}, Epilogue{map_d, out});
        });
    }
}

#define ENTRY(NAME, CONFIG)                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)                                                                          \
        NAME(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d,        \
             const Policies policies, const i32* offsets, const i32* index, i32 experts, i32 columns, i32 blocks_k, const float* scales_a,     \
             const float* scales_b, u8* d) {                                                                                                   \
        plain<CONFIG>(&map_a, &map_b, &map_d, policies, offsets, index, experts, columns, blocks_k, scales_a, scales_b, d);                    \
    }

constexpr Config A{CONFIG_A};
ENTRY(plain_a, A)
#ifdef CONFIG_B
constexpr Config B{CONFIG_B};
ENTRY(plain_b, B)
#endif
