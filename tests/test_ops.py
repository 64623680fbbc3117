"""When a call of an op goes through torch's dispatcher, and when its kernel is called at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import supersonic_moe as sm
from supersonic_moe.ops import caller


class Subclass(torch.Tensor):
    pass


def grad_of(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A transform in which ``call`` runs and gets no gradient."""
    got: Tensor = torch.func.grad(lambda y: y.sum() + call(y.detach()).sum())(x)
    return got


def compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    got: Tensor = torch.compile(call, fullgraph=True, backend="eager")(x)
    return got


def counted(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return call(x)


def traced(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """With real tensors, and before autograd: under a mode of another kind than the FLOP counter's."""
    got: Tensor = make_fx(call, tracing_mode="real", pre_dispatch=True)(x)(x)
    return got


def without_gradients(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


DIRECT: dict[str, Callable[..., Any]] = {
    "no gradients": without_gradients,
    "inference mode": lambda call, x: torch.inference_mode()(call)(x),
    "a parameter": lambda call, x: without_gradients(call, torch.nn.Parameter(x)),
}
OBSERVED: dict[str, Callable[..., Any]] = {
    "gradients are recorded": lambda call, x: call(x),
    "FLOPs are counted": lambda call, x: without_gradients(lambda y: counted(call, y), x),
    "a transform": grad_of,
    "a trace ahead of autograd": lambda call, x: without_gradients(lambda y: traced(call, y), x),
    "the compiler": lambda call, x: without_gradients(lambda y: compiled(call, y), x),
    "another class": lambda call, x: without_gradients(call, x.as_subclass(Subclass)),
    "meta": lambda call, x: without_gradients(call, x.to("meta")),
}


@pytest.fixture(name="op", scope="module")
def an_op() -> Any:
    """Twice its argument on a CPU and on meta, where nothing else would tell who called."""
    with torch.library._scoped_library("supersonic_moe_test", "DEF") as library:
        library.define("twice(Tensor x, int times) -> Tensor")
        library.impl("twice", lambda x, times: x.clone() * times, "CPU")
        torch.library.register_fake("supersonic_moe_test::twice", lambda x, times: torch.empty_like(x), lib=library)
        yield torch.ops.supersonic_moe_test.twice.default


@pytest.mark.parametrize("where", DIRECT)
def test_the_kernel_is_called_where_nobody_looks(where: str, op: Any) -> None:
    def refused(*args: Any) -> Tensor:
        raise AssertionError(f"{op} went through the dispatcher")

    call = caller(refused, lambda x, times: x * times)
    x = torch.randn(3)
    torch.testing.assert_close(DIRECT[where](lambda y: call(y, 2), x).detach(), 2 * x)


@pytest.mark.parametrize("where", OBSERVED)
def test_the_op_is_called_where_somebody_looks(where: str, op: Any) -> None:
    def refused(*args: Any) -> Tensor:
        raise AssertionError(f"{op} was left out")

    call = caller(op, refused)
    OBSERVED[where](lambda y: call(y, 2), torch.randn(3))


def test_constants_need_no_op_where_gradients_are_recorded(op: Any) -> None:
    def refused(*args: Any) -> Tensor:
        raise AssertionError(f"{op} went through the dispatcher")

    call = caller(refused, lambda x, times: x * times, differentiable=False)
    assert torch.is_grad_enabled() and call(torch.ones(3, dtype=torch.int32), 2).tolist() == [2, 2, 2]


def test_a_profile_lists_ops_by_their_names() -> None:
    x, logits = torch.randn(5, 16), torch.randn(5, 4)
    w1, w2 = torch.randn(4, 16, 16, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
    scores, ids = logits.softmax(1).topk(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sm.topk_experts(x, ids, scores, w1, w2).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"supersonic_moe::experts_forward", "supersonic_moe::experts_backward"} <= names
