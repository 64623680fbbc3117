// D[e] = or += A[rows of e]^T * B[rows of e], or its transpose, bf16 operands, bf16 or fp32 output. See grouped_wgrad.py.
#include "epilogue/weight_gradient.cuh"
#include "gemm/load_depth.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;
constexpr bool LAST_ROWS = CONFIG.block_n == 320;  // tiles for sizes that 256 and 384 do not fill (gemm_config.py)
using Epilogue = WeightGradient<CONFIG, FP32>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    grouped_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_a_run,
                  const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets, const i32* index,
                  const i32 experts, const i32 blocks_m, const i32 blocks_n, const i32 adds, const i32 transposed, const i32 rows) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const auto produce = [&](u32) {
        const DepthGemm gemm{offsets, index, &map_a_run, experts, blocks_m, blocks_n, rows};
        load_ragged_depth<Epilogue::BORROWED_STAGES, LAST_ROWS>(shared, gemm, &map_a, &map_b, FP32 && adds);
    };
    run_roles(shared, produce, [&](u32 warp) {
        const Epilogue epilogue{{&map_d, FP32 && adds, transposed != 0}};
        for_each_tile<Major::MN>(shared, warp, RaggedDepth<LAST_ROWS>{static_cast<i32>(CONFIG.block_k()), rows}, epilogue);
    });
}
