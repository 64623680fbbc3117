// From router logits to rows sorted by expert. VALUES: experts of a lane. See route_rows.py.
#include "routing/place.cuh"

extern __shared__ __align__(16) u8 routing_shared[];

extern "C" __global__ void __launch_bounds__(route_threads, 1)
    route_small(const float* logits, i64 row, const void* bias, i32 scoring, i32 bias_type, i32 groups, i32 kept, i32 group_size,
                i32 group_lanes_log2, float factor, i32 offset, i32 num_experts, i32 routed, i32 top_k, i32 choices, i32 tokens,
                i32* offsets, int4* items, i32* row_slot, i32* row_token, int2* row_out, i32* slot_row, float* weights,
                u32* counters, i32 counter_words) {
    dependency_launch();
    const RoutingRule rule = {num_experts, top_k, groups, kept, scoring, bias_type, group_size, group_lanes_log2, factor};
    FromLogits<VALUES> source = {logits, row, bias, rule, {offset, num_experts, routed, top_k, choices},
                                 reinterpret_cast<ChoiceShared<VALUES>*>(routing_shared)};
    const RowTables tables = {offsets, items, row_slot, row_token, row_out, slot_row, nullptr, 0};
    place_by_cluster(source, tokens, tables, weights, counters, counter_words);
}

extern "C" __global__ void __launch_bounds__(route_threads, VALUES <= 8 ? 2 : 1)
    route_count(const float* logits, i64 row, const void* bias, i32 scoring, i32 bias_type, i32 groups, i32 kept, i32 group_size,
                i32 group_lanes_log2, float factor, i32 offset, i32 num_experts, i32 routed, i32 top_k, i32 choices, i32 tokens, i32 span,
                i32* counts, i32* slot_row, float* weights, u32* counters, i32 counter_words) {
    dependency_launch();
    const RoutingRule rule = {num_experts, top_k, groups, kept, scoring, bias_type, group_size, group_lanes_log2, factor};
    FromLogits<VALUES> source = {logits, row, bias, rule, {offset, num_experts, routed, top_k, choices},
                                 reinterpret_cast<ChoiceShared<VALUES>*>(routing_shared)};
    count_block(source, tokens, span, counts, slot_row, weights, counters, counter_words);
}
