// From the ids of another router to rows sorted by expert, and the second half of both ways. See route_rows.py.
#include "routing/place.cuh"

extern "C" __global__ void __launch_bounds__(route_threads, 1)
    place_small(const void* ids, i32 wide, const float* topk_weights, const i32* map, float factor, i32 offset, i32 num_experts, i32 routed,
                i32 top_k, i32 choices, i32 tokens, i32* offsets, int4* items, i32* row_slot, i32* row_token, int2* row_out, i32* slot_row,
                float* weights, u32* counters, i32 counter_words, i32* received) {
    dependency_launch();
    FromIds source = {ids, wide != 0, topk_weights, map, factor, {offset, num_experts, routed, top_k, choices}};
    const RowTables tables = {offsets, items, row_slot, row_token, row_out, slot_row, received, routed};
    place_by_cluster(source, tokens, tables, weights, counters, counter_words);
}

extern "C" __global__ void __launch_bounds__(route_threads, 2)
    place_count(const void* ids, i32 wide, const float* topk_weights, const i32* map, float factor, i32 offset, i32 num_experts, i32 routed,
                i32 top_k, i32 choices, i32 tokens, i32 span, i32* counts, i32* slot_row, float* weights, u32* counters, i32 counter_words) {
    dependency_launch();
    FromIds source = {ids, wide != 0, topk_weights, map, factor, {offset, num_experts, routed, top_k, choices}};
    count_block(source, tokens, span, counts, slot_row, weights, counters, counter_words);
}

extern "C" __global__ void __launch_bounds__(route_threads, 2)
    place_rows(const i32* counts, i32 tokens, i32 span, i32 choices, i32 num_local, i32* offsets, int4* items, i32* row_slot,
               i32* row_token, int2* row_out, i32* slot_row, const float* weights, i32* received, i32 routed) {
    dependency_launch();
    dependency_wait();
    const RowTables tables = {offsets, items, row_slot, row_token, row_out, slot_row, received, routed};
    place_counted(counts, tokens, span, choices, num_local, tables, weights);
}
