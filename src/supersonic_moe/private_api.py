"""Names of torch that are not public and that this package uses, each with a public way for the day it is gone.

Nothing else in the package touches a private name of torch: ``tests/docs/test_private_api.py`` searches for them, and
runs every substitute here. They are in use because the public way costs host time that a small layer waits for, or
because there is none. So that they cost none here either, each is looked up once, when this module is imported. Those
of Triton are in ``kernels/triton/launch.py``, which takes them only from versions whose launcher it knows.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def _raw_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _add_each(targets: list[Tensor], summands: list[Tensor]) -> None:
    for target, summand in zip(targets, summands, strict=True):
        target.add_(summand)


def _copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _always(node: Any) -> bool:
    return True


def _gpu_sleep(cycles: int) -> None:
    raise RuntimeError(
        f"timing single kernels needs torch.cuda._sleep, which torch {torch.__version__} does not have; use a torch "
        "that has been tested (README.md, Install)."
    )


def _promise(condition: bool) -> None:
    if not condition:
        raise RuntimeError("a size is not what this call can take; run it without torch.compile to see which.")


promise: Callable[[bool], None] = getattr(torch, "_check", _promise)
"""Raise RuntimeError unless a condition on sizes holds; under ``torch.compile`` for sizes that depend on data, when the
graph runs.
"""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""Index of the current CUDA device; the public call asks first whether CUDA is initialised."""

raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
"""Address of torch's current stream on a device, at a tenth of the time of a ``torch.cuda.Stream`` object."""


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", _empty
)
"""A tensor on the current CUDA device, as compiled graphs allocate it, at half the time. Dispatch modes do not see it,
and deterministic mode does not fill it.
"""

transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a transform of ``torch.func`` may be active; True where torch does not say."""

_executes: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", _always)


def reaches(node: Any) -> bool | None:
    """In a backward pass: whether it goes on to ``node`` of the graph; None where ``node`` is a leaf whose gradient
    ``torch.autograd.grad`` hands out instead of accumulating it. True where torch does not say.
    """
    try:
        return _executes(node)
    except RuntimeError:
        return None


_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_included: Callable[[Any], bool] = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", _always)
_PRE_DISPATCH = getattr(getattr(torch._C, "DispatchKey", None), "PreDispatch", None)
_before_autograd = _always if _PRE_DISPATCH is None else _included


def dispatch_modes() -> bool:
    """Whether a ``__torch_dispatch__`` mode is active, one that sees ops before autograd does included, which
    ``make_fx(pre_dispatch=True)`` traces with. True where torch does not say.
    """
    return bool(_modes() or _before_autograd(_PRE_DISPATCH))


profiled: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
"""Whether torch's profiler runs, which lists ops by their names; True where torch does not say."""


def _dispatch_mode() -> Any:
    try:
        return importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode
    except (ImportError, AttributeError):
        return None


_mode = _dispatch_mode()
_unmarked = {"_should_skip_dynamo": classmethod(lambda cls: False)}  # else the first operator imports the compiler
DispatchMode: Any = _mode and type("DispatchMode", (_mode,), _unmarked)
"""A class whose ``with`` block sees each operator of torch that runs on this thread; None where torch has none. Its
``__torch_dispatch__`` is ``uncompiled``.
"""

_forward_ad = torch.autograd.forward_ad


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken, which ``requires_grad`` does not show. False where torch does
    not say.
    """
    return bool(getattr(_forward_ad, "_current_level", -1) >= 0)


BASE_APPLIES = hasattr(torch.autograd.Function.__base__, "apply")
"""Whether ``torch.autograd.Function.apply`` binds arguments and then calls ``apply`` of its base class."""

add_each: Callable[[list[Tensor], list[Tensor]], None] = getattr(torch, "_foreach_add_", _add_each)
"""``target += summand`` for each pair, on a GPU in few launches."""

copy_each: Callable[[list[Tensor], list[Tensor]], None] = getattr(torch, "_foreach_copy_", _copy_each)
"""``target.copy_(source)`` for each pair, on a GPU in few launches."""


def default_store(prefix: str) -> Any:
    """The key-value store that ranks of ``torch.distributed`` share (a ``Store``), seen through keys that start with
    ``prefix``; None where torch does not say.
    """
    store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
    return None if store is None else dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def has_symmetric_memory() -> bool:
    """Whether torch lets GPUs reach each other's memory. Imported late: it takes a while, and few need it."""
    try:
        module = importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError:
        return False
    return hasattr(module, "_SymmetricMemory") and hasattr(module, "rendezvous")


def symmetric_block(size: int, device: torch.device) -> Tensor:
    """(size,) uint8 that :func:`symmetric_views` takes, not zeroed. Not from torch's pool: a block that the pool hands
    out again on one rank, and not on another, would be taken for two.
    """
    module = importlib.import_module("torch.distributed._symmetric_memory")
    block: Tensor = module._SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    return block


def symmetric_views(block: Tensor, group: dist.ProcessGroup) -> tuple[list[Tensor], Any]:
    """The blocks of all ranks, as this one reads and writes them, and what has to live as long. Collective."""
    handle = importlib.import_module("torch.distributed._symmetric_memory").rendezvous(block, group)
    shape = tuple(block.shape)
    return [handle.get_buffer(rank, shape, torch.uint8) for rank in range(dist.get_world_size(group))], handle


def active_ddp() -> Any:
    """The DistributedDataParallel whose forward runs, on any thread; None without one, or where torch does not say."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def ignored_by_ddp(module: nn.Module, names: list[str]) -> None:
    """DistributedDataParallel of ``module`` will leave the parameters of these ``names`` alone. There is no public way;
    without this name it would refuse or average them.
    """
    module._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


gpu_sleep: Callable[[int], None] = getattr(torch.cuda, "_sleep", _gpu_sleep)
"""Keep the current CUDA stream busy for so many clock cycles. There is no public way: RuntimeError without it."""

_never_twice = itertools.count(-1, -1)


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that a view looks into, else the tensor itself. A view counts as itself where torch does not say."""
    base: Tensor | None = getattr(tensor, "_base", None)
    return tensor if base is None else base


_counted = operator.attrgetter("_version")


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How many times each tensor was changed in place, by torch's count; where there is none, another number each time,
    so that nothing counts as unchanged. A map without Python code, because it runs for all weights in each pass.
    """
    try:
        return list(map(_counted, tensors))
    except AttributeError:
        return [next(_never_twice) for _ in tensors]


def replace_saved(out: Tensor, saved: Tensor, again: Callable[[], Tensor]) -> None:
    """The function that made ``out`` keeps its operand ``saved`` for backward no longer, which calls ``again`` for it.
    Nothing happens where torch does not say what a function keeps, or where other hooks on what it keeps are active:
    activation checkpointing keeps nothing already, and its second forward needs what it keeps at once.
    """
    for kept in getattr(out.grad_fn, "_raw_saved_tensors", ()):
        tensor = getattr(kept, "data", None)
        if isinstance(tensor, Tensor) and _is_same(tensor, saved):
            with suppress(RuntimeError):  # hooks that keep the tensor as it is: torch takes one pair
                kept.register_hooks(lambda _: None, lambda _: again())


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Not by addresses: without elements, all tensors are at address 0."""
    same = tensor.untyped_storage() is other.untyped_storage()
    return same and (tensor.storage_offset(), tensor.shape) == (other.storage_offset(), other.shape)


class _Never(Exception):
    """Is not raised."""


END_OF_RECOMPUTATION: type[Exception] = getattr(torch.utils.checkpoint, "_StopRecomputationError", _Never)
"""What ends a forward that checkpointing runs again as soon as backward has all that it needs; nothing where torch does
not say.
"""

_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread, as it is when checkpointing runs a forward again. False
    where torch does not say.
    """
    return bool(_graph_task() != -1)


_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)


def in_checkpoint_function() -> bool:
    """In a backward: whether it runs a forward again that ran without gradients, as reentrant checkpointing does in a
    ``CheckpointFunction`` (torch's, Megatron's, DeepSpeed's). False where torch does not say.
    """
    return type(_node()).__name__ == "CheckpointFunctionBackward"


def exporting() -> bool:
    """Whether ``torch.export`` is tracing. In torch 2.11 the public name is True under ``torch.compile`` too. False
    where torch does not say.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def constant_when_compiled(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result`` leaves ``function``: marked. The public name imports the compiler
    for that, two seconds of a process that may never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_transform_level: Callable[[], int | None] = getattr(
    getattr(torch._C, "_functorch", None), "maybe_current_level", lambda: int(transforms_active())
)


@constant_when_compiled
def transforms_traced() -> int:
    """How many transforms of ``torch.func`` are around what ``torch.compile`` traces: it enters them as it comes to
    them, and guards on those around a graph. At most 1 where torch does not say.
    """
    return _transform_level() or 0


_when_called: Callable[[Any], Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def uncompiled(function: Function) -> Function:
    """As ``torch.compiler.disable`` leaves ``function``: not traced. That imports the compiler, too; here whoever
    compiles does.
    """
    disabled = _when_called(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call  # type: ignore[return-value]


_ALL_CALLS = nn.modules.module
_SOMETHING = {None: None}
_forward_of_all = getattr(_ALL_CALLS, "_global_forward_hooks", _SOMETHING)
_forward_pre_of_all = getattr(_ALL_CALLS, "_global_forward_pre_hooks", _SOMETHING)
_backward_of_all = getattr(_ALL_CALLS, "_global_backward_hooks", _SOMETHING)
_backward_pre_of_all = getattr(_ALL_CALLS, "_global_backward_pre_hooks", _SOMETHING)


def runs_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than the ``forward`` of its class. True where torch does not say."""
    own = module.__dict__
    try:
        return bool(
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or _forward_of_all
            or _forward_pre_of_all
            or _backward_of_all
            or _backward_pre_of_all
            or "forward" in own  # how accelerate offloads
        )
    except KeyError:
        return True


def member_of(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of a parameter or a submodule, at a third of its time: ``nn.Module`` has it fail first,
    then searches. Eight of them in a forward took as long as a launch.
    """
    own = module.__dict__
    for members in (own.get("_parameters", ()), own.get("_modules", ())):
        if name in members:
            return members[name]
    return getattr(module, name)  # a parametrization, for instance
