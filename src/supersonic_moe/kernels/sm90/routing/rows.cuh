// From the experts of slots to rows sorted by expert, in slot order inside an expert: a stable counting sort in three steps, so that
// several blocks can share it.
//
//   count_slots     ranks the slots of a block among those of the same expert, and counts each expert
//   scan_experts    first row and first item of each expert
//   the caller adds up: row = first row of the expert + counts of earlier blocks + rank in this block
//
// A slot is token * choices + choice. A slot without a local expert has nowhere and gets no row.
#pragma once
#include "ptx/barrier.cuh"
#include "routing/choose.cuh"

constexpr u32 route_threads = 512, route_warps = route_threads / 32;
constexpr u32 max_local_experts = 512;  // one thread an expert, the shared one included
constexpr u32 max_choices = 17;         // 16 and the shared expert
constexpr u16 nowhere = 0xffff;
constexpr u32 item_rows = 128;  // rows of an expert that the streaming kernel multiplies at a time: an item

struct RowShared {
    u16 by_warp[route_warps][max_local_experts];  // slots of each expert in each warp's part, then in all earlier parts
    u32 counts[max_local_experts];                // of this block
    u32 first_row[max_local_experts];             // where this block's slots of an expert go
    u64 sums[route_warps];
    u32 largest[route_warps];
};

// Rank of this thread's slot `part * 32 + lane` of its warp's part among the slots of its expert, for up to Parts parts. Ends with a
// barrier. `experts`: of each of the `slots` slots, in shared memory.
template <u32 Parts>
DEVICE void count_slots(RowShared& shared, const u16* experts, u32 slots, u32 num_local, u32 (&rank)[Parts]) {
    const u32 warp = threadIdx.x / 32, lane = lane_index();
    for (u32 i = lane; i < num_local; i += 32) shared.by_warp[warp][i] = 0;
    __syncwarp();
#pragma unroll
    for (u32 part = 0; part < Parts; ++part) {
        const u32 slot = (warp * Parts + part) * 32 + lane;
        const u16 expert = slot < slots ? experts[slot] : nowhere;
        const u32 same = __match_any_sync(all_lanes, static_cast<u32>(expert));
        const u32 before = __popc(same & ((1u << lane) - 1));
        u32 earlier = 0;
        if (expert != nowhere) earlier = shared.by_warp[warp][expert];
        __syncwarp();
        if (expert != nowhere && before == 0) shared.by_warp[warp][expert] = static_cast<u16>(earlier + __popc(same));
        __syncwarp();
        rank[part] = earlier + before;
    }
    __syncthreads();
    if (threadIdx.x < num_local) {
        u32 running = 0;
#pragma unroll
        for (u32 w = 0; w < route_warps; ++w) {
            const u32 own = shared.by_warp[w][threadIdx.x];
            shared.by_warp[w][threadIdx.x] = static_cast<u16>(running);
            running += own;
        }
        shared.counts[threadIdx.x] = running;
    }
    __syncthreads();
}

// Rows in the low half, items in the high half.
struct ExpertScan {
    u64 before;   // of all experts before the thread's
    u64 total;    // of all experts
    u32 largest;  // rows of the expert that has most
};

// Thread e brings the rows of expert e (0 past the last). All threads call it; two barriers inside.
DEVICE ExpertScan scan_experts(RowShared& shared, u32 rows) {
    const u32 warp = threadIdx.x / 32, lane = lane_index();
    const u64 own = rows | static_cast<u64>((rows + item_rows - 1) / item_rows) << 32;
    u64 upto = own;
#pragma unroll
    for (u32 lanes = 1; lanes < 32; lanes *= 2) {
        const u64 left = __shfl_up_sync(all_lanes, upto, lanes);
        if (lane >= lanes) upto += left;
    }
    const u32 largest = __reduce_max_sync(all_lanes, rows);
    if (lane == 31) shared.sums[warp] = upto, shared.largest[warp] = largest;
    __syncthreads();
    ExpertScan scan = {upto - own, 0, 0};
#pragma unroll
    for (u32 w = 0; w < route_warps; ++w) {
        const u64 sum = shared.sums[w];
        if (w < warp) scan.before += sum;
        scan.total += sum;
        scan.largest = max(scan.largest, shared.largest[w]);
    }
    __syncthreads();
    return scan;
}

// What the kernels behind the router read.
struct RowTables {
    i32* offsets;       // (E + 1): expert e has the rows [offsets[e], offsets[e + 1])
    i32* tile_offsets;  // the same for the tile kernels: all zero where the rows are streamed; may be null
    int4* items;        // header {items, rows of the largest, 0, streamed?}, then {expert, first row, rows, 0} of each
    i32* row_slot;      // slot of each row
    i32* slot_row;      // row of each slot, -1 for none
    i32 stream_rows;    // the most rows that are streamed
};

// Thread e writes the entries of expert e.
DEVICE void store_experts(const RowTables& tables, u32 num_local, const ExpertScan& scan, u32 rows) {
    const u32 e = threadIdx.x, first = static_cast<u32>(scan.before), all = static_cast<u32>(scan.total);
    const bool streamed = all <= static_cast<u32>(tables.stream_rows);
    if (e == 0) {
        const i32 items = streamed ? static_cast<i32>(scan.total >> 32) : 0;
        tables.items[0] = make_int4(items, static_cast<i32>(min(scan.largest, item_rows)), 0, streamed);
        tables.offsets[num_local] = all;
        if (tables.tile_offsets) tables.tile_offsets[num_local] = streamed ? 0 : all;
    }
    if (e >= num_local) return;
    tables.offsets[e] = first;
    if (tables.tile_offsets) tables.tile_offsets[e] = streamed ? 0 : first;
    if (!streamed) return;
    int4* item = tables.items + 1 + (scan.before >> 32);
    for (u32 row = 0; row < rows; row += item_rows) *item++ = make_int4(e, first + row, min(rows - row, item_rows), 0);
}

// Writes both directions for the slots that count_slots ranked; `first_slot` is the first of them in the whole batch.
template <u32 Parts>
DEVICE void place_slots(const RowShared& shared, const RowTables& tables, const u16* experts, u32 slots, i64 first_slot,
                        const u32 (&rank)[Parts]) {
    const u32 warp = threadIdx.x / 32, lane = lane_index();
#pragma unroll
    for (u32 part = 0; part < Parts; ++part) {
        const u32 slot = (warp * Parts + part) * 32 + lane;
        if (slot >= slots) continue;
        const u16 expert = experts[slot];
        i32 row = -1;
        if (expert != nowhere) {
            row = shared.first_row[expert] + shared.by_warp[warp][expert] + rank[part];
            tables.row_slot[row] = static_cast<i32>(first_slot + slot);
        }
        tables.slot_row[first_slot + slot] = row;
    }
}
