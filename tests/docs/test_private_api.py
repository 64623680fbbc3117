"""Private names of torch and Triton: where they may be used, and that each substitute gives the right result."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from supersonic_moe import MoE, autograd, constant_weights, private_api
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.jit import tape

SOURCE = Path(private_api.__file__).parent
ALLOWED = {
    # a contender of benchmarks that has no public name; without it that contender is reported as missing
    ("bench/layer_peers.py", "training._to_fp8_blockwise_then_scaled_grouped_mm"),
    ("cli/health.py", "torch.distributed._symmetric_memory"),  # imported to see whether it is there
    # the contract of an experts backend of Transformers; tests/integrations/transformers fail without them
    ("integrations/transformers/gates.py", "kind._apply_gate"),
    ("integrations/transformers/backend.py", "module._apply_gate"),
    ("integrations/transformers/report.py", "module.config._experts_implementation"),
    ("moe.py", "super()._load_from_state_dict"),  # which has the metadata: test_moe.py sees another layout refused
    ("moe.py", "super()._apply"),  # what .to() and .cuda() call on every module: test_moe.py sees the bias stay fp32
}
# documented by Python: NamedTuple, Enum, os
PUBLIC = {"_asdict", "_field_defaults", "_fields", "_make", "_replace", "_value_", "_exit"}


def private_names(path: Path) -> dict[str, int]:
    """Private attributes of anything but the file's own objects, and private modules: name -> line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=attr) if _private(attr):
                base = ast.unparse(value)
                if base not in ("self", "cls") and (attr not in own or base == "super()") and attr not in PUBLIC:
                    found[f"{base}.{attr}"] = node.lineno
            case ast.ImportFrom(module=str(module)):
                for name in (module, *(f"{module}.{alias.name}" for alias in node.names)):
                    if module.split(".")[0] != "supersonic_moe" and any(map(_private, name.split("."))):
                        found[name] = node.lineno
            case ast.Import(names=names):
                found |= {alias.name: node.lineno for alias in names if any(map(_private, alias.name.split(".")))}
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(attr)), *_]) if _private(attr):
                found[f"getattr {attr}"] = node.lineno
            case ast.Call(func=ast.Attribute(attr="attrgetter"), args=args):
                names = [arg.value for arg in args if isinstance(arg, ast.Constant)]
                found |= {f"attrgetter {name}": node.lineno for name in names if _private(name)}
    return found


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_are_in_one_place() -> None:
    assert {"getattr _cuda_getDevice", "attrgetter _version"} <= set(private_names(SOURCE / "private_api.py"))
    stray = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in SOURCE.rglob("*.py")
        for name, line in private_names(path).items()
        if path.name != "private_api.py" and (str(path.relative_to(SOURCE)), name) not in ALLOWED
    ]
    assert not stray, f"use or extend supersonic_moe/private_api.py, which has a substitute for each name: {stray}"


def _of_this_file(add: int) -> int:
    with open(__file__) as file:  # what the compiler cannot trace
        return file.fileno() * 0 + add


def test_a_marked_function_is_called_by_the_compiler_and_not_traced() -> None:
    marked = private_api.constant_when_compiled(_of_this_file)
    compiled = torch.compile(lambda x: x * marked(3), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3, 3]


# ---- without the private names, the public way gives the same --------------------------------------------------------

PRIVATE = {
    torch._C: (
        "_cuda_getDevice",
        "_cuda_getCurrentRawStream",
        "_are_functorch_transforms_active",
        "_will_engine_execute_node",
        "_current_graph_task_id",
        "_current_autograd_node",
        "_len_torch_dispatch_stack",
        "_dispatch_tls_is_dispatch_key_included",
    ),
    torch._C._functorch: ("maybe_current_level",),
    nn.modules.module: tuple(
        f"_global_{when}_hooks" for when in ("forward", "forward_pre", "backward", "backward_pre")
    ),
    torch.cuda: ("_sleep",),
    torch.autograd: ("_profiler_enabled",),
    torch.utils._python_dispatch: ("TorchDispatchMode",),
    torch.utils.checkpoint: ("_StopRecomputationError",),
    torch._C._dynamo.guards: ("_empty_strided_cuda",),
    torch: ("_foreach_add_", "_foreach_copy_", "_disable_dynamo"),
}


@pytest.fixture
def substitutes() -> Any:
    """A copy of the module, imported where none of the private names exists."""
    spec = importlib.util.spec_from_file_location("private_api_without_names", private_api.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for place, names in PRIVATE.items():
            for name in names:
                patch.delattr(place, name, raising=False)
        spec.loader.exec_module(module)
    return module


def test_private_names_are_taken_where_they_are() -> None:
    for place, names in PRIVATE.items():
        for name in names:
            if hasattr(place, name):
                assert any(getattr(place, name) is taken for taken in vars(private_api).values())


def test_without_symmetric_memory_ranks_use_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_api.has_symmetric_memory()
    module = sys.modules["torch.distributed._symmetric_memory"]
    assert callable(module._SymmetricMemory.empty_strided_p2p)
    with monkeypatch.context() as patch:
        patch.delattr(module, "rendezvous")
        assert not private_api.has_symmetric_memory()
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", None)
    assert not private_api.has_symmetric_memory()


def test_device_and_stream_are_asked_of_torch_cuda(substitutes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert substitutes.current_device is torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device))
    assert substitutes.raw_stream(2) == 102


def test_a_mode_may_be_active_where_torch_does_not_say(substitutes: Any) -> None:
    assert substitutes.dispatch_modes() and not private_api.dispatch_modes()
    assert substitutes.profiled() and not private_api.profiled()


def test_without_dispatch_modes_nothing_is_recorded(substitutes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert substitutes.DispatchMode is None
    monkeypatch.setattr(tape, "DispatchMode", None)
    monkeypatch.setattr(tape, "current_device", lambda: -1)
    monkeypatch.setattr(tape, "state", tape._State())
    runs: list[torch.Tensor] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        return x

    for _ in range(4):
        tape.play(noted, (torch.ones(4),))
    assert len(runs) == 4


class Square(torch.autograd.Function):
    bindings = 0

    @staticmethod
    def forward(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return factor * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return 2 * ctx.factor * ctx.saved_tensors[0] * grad, None

    @classmethod
    def apply(cls, *args: Any) -> Any:
        cls.bindings += 1
        return super().apply(*args)


def squared() -> tuple[list[float], list[float], bool]:
    """Result, gradient, and whether torch bound the arguments."""
    x = torch.arange(4.0, requires_grad=True)
    before = Square.bindings
    y = autograd.apply(Square, x, 3.0)
    y.sum().backward()
    assert x.grad is not None
    return y.tolist(), x.grad.tolist(), Square.bindings > before


def test_autograd_functions_are_applied_by_torch_itself(substitutes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [0, 3, 12, 27], [0, 6, 12, 18]
    assert squared() == (*results, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "transforms_active", substitutes.transforms_active)
        assert squared() == (*results, True)
    monkeypatch.setattr(autograd, "BASE_APPLIES", False)
    assert squared() == (*results, True)


def test_transforms_of_torch_func_go_through_torch() -> None:
    before = Square.bindings
    dx = torch.func.grad(lambda x: autograd.apply(Square, x, 3.0).sum())(torch.arange(4.0))
    assert dx.tolist() == [0, 6, 12, 18] and Square.bindings > before


def test_one_transform_is_traced_where_torch_does_not_count_them(substitutes: Any) -> None:
    found = [private_api.transforms_traced()]
    torch.func.grad(lambda x: found.append(private_api.transforms_traced()) or x)(torch.ones(()))
    assert found == [0, 1] and substitutes.transforms_traced() == 1


def test_what_a_node_keeps_is_made_again_where_torch_shows_it() -> None:
    x = torch.arange(4.0, requires_grad=True)
    y = Square.apply(x, 3.0)
    private_api.replace_saved(y, x, lambda: 10 * x.detach())
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 60, 120, 180]
    private_api.replace_saved(SimpleNamespace(grad_fn=object()), x, lambda: x)  # type: ignore[arg-type]
    for pack, unpack in ((lambda t: (t,), lambda kept: kept[0]), (lambda t: t, lambda t: t)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            z = Square.apply(x, 3.0)
        private_api.replace_saved(z, x, lambda: 10 * x)
        assert torch.autograd.grad(z.sum(), x)[0].tolist() == [0, 6, 12, 18]
    kept = [SimpleNamespace(data=torch.empty(0), hooks=[]) for _ in range(2)]  # both at address 0
    for one in kept:
        one.register_hooks = lambda *pair, one=one: one.hooks.append(pair)
    node = SimpleNamespace(grad_fn=SimpleNamespace(_raw_saved_tensors=kept))
    private_api.replace_saved(node, kept[1].data, lambda: x)  # type: ignore[arg-type]
    assert [len(one.hooks) for one in kept] == [0, 1]


class Unversioned:
    """A tensor without the private attributes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        if name in ("_base", "_version"):
            raise AttributeError(name)
        return getattr(self.tensor, name)


def test_a_tensor_without_a_version_never_counts_as_unchanged() -> None:
    tensor = torch.zeros(4)
    view = tensor[1:]
    assert private_api.base_of(view) is tensor and private_api.base_of(tensor) is tensor
    assert private_api.versions_of([tensor, view]) == private_api.versions_of([tensor, view]) == [0, 0]
    bare: Any = Unversioned(view)
    assert private_api.base_of(bare) is bare
    assert len({*private_api.versions_of([bare, tensor]), *private_api.versions_of([bare]), 0}) == 4


def test_weights_without_versions_are_quantized_in_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoE(2, 1, 128, 128, "swiglu", add_bias=False, std=0.02, recipe=Fp8Recipe()).to(torch.bfloat16)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    numbers = itertools.count()
    monkeypatch.setattr("supersonic_moe.quantization.weight_cache.versions_of", lambda ws: [next(numbers) for _ in ws])
    with constant_weights(moe), torch.no_grad():
        before = moe(x)[0]
        for weight in (moe.c_fc.weight, moe.c_proj.weight):
            weight.data.mul_(2)  # shows no sign: with a version the old copies would serve
        assert not torch.equal(moe(x)[0], before)


def test_pairs_of_tensors_one_by_one(substitutes: Any) -> None:
    for module in (private_api, substitutes):
        targets = [torch.zeros(2), torch.ones(3)]
        module.add_each(targets, [torch.ones(2), torch.full((3,), 2.0)])
        module.copy_each(targets[:1], [targets[0] * 5])
        assert [t.tolist() for t in targets] == [[5, 5], [3, 3, 3]]


def test_a_torch_without_its_store_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = torch.distributed
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    private_api.default_store("a/").set("b", "c")
    monkeypatch.delattr(dist.distributed_c10d, "_get_default_store")
    assert private_api.default_store("a/") is None


def test_a_promise_that_does_not_hold_is_an_error(substitutes: Any) -> None:
    for module in (private_api, substitutes):
        module.promise(True)
        with pytest.raises(RuntimeError):
            module.promise(False)


def test_a_pass_whose_ends_torch_does_not_tell_reaches_everything(substitutes: Any) -> None:
    leaf = torch.zeros(2, requires_grad=True)
    told: list[list[Any]] = []
    probe = (leaf * 2).sum()
    probe.grad_fn.register_prehook(
        lambda _: told.append([api.reaches(leaf_node) for api in (private_api, substitutes)])
    )
    leaf_node = leaf.view_as(leaf).grad_fn.next_functions[0][0]
    probe.backward(retain_graph=True)
    torch.autograd.grad(probe, leaf)
    assert told == [[True, True], [None, True]]


def test_a_torch_without_sleep_is_named(substitutes: Any) -> None:
    with pytest.raises(
        RuntimeError, match=rf"needs torch\.cuda\._sleep, which torch {re.escape(torch.__version__)} does"
    ):
        substitutes.gpu_sleep(1)


def test_the_correction_bias_stays_fp32_through_the_private_hook_of_modules() -> None:
    moe = MoE(4, 2, 16, 8, "swiglu", add_bias=False, std=0.02, router="sigmoid_grouped_topk")
    nn.Sequential(moe).to(torch.bfloat16)
    assert moe.correction_bias is not None and moe.correction_bias.dtype is torch.float32


def test_backward_is_where_autograd_runs_it(substitutes: Any) -> None:
    x, seen = torch.ones(1, requires_grad=True), []
    x.register_hook(lambda _: seen.append((private_api.in_backward(), substitutes.in_backward())))
    assert not private_api.in_backward()
    x.backward()
    assert seen == [(True, False)]


def test_an_export_is_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile counts are kept, also by a torch whose public name calls both the same."""
    seen = []

    def call(x: torch.Tensor) -> torch.Tensor:
        seen.append(private_api.exporting())
        return x + 1

    torch.compile(call, backend="eager", fullgraph=True)(torch.zeros(1))
    assert seen == [False]
    module = nn.Identity()
    module.forward = call  # type: ignore[method-assign]
    torch.export.export(module, (torch.zeros(1),))
    assert seen[1:] and all(seen[1:])
    monkeypatch.delattr(torch.compiler, "_is_exporting_flag")
    assert not private_api.exporting()


def test_a_module_whose_hooks_are_unknown_is_called(substitutes: Any) -> None:
    module = nn.Linear(1, 1)
    assert not private_api.runs_hooks(module) and substitutes.runs_hooks(module)
    assert private_api.runs_hooks(SimpleNamespace())  # type: ignore[arg-type]
    for watch in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        for handle in (
            getattr(module, f"register_{watch}")(print),
            getattr(nn.modules.module, f"register_module_{watch}")(print),
        ):
            assert private_api.runs_hooks(module), watch
            handle.remove()
    assert not private_api.runs_hooks(module)
    module.forward = print
    assert private_api.runs_hooks(module)


def test_members_of_a_module_are_those_that_its_attributes_are() -> None:
    """Also where a parametrization takes the place of a parameter, and where torch keeps members elsewhere."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
    linear = module[0]
    assert private_api.member_of(module, "0") is linear
    assert private_api.member_of(linear, "weight") is linear.weight and private_api.member_of(linear, "bias") is None
    elsewhere: Any = SimpleNamespace(weight=1)
    assert private_api.member_of(elsewhere, "weight") == 1
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Tanh())
    assert torch.equal(private_api.member_of(linear, "weight"), linear.parametrizations.weight.original.tanh())
    with pytest.raises(AttributeError, match="nothing"):
        private_api.member_of(linear, "nothing")
