// The routing kernels for many tokens, on a CPU. VALUES: experts of a lane.
#include "routing/place.cuh"

static ChoiceShared<VALUES> choice_shared[route_warps];

extern "C" void route(const float* logits, i64 row, const void* bias, i32 scoring, i32 bias_type, i32 groups, i32 kept, i32 group_size,
                      i32 group_lanes_log2, float factor, i32 offset, i32 num_experts, i32 routed, i32 top_k, i32 choices, i32 tokens,
                      i32 span, i32 blocks, i32* counts, i32* offsets, int4* items, i32* row_slot, i32* row_token, int2* row_out,
                      i32* slot_row, float* weights, u32* counters, i32 counter_words) {
    const RoutingRule rule = {num_experts, top_k, groups, kept, scoring, bias_type, group_size, group_lanes_log2, factor};
    const Placement placement = {offset, num_experts, routed, top_k, choices};
    const RowTables tables = {offsets, items, row_slot, row_token, row_out, slot_row};
    gridDim.x = blocks, blockDim.x = route_threads;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        run_block(route_threads, [&] {
            FromLogits<VALUES> source = {logits, row, bias, rule, placement, choice_shared};
            count_block(source, tokens, span, counts, slot_row, weights, counters, counter_words);
        });
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        run_block(route_threads, [&] { place_counted(counts, tokens, span, choices, placement.num_local(), tables, weights); });
}
