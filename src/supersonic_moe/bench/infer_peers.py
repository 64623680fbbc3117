"""Whole inference operators made of other libraries' products: router logits in, combined bf16 rows out.

Each takes what a serving stack gives it: e4m3 x with its scales, raw weights. Routing is our Triton router
(``kernels/triton/router.py``) for all of them; where it lacks the rule (square root of softplus) a peer is handed the
ids. Glue is ``infer_glue.py``. Buffers have the sizes of this batch's true row counts, which only the device knows in a
serving stack; that and the ids favour the peers.

deep_gemm_fused
    SGLang's build of DeepGEMM (``sgl-deep-gemm``), ``fp8_mega_moe`` for Hopper at world size 1: dispatch, both
    products and combination in one kernel. Weights are interleaved beforehand, as it wants them, and x lies in its
    symmetric buffer already.
deep_gemm
    Its grouped products: masked (E, M, ·) up to ``MASKED_TOKENS`` tokens, else contiguous rows in tiles of 128.
sgl_cutlass, sgl_cutlass_es
    ``fp8_blockwise_scaled_grouped_mm`` of ``sglang-kernel`` and its "expert-specialised" variant.
sgl_triton, sgl_triton_untuned
    SGLang's Triton fused MoE (``infer_triton.py``): the fastest of a sweep at this batch, and its default.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe.bench import infer_glue as glue
from supersonic_moe.bench import infer_triton
from supersonic_moe.bench.infer_cases import Workload
from supersonic_moe.bench.infer_parts import Call, by_block, codes, new_out, routed, sorted_rows, whole_blocks
from supersonic_moe.kernels.triton.tiling import cdiv
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

MASKED_TOKENS = 1024  # tokens up to which deep_gemm is masked: beyond, padding each expert to the fullest costs more
CUTLASS_WORKSPACE = 90000  # bytes, as SGLang allocates it


# ---- DeepGEMM --------------------------------------------------------------------------------------------------------


def mega_moe(work: Workload, ranks: int = 1) -> tuple[Any, Call]:
    """Its symmetric buffer, with x in it, and the launch that reads it. ``ranks`` have as many experts each."""
    deep_gemm, (experts, shape) = importlib.import_module("deep_gemm"), (work.experts, work.case.shape)
    whole_blocks(work)
    halves = (t.view(shape.local, 2, -1, t.shape[-1]) for t in (experts.w13.view(torch.uint8), experts.w13_scale))
    gate_first, scale_gate_first = (t.flip(1).flatten(1, 2) for t in halves)
    up, down = deep_gemm.transform_weights_for_mega_moe_sm90(
        (gate_first.view(E4M3), scale_gate_first), (experts.w2, experts.w2_scale)
    )
    tokens, top_k = work.case.tokens, shape.rule.top_k
    buffer = deep_gemm.get_symm_buffer_for_sm90_mega_moe(
        _group(), ranks * shape.local, tokens, top_k, shape.hidden, shape.inter
    )
    buffer.x[:tokens].copy_(work.x)
    buffer.x_sf[:tokens].copy_(work.x_scale.t())
    out = new_out(work)

    def launch() -> Tensor:
        deep_gemm.fp8_mega_moe(out, up, down, buffer)
        return out

    return buffer, launch


def deep_gemm_fused(work: Workload) -> Call:
    buffer, launch = mega_moe(work)
    tokens, local, route = work.case.tokens, work.case.shape.local, routed(work)
    ids_TK, weights_TK = buffer.topk_idx[:tokens], buffer.topk_weights[:tokens]

    def run() -> Tensor:
        weights, ids = route()
        glue.localize(ids, work.case.offset, local, ids_TK, (weights, weights_TK))
        return launch()

    return run


def _group() -> dist.ProcessGroup:
    """The process group of all ranks; where there is none yet, of this process and nobody else."""
    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=device)
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed has no default process group.")
    return group


def deep_gemm_grouped(work: Workload) -> Call:
    whole_blocks(work)
    module = importlib.import_module("deep_gemm")
    return _masked(work, module) if work.case.tokens <= MASKED_TOKENS else _contiguous(work, module)


def _masked(work: Workload, module: ModuleType) -> Call:
    shape, experts, case, device = work.case.shape, work.experts, work.case, work.x.device
    # Whole tiles of rows for each expert: it stores whole tiles, which would reach into the next expert's rows.
    most = max(1, cdiv(max(work.counts), BLOCK)) * BLOCK
    local, hidden, inter = shape.local, shape.hidden, shape.inter
    expected = max(1, cdiv(work.rows, local))

    def bf16(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device)

    x, c = codes(work, local, most, hidden), codes(work, local, most, inter)
    z, y = bf16(local, most, 2 * inter), bf16(local, most, hidden)
    x_scale, c_scale = (by_block(device, local, most, blocks(width)) for width in (hidden, inter))
    route, out = routed(work), new_out(work)

    def run() -> Tensor:
        weights_TK, ids_TK = route()
        dest_S, counts_E = glue.place_masked(ids_TK, case.offset, work.x, work.x_scale.t(), x, x_scale)
        up = experts.w13, experts.w13_scale
        module.m_grouped_fp8_fp4_gemm_nt_masked((x, x_scale), up, z, counts_E, expected)
        glue.swiglu_quantize(z, counts_E, c, c_scale, gate_first=False)
        down = experts.w2, experts.w2_scale
        module.m_grouped_fp8_fp4_gemm_nt_masked((c, c_scale), down, y, counts_E, expected)
        return glue.combine(y.view(-1, hidden), dest_S, weights_TK, out)

    return run


def _contiguous(work: Workload, module: ModuleType) -> Call:
    shape, experts, device = work.case.shape, work.experts, work.x.device
    rows = sum(cdiv(count, BLOCK) * BLOCK for count in work.counts)
    hidden, inter = shape.hidden, shape.inter
    x, c = codes(work, rows, hidden), codes(work, rows, inter)
    z, y = (torch.empty(rows, width, dtype=torch.bfloat16, device=device) for width in (2 * inter, hidden))
    x_scale, c_scale = (by_block(device, 1, rows, blocks(width))[0] for width in (hidden, inter))
    sort, out = sorted_rows(work, tile=BLOCK, capacity=rows), new_out(work)

    def run() -> Tensor:
        weights_TK, (_, gather_P, _, expert_P, dest_S, counts_E) = sort()
        glue.gather(gather_P, counts_E, work.x, work.x_scale.t(), x, x_scale)
        module.m_grouped_fp8_fp4_gemm_nt_contiguous((x, x_scale), (experts.w13, experts.w13_scale), z, expert_P)
        glue.swiglu_quantize(z, gather_P, c, c_scale, gate_first=False)
        module.m_grouped_fp8_fp4_gemm_nt_contiguous((c, c_scale), (experts.w2, experts.w2_scale), y, expert_P)
        return glue.combine(y, dest_S, weights_TK, out)

    return run


# ---- CUTLASS ---------------------------------------------------------------------------------------------------------


def sgl_cutlass(work: Workload) -> Call:
    grouped = importlib.import_module("sgl_kernel").fp8_blockwise_scaled_grouped_mm
    shape, device = work.case.shape, work.x.device
    pointers = [torch.empty(shape.local, dtype=torch.int64, device=device) for _ in range(5)]
    layouts = [torch.empty(shape.local, 5, dtype=torch.int32, device=device) for _ in range(2)]

    def multiply(out: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *rest: Tensor) -> None:
        stride_a, stride_b, stride_out, sizes, offsets, workspace = rest
        grouped(
            out, *pointers, a[0], b[0], a[1], b[1], stride_a, stride_b, stride_out, *layouts, sizes, offsets, workspace
        )

    return _cutlass(work, multiply)


def sgl_cutlass_es(work: Workload) -> Call:
    grouped = importlib.import_module("sgl_kernel").es_fp8_blockwise_scaled_grouped_mm

    def multiply(out: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *rest: Tensor) -> None:
        grouped(out, a[0], b[0], a[1], b[1], *rest)

    return _cutlass(work, multiply)


def _cutlass(work: Workload, multiply: Callable[..., None]) -> Call:
    whole_blocks(work)
    shape, experts, device = work.case.shape, work.experts, work.x.device
    local, hidden, inter, rows = shape.local, shape.hidden, shape.inter, max(1, work.rows)
    x, c = codes(work, rows, hidden), codes(work, rows, inter)
    z, y = (torch.empty(rows, width, dtype=torch.bfloat16, device=device) for width in (2 * inter, hidden))
    x_scale, c_scale = (torch.empty(rows, blocks(width), device=device) for width in (hidden, inter))
    up = experts.w13.transpose(1, 2), experts.w13_scale.transpose(1, 2)
    down = experts.w2.transpose(1, 2), experts.w2_scale.transpose(1, 2)
    sizes = tuple(
        torch.tensor([[0, n, k]] * local, dtype=torch.int32, device=device)
        for n, k in ((2 * inter, hidden), (hidden, inter))
    )
    by_h, by_i, by_2i = (torch.full((local,), n, device=device) for n in (hidden, inter, 2 * inter))
    workspace = torch.empty(CUTLASS_WORKSPACE, dtype=torch.uint8, device=device)
    sort, out = sorted_rows(work, tile=1, capacity=rows), new_out(work)

    def run() -> Tensor:
        weights_TK, (offsets, gather_P, _, _, dest_S, counts_E) = sort()
        glue.gather(gather_P, counts_E, work.x, work.x_scale.t(), x, x_scale, (sizes[0], sizes[1]))
        multiply(z, (x, x_scale), up, by_h, by_h, by_2i, sizes[0], offsets[:-1], workspace)
        glue.swiglu_quantize(z, gather_P, c, c_scale, gate_first=False)
        multiply(y, (c, c_scale), down, by_i, by_i, by_h, sizes[1], offsets[:-1], workspace)
        return glue.combine(y, dest_S, weights_TK, out)

    return run


PEERS: Mapping[str, Callable[[Workload], Call]] = {
    "deep_gemm_fused": deep_gemm_fused,
    "deep_gemm": deep_gemm_grouped,
    "sgl_cutlass": sgl_cutlass,
    "sgl_cutlass_es": sgl_cutlass_es,
    "sgl_triton": infer_triton.fastest,
    "sgl_triton_untuned": infer_triton.untuned,
}
