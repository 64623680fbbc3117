// Weight gradients from the parts of kernels/sm90, in configurations and with policies that no kernel of the package has yet:
// test_gemm_parts.py compiles them.
//
// Constants: CONFIG_A, the choices of a Config; SCHEDULE, an expression of C and `policies`.
#include "epilogue/deferred_weight_gradient.cuh"
#include "epilogue/weight_gradient.cuh"
#include "gemm/load_depth.cuh"
#include "gemm/load_depth_fp8.cuh"
#include "gemm/roles.cuh"
#include "gemm/tiles.cuh"

struct Policies {
    const i32 *begin_block, *end_block;
    i32* counter;
    const u32* arrived;
};

// Rows of A, transposed, times rows of B.
template <Config C>
DEVICE void gradient(const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_d, const Policies& policies, const i32* offsets,
                     const i32* index, i32 experts, i32 rows, i32 columns, const float* scales_b) {
    if constexpr (C.scaled()) {
        using Epilogue = DeferredWeightGradient<C, true>;
        const auto shared = shared_memory<C, C.shared_bytes(Epilogue::STAGING_BYTES), Epilogue::STAGING_BYTES>();
        const auto produce = [&](u32 warp) {
            if (warp > 0) return;
            load_scaled_depth(shared, {offsets, nullptr, experts, rows, columns, scales_b, columns, 1}, map_a, map_a, map_b, true, SCHEDULE);
        };
        run_roles(shared, produce, [&](u32 warp) { Epilogue{shared, {map_d, true, false}, warp / 4 - 1, warp}.run(rows); });
    } else {
        using Epilogue = WeightGradient<C, true>;
        const auto shared = shared_memory<C, C.shared_bytes()>();
        const auto produce = [&](u32) {
            load_ragged_depth<Epilogue::BORROWED_STAGES>(shared, {offsets, index, map_a, experts, rows, columns, rows}, map_a, map_b, true, SCHEDULE);
        };
        run_roles(shared, produce, [&](u32 warp) {
            for_each_tile<Major::MN>(shared, warp, RaggedDepth<>{static_cast<i32>(C.block_k()), rows}, Epilogue{{map_d, true, false}});
        });
    }
}

constexpr Config A{CONFIG_A};

extern "C" __global__ void __launch_bounds__(A.threads(), 1)
    gradient_a(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d,
               const Policies policies, const i32* offsets, const i32* index, i32 experts, i32 rows, i32 columns, const float* scales_b) {
    gradient<A>(&map_a, &map_b, &map_d, policies, offsets, index, experts, rows, columns, scales_b);
}
