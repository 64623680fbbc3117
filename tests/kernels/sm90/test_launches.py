"""What the functions of the sm_90 backend hand to their kernels, by name, without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

from recorded_launches import Mapped, recorded_launches  # noqa: F401

from supersonic_moe.config.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.jit import Kernel
from supersonic_moe.kernels.interface import (
    RANGE_ROWS,
    Arrivals,
    DownBackward,
    Gate,
    Into,
    Quantized,
    RowBlocks,
    Rows,
    Segments,
    UpProjection,
)
from supersonic_moe.kernels.sm90 import backend, gemm_config, registered_specs
from supersonic_moe.kernels.sm90.down_projection_fp8 import down_projection_fp8
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8_into
from supersonic_moe.quantization.block_format import E4M3, blocks, empty_e4m3, empty_scales

E, H, I, T = 3, 264, 384, 40  # noqa: E741
OFFSETS = torch.tensor([0, 700, 701, 701], dtype=torch.int32)
P, G = 705, 1024


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def e4m3(*shape: int) -> Tensor:
    return empty_e4m3(torch.empty(0), *shape)


def rows_fp8(rows: int, columns: int, *, tma: bool) -> Quantized:
    return Quantized(e4m3(rows, columns), empty_scales(torch.empty(0), rows, blocks(columns), tma))


class Case:
    """Operands of one layer, of which ``gathered`` says whether rows come through an index."""

    def __init__(self, gathered: bool) -> None:
        self.index = torch.zeros(P, dtype=torch.int32) if gathered else None
        rows = T if gathered else P
        self.x, self.x_fp8 = bf16(rows, H), rows_fp8(rows, H, tma=not gathered)
        self.w1, self.w2 = bf16(E, 2 * I, H), bf16(E, H, I)
        self.w1_fp8 = Quantized(e4m3(E, 2 * I, H), torch.zeros(E, 6, 3))
        self.w2_fp8 = Quantized(e4m3(E, I, H), torch.zeros(E, 3, 3).mT)  # transposed
        self.b1, self.scores, self.z, self.a = bf16(E, 2 * I), torch.zeros(P), bf16(P, 2 * I), bf16(P, I)
        self.groups = OFFSETS, torch.zeros(P, dtype=torch.int32)
        indices = torch.zeros(2, G, dtype=torch.int32)
        self.segments = Segments(OFFSETS.clone(), *indices, torch.zeros(G // 128, dtype=torch.int32))
        self.columns = Quantized(e4m3(H, G), empty_scales(torch.empty(0), H, G // 128, True))
        self.tiles = Quantized(e4m3(I, G), torch.zeros(blocks(I), G // 128))

    @property
    def rows(self) -> Rows[Tensor]:
        return Rows(self.x, self.index)

    @property
    def fp8(self) -> Rows[Quantized]:
        return Rows(self.x_fp8, self.index)


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def check(launched: tuple[Kernel, Any, dict[str, Any]], name: str, **expected: Any) -> None:
    kernel, grid, arguments = launched
    assert kernel.spec in registered_specs() and kernel.spec.name == name
    assert grid == (131 // kernel.spec.cluster * kernel.spec.cluster, 1, 1)
    for parameter, value in expected.items():
        wanted = address(value) if value is None or isinstance(value, Tensor) else value
        given = arguments[parameter]
        assert (given.address if isinstance(given, Mapped) else given) == wanted, parameter


GATES = [
    Gate(activation, layout)
    for activation in (as_activation("swiglu"), as_activation("reglu"), Activation.gpt_oss())
    for layout in GateUpLayout
]
BASES = {GateUpLayout.INTERLEAVED: (0, 1), GateUpLayout.GATE_UP: (0, I), GateUpLayout.UP_GATE: (I, 0)}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.activation.type}-{gate.layout}")
def test_fused_steps(gate: Gate, gathered: bool, launches: list[Any]) -> None:
    c, (gate_base, up_base) = Case(gathered), BASES[gate.layout]
    limit = float("inf") if gate.activation.limit is None else gate.activation.limit
    numbers = {
        "alpha": gate.activation.alpha, "limit": limit, "up_offset": gate.activation.up_offset,
        "experts": E, "width": I, "offsets": OFFSETS, "index": c.index,
    }  # fmt: skip
    halves = {"gate_base": gate_base, "up_base": up_base}
    scales_w1 = {"scale_w": c.w1_fp8.scale, "scale_w_expert": 18, "scale_w_column": 3, "scale_w_k": 1}
    scales_w2 = {"scale_w": c.w2_fp8.scale, "scale_w_expert": 9, "scale_w_column": 1, "scale_w_k": 3}
    for b1, save in ((None, True), (c.b1, False)):
        z, a = backend.up_projection(UpProjection(c.rows, c.w1, b1, *c.groups, gate, save))
        check(
            launches[-1], "up_projection", map_x=c.x, map_x_run=c.x if gathered else a,
            map_w=c.w1, map_z=z if save else a, map_a=a, blocks_k=5,
            z=z if save else None, a=a, b1=b1, **numbers, **halves,
        )  # fmt: skip
        dz, scaled, ds = backend.down_backward(DownBackward(c.rows, c.w2, c.z, b1, c.scores, *c.groups, gate))
        check(
            launches[-1], "down_backward", map_do=c.x, map_do_run=c.x if gathered else scaled,
            map_w=c.w2, map_z=c.z, map_dz=dz, map_as=scaled, blocks_k=5,
            b1=b1, scores=c.scores, dz=dz, rows_allocated=P, **{"as": scaled}, **numbers, **halves,
        )  # fmt: skip
        assert ds.shape == (P,)
    for recipe in (
        Fp8Recipe(),
        Fp8Recipe(save_preactivation="bf16", scale="pow2"),
        Fp8Recipe(save_preactivation="recompute"),
        Fp8Recipe(save_preactivation="int8"),
    ):
        kept = recipe.save_preactivation
        if kept == "int8" and gate.activation != as_activation("swiglu"):
            continue  # composed
        up = UpProjection(c.fp8, c.w1_fp8, c.b1, *c.groups, gate, save=True)
        (z, z_scale), (a, a_scale) = backend.up_projection_fp8(up, recipe)
        check(
            launches[-1], "up_projection_fp8", map_x=c.x_fp8.q, map_x_run=c.x_fp8.q if gathered else a,
            map_scale_x=a if gathered else c.x_fp8.scale,
            map_w=c.w1_fp8.q, map_z=a if kept == "recompute" else z, map_a=a, blocks_k=3, scale_x=c.x_fp8.scale,
            scale_x_row=c.x_fp8.scale.stride(0), b1=c.b1, z=None if kept == "recompute" else z,
            scale_z=z_scale if kept in ("fp8", "int8") else None, a=a, scale_a=a_scale,
            z_row_bytes=z.stride(0) * z.itemsize, a_row_bytes=a.stride(0), scale_stride=a_scale.stride(1),
            pow2=int(recipe.pow2), saved={"recompute": 0, "fp8": 1, "int8": 1, "bf16": 2}[kept],
            **scales_w1, **numbers, **halves,
        )  # fmt: skip
        int8 = kept == "int8"
        assert dict(launches[-1][0].spec.constants).get("SAVED_INT8", 0) == int8
        assert z.dtype is {"fp8": E4M3, "int8": torch.int8}.get(kept, torch.bfloat16)
        if kept == "recompute":
            continue
        down = DownBackward(c.fp8, c.w2_fp8, Quantized(z, z_scale), c.b1, c.scores, *c.groups, gate)
        common = {
            "map_do": c.x_fp8.q, "map_do_run": c.x_fp8.q if gathered else z,
            "map_scale_do": z if gathered else c.x_fp8.scale, "map_w": c.w2_fp8.q, "map_z": z,
            "map_scale_z": z_scale if kept in ("fp8", "int8") else z, "map_scores": c.scores, "scale_do": c.x_fp8.scale,
            "scale_do_row": c.x_fp8.scale.stride(0), "b1": c.b1, "rows_allocated": P, "blocks_k": 3,
        }  # fmt: skip
        dz, scaled, _ = backend.down_backward_fp8(down)
        check(
            launches[-1], "down_backward_fp8", map_dz=dz, map_as=scaled, dz=dz, **{"as": scaled}, **common,
            **scales_w2, **numbers, **halves,
        )  # fmt: skip
        assert dict(launches[-1][0].spec.constants).get("SAVED_INT8", 0) == int8
        if kept in ("fp8", "int8") and gate.layout is GateUpLayout.INTERLEAVED:
            (rows, columns), tiles, _ = backend.down_backward_fp8_quantize(down, c.segments, True)
            check(
                launches[-1], "down_backward_fp8_quantize", map_dz=rows.q, map_dz_transposed=columns.q,
                map_as_transposed=tiles.q, padded_offsets=c.segments.offsets, dz=rows.q, row_scales=rows.scale,
                row_scales_stride=rows.scale.stride(1), dz_scales=columns.scale,
                dz_scales_stride=columns.scale.stride(1), as_scales=tiles.scale,
                as_scales_stride=tiles.scale.stride(1), pow2=1, **common, **scales_w2, **numbers,
            )  # fmt: skip


@pytest.mark.parametrize("gathered", [False, True])
def test_steps_without_a_gate(gathered: bool, launches: list[Any]) -> None:
    c, gate = Case(gathered), Gate(as_activation("relu_sq"), GateUpLayout.GATE_UP)
    w1, z_saved, sizes = bf16(E, I, H), bf16(P, I), {"experts": E, "width": I, "offsets": OFFSETS, "index": c.index}
    for b1, save in ((None, True), (bf16(E, I), False)):
        z, a = backend.up_projection(UpProjection(c.rows, w1, b1, *c.groups, gate, save))
        assert z.shape == (P if save else 0, I)
        check(
            launches[-1], "up_projection_ungated", map_x=c.x, map_x_run=c.x if gathered else a,
            map_w=w1, map_z=z if save else a, map_a=a, blocks_k=5,
            z=z if save else None, a=a, b1=b1, **sizes,
        )  # fmt: skip
        dz, scaled, ds = backend.down_backward(DownBackward(c.rows, c.w2, z_saved, b1, c.scores, *c.groups, gate))
        check(
            launches[-1], "down_backward_ungated", map_do=c.x, map_do_run=c.x if gathered else scaled,
            map_w=c.w2, map_z=z_saved, map_dz=dz, map_as=scaled,
            blocks_k=5, b1=b1, scores=c.scores, dz=dz, rows_allocated=P, **{"as": scaled}, **sizes,
        )  # fmt: skip
        assert dz.shape == (P, I) and ds.shape == (P,)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("activation", "layout", "order"),
    [
        (as_activation("swiglu"), GateUpLayout.GATE_UP, 1),
        (as_activation("swiglu"), GateUpLayout.UP_GATE, 1),
        (Activation.gpt_oss(), GateUpLayout.INTERLEAVED, 2),
    ],
)
def test_steps_of_weights_with_h_outermost(
    activation: Activation, layout: GateUpLayout, order: int, gathered: bool, launches: list[Any]
) -> None:
    c, gate = Case(gathered), Gate(activation, layout)
    w1, w2, (gate_base, up_base) = bf16(E, H, 2 * I).mT, bf16(E, I, H).mT, BASES[layout]
    common = {"experts": E, "width": I, "blocks_k": 5, "b1": c.b1, "gate_base": gate_base, "up_base": up_base}
    z, a = backend.up_projection(UpProjection(c.rows, w1, c.b1, *c.groups, gate, True))
    check(launches[-1], "up_projection", map_x=c.x, map_w=w1, map_z=z, map_a=a, interleaved=int(order == 2), **common)
    assert dict(launches[-1][0].spec.constants)["W1_ORDER"] == order
    dz, _, _ = backend.down_backward(DownBackward(c.rows, w2, c.z, c.b1, c.scores, *c.groups, gate))
    check(launches[-1], "down_backward", map_do=c.x, map_w=w2, map_z=c.z, map_dz=dz, **common)
    assert dict(launches[-1][0].spec.constants)["B_MN_MAJOR"] == 0


@pytest.mark.parametrize("gathered", [False, True])
def test_products(gathered: bool, launches: list[Any]) -> None:
    c = Case(gathered)
    ragged = {"offsets": OFFSETS, "index": c.index, "experts": E}
    for b in (c.w1.mT, c.w2):
        d = backend.grouped_mm(c.rows, b, OFFSETS)
        check(
            launches[-1], "grouped_gemm", map_a=c.x, map_a_run=c.x if gathered else b,
            map_b=b, map_d=d, columns=b.shape[2], blocks_k=5, d=d,
            d_row_bytes=2 * b.shape[2], **ragged,
        )  # fmt: skip
    d = backend.grouped_mm_fp8(c.fp8, c.w1_fp8, OFFSETS)
    check(
        launches[-1], "grouped_gemm_fp8", map_a=c.x_fp8.q, map_a_run=c.x_fp8.q if gathered else d,
        map_scale_a=d if gathered else c.x_fp8.scale,
        map_b=c.w1_fp8.q, map_d=d, columns=2 * I, blocks_k=3, scale_a=c.x_fp8.scale,
        scale_a_row=c.x_fp8.scale.stride(0), scale_b=c.w1_fp8.scale, scale_b_expert=18, scale_b_column=3, scale_b_k=1,
        d=d, d_row_bytes=4 * I, **ragged,
    )  # fmt: skip
    for transposed, output in itertools.product((False, True), range(3)):
        shape = (E, 2 * I, H) if transposed else (E, H, 2 * I)
        given = {0: None, 1: torch.zeros(shape), 2: torch.zeros(shape)}[output]
        d = backend.grouped_mm_wgrad(c.rows, c.z, OFFSETS, Into(given, transposed, output == 2))
        check(
            launches[-1],
            "grouped_wgrad",
            map_a=c.x,
            map_a_run=c.x if gathered else c.z,
            map_b=c.z,
            map_d=d,
            blocks_m=2,
            rows=264,
            blocks_n=3,
            **ragged,
        )
        assert dict(launches[-1][0].spec.constants)["FP32"] == (output > 0)
        shape = (E, I, H) if transposed else (E, H, I)
        given = {0: None, 1: torch.zeros(shape), 2: torch.zeros(shape)}[output]
        into, source = Into(given, transposed, output == 2), c.segments.source if output == 1 else None
        d = backend.grouped_mm_wgrad_fp8(c.columns, c.tiles, c.segments.offsets, into, source)
        check(
            launches[-1], "grouped_wgrad_fp8", map_a=c.columns.q, map_scale_a=c.columns.scale, map_b=c.tiles.q,
            map_d=d, offsets=c.segments.offsets, source=source, experts=E, rows=H, columns=I, scale_b=c.tiles.scale,
            scale_b_column=8, scale_b_k=1,
        )  # fmt: skip


def test_rows_that_arrive_and_results_that_leave_in_parts(launches: list[Any]) -> None:
    c, experts, waits = Case(gathered=True), 2, list[str]()
    groups = OFFSETS[: experts + 1].clone(), c.groups[1]
    begin, end, there = *torch.zeros(2, 3, experts, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    arriving = Arrivals(begin, end, there, lambda: waits.append("all"))
    gate, others = Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED), GATES[3]
    w1, w2 = c.w1[:experts], c.w2[:experts]
    w1_fp8, w2_fp8 = (Quantized(w.q[:experts], w.scale[:experts]) for w in (c.w1_fp8, c.w2_fp8))
    z_fp8 = rows_fp8(P, 2 * I, tma=True)

    def walked(gate: Gate) -> None:
        backend.up_projection(UpProjection(c.rows, w1, None, *groups, gate, True), arriving)
        backend.down_backward(DownBackward(c.rows, w2, c.z, None, c.scores, *groups, gate), arriving)
        backend.up_projection_fp8(UpProjection(c.fp8, w1_fp8, None, *groups, gate, True), Fp8Recipe(), arriving)
        down = DownBackward(c.fp8, w2_fp8, z_fp8, None, c.scores, *groups, gate)
        backend.down_backward_fp8_quantize(down, c.segments, True, arriving)

    names = ["up_projection", "down_backward", "up_projection_fp8", "down_backward_fp8_quantize"]
    walked(gate)
    for launched, name in zip(launches, names, strict=True):
        check(launched, name, begin_block=begin, end_block=end, arrived=there, parts=3)
        assert dict(launched[0].spec.constants)["ROW_BLOCKS"] == RANGE_ROWS
    assert not waits, "the kernels look themselves"
    launches.clear()
    walked(others)
    for launched, name in zip(launches, names, strict=True):
        check(launched, name, begin_block=None, end_block=None, arrived=None, parts=1)
        assert "ROW_BLOCKS" not in dict(launched[0].spec.constants)
    assert len(waits) == len(names), "there is no such kernel, so the stream waits"

    a, a_fp8, done = Rows(c.a), Rows(rows_fp8(P, I, tma=True)), list[int]()
    parts = [RowBlocks(begin[i], end[i], lambda _, i=i: done.append(len(launches) - i)) for i in range(2)]  # type: ignore[misc]
    w2_out = Quantized(e4m3(experts, H, I), torch.zeros(experts, 3, 3))
    for name, product in (
        ("grouped_gemm", lambda p: backend.grouped_mm(a, w2.mT, groups[0], p)),
        ("grouped_gemm_fp8", lambda p: backend.grouped_mm_fp8(a_fp8, w2_out, groups[0], p)),
    ):
        launches.clear()
        done.clear()
        product(parts)
        for i, launched in enumerate(launches):
            check(launched, name, begin_block=begin[i], end_block=end[i], arrived=None, parts=1)
            assert dict(launched[0].spec.constants)["ROW_BLOCKS"] == RANGE_ROWS
        assert len(launches) == 2 and done == [1, 1], "each is told of when it has been launched"
        launches.clear()
        product(())
        assert len(launches) == 1 and "ROW_BLOCKS" not in dict(launches[0][0].spec.constants)


@pytest.mark.parametrize("columns", [256, 512])
def test_a_box_for_the_rows_of_each_loading_warp(columns: int, launches: list[Any]) -> None:
    """Of a tile of 128 rows, or of the half that each of two blocks gathers in FP8; in a weight gradient, of 64."""
    c = Case(gathered=True)
    b_fp8 = Quantized(e4m3(E, columns, H), torch.zeros(E, columns // 128, 3))
    backend.grouped_mm(c.rows, bf16(E, H, columns), OFFSETS)
    backend.grouped_mm_fp8(c.fp8, b_fp8, OFFSETS)
    backend.grouped_mm_wgrad(c.rows, bf16(P, columns), OFFSETS)
    boxes = [(arguments["map_a"].box, arguments["map_a_run"].box) for _, _, arguments in launches]
    halved = columns == 512
    assert boxes == [((1, 64), (32, 64)), ((1, 128), (16 if halved else 32, 128)), ((1, 64), (16, 64))]


def test_quantizer(launches: list[Any]) -> None:
    x, index, source = bf16(T, H), torch.zeros(G, dtype=torch.int32), torch.zeros(G // 128, dtype=torch.int32)
    q, scale = backend.quantize_columns(x, index, True, segments=Segments(OFFSETS, index, index, source))
    kernel, grid, arguments = launches[-1]
    assert grid == (G // 128, 3, 1) and kernel.spec.name == "quantize_columns"
    assert arguments == {
        "x": x.data_ptr(), "x_row": H, "index": index.data_ptr(), "offsets": OFFSETS.data_ptr(), "segments": E,
        "source": source.data_ptr(), "q": q.data_ptr(), "q_column": G,
        "scales": scale.data_ptr(), "scales_block": scale.stride(1), "columns": H, "pow2": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ({"columns": 3072, "rows": 255, "depth": 8192, "gather": False}, (256, 1, False)),
        ({"columns": 3072, "rows": 256, "depth": 4095, "gather": True}, (256, 2, False)),
        ({"columns": 3072, "rows": 256, "depth": 4096, "gather": True}, (384, 2, False)),
        ({"columns": 3072, "rows": 256, "gather": True}, (256, 2, False)),  # an epilogue for 256 columns
        ({"columns": 3072, "depth": 4096, "gather": True}, (384, 2, False)),  # a weight gradient
        ({"columns": 2880, "depth": 1024, "gather": True}, (320, 2, False)),
        ({"columns": 8, "depth": 0, "gather": True}, (256, 2, False)),
        ({"columns": 768, "gather": True, "staging_bytes": 1}, (256, 1, False)),
        ({"columns": 769, "gather": True, "staging_bytes": 1}, (256, 2, True)),
        ({"columns": 769, "gather": False, "staging_bytes": 1}, (256, 1, False)),
    ],
    ids=str,
)
def test_the_form_follows_from_the_sizes(sizes: dict[str, Any], form: tuple[int, int, bool]) -> None:
    config = gemm_config.choose(**sizes)
    assert (config.block_n, config.cluster, config.share_a) == form
    assert config is gemm_config.choose(**sizes)


def test_a_form_is_one_object_however_it_is_asked_for() -> None:
    """Kernels are found by it: two objects would compile and load the same kernel twice."""
    assert gemm_config.choose(3072, True, rows=999) is gemm_config.bf16_form(256, 2, True)
    assert gemm_config.choose(768, False, staging_bytes=64) is gemm_config.fp8_form(1, False, 64)
    with pytest.raises(TypeError, match="positional-only"):
        gemm_config.bf16_form(256, 2, gather=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing"):
        gemm_config.fp8_form(1, False)  # type: ignore[call-arg]


def test_forms_describe_themselves() -> None:
    choose: Callable[..., gemm_config.GemmConfig] = gemm_config.choose
    assert str(choose(3072, gather=False, rows=1)) == "128 x 256 x 64 in 4 stages"
    assert (
        str(choose(3072, gather=False, rows=999, depth=5000)) == "128 x 384 x 64 in 3 stages, pairs of blocks share B"
    )
    assert str(choose(512, gather=True, staging_bytes=1)) == "128 x 256 x 128 in 3 stages, pairs of blocks share A"


@pytest.mark.parametrize("pairs", [False, True])
def test_pairs_of_row_blocks_load_half_of_a_weight_each(pairs: bool, launches: list[Any]) -> None:
    """Of W1 part 0 is gates and part 1 ups, as without pairs; of W2 each block has 128 columns, of rows that both have
    each 64.
    """
    case, gate = Case(gathered=False), Gate(as_activation("swiglu"), GateUpLayout.GATE_UP)
    step = UpProjection(case.fp8, case.w1_fp8, None, *case.groups, gate, save=False)
    _, a = up_projection_fp8_into(step, Fp8Recipe(), None, pairs=pairs)
    w2 = Quantized(e4m3(E, H, I), torch.zeros(E, 3, 3))
    down_projection_fp8(a, w2, OFFSETS, 1024, bf16(P, H), bf16(T, H), pairs)
    found = [(kernel.spec.name, kernel.spec.cluster, grid[0]) for kernel, grid, _ in launches]
    blocks_of = (2, 130) if pairs else (1, 131)
    assert found == [("up_projection_fp8", *blocks_of), ("down_projection_fp8", *blocks_of)]
    assert launches[0][2]["map_w"].box == (1, 1, 128, 128)
    assert launches[0][2]["map_x"].box == launches[1][2]["map_a"].box == (64 if pairs else 128, 128)
    assert launches[1][2]["map_b"].box == (1, 128 if pairs else 256, 128)
    assert all(kernel.spec in registered_specs() for kernel, _, _ in launches)
