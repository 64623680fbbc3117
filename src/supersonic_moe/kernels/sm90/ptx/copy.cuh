// Moving tiles: TMA tensor loads, stores and reductions, bulk groups, ldmatrix and stmatrix.
//
// TMA coordinates count elements, innermost (contiguous) dimension first: {column, row}, {column, row, slice}. One thread
// issues an instruction for the whole box of the tensor map. Elements outside the tensor load as zero, and still count as
// bytes of the load; they are not stored. Tiles in shared memory are aligned to 8 * swizzle span (1024 bytes for 128 B).
#pragma once
#include "ptx/types.cuh"

// ---- TMA loads: complete on an mbarrier that expects the bytes of the box ----

DEVICE void tma_load(u32 tile, const TensorMap* map, u32 barrier, i32 c0, i32 c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(tile),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1)
        : "memory");
}

DEVICE void tma_load(u32 tile, const TensorMap* map, u32 barrier, i32 c0, i32 c1, i32 c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            tile),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// As tma_load, into every block of the cluster whose bit is set in `blocks`: the same offset of their shared memory, counted
// by the mbarrier at the same offset there. One read of L2 for all of them.
DEVICE void tma_load_multicast(u32 tile, const TensorMap* map, u32 barrier, u16 blocks, i32 c0, i32 c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(tile),
        "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1)
        : "memory");
}

DEVICE void tma_load_multicast(u32 tile, const TensorMap* map, u32 barrier, u16 blocks, i32 c0, i32 c1, i32 c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(tile),
        "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

DEVICE void tma_load(u32 tile, const TensorMap* map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            tile),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

DEVICE void tma_load_multicast(u32 tile, const TensorMap* map, u32 barrier, u16 blocks, i32 c0, i32 c1, i32 c2, i32 c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(tile),
        "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Loads of what is read once: it leaves L2 first (`policy` of evict_first()), unless others read it soon (evict_normal()).
DEVICE u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE u64 evict_normal() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE void tma_load_once(u32 tile, const TensorMap* map, u32 barrier, u64 policy, i32 c0, i32 c1, i32 c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(tile),
        "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

DEVICE void tma_load_once(u32 tile, const TensorMap* map, u32 barrier, u64 policy, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(tile),
        "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// `bytes` that lie together, without a tensor map; addresses and size are multiples of 16.
DEVICE void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination), "l"(source),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// Fetch the descriptor itself, at the start of a kernel, so that the first load does not wait for it.
DEVICE void prefetch_tensor_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- TMA stores and reductions: complete in bulk groups of the issuing thread ----
// Threads that wrote the tile execute fence_proxy_async and meet at a barrier before the store.

DEVICE void tma_store(const TensorMap* map, u32 tile, i32 c0, i32 c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(tile),
                 "r"(c0), "r"(c1)
                 : "memory");
}

DEVICE void tma_store(const TensorMap* map, u32 tile, i32 c0, i32 c1, i32 c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(tile),
                 "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// global += tile, element-wise in L2, in the type of the tensor map.
DEVICE void tma_reduce_add(const TensorMap* map, u32 tile, i32 c0, i32 c1) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(tile), "r"(c0), "r"(c1)
                 : "memory");
}

DEVICE void tma_reduce_add(const TensorMap* map, u32 tile, i32 c0, i32 c1, i32 c2) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(tile), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// Close the group of stores issued by this thread since the last commit.
DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until at most Pending groups of this thread still read shared memory: older tiles may be overwritten. A block waits
// for 0 before it exits.
template <u32 Pending>
DEVICE void tma_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Wait until at most Pending groups of this thread are incomplete: writes of older groups are done, visible to this thread.
template <u32 Pending>
DEVICE void tma_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- matrices between shared memory and registers ----

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned); register i
// of lane l then is elements 2 * (l % 4), +1 of row l / 4 of matrix i. Transpose exchanges rows and columns on the way.
template <bool Transpose = false>
DEVICE void load_matrices(u32 (&matrices)[4], u32 row) {
    if constexpr (Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(row)
                     : "memory");
    }
}

// The reverse, with the same assignment of lanes to rows and elements.
template <bool Transpose = false>
DEVICE void store_matrices(u32 row, const u32 (&matrices)[4]) {
    if constexpr (Transpose) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(matrices[0]),
                     "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                     : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(matrices[0]),
                     "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                     : "memory");
    }
}

// The same for two matrices: lanes 0 to 15 give the addresses of their rows.
DEVICE void store_matrices(u32 row, const u32 (&matrices)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(matrices[0]), "r"(matrices[1]) : "memory");
}
