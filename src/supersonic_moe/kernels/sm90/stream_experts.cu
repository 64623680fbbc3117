// Both products of a Mixture-of-Experts layer for few rows an expert: weights stream through once. See stream_experts.py.
#include "stream/load.cuh"
#include "stream/multiply.cuh"

static_assert(SMEM_BYTES == RING_BYTES + sizeof(Side), "the host reserves another number of bytes than stream/work.cuh asks for");

extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)
    stream_experts(const __grid_constant__ TensorMap map_w13, const __grid_constant__ TensorMap map_w13_narrow,
                   const __grid_constant__ TensorMap map_w2, const __grid_constant__ TensorMap map_w2_narrow,
                   const __grid_constant__ TensorMap map_shared_w13, const __grid_constant__ TensorMap map_shared_w13_narrow,
                   const __grid_constant__ TensorMap map_shared_w2, const __grid_constant__ TensorMap map_shared_w2_narrow,
                   const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_codes, const int4* items,
                   const i32* row_slot, const float* x_weight, const i32 choices, const i32 hidden, const i32 inter, const i32 routed,
                   const i32 interleaved, const i32 gate_first, const float* x_scale, const i64 x_scale_row, const i64 x_scale_k,
                   const float* w13_scale, const float* w2_scale, const float* shared_w13_scale, const float* shared_w2_scale, float* c,
                   u8* codes, float* c_scale, float* y, u32* counters, const i32 max_items, const float limit, const i32 pow2) {
    extern __shared__ __align__(1024) u8 dynamic_shared_memory[];
    const Block block = {smem_address(dynamic_shared_memory), *reinterpret_cast<Side*>(dynamic_shared_memory + RING_BYTES)};
    const Problem problem = {items,     row_slot, x_weight,       choices,          hidden, inter, routed,  interleaved != 0, gate_first != 0,
                             x_scale,   x_scale_row, x_scale_k,     w13_scale,        w2_scale, shared_w13_scale, shared_w2_scale, c,
                             codes,     c_scale,  y,                counters,         max_items, limit, pow2 != 0};
    dependency_launch();
    block.init_barriers();
    const u32 warp = warp_index();
    if (warp == 0 && elect_one()) prefetch_tensor_map(&map_w13), prefetch_tensor_map(&map_w13_narrow), prefetch_tensor_map(&map_x);
    dependency_wait();
    const Geometry geometry(problem);
    const bool narrow = geometry.narrow();
    if (warp < 4) {
        register_dealloc<88>();
        if (warp > 0) {
            load_tokens(block, problem, geometry, &map_x, &map_codes, warp - 1);
        } else if (elect_one()) {
            const WeightMaps own = {narrow ? &map_w13_narrow : &map_w13, narrow ? &map_w2_narrow : &map_w2};
            const WeightMaps shared = {narrow ? &map_shared_w13_narrow : &map_shared_w13, narrow ? &map_shared_w2_narrow : &map_shared_w2};
            load_weights(block, problem, geometry, own, shared);
        }
    } else {
        register_alloc<208>();
        compute_tiles(block, problem, geometry, warp / 4 - 1);
    }
}
