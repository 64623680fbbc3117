"""One small case of every sm_90 kernel, of the inference operator and of a layer step, for compute-sanitizer
(test_gpu_sanitizer.py).

Checks nothing itself. With the argument ``racecheck`` every lane arrives on barriers for itself: that tool takes an
arrival to order the accesses of its own lane only, also behind ``__syncwarp``.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from inference_oracle import make_case

import supersonic_moe as sm
from supersonic_moe.config.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.inference import SharedExpert, moe_fp8_ds_routed, moe_fp8_topk, workspace_bytes
from supersonic_moe.kernels.interface import DownBackward, Gate, Into, Quantized, Rows, UpProjection
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90 import gemm_config
from supersonic_moe.kernels.sm90.down_backward import down_backward
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8
from supersonic_moe.kernels.sm90.down_backward_fp8_quantize import down_backward_fp8_quantize
from supersonic_moe.kernels.sm90.exchange_flags import ExchangeFlags
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad
from supersonic_moe.kernels.sm90.grouped_wgrad_fp8 import grouped_mm_wgrad_fp8
from supersonic_moe.kernels.sm90.quantize_columns import quantize_columns
from supersonic_moe.kernels.sm90.rank_tokens import Layout
from supersonic_moe.kernels.sm90.up_projection import up_projection
from supersonic_moe.kernels.triton.pad_segments import pad_segments
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows
from supersonic_moe.parallel.few_rows import FewRows, Given
from supersonic_moe.parallel.symmetric import HEAD
from supersonic_moe.quantization.block_format import padded_capacity

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
HIDDEN, WIDTH = 136, 200  # no multiple of a tile, more than one block


def kernels(counts: list[int]) -> None:
    """Ragged, empty and hot experts; rows as they lie and through an index, in clusters of one and of two."""
    num_experts, rows = len(counts), sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=CUDA)
    row_expert = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(counts)).int().to(CUDA)
    x = torch.randn(rows, HIDDEN, device=CUDA, dtype=BF16)
    w1 = torch.randn(num_experts, 2 * WIDTH, HIDDEN, device=CUDA, dtype=BF16)
    w2 = torch.randn(num_experts, HIDDEN, WIDTH, device=CUDA, dtype=BF16)
    b1 = torch.randn(num_experts, 2 * WIDTH, device=CUDA, dtype=BF16)
    scores = torch.rand(rows, device=CUDA)
    index = torch.randint(0, rows, (rows,), device=CUDA, dtype=torch.int32)
    index[::13] = -1
    segments = pad_segments(offsets, index, padded_capacity(rows, num_experts))
    swiglu = as_activation("swiglu")
    w1_q, _, w1_scale = quantize_blocks(w1)
    _, w2_q, w2_scale = quantize_blocks(w2)
    for gather in (None, index):
        rows_bf16, rows_fp8 = Rows(x, gather), Rows(quantize_rows(x, tma=gather is None), gather)
        grouped_mm_fp8(rows_fp8, Quantized(w1_q, w1_scale), offsets)
        grouped_mm_fp8(rows_fp8, Quantized(w1_q[:, :200], w1_scale), offsets)  # one block of columns
        for layout in (GateUpLayout.INTERLEAVED, GateUpLayout.UP_GATE):
            gate = Gate(swiglu, layout)
            z, a = up_projection(UpProjection(rows_bf16, w1, b1, offsets, row_expert, gate, save=True))
            down = DownBackward(rows_bf16, w2, z, b1, scores, offsets, row_expert, gate)
            dz, scaled, _ = down_backward(down)
            no_scale = z.new_empty(0, -(-2 * WIDTH // 128), dtype=torch.float32)
            for saved in (quantize_rows(z, tma=True), Quantized(z, no_scale)):  # e4m3 in such halves is not fused
                down_fp8 = down._replace(dout=rows_fp8, w2=Quantized(w2_q, w2_scale.mT), z=saved)
                down_backward_fp8(down_fp8)
                down_backward_fp8_quantize(down_fp8, segments, False)
        turned = w1.mT.contiguous().mT, b1, w2.mT.contiguous().mT
        for gate, first, bias, second in (
            (Gate(as_activation("relu_sq"), GateUpLayout.GATE_UP), w1[:, :WIDTH], b1[:, :WIDTH], w2),
            (Gate(swiglu, GateUpLayout.UP_GATE), *turned),
            (Gate(Activation.gpt_oss(), GateUpLayout.INTERLEAVED), *turned),
        ):
            z, _ = up_projection(UpProjection(rows_bf16, first, bias, offsets, row_expert, gate, save=True))
            down_backward(DownBackward(rows_bf16, second, z, bias, scores, offsets, row_expert, gate))
        grouped_mm(rows_bf16, w1.transpose(1, 2), offsets)
        grouped_mm(rows_bf16, w2, offsets)
        for transposed in (False, True):
            grouped_mm_wgrad(rows_bf16, dz, offsets, Into(None, transposed))
            out = torch.zeros(
                (num_experts, 2 * WIDTH, HIDDEN) if transposed else (num_experts, HIDDEN, 2 * WIDTH), device=CUDA
            )
            grouped_mm_wgrad(rows_bf16, dz, offsets, Into(out, transposed))
            grouped_mm_wgrad(rows_bf16, dz, offsets, Into(out, transposed, accumulate=True))
    grouped_mm(Rows(a), w2.transpose(1, 2), offsets)
    grouped_mm_wgrad(Rows(x), scaled, offsets)
    columns = quantize_columns(x, segments.token_index)
    tiles = quantize_columns(dz, segments.row_index, tiled=True)
    for transposed in (False, True):
        out = torch.zeros(
            (num_experts, 2 * WIDTH, HIDDEN) if transposed else (num_experts, HIDDEN, 2 * WIDTH), device=CUDA
        )
        grouped_mm_wgrad_fp8(columns, tiles, segments.offsets, Into(None, transposed))
        grouped_mm_wgrad_fp8(columns, tiles, segments.offsets, Into(out, transposed))
        grouped_mm_wgrad_fp8(columns, tiles, segments.offsets, Into(out, transposed, accumulate=True))


def inference(tokens: int, inter: int, order: str) -> None:
    """Routing, streaming and, where rows are many, tile kernels, combination: behind logits and behind ids of others,
    with sentinels, a shared expert and a workspace of exactly the size asked for.
    """
    sizes = {"tokens": tokens, "hidden": 256, "inter": inter, "choices": 2, "num_experts": 64, "order": order}
    case, one = make_case(local=8, **sizes), make_case(local=1, **sizes)
    x, x_scale, ids, weights = (t.to(CUDA) for t in (case.x, case.x_scale, case.ids, case.weights))
    w13, w13_scale, w2, w2_scale = (t.to(CUDA) for t in (case.w13, case.w13_scale, case.w2, case.w2_scale))
    shared = SharedExpert(*(t[0].to(CUDA) for t in (one.w13, one.w2, one.w13_scale, one.w2_scale)))
    logits, bias = torch.randn(tokens, 64, device=CUDA), torch.randn(64, device=CUDA, dtype=BF16)
    moe_fp8_ds_routed(
        logits, bias, x, x_scale.t().contiguous(), w13, w13_scale, w2, w2_scale, 60, 2.5, gate_up_order=order
    )
    needed = workspace_bytes(tokens, 3, 256, inter, 9)
    ids[0] = torch.tensor([-1, 2**31 - 1])
    moe_fp8_topk(
        x.to(BF16), w13, w2, w13_scale, w2_scale, weights, ids, local_expert_offset=3, num_experts=64,
        gate_up_order=order, shared_expert=shared, workspace=torch.empty(needed, dtype=torch.uint8, device=CUDA),
    )  # fmt: skip


def few_rows(tokens: int) -> None:
    """``MegaMoE`` with few rows, in a group of one rank, with a block of exactly the size that it needs."""
    case = make_case(tokens=tokens, hidden=256, inter=128, choices=2, num_experts=8, local=8, order="gate_up")
    x, x_scale, ids, weights = (t.to(CUDA) for t in (case.x, case.x_scale, case.ids, case.weights))
    experts = Fp8Experts(*(t.to(CUDA) for t in (case.w13, case.w13_scale, case.w2, case.w2_scale)))
    block = torch.zeros(HEAD + Layout.of(1, tokens, 256, 2).end, dtype=torch.uint8, device=CUDA)
    memory = SimpleNamespace(blocks=[block], flags=ExchangeFlags([block], 0, 5.0))
    few = FewRows(SimpleNamespace(memory=memory, inside=lambda call, phase: nullcontext()), 0, 1, 8, tokens, 2)
    ids[0] = torch.tensor([-1, 2**31 - 1])
    out = torch.zeros(tokens, 256, dtype=BF16, device=CUDA)
    for rows, scale in ((x, x_scale), (x.to(BF16), None)):
        given = Given(rows, scale, ids, weights, experts, GateUpLayout.GATE_UP, None, False, None)
        few.run(1, given, out, accumulate=scale is None)


def main() -> None:
    if sys.argv[1:] == ["racecheck"]:
        gemm_config.ARRIVALS = 32
    kernels([70, 0, 1, 129, 15])
    kernels([300, 0, 513])
    for block_n in (gemm_config.BROAD_BLOCK_N, gemm_config.WIDE_BLOCK_N):
        gemm_config.tile_columns = lambda columns, depth, block_n=block_n: block_n
        kernels([300, 0, 513])
    for tokens, inter, order in ((1, 128, "up_gate"), (33, 192, "gate_up"), (900, 256, "interleaved")):
        inference(tokens, inter, order)
    for tokens in (1, 60, 200):
        few_rows(tokens)
    layer = sm.MoE(8, 2, HIDDEN, WIDTH, "swiglu", True, 0.02).to(CUDA, BF16)
    x = torch.randn(77, HIDDEN, device=CUDA, dtype=BF16, requires_grad=True)
    out, aux = layer(x)
    (out.float().sum() + aux).backward()
    torch.cuda.synchronize()
    print("all cases ran")


if __name__ == "__main__":
    main()
