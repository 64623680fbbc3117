// Bodies of the routing kernels: one cluster for up to 128 tokens, or a kernel that counts and one that places. See route_rows.py.
#pragma once
#include "routing/slots.cuh"

constexpr u32 route_cluster = 8;
constexpr u32 small_tokens = 16;  // of a block of the cluster: a warp for each
constexpr u32 pass_tokens = 128;  // that place_counted takes at a time
constexpr u32 small_parts = (small_tokens * max_choices + route_threads - 1) / route_threads;
constexpr u32 pass_parts = (pass_tokens * max_choices + route_threads - 1) / route_threads;

DEVICE void zero_words(u32* words, i32 count) {
    for (i32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) words[i] = 0;
}

// The whole of it, by a cluster. Blocks read one another's counts through distributed shared memory, so nothing in global memory has to be
// zero beforehand.
template <class Source>
DEVICE void place_by_cluster(const Source& source, i32 tokens, const RowTables& tables, float* weights, u32* counters, i32 counter_words) {
    __shared__ RowShared shared;
    __shared__ u16 experts[small_tokens * max_choices];
    const u32 warp = threadIdx.x / 32, rank = cluster_block_rank();
    const u32 choices = source.placement.choices, num_local = source.placement.num_local();
    const u32 span = (tokens + route_cluster - 1) / route_cluster, first = min(span * rank, static_cast<u32>(tokens));
    const u32 own = min(span, tokens - first);
    const bool has_slot = warp < own && lane_index() < choices;
    float weight = 0.0f;
    if (warp < own) {
        const u16 expert = slot_of_lane(source, first + warp, weight);
        if (has_slot) experts[warp * choices + lane_index()] = expert;
    }
    __syncthreads();

    u32 place[small_parts];
    count_slots(shared, experts, own * choices, num_local, place);
    cluster_sync();  // before the first store to global memory, which it would wait for
    u32 rows = 0, earlier = 0;
    if (threadIdx.x < num_local) {
        const u32 address = smem_address(&shared.counts[threadIdx.x]);
#pragma unroll
        for (u32 block = 0; block < route_cluster; ++block) {
            const u32 theirs = load_remote(address, block);
            rows += theirs;
            earlier += block < rank ? theirs : 0;
        }
    }
    const ExpertScan scan = scan_experts(shared, rows, num_local);
    cluster_arrive_relaxed();  // has read the others' counts; waits for them before it exits
    const u32 first_row = store_experts(tables, num_local, scan, rows, rank == 0);
    if (threadIdx.x < num_local) shared.first_row[threadIdx.x] = first_row + earlier;
    if (has_slot) weights[static_cast<i64>(first + warp) * choices + lane_index()] = weight;
    zero_words(counters, counter_words);
    __syncthreads();
    place_slots(shared, tables, experts, weights, own * choices, static_cast<i64>(first) * choices, choices, place);
    cluster_wait();
}

// Block b has the tokens [b * span, (b + 1) * span): leaves the local expert of each slot in slot_row, and its counts in row b.
template <class Source>
DEVICE void count_block(const Source& source, i32 tokens, i32 span, i32* counts, i32* slot_row, float* weights, u32* counters,
                        i32 counter_words) {
    __shared__ u32 mine[max_local_experts];
    const u32 warp = threadIdx.x / 32, choices = source.placement.choices, num_local = source.placement.num_local();
    if (threadIdx.x < num_local) mine[threadIdx.x] = 0;
    zero_words(counters, counter_words);
    __syncthreads();
    const i64 first = static_cast<i64>(span) * blockIdx.x, end = min(first + span, static_cast<i64>(tokens));
    for (i64 token = first + warp; token < end; token += route_warps) {
        float weight;
        const u16 expert = slot_of_lane(source, token, weight);
        if (lane_index() < choices) {
            weights[token * choices + lane_index()] = weight;
            slot_row[token * choices + lane_index()] = expert == nowhere ? -1 : expert;
            if (expert != nowhere) atomicAdd(&mine[expert], 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x < num_local) counts[blockIdx.x * num_local + threadIdx.x] = mine[threadIdx.x];
}

// Behind count_block, with its grid and span.
DEVICE void place_counted(const i32* counts, i32 tokens, i32 span, u32 choices, u32 num_local, const RowTables& tables,
                          const float* weights) {
    __shared__ RowShared shared;
    __shared__ u16 experts[pass_tokens * max_choices];
    if (threadIdx.x < num_local) shared.counts[threadIdx.x] = shared.first_row[threadIdx.x] = 0;
    __syncthreads();
    const u32 parts = route_threads / num_local, e = threadIdx.x % num_local, part = threadIdx.x / num_local;
    if (part < parts) {
        u32 rows = 0, earlier = 0;
#pragma unroll 8
        for (u32 block = part; block < gridDim.x; block += parts) {
            const u32 theirs = counts[block * num_local + e];
            rows += theirs;
            earlier += block < blockIdx.x ? theirs : 0;
        }
        atomicAdd(&shared.counts[e], rows);
        atomicAdd(&shared.first_row[e], earlier);
    }
    __syncthreads();
    const u32 rows = threadIdx.x < num_local ? shared.counts[threadIdx.x] : 0;
    const ExpertScan scan = scan_experts(shared, rows, num_local);
    const u32 first_row = store_experts(tables, num_local, scan, rows, blockIdx.x == 0);
    if (threadIdx.x < num_local) shared.first_row[threadIdx.x] += first_row;

    const i64 end = min(static_cast<i64>(span) * (blockIdx.x + 1), static_cast<i64>(tokens));
    for (i64 first = static_cast<i64>(span) * blockIdx.x; first < end; first += pass_tokens) {
        const u32 slots = static_cast<u32>(min(static_cast<i64>(pass_tokens), end - first)) * choices;
        __syncthreads();
        for (u32 i = threadIdx.x; i < slots; i += route_threads) {
            const i32 expert = tables.slot_row[first * choices + i];
            experts[i] = expert < 0 ? nowhere : static_cast<u16>(expert);
        }
        __syncthreads();
        u32 place[pass_parts];
        count_slots(shared, experts, slots, num_local, place);
        place_slots(shared, tables, experts, weights, slots, first * choices, choices, place);
        __syncthreads();
        if (threadIdx.x < num_local) shared.first_row[threadIdx.x] += shared.counts[threadIdx.x];
    }
}
