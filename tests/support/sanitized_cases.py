"""One small case of every sm_90 kernel, of the inference operator, of what several ranks exchange and of a layer step,
for compute-sanitizer (test_gpu_sanitizer.py).

Ranks that wait for each other would need kernels that run at the same time, which a tool need not let them. So each
runs when the others have told it everything, or seem to have: ``told_long_ago``.

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
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.inference import SharedExpert, moe_fp8_ds_routed, moe_fp8_topk, workspace_bytes
from supersonic_moe.kernels.interface import (
    RANGE_ROWS,
    Arrivals,
    Banks,
    DownBackward,
    Gate,
    Into,
    Quantized,
    RowBlocks,
    Rows,
    Sources,
    UpProjection,
)
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90 import gemm_config
from supersonic_moe.kernels.sm90.down_backward import down_backward
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8
from supersonic_moe.kernels.sm90.down_backward_fp8_quantize import down_backward_fp8_quantize
from supersonic_moe.kernels.sm90.exchange_flags import MAX_RANKS, WORDS, ExchangeFlags
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad
from supersonic_moe.kernels.sm90.grouped_wgrad_fp8 import grouped_mm_wgrad_fp8
from supersonic_moe.kernels.sm90.quantize_columns import quantize_columns
from supersonic_moe.kernels.sm90.rank_tokens import Layout
from supersonic_moe.kernels.sm90.up_projection import up_projection
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8
from supersonic_moe.kernels.triton.departures import departures_everywhere
from supersonic_moe.kernels.triton.pad_segments import pad_segments
from supersonic_moe.kernels.triton.push_rows import needed_rows, push_back, push_rows, take_rows
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows
from supersonic_moe.kernels.triton.row_parts import row_parts
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


def products_in_parts(counts: list[int]) -> None:
    """Products whose rows come, or leave, in two parts: here all are there. ``counts`` average 256 or more, or the
    kernels in bf16 have no parts.
    """
    num_experts, rows = len(counts), sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=CUDA)
    row_expert = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(counts)).int().to(CUDA)
    blocks = torch.tensor(counts, dtype=torch.int32, device=CUDA).add(RANGE_ROWS - 1) // RANGE_ROWS
    cut, start = blocks // 2, torch.zeros_like(blocks)
    begin, end = torch.stack([start, cut]), torch.stack([cut, blocks])
    arriving = Arrivals(begin, end, torch.ones(2, dtype=torch.int32, device=CUDA), _no_parts)
    leaving = [RowBlocks(*part, lambda _: None) for part in zip(begin, end, strict=True)]
    index = torch.randint(0, rows, (rows,), device=CUDA, dtype=torch.int32)
    x, scores = torch.randn(rows, HIDDEN, device=CUDA, dtype=BF16), torch.rand(rows, device=CUDA)
    w1 = torch.randn(num_experts, 2 * WIDTH, HIDDEN, device=CUDA, dtype=BF16)
    w2 = torch.randn(num_experts, HIDDEN, WIDTH, device=CUDA, dtype=BF16)
    gate = Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED)

    z, a = up_projection(UpProjection(Rows(x, index), w1, None, offsets, row_expert, gate, save=True), arriving)
    down_backward(DownBackward(Rows(x, index), w2, z, None, scores, offsets, row_expert, gate), arriving)
    grouped_mm(Rows(a), w2.transpose(1, 2), offsets, leaving)

    w1_q, _, w1_scale = quantize_blocks(w1)
    w2_q, w2_turned, w2_scale = quantize_blocks(w2)
    codes = Rows(quantize_rows(x, tma=False), index)
    step = UpProjection(codes, Quantized(w1_q, w1_scale), None, offsets, row_expert, gate, save=True)
    z_q, a_q = up_projection_fp8(step, Fp8Recipe(), arriving)
    grouped_mm_fp8(Rows(a_q), Quantized(w2_q, w2_scale), offsets, leaving)
    segments = pad_segments(offsets, index, padded_capacity(rows, num_experts))
    down = DownBackward(codes, Quantized(w2_turned, w2_scale.mT), z_q, None, scores, offsets, row_expert, gate)
    down_backward_fp8_quantize(down, segments, False, arriving)


def _no_parts() -> None:
    raise AssertionError("one of these products waits for all of its rows: no kernel of it walks parts")


def departures(tokens: int) -> None:
    """Tables of tokens that go to two ranks, with places to spare, and of the parts in which rows come from them."""
    places = tokens + 3
    ids = torch.randint(-1, 9, (tokens, 3), device=CUDA)
    for chosen in (ids, ids.int()):
        departures_everywhere(chosen, 8, 2, places)
    counts = torch.tensor([0, 2 * places // 3, 0, 2 * places - 2 * places // 3], dtype=torch.int32)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0).int()]).to(CUDA)
    index = torch.arange(2 * places, dtype=torch.int32, device=CUDA)
    for rank in range(2):
        row_parts(offsets, index, Sources(rank, 2, places))


def pushed(tokens: int, columns: int) -> None:
    """Rows of words that both ranks may need, into banks of as many bytes as they have, and back."""
    ids = torch.randint(-1, 9, (2 * tokens, 3), device=CUDA).int()
    needed, rows = needed_rows(ids, 4, 2), torch.zeros(2 * tokens, columns, dtype=torch.int32, device=CUDA)
    banks = [torch.zeros(rows.nbytes, dtype=torch.uint8, device=CUDA) for _ in range(2)]
    table = torch.tensor([bank.data_ptr() for bank in banks], dtype=torch.int64, device=CUDA)
    copies = departures_everywhere(ids[:tokens], 8, 2, tokens).copy_TR
    for rank in range(2):
        to = Banks(banks, table, rank, tokens, 0, tokens)
        push_rows(rows[:tokens], copies, torch.empty_like(rows[tokens:]), to)
        take_rows(rows, needed, to)
        push_back(rows, needed, to)


def told_long_ago(blocks: list[torch.Tensor]) -> None:
    """Each rank finds flags of an epoch that it never reaches. A rank that runs tells the others its own epochs, which
    those that run behind it find instead: as many.
    """
    for rank, block in enumerate(blocks):
        words = block[: 8 * WORDS].view(torch.int64)
        for peer in range(len(blocks)):
            if peer != rank:
                words[peer] = words[MAX_RANKS + peer] = 1000 << 32


def exchange(ranks: int) -> None:
    """The flags of ranks, through both banks, in blocks that hold nothing else."""
    blocks = [torch.zeros(8 * WORDS, dtype=torch.uint8, device=CUDA) for _ in range(ranks)]
    told_long_ago(blocks)
    for rank in range(ranks):
        flags = ExchangeFlags(blocks, rank, 5.0)
        for number in range(4):
            flags.begin(number % 2, 1 + number, 0)
            flags.meet(64, 1 + number, 1)


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


def few_rows(tokens: int, ranks: int) -> None:
    """``MegaMoE`` with few rows, a rank after the other, with blocks of exactly the size that they need."""
    sizes = {"hidden": 256, "inter": 128, "choices": 2, "num_experts": 8, "local": 8 // ranks, "order": "gate_up"}
    case = make_case(tokens=tokens, **sizes)
    x, x_scale, ids, weights = (t.to(CUDA) for t in (case.x, case.x_scale, case.ids, case.weights))
    experts = Fp8Experts(*(t.to(CUDA) for t in (case.w13, case.w13_scale, case.w2, case.w2_scale)))
    size = HEAD + Layout.of(ranks, tokens, 256, 2).end
    blocks = [torch.zeros(size, dtype=torch.uint8, device=CUDA) for _ in range(ranks)]
    told_long_ago(blocks)
    ids[0] = torch.tensor([-1, 2**31 - 1])
    out = torch.zeros(tokens, 256, dtype=BF16, device=CUDA)
    for rank in range(ranks):
        memory = SimpleNamespace(blocks=blocks, flags=ExchangeFlags(blocks, rank, 5.0))
        copies = SimpleNamespace(memory=memory, inside=lambda call, phase: nullcontext())
        few = FewRows(copies, rank, ranks, 8, tokens, 2)
        for rows, scale in ((x, x_scale), (x.to(BF16), None)):
            given = Given(rows, scale, ids, weights, experts, GateUpLayout.GATE_UP, None, False, None)
            few.run(1, given, out, accumulate=scale is None)


def main() -> None:
    if sys.argv[1:] == ["racecheck"]:
        gemm_config.ARRIVALS = 32
    kernels([70, 0, 1, 129, 15])
    kernels([300, 0, 513])
    products_in_parts([300, 0, 513])
    for block_n in (gemm_config.BROAD_BLOCK_N, gemm_config.WIDE_BLOCK_N):
        gemm_config.tile_columns = lambda columns, depth, block_n=block_n: block_n
        kernels([300, 0, 513])
        products_in_parts([300, 0, 513])
    for tokens, inter, order in ((1, 128, "up_gate"), (33, 192, "gate_up"), (900, 256, "interleaved")):
        inference(tokens, inter, order)
    for tokens, ranks in ((1, 1), (60, 1), (200, 1), (1, 2), (60, 2)):
        few_rows(tokens, ranks)
    exchange(2)
    exchange(3)
    for tokens in (1, 70):
        departures(tokens)
        pushed(tokens, 36)
        pushed(tokens, 5)
    layer = sm.MoE(8, 2, HIDDEN, WIDTH, "swiglu", True, 0.02).to(CUDA, BF16)
    x = torch.randn(77, HIDDEN, device=CUDA, dtype=BF16, requires_grad=True)
    out, aux = layer(x)
    (out.float().sum() + aux).backward()
    torch.cuda.synchronize()
    print("all cases ran")


if __name__ == "__main__":
    main()
