// From accumulators to global memory through staging buffers in shared memory: what all epilogues share.
//
// A buffer holds 128 bytes of output, 64 columns of bf16 or 32 of fp32, for each row of the tile, in swizzled lines. Each math warp fills
// its 16 lines of as many as it needs, hands them to TMA and goes on without waiting. Epilogues behind the bf16 loop have no buffers of
// their own. After the K blocks of a tile the loading warps pass the next few stages on empty (offer_stages); the math warps borrow
// them, and give them back once the next tile's first product is in flight. So the buffers are as large as the ring, cost no shared
// memory of their own, and hold nothing while the main loop runs.
#pragma once
#include "gemm/shared_memory.cuh"
#include "ptx/copy.cuh"

// Borrowed stages, which TMA may still read from.
template <Config C>
struct BorrowedStages {
    u32 stage = 0, count = 0;

    // The next stage is this warp's to write to on return; the address of its buffers.
    DEVICE u32 borrow(const SharedMemory<C>& shared, Ring<C>& ring) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (count++ == 0) stage = ring.stage;
        const u32 buffers = shared.tile_a(ring.stage);
        ring.advance();
        return buffers;
    }
    DEVICE u32 stage_of(u32 i) const { return stage + i < C.stages ? stage + i : stage + i - C.stages; }
    // `group`: the math warpgroup of which one thread issued all stores, or NONE where one of each warp did.
    static constexpr u32 NONE = ~0u;
    DEVICE void give_back(const SharedMemory<C>& shared, u32 group = NONE) {
        if (count == 0) return;
        tma_wait_read<0>();
        if (group == NONE) {
            __syncwarp();
        } else {
            sync_warpgroup(group);
        }
        for (; count > 0; --count) {
            shared.release(stage);
            stage = stage + 1 == C.stages ? 0 : stage + 1;
        }
    }
};

// First of the 16 lines of a buffer that math warp `warp` owns. (As (warp - 4) * WARP_ROWS it costs up to 54 instructions.)
DEVICE u32 first_line(u32 warp) { return (warp / 4 - 1) * GROUP_ROWS + warp % 4 * WARP_ROWS; }

// What a math warp has of a tile: its lines of a buffer from `line` on, which are the rows from `row` on of the output; `rows` of them,
// or none, are the expert's.
struct WarpRows {
    u32 lane, line;
    i32 row, rows;
};
DEVICE WarpRows warp_rows(const WorkTile& tile, u32 warp) {
    const u32 line = first_line(warp);
    const i32 row = tile.row + static_cast<i32>(line);
    return {fresh_thread_index() % 32, line, row, tile.row_end - row};
}

// Four accumulators as they are from here on: what packs them cannot move ahead of this point. Without it the compiler converts
// all buffers before the first store and runs out of registers.
DEVICE void pin_four(float* acc) { asm volatile("" : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])::"memory"); }

// 32 bytes, the `part`-th of this warp's 16 lines from `line` of a buffer on, as ldmatrix and stmatrix take them: 16 columns of bf16.
DEVICE u32 matrix_address(u32 buffer, u32 line, u32 part, u32 lane) {
    return (buffer + (line + lane % 16) * LINE + (lane / 16 * 16 ^ lane % 8 * 16)) ^ part * 32;
}

// `columns` of a warp's accumulators, 64 at most, rounded to bf16, into its 16 lines.
DEVICE void stage_bf16(float* acc, u32 lines, u32 lane, u32 columns = 64) {
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {
        float* d = acc + part * 8;
        if (part * 16 + 16 <= columns) {
            pin_four(d), pin_four(d + 4);
            const u32 matrices[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7])};
            store_matrices(lines + swizzle<LINE>(lane % 16 * LINE + (part * 2 + lane / 16) * 16), matrices);
        } else if (part * 16 < columns) {
            pin_four(d);
            const u32 matrices[2] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3])};
            store_matrices(lines + swizzle<LINE>(lane % 16 * LINE + part * 32), matrices);
        }
    }
}

// 32 columns, fp32, likewise.
DEVICE void stage_f32(const float* acc, u32 lines, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 16; i += 2) {
        const u32 at = swizzle<LINE>((lane / 4 + i % 4 / 2 * 8) * LINE + i / 4 * 32 + lane % 4 * 8);
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(lines + at), "f"(acc[i]), "f"(acc[i + 1]) : "memory");
    }
}

// An output with ragged rows as ordinary stores see it: TMA would write the rows past an expert's end into the next expert.
struct Rows {
    u8* pointer;
    i64 row_bytes;
    i32 columns;  // those from here on are not stored
};

// The first `rows` of this warp's staged lines, 16 bytes a lane. Bytes: of an element.
template <u32 Bytes = 2>
DEVICE void store_rows(const Rows& out, u32 lines, i32 row, i32 rows, i32 column, u32 lane) {
#pragma unroll
    for (u32 part = 0; part < WARP_ROWS * 8 / 32; ++part) {
        const u32 line = part * 4 + lane / 8, chunk = lane % 8;
        if (static_cast<i32>(line) < rows && column + static_cast<i32>(chunk * 16 / Bytes) < out.columns) {
            u32 v[4];
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                         : "r"(lines + swizzle<LINE>(line * LINE + chunk * 16))
                         : "memory");
            u8* target = out.pointer + (row + static_cast<i32>(line)) * out.row_bytes + column * static_cast<i32>(Bytes) + chunk * 16;
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                         : "memory");
        }
    }
}

// Where this warp's 16 lines of a staging buffer go: column `column` of slice `half` of the map; `out` is the same slice for store_rows.
struct Destination {
    const TensorMap* map;
    Rows out;
    u32 lines;
    i32 column, half;
};

// This warp's lines of `count` buffers to rows `row`..: by TMA, in one bulk group, where all 16 are the expert's. `rows` and what
// `destination(i)` gives are the same in all lanes, and known to be: TMA takes uniform registers, and behind `lane == 0` instead of
// elect_one its instructions become loops over the lanes.
template <u32 Bytes = 2, typename DestinationOf>
DEVICE void store_lines(u32 count, i32 row, i32 rows, u32 lane, DestinationOf destination) {
    if (rows >= static_cast<i32>(WARP_ROWS)) {
        if (elect_one()) {
#pragma unroll
            for (u32 i = 0; i < count; ++i) {
                const Destination to = destination(i);
                tma_store(to.map, to.lines, to.column, to.half, row);
            }
            tma_commit();
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < count; ++i) {
        const Destination to = destination(i);
        store_rows<Bytes>(to.out, to.lines, row, rows, to.column, lane);
    }
}

// `columns` of this warp's accumulators, rounded to bf16, through the buffers whose lines start at `lines`, to (row, column) of an output
// seen as (rows, 1, columns) in boxes of 16 x 64. What is no whole buffer leaves without TMA, whose box would reach into the next tile.
template <Config C>
DEVICE void store_columns(float* acc, u32 columns, u32 lines, const TensorMap* map, const Rows& out, i32 row, i32 rows, i32 column,
                          u32 lane) {
    const u32 whole = columns / 64;
#pragma unroll
    for (u32 i = 0; i < (columns + 63) / 64; ++i) stage_bf16(acc + i * 32, lines + i * C.buffer_bytes(), lane, min(columns - i * 64, 64u));
    fence_proxy_async();
    __syncwarp();
    if (whole > 0)
        store_lines(whole, row, rows, lane, [&](u32 i) -> Destination {
            return {map, out, lines + i * C.buffer_bytes(), column + static_cast<i32>(i * 64), 0};
        });
    if (columns % 64 > 0) {
        const Rows narrow{out.pointer, out.row_bytes, min(out.columns, column + static_cast<i32>(columns))};
        store_rows(narrow, lines + whole * C.buffer_bytes(), row, rows, column + static_cast<i32>(whole * 64), lane);
    }
}
