// Bodies of the routing kernels: one cluster for up to 128 tokens, or a kernel that counts and one that places. See route_rows.py.
#pragma once
#include "routing/slots.cuh"

constexpr u32 route_cluster = 8;
constexpr u32 small_tokens = 16;  // of a block of the cluster: a warp for each
constexpr u32 count_loads = 17;   // counts on their way to a thread: all that it reads of 264 blocks and 32 experts

DEVICE void zero_words(u32* words, i32 count) {
    for (i32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) words[i] = 0;
}

// Whether one lane of the warp, which has the choices of a token, has a row.
DEVICE bool is_alone(u16 expert) { return __popc(__ballot_sync(all_lanes, expert != nowhere)) == 1; }

// The whole of it, by a cluster. Blocks read one another's counts through distributed shared memory, so nothing in global memory has to be
// zero beforehand.
template <class Source>
DEVICE void place_by_cluster(Source& source, i32 tokens, const RowTables& tables, float* weights, u32* counters, i32 counter_words) {
    __shared__ RowShared shared;
    const u32 warp = threadIdx.x / 32, rank = cluster_block_rank();
    const u32 choices = source.placement.choices, num_local = source.placement.num_local();
    const u32 span = (tokens + route_cluster - 1) / route_cluster, first = min(span * rank, static_cast<u32>(tokens));
    const u32 own = min(span, tokens - first);
    Slot slot = {static_cast<i64>(first + warp) * choices + lane_index(), nowhere, false, 0.0f};
    if (warp < own) {
        typename Source::Loaded loaded;
        source.load(first + warp, loaded);
        source.prepare();
        slot.expert = slot_of_lane(source, loaded, slot.weight, [] {});
        slot.alone = is_alone(slot.expert);
    }
    const bool has_slot = warp < own && lane_index() < choices;
    const u32 place = count_slots(shared, slot.expert, own, num_local);
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
    if (has_slot) weights[slot.index] = slot.weight;
    zero_words(counters, counter_words);
    __syncthreads();
    if (has_slot) place_slot(shared, tables, slot, place, choices);
    cluster_wait();
}

// slot_row between the two kernels: the local expert of a slot that has a row, and this bit if it is the only one of its token.
constexpr i32 alone_bit = 1 << 16;

// Block b has the tokens [b * span, (b + 1) * span): leaves the local expert of each slot in slot_row, and its counts in row b.
template <class Source>
DEVICE void count_block(Source& source, i32 tokens, i32 span, i32* counts, i32* slot_row, float* weights, u32* counters, i32 counter_words) {
    __shared__ u32 mine[max_local_experts];
    const u32 warp = threadIdx.x / 32, choices = source.placement.choices, num_local = source.placement.num_local();
    const u32 first = static_cast<u32>(span) * blockIdx.x, end = min(first + span, static_cast<u32>(tokens));
    typename Source::Loaded loaded;
    if (first + warp < end) source.load(first + warp, loaded);
    source.prepare();
    if (threadIdx.x < num_local) mine[threadIdx.x] = 0;
    zero_words(counters, counter_words);
    __syncthreads();
    for (u32 token = first + warp; token < end; token += route_warps) {
        float weight;
        const u16 expert = slot_of_lane(source, loaded, weight, [&] {
            if (token + route_warps < end) source.load(token + route_warps, loaded);
        });
        const bool alone = is_alone(expert);
        if (lane_index() < choices) {
            const i64 slot = static_cast<i64>(token) * choices + lane_index();
            weights[slot] = weight;
            slot_row[slot] = expert == nowhere ? -1 : expert | (alone ? alone_bit : 0);
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
    const i64 end = min(static_cast<i64>(span) * (blockIdx.x + 1), static_cast<i64>(tokens)) * choices;
    i64 index = static_cast<i64>(span) * blockIdx.x * choices + threadIdx.x;
    const auto load = [&] {
        const i32 placed = index < end ? tables.slot_row[index] : -1;
        return Slot{index, placed < 0 ? nowhere : static_cast<u16>(placed), (placed & alone_bit) != 0, index < end ? weights[index] : 0.0f};
    };
    Slot slot = load();

    if (threadIdx.x < num_local) shared.counts[threadIdx.x] = shared.first_row[threadIdx.x] = 0;
    __syncthreads();
    const u32 parts = route_threads / num_local, e = threadIdx.x % num_local, part = threadIdx.x / num_local;
    if (part < parts) {
        u32 rows = 0, earlier = 0;
        for (u32 first = part; first < gridDim.x; first += count_loads * parts) {
            u32 theirs[count_loads];
#pragma unroll
            for (u32 i = 0; i < count_loads; ++i) {
                const u32 block = first + i * parts;
                theirs[i] = block < gridDim.x ? counts[block * num_local + e] : 0;
            }
#pragma unroll
            for (u32 i = 0; i < count_loads; ++i) {
                rows += theirs[i];
                earlier += first + i * parts < blockIdx.x ? theirs[i] : 0;
            }
        }
        atomicAdd(&shared.counts[e], rows);
        atomicAdd(&shared.first_row[e], earlier);
    }
    __syncthreads();
    const u32 rows = threadIdx.x < num_local ? shared.counts[threadIdx.x] : 0;
    const ExpertScan scan = scan_experts(shared, rows, num_local);
    const u32 first_row = store_experts(tables, num_local, scan, rows, blockIdx.x == 0);
    if (threadIdx.x < num_local) shared.first_row[threadIdx.x] += first_row;

    while (true) {
        const u32 rank = count_slots(shared, slot.expert, route_warps, num_local);
        if (index < end) place_slot(shared, tables, slot, rank, choices);
        index += route_threads;
        if (index - threadIdx.x >= end) return;
        slot = load();
        __syncthreads();
        if (threadIdx.x < num_local) shared.first_row[threadIdx.x] += shared.counts[threadIdx.x];
    }
}
