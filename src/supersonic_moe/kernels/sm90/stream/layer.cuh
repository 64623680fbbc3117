// The streaming kernel: what its warps do, one after the other. See stream_experts.py.
#pragma once
#include "stream/combine.cuh"
#include "stream/gather.cuh"
#include "stream/load.cuh"
#include "stream/multiply.cuh"

static_assert(SMEM_BYTES == RING_BYTES + sizeof(Side), "the host reserves another number of bytes than stream/work.cuh asks for");

DEVICE void stream_layer(const Problem& problem, const WeightMaps& wide, const WeightMaps& narrow, const WeightMaps& shared_wide,
                         const WeightMaps& shared_narrow) {
    extern __shared__ __align__(1024) u8 dynamic_shared_memory[];
    const Block block = {dynamic_shared_memory, smem_address(dynamic_shared_memory),
                         *reinterpret_cast<Side*>(dynamic_shared_memory + RING_BYTES)};
    dependency_launch();
    block.init_barriers();
    const u32 warp = warp_index();
    if (warp == WEIGHT_WARP && elect_one()) {
        prefetch_tensor_map(wide.w13), prefetch_tensor_map(narrow.w13);
        prefetch_tensor_map(wide.w2), prefetch_tensor_map(narrow.w2);
    }
    dependency_wait();
    block.read_items(problem);
    const Geometry geometry(problem, block.side.items[0]);
    if (warp < MATH_WARPS) {
        gather_rows(problem, geometry);
        compute_strips(block, problem, geometry, warp / 4);
        combine_tokens(block, problem, geometry);
    } else if (warp == TOKEN_WARP) {
        load_tokens(block, problem, geometry);
    } else if (elect_one()) {
        const bool is_narrow = geometry.narrow();
        const WeightMaps own = {is_narrow ? narrow.w13 : wide.w13, is_narrow ? narrow.w2 : wide.w2};
        const WeightMaps shared = {is_narrow ? shared_narrow.w13 : shared_wide.w13, is_narrow ? shared_narrow.w2 : shared_wide.w2};
        load_weights(block, problem, geometry, own, shared);
    }
}
