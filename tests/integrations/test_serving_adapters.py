"""Adapters for serving stacks against the signatures that those stacks publish, written down here: vLLM's modular
experts (``modular_kernel.py`` at 003d383e), SGLang's fused functions (0.5.23) and FlashInfer-Bench's definition. None
of the three is installed; stand-ins have their names, fields and parameters.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from inference_oracle import Case, make_case, moe_loop
from torch import Tensor

from supersonic_moe.inference import moe_fp8_ds_routed, workspace_bytes
from supersonic_moe.integrations import sglang_experts
from supersonic_moe.kernels.reference.quantize import dequantize

FLASHINFER_BENCH = Path(__file__).parents[2] / "benchmarks/flashinfer_bench"


def relative_error(got: Tensor, want: Any) -> float:
    want = torch.as_tensor(want).double()
    return float((got.double() - want).norm() / want.norm())


def names(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> ModuleType:
    """A module of that name, and packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
            sys.modules[package].__path__ = []  # type: ignore[attr-defined]
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    if len(parts) > 1:
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)
    return module


# ---- vLLM ------------------------------------------------------------------------------------------------------------

APPLY = [
    "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
    "apply_router_weight_on_input",
]  # fmt: skip
WORKSPACE_SHAPES = [
    "M", "N", "K", "topk", "global_num_experts", "local_num_experts", "expert_tokens_meta", "activation",
]  # fmt: skip


class Activation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"


class Format(enum.Enum):
    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


class Modular(ABC):
    """The abstract methods of ``FusedMoEExpertsModular``, and how it keeps its configuration."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        self.moe_config, self.quant_config = moe_config, quant_config

    @property
    def w1_scale(self) -> Tensor:
        return self.quant_config.w1_scale

    @property
    def w2_scale(self) -> Tensor:
        return self.quant_config.w2_scale

    @staticmethod
    @abstractmethod
    def activation_format() -> Any: ...
    @staticmethod
    @abstractmethod
    def _supports_current_device() -> bool: ...
    @staticmethod
    @abstractmethod
    def _supports_no_act_and_mul() -> bool: ...
    @staticmethod
    @abstractmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool: ...
    @staticmethod
    @abstractmethod
    def _supports_activation(activation: Any) -> bool: ...
    @staticmethod
    @abstractmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool: ...
    @abstractmethod
    def workspace_shapes(self, *_: Any) -> Any: ...
    @abstractmethod
    def finalize_weight_and_reduce_impl(self) -> Any: ...
    @abstractmethod
    def apply(self, *_: Any) -> Any: ...


class NoOp:
    pass


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter, imported between stand-ins."""
    moe, quantization = "vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.quantization.utils"
    stand_in(monkeypatch, f"{moe}.modular_kernel", FusedMoEExpertsModular=Modular, FusedMoEActivationFormat=Format)
    stand_in(monkeypatch, f"{moe}.activation", MoEActivation=Activation)
    stand_in(monkeypatch, f"{moe}.topk_weight_and_reduce", TopKWeightAndReduceNoOP=NoOp)
    keys = {"kFp8Dynamic128Sym": "dynamic 1x128", "kFp8Static128BlockSym": "static 128x128"}
    stand_in(monkeypatch, f"{quantization}.quant_utils", **keys)
    name = "supersonic_moe.integrations.vllm_experts"
    module = importlib.import_module(name)
    yield module
    del sys.modules[name]


def vllm_experts(vllm: ModuleType, case: Case, clamp: float | None = None) -> Any:
    quant = SimpleNamespace(
        block_shape=[128, 128], w1_scale=case.w13_scale, w2_scale=case.w2_scale, gemm1_clamp_limit=clamp
    )
    return vllm.SupersonicExperts(moe_config=None, quant_config=quant)


def test_vllm_sees_the_signatures_that_it_calls(vllm: ModuleType) -> None:
    experts = vllm.SupersonicExperts
    assert names(experts.apply) == APPLY and names(experts.workspace_shapes) == WORKSPACE_SHAPES
    assert names(experts.__init__) == ["moe_config", "quant_config"]
    assert experts.activation_format() is Format.Standard
    assert experts._supports_quant_scheme("static 128x128", "dynamic 1x128")
    assert not experts._supports_quant_scheme("static 128x128", None)
    assert experts._supports_activation(Activation.SILU) and not experts._supports_activation(Activation.GELU)
    assert experts._supports_shape(7168) and not experts._supports_shape(2880)
    with pytest.raises(ValueError, match="blocks of 128 x 128; got block_shape None"):
        experts(None, SimpleNamespace(block_shape=None))
    assert isinstance(experts(None, SimpleNamespace(block_shape=[128, 128])).finalize_weight_and_reduce_impl(), NoOp)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_vllm_experts_compute_what_they_are_asked_for(vllm: ModuleType, mapped: bool, on_input: bool) -> None:
    """With global ids through a map or local ids; ``on_input``: vLLM has applied the weights before."""
    case = make_case(tokens=11, hidden=256, inter=192, local=5, choices=3, num_experts=8, order="gate_up")
    placed = torch.tensor([-1, 3, 0, -1, 2, 4, 1, -1], dtype=torch.int32)
    experts = vllm_experts(vllm, case, clamp=2.0)
    first, second, shape = experts.workspace_shapes(11, 384, 256, 3, 8, 5, None, Activation.SILU)
    assert first == (0,) and shape == (11, 256)
    assert 2 * second[0] >= workspace_bytes(11, 3, 256, 192, 5)
    output = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    workspace = torch.full(second, torch.nan, dtype=torch.bfloat16)
    ids = case.ids if mapped else torch.where(case.ids < 5, case.ids, -1)
    arguments = (
        output, case.x, case.w13, case.w2, case.weights, ids, Activation.SILU, 8 if mapped else -1,
        placed if mapped else None, case.x_scale, None, output.new_empty(0), workspace, None, on_input,
    )  # fmt: skip
    assert experts.apply(*arguments) is None
    local = torch.where(ids < 0, -1, placed[ids.long().clamp(min=0)]) if mapped else ids
    if on_input:
        case.weights = torch.ones_like(case.weights)
    want = moe_loop(case, local_ids=local, limit=2.0)
    assert relative_error(output, want) < 0.03


def test_vllm_scratch_starts_where_the_operator_wants_it(vllm: ModuleType) -> None:
    memory = torch.empty(1000, dtype=torch.bfloat16)
    for start in range(3):
        part = memory[start:]
        aligned = vllm._aligned(part)
        assert aligned.dtype is torch.uint8 and aligned.data_ptr() % 256 == 0
        assert 0 <= aligned.data_ptr() - part.data_ptr() < 256
        assert aligned.data_ptr() + aligned.numel() == memory.data_ptr() + 2000


def test_vllm_registers_by_name_and_says_what_is_missing(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="pull request 53897"):
        vllm.register()
    seen = []

    def register_fp8_moe_backend(name: str, expert_class_paths: list[str], auto_select: bool) -> None:
        seen.append((name, expert_class_paths, auto_select))

    stand_in(monkeypatch, vllm.REGISTRY, register_fp8_moe_backend=register_fp8_moe_backend)
    vllm.register()
    ((name, (path,), auto_select),) = seen
    module, _, attribute = path.rpartition(".")
    assert name == "supersonic_moe" and not auto_select
    assert getattr(importlib.import_module(module), attribute) is vllm.SupersonicExperts


# ---- SGLang ----------------------------------------------------------------------------------------------------------


class TopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor | None = None


class DispatchOutput(NamedTuple):
    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_output: TopKOutput
    hidden_states_pre_quant: tuple[Tensor, ...] | None = None


class CombineInput(NamedTuple):
    hidden_states: Tensor


QUANT_INFO: dict[str, Any] = {
    "b13": None, "b2": None, "use_fp8_w8a8": True, "block_shape": [128, 128], "fuse_swiglu_interleaved": False,
}  # fmt: skip
RUNNER_CONFIG: dict[str, Any] = {
    "activation": "silu", "is_gated": True, "apply_router_weight_on_input": False, "no_combine": False,
    "routed_scaling_factor": None, "gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None,
}  # fmt: skip


class DispatchCore(ABC):
    """``DispatchMoeRunnerCore``."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def runner_backend(self) -> Any: ...
    @abstractmethod
    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
    ) -> Any: ...


@pytest.fixture
def runner_cores(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins of SGLang; what was registered, by name."""
    moe, found = "sglang.srt.layers.moe", {}
    stand_in(monkeypatch, f"{moe}.token_dispatcher.standard", StandardCombineInput=CombineInput)
    stand_in(monkeypatch, f"{moe}.moe_runner.base", DispatchMoeRunnerCore=DispatchCore)
    stand_in(monkeypatch, f"{moe}.moe_runner.runner", register_moe_runner_core=found.__setitem__)
    stand_in(monkeypatch, f"{moe}.utils", resolve_moe_runner_backend=lambda name: f"backend {name}")
    return found


def sglang_call(case: Case, **config: Any) -> tuple[DispatchOutput, SimpleNamespace, SimpleNamespace]:
    x = dequantize(case.x, case.x_scale, torch.float32).bfloat16()
    quant = SimpleNamespace(
        w13_weight=case.w13, w2_weight=case.w2, w13_scale=case.w13_scale, w2_scale=case.w2_scale, **QUANT_INFO
    )
    dispatched = DispatchOutput(x, None, TopKOutput(case.weights, case.ids))
    return dispatched, quant, SimpleNamespace(**{**RUNNER_CONFIG, **config})


def test_sglang_fused_function_and_backend(runner_cores: dict[str, Any]) -> None:
    assert names(sglang_experts.fused_experts) == ["dispatch_output", "quant_info", "runner_config"]
    case = make_case("positive", tokens=9, local=5, choices=3, num_experts=7, order="gate_up")
    case.ids = torch.where(case.ids < 5, case.ids, -1)
    call = sglang_call(case, routed_scaling_factor=2.5, swiglu_limit=50.0)
    got = sglang_experts.fused_experts(*call)
    assert isinstance(got, CombineInput)
    assert relative_error(got.hidden_states, moe_loop(case, limit=50.0, factor=2.5)) < 0.05

    sglang_experts.register()
    core = runner_cores["supersonic_moe"](None)
    assert core.runner_backend == "backend supersonic_moe"
    assert torch.equal(core.run_from_dispatch(*call).hidden_states, got.hidden_states)
    with pytest.raises(ValueError, match="no LoRA hooks"):
        core.run_from_dispatch(*call, hooks=object())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_shape": None}, "blocks of 128 x 128"),
        ({"use_fp8_w8a8": False}, "use_fp8_w8a8=False"),
        ({"b2": torch.zeros(1)}, "got biases"),
        ({"fuse_swiglu_interleaved": True}, "interleaved gate and up"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"is_gated": False}, "activation 'silu'"),
        ({"gemm1_alpha": 1.7}, "gemm1_alpha"),
        ({"no_combine": True}, "rows that are not combined"),
    ],
)
def test_sglang_asks_for_something_else(change: dict[str, Any], said: str, runner_cores: dict[str, Any]) -> None:
    dispatched, quant, config = sglang_call(make_case(order="gate_up"))
    (name, value), *_ = change.items()
    setattr(quant if hasattr(quant, name) else config, name, value)
    with pytest.raises(ValueError, match=said):
        sglang_experts.fused_experts(dispatched, quant, config)


# ---- FlashInfer-Bench ------------------------------------------------------------------------------------------------

INPUTS = [
    "routing_logits", "routing_bias", "hidden_states", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale",
    "gemm2_weights", "gemm2_weights_scale", "local_expert_offset", "routed_scaling_factor",
]  # fmt: skip


def test_flashinfer_bench_calls_the_operator_with_and_without_an_output() -> None:
    spec = importlib.util.spec_from_file_location("contest_entry", FLASHINFER_BENCH / "main.py")
    assert spec is not None and spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    assert names(entry.run) == [*INPUTS, "output"]
    case = make_case(tokens=6, local=32, choices=1, num_experts=1)
    inputs = (
        torch.randn(6, 256), torch.randn(256).bfloat16(), case.x, case.x_scale.t().contiguous(), case.w13,
        case.w13_scale, case.w2, case.w2_scale, 96, 2.5,
    )  # fmt: skip
    want = moe_fp8_ds_routed(*inputs)
    output = torch.full((6, 256), torch.nan, dtype=torch.bfloat16)
    assert entry.run(*inputs, output) is output
    assert torch.equal(output, want) and torch.equal(entry.run(*inputs), want)
    assert want.abs().sum() > 0


def test_flashinfer_bench_solution_holds_its_source() -> None:
    run = subprocess.run([sys.executable, FLASHINFER_BENCH / "pack.py"], capture_output=True, text=True, check=True)
    solution = json.loads(run.stdout)
    assert solution["definition"] == "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
    file, function = solution["spec"]["entry_point"].split("::")
    (source,) = solution["sources"]
    assert source["path"] == file and f"def {function}(" in source["content"]
    compile(source["content"], file, "exec")
    assert all(solution[key] for key in ("name", "author")) and solution["spec"]["target_hardware"]
