"""Layers of experts of Transformers on a GPU in BF16 and fp16: each family's on the tokens that they meet inside the
model, duplicates, decode in a CUDA graph, nothing waits for the host, the compiler.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_graphs import in_graph
from host_waits import no_host_waits
from oracle import rel_fro
from torch import Tensor, nn
from transformers_experts import decorated_classes, inputs, outputs_and_gradients, random_experts
from transformers_models import FAMILIES, model_of, tokens

from supersonic_moe.integrations.transformers import served

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
NAMES = [
    "DeepseekV4Experts",
    "Gemma4TextExperts",
    "GptOssExperts",
    "MiniMaxM3VLExperts",
    "MixtralExperts",
    "NemotronHExperts",
]


def first_experts(model: nn.Module, ids: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The first layer of experts, and what the model hands to it."""
    (experts,) = (m for name, m in model.named_modules() if name == served(model)[0].layer)
    seen: list[list[Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda _, given: seen.append([t.detach().clone() for t in given[:3]]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return experts, seen[0]


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_no_further_from_fp64_than_the_librarys(family: str, dtype: torch.dtype) -> None:
    model, ids = model_of(family, dtype).to(CUDA), tokens(4, 32).to(CUDA)
    assert all(layer.served and "'reference'" not in layer.by for layer in served(model)), str(served(model))
    experts, (x, chosen, scores) = first_experts(model, ids)
    assert_no_further(experts, x, chosen, scores)


def assert_no_further(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor) -> None:
    """In training, and in decode where tokens are few."""
    given = x.requires_grad_(), ids, scores.requires_grad_()
    ours = outputs_and_gradients(experts, "supersonic", *given)
    eager = outputs_and_gradients(experts, "eager", *given)
    experts.config._experts_implementation = "supersonic"
    with torch.no_grad():
        decoded = experts.eval()(x, ids, scores)
    doubles = (x.detach().double().requires_grad_(), ids, scores.detach().double().requires_grad_())
    exact = outputs_and_gradients(experts.double(), "eager", *doubles)
    bounds = {leaf: 1.2 * rel_fro(eager[leaf], exact[leaf]) + 5e-4 for leaf in exact}
    assert rel_fro(decoded, exact["out"]) < bounds["out"]
    assert {leaf: bound for leaf, bound in bounds.items() if not rel_fro(ours[leaf], exact[leaf]) < bound} == {}


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_an_expert_named_twice_counts_twice(name: str, dtype: torch.dtype) -> None:
    experts = random_experts(decorated_classes()[name], dtype).to(CUDA)
    x, ids, scores = (t.detach().to(CUDA) for t in inputs(experts, dtype))
    ids[:6], ids[7, 1] = 2, ids[7, 0]
    assert_no_further(experts, x, ids, scores)


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["layer", "decode"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_decode_never_waits_and_fits_a_cuda_graph(name: str, batch: int, training: bool, dtype: torch.dtype) -> None:
    """By the layer's own kernels, as in train mode, and by those of decode."""
    experts = random_experts(decorated_classes()[name], dtype).to(CUDA).train(training)
    experts.config._experts_implementation = "supersonic"
    x, ids, scores = (t.detach()[:batch].to(CUDA) for t in inputs(experts, dtype))

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = experts(x, ids, scores)
        return out

    first = call()
    with no_host_waits():
        again = call(), call()  # recorded, then played, where a tape can hold it
    assert all(torch.equal(out, first) for out in again)
    graph, out = in_graph(call)
    x.copy_(torch.randn_like(x))
    ids.copy_((ids + 1) % 4)
    graph.replay()
    assert torch.equal(out, call())


@DTYPES
@pytest.mark.parametrize("name", [*NAMES, "an unknown gate"])
def test_training_never_waits(name: str, dtype: torch.dtype) -> None:
    changes = {"hidden_act": "mish"} if name == "an unknown gate" else {}
    experts = random_experts(decorated_classes()["MixtralExperts" if changes else name], dtype, **changes).to(CUDA)
    experts.config._experts_implementation = "supersonic"
    x, ids, scores = (t.detach().to(CUDA) for t in inputs(experts, dtype))
    leaves = [x.requires_grad_(), scores.requires_grad_(), *experts.parameters()]
    dout = torch.randn_like(x)

    def step() -> list[Tensor]:
        out = experts(x, ids, scores)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    first = step()
    with no_host_waits():
        again = step()
    assert all(map(torch.equal, first, again))


def test_the_compiler_takes_any_number_of_tokens() -> None:
    """With code of Inductor around our kernels, forward and backward."""
    torch._dynamo.reset()
    experts: Any = random_experts(decorated_classes()["GptOssExperts"], torch.bfloat16).to(CUDA)
    experts.limit, experts.alpha = 7.0, 1.702  # those of the library's model
    experts.config._experts_implementation = "supersonic"
    compiled = torch.compile(experts, fullgraph=True, dynamic=True)
    for count in (13, 7, 10):
        x, ids, scores = (t.detach()[:count].clone().to(CUDA) for t in inputs(experts, torch.bfloat16))
        leaves = [x.requires_grad_(), scores.requires_grad_(), *experts.parameters()]
        dout = torch.randn_like(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outs = [call(x, ids, scores) for call in (compiled, experts)]
        found = [[out.detach(), *torch.autograd.grad(out, leaves, dout)] for out in outs]
        assert all(map(torch.equal, *found))
