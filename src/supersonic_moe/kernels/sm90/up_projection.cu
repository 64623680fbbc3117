// Z[r] = X[r] * W1[expert of r]^T and A[r] = act(Z[r] + b1), for rows sorted by expert and gated activations. See
// up_projection.py.
//
// A tile is 128 rows x 128 activations. Its B is 128 gate rows and 128 up rows of W1, so gate and up of an activation sit in one
// thread at the same place of the two halves of its accumulators, whatever the order in which the weight stores them. Where H is
// outermost and gates and ups alternate, B is 256 columns of W1 as they lie, and gate and up are neighbours.
#include "epilogue/gated.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;
constexpr GateAndUp ORDER = static_cast<GateAndUp>(W1_ORDER);
using Epilogue = GatedActivation<CONFIG, static_cast<Act>(ACTIVATION), ORDER == GateAndUp::Pairs>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    up_projection(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_x_run,
                  const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_z,
                  const __grid_constant__ TensorMap map_a, const i32* offsets, const i32* index, const i32 experts, const i32 width,
                  const i32 blocks_k, u8* z, u8* a, const u16* b1, const i32 gate_base, const i32 up_base, const i32 interleaved,
                  const float alpha, const float limit, const float up_offset, const i32* begin_block, const i32* end_block,
                  const u32* arrived, const i32 parts) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_x_run, experts, width, blocks_k};
    const Epilogue epilogue{&map_z, &map_a, z, a, b1, width, gate_base, up_base, interleaved != 0,
                            {alpha, limit, up_offset}, Epilogue::stages_used(z)};
    const auto produce = [&](u32) {
        load_ragged_rows<Epilogue::WIDTH>(shared, gemm, &map_x, Unscaled{}, LoadGateAndUp<CONFIG, ORDER>{&map_w, gate_base},
                                          OfferStages<CONFIG>{shared, epilogue.used}, ReadyAtStart{}, SCHEDULE);
    };
    constexpr Major major = ORDER == GateAndUp::Rows ? Major::K : Major::MN;
    run_roles(shared, produce, [&](u32 warp) { for_each_tile<major>(shared, warp, FixedDepth{blocks_k}, epilogue); });
}
