// The Config of a kernel from the constants of its KernelSpec, which the host passes as macros (kernels/sm90/*.py).
#pragma once
#include "gemm/config.cuh"

template <Operand Type>
constexpr Config CONFIG_OF_SPEC{.block_n = BLOCK_N, .stages = STAGES, .operand = Type, .cluster = CLUSTER, .group_m = GROUP_M,
                                .gather = GATHER, .share_a = SHARE_A, .arrivals = ARRIVALS};

// Which tiles it walks: all, or row blocks in the parts that it is given.
#ifdef ROW_BLOCKS
#define SCHEDULE (RowBlocks<CONFIG>(begin_block, end_block, arrived, parts, ROW_BLOCKS))
#else
#define SCHEDULE (AllTiles<CONFIG>{})
#endif
