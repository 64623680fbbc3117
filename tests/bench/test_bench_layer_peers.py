"""Other libraries' layers in the layer suite: stand-ins with their interfaces, computed in plain PyTorch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import QUICK, run, words
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.bench import layer, layer_peers, report, timing, transformers
from supersonic_moe.bench.layer import LayerConfig, run_case
from supersonic_moe.bench.peers import torch_loop
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.shapes import CPU_HUGGING_FACE_MODELS
from supersonic_moe.bench.suites.layer import Layer
from supersonic_moe.config.activation import ActivationType
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.perf_model import LayerShape

SMALL = LayerShape(96, 32, 16, 4, 2)
LIBRARIES = ("sonicmoe", "liger", "torchao")


def config(*peers: str, **changes: Any) -> LayerConfig:
    return LayerConfig(torch.device("cpu"), torch.float32, warm_ms=0, min_ms=0, peers=peers, **changes)


@dataclass
class Tuner:
    configs: list[Any]

    def prune_configs(self, kwargs: dict[str, Any]) -> list[Any]:
        return self.configs


def gemm(tile_m: int, tile_n: int, pingpong: bool, cluster: tuple[int, int] = (2, 1), capacity: int = 9) -> Any:
    shape = {"tile_m": tile_m, "tile_n": tile_n, "pingpong": pingpong, "swap_ab": False, "device_capacity": capacity}
    chosen = SimpleNamespace(**shape, cluster_m=cluster[0], cluster_n=cluster[1])
    return SimpleNamespace(kwargs={"config": chosen})


def triton(stages: int = 4, **kwargs: int) -> Any:
    return SimpleNamespace(kwargs=kwargs, num_stages=stages)


class TorchaoProduct(torch.autograd.Function):
    """With a weight gradient like torchao's, on scales of one row each: those of the left operand are row-major."""

    @staticmethod
    def forward(ctx: Any, rows_SK: Tensor, w_EKN: Tensor, offs_E: Tensor, multiply: Any) -> Tensor:
        ctx.save_for_backward(rows_SK, w_EKN, offs_E)
        ctx.multiply = multiply
        return F.grouped_mm(rows_SK, w_EKN, offs=offs_E)

    @staticmethod
    def backward(ctx: Any, dy_SN: Tensor) -> Any:
        rows_SK, w_EKN, offs_E = ctx.saved_tensors
        sizes_E = torch.diff(offs_E, prepend=offs_E.new_zeros(1))
        scales_NS = 1 + (torch.arange(dy_SN.numel()) % 5).view(dy_SN.shape[::-1])
        scales_SK = 1 + (torch.arange(rows_SK.numel()) % 7).view(rows_SK.shape)
        dw_ENK = rows_SK.new_empty(w_EKN.shape[0], dy_SN.shape[1], rows_SK.shape[1])
        ctx.multiply(
            (dy_SN.t() / scales_NS, scales_NS.float()), (rows_SK.t() / scales_SK.t(), scales_SK.float().t()),
            dw_ENK, sizes_E.tolist(), sizes_E, torch.zeros_like(dw_ENK), recipe=(1, 1, 128),
        )  # fmt: skip
        return F.grouped_mm(dy_SN.contiguous(), w_EKN.transpose(1, 2), offs=offs_E), dw_ENK.transpose(1, 2), None, None


@dataclass
class DeepGemm:
    """DeepGEMM's weight gradient, and torchao's look at it, which it takes once."""

    module: ModuleType = field(default_factory=lambda: ModuleType("deep_gemm"))
    largest: int = 232448  # bytes of shared memory that a block can have
    scales: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # shape and strides
    seen: Any = None

    def transposed(self, scales_DB: Tensor) -> Tensor:
        self.scales.append((tuple(scales_DB.shape), scales_DB.stride()))
        if scales_DB.stride() != (1, scales_DB.shape[0]):
            assert scales_DB.is_contiguous()
            columns = scales_DB.shape[1]
            if 64 * (columns + 1 - columns % 2) * 4 > self.largest:
                raise RuntimeError("CUDA_ERROR_INVALID_VALUE, invalid argument")
        return scales_DB

    def multiply(
        self, lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], out: Tensor, sizes: list[int], sizes_E: Tensor,
        added: Tensor, recipe: tuple[int, int, int],
    ) -> None:  # fmt: skip
        assert recipe == (1, 1, 128) and sizes_E.tolist() == sizes
        left, right = (values * self.transposed(scales) for values, scales in (lhs, rhs))
        pairs = zip(left.split(sizes, 1), right.split(sizes, 1), strict=True)
        out.copy_(added + torch.stack([a @ b.t() for a, b in pairs]))

    def product(self, rows_SK: Tensor, w_EKN: Tensor, *, offs: Tensor) -> Tensor:
        return TorchaoProduct.apply(rows_SK, w_EKN, offs, self.look())

    def look(self) -> Any:
        self.seen = self.seen or self.module.k_grouped_fp8_gemm_nt_contiguous
        return self.seen


@dataclass
class StandIns:
    modes: list[bool] = field(default_factory=list)  # whether SonicMoE was asked for inference
    emulates: bool = False
    deepgemm: DeepGemm = field(default_factory=DeepGemm)
    tuners: dict[str, Tuner] = field(default_factory=dict)

    def sonicmoe(
        self, x: Tensor, router_EH: Tensor, w1_NHE: Tensor, b1: None, w2_HIE: Tensor, b2: None, k: int, stream: int,
        activation: str, *, is_inference_mode_enabled: bool, is_softmax_over_topk: bool, norm_topk_probs: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.modes.append(is_inference_mode_enabled)
        names = {(True, False): "softmax_after_topk", (False, False): "softmax_before_topk"}
        router = names.get((is_softmax_over_topk, norm_topk_probs), "softmax_before_topk_renormalized")
        w1_ENH = w1_NHE.permute(2, 0, 1)
        gate_up_ENH = torch.cat([w1_ENH[:, 0::2], w1_ENH[:, 1::2]], 1)
        out = torch_loop(x, router_EH, gate_up_ENH, w2_HIE.permute(2, 0, 1), k, router, ActivationType(activation))
        return out, router_EH, router_EH

    def liger(self, x: Tensor, w1_ENH: Tensor, w2_EHI: Tensor, ids_TK: Tensor, scores_TK: Tensor) -> Tensor:
        assert ids_TK.dtype is torch.int32
        dense_TE = torch.zeros(x.shape[0], w1_ENH.shape[0]).scatter(1, ids_TK.long(), scores_TK)
        gate, up = torch.einsum("th,enh->ten", x, w1_ENH).chunk(2, -1)
        return torch.einsum("te,tei,ehi->th", dense_TE, F.silu(gate) * up, w2_EHI)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIns]:
    it = StandIns()
    tiles = [gemm(*tile) for tile in layer_peers.SONIC_TILES]
    others = [gemm(128, 256, False, (1, 2)), gemm(128, 256, False, capacity=10), gemm(128, 160, True)]
    products = dict.fromkeys(("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"))
    it.tuners |= {name: Tuner([*others, *tiles]) for name in products}
    it.tuners["token_gather_sum_kernel"] = Tuner(
        [triton(BLOCK_H=256, BLOCK_K=8), triton(BLOCK_H=1024, BLOCK_K=8), triton(BLOCK_H=4096, BLOCK_K=8)]
    )
    lists = [triton(3, BLOCK_N=128, BLOCK_K=64), triton(5, BLOCK_N=128, BLOCK_K=64), triton(2, BLOCK_N=128, BLOCK_K=32)]
    it.tuners |= {name: Tuner(list(lists)) for name in layer_peers.LIGER}
    it.tuners["_token_gather_weighted_sum_kernel"] = Tuner(
        [triton(BLOCK_H=512, BLOCK_K=8), triton(BLOCK_H=64, BLOCK_K=1)]
    )
    modules = {
        "sonicmoe.functional": {"moe_TC_softmax_topk_layer": it.sonicmoe},
        "sonicmoe.functional.reduction_over_k_gather": it.tuners,
        "quack.gemm_interface": it.tuners,
        "liger_kernel.ops.fused_moe_kernels": it.tuners,
        "liger_kernel.ops.fused_moe": {"LigerFusedMoEFunction": SimpleNamespace(apply=it.liger)},
        "torchao.prototype.blockwise_fp8_training.deepgemm_grouped_kernels": {
            "can_use_deepgemm_grouped_training": lambda *_: it.deepgemm.look() and not it.emulates
        },
        "torchao.prototype.moe_training.blockwise_fp8.grouped_mm": {
            "_to_fp8_blockwise_then_scaled_grouped_mm": it.deepgemm.product
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        for end in (i for i, letter in enumerate(name) if letter == "."):
            if name[:end] not in modules:
                monkeypatch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
    it.deepgemm.module.k_grouped_fp8_gemm_nt_contiguous = it.deepgemm.multiply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", it.deepgemm.module)
    card = SimpleNamespace(shared_memory_per_block_optin=it.deepgemm.largest)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    caches = (layer_peers._sonicmoe, layer_peers.liger_function, layer_peers._torchao)
    for cached in caches:
        cached.cache_clear()
    yield it
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("router", ["softmax_after_topk", "softmax_before_topk", "softmax_before_topk_renormalized"])
def test_libraries_get_our_layer_and_are_timed_in_pairs(
    installed: StandIns, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "FAR_SLOWER", math.inf)  # a busy machine can hold up any one call
    result = run_case(SMALL, config(*LIBRARIES, router=router, pairs=6))
    assert result.missing == {}
    assert list(result.metrics) == [OURS, *LIBRARIES]
    assert set(installed.modes) == {True, False}, "inference mode where no gradient is wanted"
    rows = {row.peer: row for row in report.rows(result) if row.metric == "fwd_bwd_us"}
    for row in rows.values():
        assert row.interval is not None and row.ratio is not None
        assert 0 < row.interval[0] <= row.ratio <= row.interval[1]


def test_tuning_lists_keep_what_wins(installed: StandIns) -> None:
    run_case(SMALL, config("sonicmoe", "liger"))
    left = {name: [c.kwargs for c in tuner.configs] for name, tuner in installed.tuners.items()}
    for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"):
        tiles = [(c["config"].tile_m, c["config"].tile_n, c["config"].pingpong) for c in left[name]]
        assert tiles == list(layer_peers.SONIC_TILES)
    assert left["token_gather_sum_kernel"] == [{"BLOCK_H": 1024, "BLOCK_K": 8}]
    assert left["_moe_bwd_dX_expanded_kernel"] == [{"BLOCK_N": 128, "BLOCK_K": 64}]
    assert left["_moe_bwd_dW1_kernel"] == [{"BLOCK_N": 128, "BLOCK_K": 32}]
    assert left["_token_gather_weighted_sum_kernel"] == [{"BLOCK_H": 512, "BLOCK_K": 8}]


def test_models_get_the_same_short_lists(installed: StandIns) -> None:
    settings = transformers.Settings(torch.device("cpu"), torch.float32, ("liger",), warm_ms=0, min_ms=0)
    case = transformers.TransformersCase(CPU_HUGGING_FACE_MODELS[0], "layers", "train", 8)
    assert list(transformers.run_case(case, settings).metrics) == [OURS, "liger"]
    assert [c.kwargs for c in installed.tuners["_moe_bwd_dW1_kernel"].configs] == [{"BLOCK_N": 128, "BLOCK_K": 32}]


@pytest.mark.parametrize(("tokens", "fits"), [(453, True), (454, False)])
def test_scales_that_deepgemm_cannot_transpose_arrive_transposed(installed: StandIns, tokens: int, fits: bool) -> None:
    """Of two slots a token: 906 columns, padded to 907, are the last that fit. All others are left as they are."""
    result = run_case(LayerShape(tokens, 32, 16, 4, 2), config("torchao"))
    assert result.missing == {} and "torchao" in result.metrics
    columns = 2 * tokens
    left = [((32, columns), (columns, 1) if fits else (1, 32))] * 2  # of w2's output H and of w1's, 2I
    assert set(installed.deepgemm.scales) == {*left, ((32, columns), (1, 32)), ((16, columns), (1, 16))}


def test_a_library_that_cannot_run_is_missing_and_the_others_are_not(installed: StandIns) -> None:
    installed.emulates = True
    installed.tuners["gemm_tuned"].configs = [gemm(64, 64, False)]
    result = run_case(SMALL, config(*LIBRARIES))
    assert list(result.metrics) == [OURS, "liger"]
    assert "would emulate" in result.missing["torchao"] and "none of the configurations" in result.missing["sonicmoe"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"activation": "geglu"}, "SwiGLU only"), ({"router": "sigmoid_grouped_topk"}, "softmax only")],
)
def test_layers_that_a_library_lacks_are_named(installed: StandIns, changes: dict[str, Any], reason: str) -> None:
    assert reason in run_case(SMALL, config("liger", **changes)).missing["liger"]


def test_all_and_none_of_the_peers() -> None:
    """Not installed, they are missing by name; torchao has its place in FP8 only."""
    found = run("bench", "layer", *QUICK, "--shape", "32,32,16,4,2", "--peers", "all")
    assert found.exit_code == 0, found.output
    reasons = [line for line in found.output.splitlines() if line.startswith("missing ")]
    assert [line.split()[1] for line in reasons] == ["sonicmoe:", "liger:"]
    assert all("ModuleNotFoundError: No module named" in line for line in reasons)
    fp8 = Layer(recipe="fp8", peers="all", device="cpu").config
    assert set(fp8.peers) == set(layer_peers.PEERS)
    assert Layer(peers="none", device="cpu").config.peers == []
    refused = run("bench", "layer", *QUICK, "--peers", "sonic")
    assert refused.exit_code == 2 and "unknown peer 'sonic'; choose from torch_loop" in words(refused)


def test_a_missing_peer_does_not_end_an_fp8_case() -> None:
    shape = LayerShape(16, 128, 128, 2, 2)
    changed = replace(config("liger"), dtype=torch.bfloat16, recipe=Fp8Recipe())
    result = run_case(shape, changed)
    assert list(result.metrics) == [OURS, layer.OURS_BF16] and "liger" in result.missing


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("peer", "module"), [("sonicmoe", "sonicmoe"), ("liger", "liger_kernel"), ("torchao", "torchao")]
)
def test_gpu_installed_libraries_compute_our_layer(peer: str, module: str) -> None:
    pytest.importorskip(module)
    changed = replace(config(peer), device=torch.device("cuda", 0), dtype=torch.bfloat16)
    if peer in layer_peers.FP8:
        changed = replace(changed, recipe=Fp8Recipe())
    assert run_case(LayerShape(1024, 512, 256, 8, 2), changed).missing == {}


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_a_peer_with_a_wrong_gradient_is_not_compared(monkeypatch: pytest.MonkeyPatch, argument: int) -> None:
    """The right output, and the gradient of one argument a fifth too large."""

    def wrong(*args: Any) -> Tensor:
        changed = list(args)
        fixed = changed[argument].detach()
        changed[argument] = fixed + 1.2 * (changed[argument] - fixed)
        return torch_loop(*changed)

    monkeypatch.setitem(layer.PEERS, "torch_loop", wrong)
    result = run_case(SMALL, config("torch_loop", "grouped_mm"))
    name = ("x", "the router", "w1", "w2")[argument]
    assert f"gradient of {name} 0.2" in result.missing["torch_loop"]
    assert list(result.metrics) == [OURS, "grouped_mm"]


@pytest.mark.parametrize(("share", "agrees"), [(0.1, True), (0.6, False)])
def test_tokens_with_another_choice_do_not_hide_the_gradients(share: float, agrees: bool) -> None:
    """A peer that breaks ties otherwise on few tokens computes the same; on most tokens it does not."""
    x_TH, w_H = torch.randn(100, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    others = [torch.randn(2, 2, 2, requires_grad=True) for _ in range(2)]

    def forward(factor_T: Tensor) -> Tensor:
        return factor_T[:, None] * x_TH * w_H + sum(0 * other.sum() for other in others)

    same_T = torch.ones(100)
    tied_T = same_T.clone()
    tied_T[: int(100 * share)] = 1.5
    judge, peer = (
        layer.Contender(lambda _, f=f: forward(f), x_TH, [*others, w_H], torch.randn(100, 8)) for f in (same_T, tied_T)
    )
    found = layer._difference(peer, judge, judge.infer(), layer.SAME_FUNCTION)
    assert (found is None) == agrees, found
