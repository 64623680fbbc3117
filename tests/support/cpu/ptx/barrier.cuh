// Stands in for ptx/barrier.cuh of the kernels: see types.cuh. Only one block runs at a time, so what clusters do is declared, not there.
#pragma once
#include "ptx/types.cuh"

u32 cluster_block_rank();
void cluster_sync();
void cluster_arrive_relaxed();
void cluster_wait();
u32 smem_address(const void* pointer);
u32 load_remote(u32 address, u32 rank);
