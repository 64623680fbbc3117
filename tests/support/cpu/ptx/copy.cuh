// Stands in for ptx/copy.cuh of the kernels: see types.cuh. A tensor map says what boxes it copies; what it asks for is there at once.
#pragma once
#include "ptx/barrier.cuh"

struct TensorMap {
    const u8* data;
    std::array<i64, 5> sizes, strides, box;  // innermost first, in bytes; 1, 0, 1 in dimensions that a tensor does not have
};

inline u64 evict_first() { return 0; }
inline u64 evict_normal() { return 0; }
inline void prefetch_tensor_map(const TensorMap*) {}

// Lines of 128 bytes, swizzled; zeros outside the tensor.
inline void tma_load_once(u32 tile, const TensorMap* map, u32 barrier, u64, i64 c0, i64 c1, i64 c2, i64 c3 = 0, i64 c4 = 0) {
    const std::array<i64, 5> first = {c0, c1, c2, c3, c4};
    u32 at = tile;
    std::array<i64, 5> i = {};
    while (i[4] < map->box[4]) {
        i64 from = 0;
        bool inside = true;
        for (u32 d = 0; d < 5; ++d) from += (first[d] + i[d]) * map->strides[d], inside &= first[d] + i[d] < map->sizes[d];
        dynamic_shared_memory[at ^ (at >> 7 & 7) << 4] = inside ? map->data[from] : 0;
        ++at;
        for (u32 d = 0; d < 5 && ++i[d] == map->box[d] && d < 4; ++d) i[d] = 0;
    }
    mbarriers.at(barrier).change(0, -static_cast<i32>(at - tile));
}
inline void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier) {
    if ((destination | bytes | reinterpret_cast<u64>(source)) % 16) std::abort();
    std::memcpy(dynamic_shared_memory + destination, source, bytes);
    mbarriers.at(barrier).change(0, -static_cast<i32>(bytes));
}
