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
constexpr u32 row_group = 8;    // where rows are streamed, each expert starts at a multiple of it; rows in between have slot -1

struct RowShared {
    u16 by_warp[route_warps][max_local_experts];  // slots of each expert in each warp, then in all earlier warps
    u32 counts[max_local_experts];                // of this block
    u32 first_row[max_local_experts];             // where this block's slots of an expert go
    uint4 sums[route_warps];  // rows, padded rows, items, rows of the largest: of the experts of a warp
};

// Rank of this thread's slot among those of the same expert in the first `warps` warps, whose threads all have one; `expert`: nowhere if
// there is none. Ends with a barrier.
DEVICE u32 count_slots(RowShared& shared, u16 expert, u32 warps, u32 num_local) {
    const u32 warp = threadIdx.x / 32, lane = lane_index();
    u32 rank = 0;
    if (warp < warps) {
        for (u32 i = lane; i < num_local; i += 32) shared.by_warp[warp][i] = 0;
        __syncwarp();
        const u32 same = __match_any_sync(all_lanes, static_cast<u32>(expert));
        rank = __popc(same & ((1u << lane) - 1));
        if (expert != nowhere && rank == 0) shared.by_warp[warp][expert] = static_cast<u16>(__popc(same));
    }
    __syncthreads();
    if (threadIdx.x < num_local) {
        u32 of_warp[route_warps], running = 0;
#pragma unroll
        for (u32 w = 0; w < route_warps; ++w) of_warp[w] = w < warps ? shared.by_warp[w][threadIdx.x] : 0;
#pragma unroll
        for (u32 w = 0; w < route_warps; ++w) {
            if (w < warps) shared.by_warp[w][threadIdx.x] = static_cast<u16>(running);
            running += of_warp[w];
        }
        shared.counts[threadIdx.x] = running;
    }
    __syncthreads();
    return rank;
}

struct ExpertSums {
    u32 rows;
    u32 padded;  // each expert's rows rounded up to whole row groups
    u32 items;
};

struct ExpertScan {
    ExpertSums before;  // of all experts before the thread's
    ExpertSums total;   // of all experts
    u32 largest;        // rows of the expert that has most
};

// Thread e brings the rows of expert e (0 past the last). All threads call it; one barrier inside.
DEVICE ExpertScan scan_experts(RowShared& shared, u32 rows, u32 num_local) {
    const u32 warp = threadIdx.x / 32, lane = lane_index();
    const ExpertSums own = {rows, (rows + row_group - 1) / row_group * row_group, (rows + item_rows - 1) / item_rows};
    ExpertSums upto = own;
#pragma unroll
    for (u32 lanes = 1; lanes < 32; lanes *= 2) {
        const u32 left = __shfl_up_sync(all_lanes, upto.rows, lanes), left_padded = __shfl_up_sync(all_lanes, upto.padded, lanes);
        const u32 left_items = __shfl_up_sync(all_lanes, upto.items, lanes);
        if (lane >= lanes) upto.rows += left, upto.padded += left_padded, upto.items += left_items;
    }
    const u32 largest = __reduce_max_sync(all_lanes, rows);
    if (lane == 31) shared.sums[warp] = make_uint4(upto.rows, upto.padded, upto.items, largest);
    __syncthreads();
    ExpertScan scan = {{upto.rows - own.rows, upto.padded - own.padded, upto.items - own.items}, {}, 0};
    for (u32 w = 0; w < (num_local + 31) / 32; ++w) {
        const uint4 sum = shared.sums[w];
        if (w < warp) scan.before.rows += sum.x, scan.before.padded += sum.y, scan.before.items += sum.z;
        scan.total.rows += sum.x, scan.total.padded += sum.y, scan.total.items += sum.z;
        scan.largest = max(scan.largest, sum.w);
    }
    return scan;
}

// What the kernels behind the router read.
struct RowTables {
    i32* offsets;    // (E + 1): rows [offsets[e], offsets[e + 1]) of expert e for the tile kernels; null where rows are streamed
    int4* items;     // where they are: header {items, rows of the largest, padded rows, 0}, then {expert, first row, rows, which << 16 | of} of each
    i32* row_slot;   // slot of each row; -1 in the rows between two experts
    i32* row_token;  // token of each row, for the tile kernels; may be null
    int2* row_out;   // with row_token: {token, weight} of a row that is its token's only one, else {-1, 1}
    i32* slot_row;   // row of each slot, -1 for none
    i32* received;   // (routed): the rows of each routed expert are added; may be null
    i32 routed;

    DEVICE bool streamed() const { return offsets == nullptr; }
};

// Thread e writes the entries of expert e. Returns the first of its rows.
DEVICE u32 store_experts(const RowTables& tables, u32 num_local, const ExpertScan& scan, u32 rows, bool stores) {
    const u32 e = threadIdx.x;
    const u32 first = tables.streamed() ? scan.before.padded : scan.before.rows;
    if (!stores) return first;
    if (tables.received && e < static_cast<u32>(tables.routed)) tables.received[e] += static_cast<i32>(rows);
    if (!tables.streamed()) {
        if (e < num_local) tables.offsets[e] = first;
        if (e == 0) tables.offsets[num_local] = scan.total.rows;
        return first;
    }
    if (e == 0) tables.items[0] = make_int4(scan.total.items, min(scan.largest, item_rows), scan.total.padded, 0);
    if (e >= num_local) return first;
    int4* item = tables.items + 1 + scan.before.items;
    const u32 of = (rows + item_rows - 1) / item_rows;
    for (u32 i = 0; i < of; ++i)
        *item++ = make_int4(e, first + i * item_rows, min(rows - i * item_rows, item_rows), of < 0x8000 ? i << 16 | of : 1);
    for (u32 row = rows; row % row_group != 0; ++row) tables.row_slot[first + row] = -1;
    return first;
}

// A choice of a token, in the thread that places it.
struct Slot {
    i64 index;     // in the whole batch
    u16 expert;    // local; nowhere: no row
    bool alone;    // the only one of its token that has a row
    float weight;  // of a slot that is alone
};

// Writes both directions for a slot that count_slots ranked.
DEVICE void place_slot(const RowShared& shared, const RowTables& tables, const Slot& slot, u32 rank, u32 choices) {
    i32 row = -1;
    if (slot.expert != nowhere) {
        row = shared.first_row[slot.expert] + shared.by_warp[threadIdx.x / 32][slot.expert] + rank;
        tables.row_slot[row] = static_cast<i32>(slot.index);
        if (tables.row_token) {
            const i32 token = static_cast<i32>(static_cast<u32>(slot.index) / choices);
            tables.row_token[row] = token;
            tables.row_out[row] = slot.alone ? make_int2(token, __float_as_int(slot.weight)) : make_int2(-1, __float_as_int(1.0f));
        }
    }
    tables.slot_row[slot.index] = row;
}
