"""``MoE`` over the ranks of tests/parallel, beside one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from parallel_cases import E, H, I, K, leaf, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from supersonic_moe import MoE


def module_as_one_process(tokens: Sequence[int], router: str, recompute: bool, masked: bool) -> dict[str, float]:
    """Largest difference of outputs, auxiliary loss and gradients of an expert-parallel ``MoE`` from those of one MoE
    that has the tokens of all ranks, in fp64.
    """
    torch.manual_seed(3)
    whole = MoE(E, K, H, I, "swiglu", True, 0.3, router=router).double()
    ep = make()
    layer = MoE(E, K, H, I, "swiglu", True, 0.3, router=router, expert_parallel=ep).double()
    others = of_rank_0(layer.c_fc.weight)
    assert dist.get_rank() == 0 or not torch.equal(layer.c_fc.weight, others), "drawn from one sequence"
    own = slice(ep.first_expert, ep.first_expert + ep.experts_here)
    layer.load_state_dict(
        {name: t if name in ("router.weight", "correction_bias") else t[own] for name, t in whole.state_dict().items()}
    )
    x, dout = torch.randn(sum(tokens), 2, H).double(), torch.randn(sum(tokens), 2, H).double()
    rows = slice(sum(tokens[: ep.rank]), sum(tokens[: ep.rank + 1]))
    mask = torch.rand(x.shape[:2]) < 0.7 if masked else None
    here_mask = None if mask is None else mask[rows]
    mine, everything = leaf(x[rows]), leaf(x)
    if recompute:
        out, _ = checkpoint(layer, mine, token_mask=here_mask, use_reentrant=False)
    else:
        out, _ = layer(mine, token_mask=here_mask)
    out.backward(dout[rows])
    expected, _ = whole(everything, token_mask=mask)
    expected.backward(dout)
    found = {"out": (out, expected[rows]), "dx": (mine.grad, everything.grad[rows])}
    router_grad = layer.router.weight.grad
    dist.all_reduce(router_grad)
    found["router"] = (router_grad, whole.router.weight.grad)
    for name in ("c_fc", "c_proj"):
        for kind in ("weight", "bias"):
            ours, theirs = getattr(getattr(layer, name), kind), getattr(getattr(whole, name), kind)
            found[f"{name}.{kind}"] = (ours.grad, theirs.grad[own])
    counts = layer.expert_counts.clone()
    dist.all_reduce(counts)
    found["counts"] = (counts, whole.expert_counts)
    with torch.no_grad():
        found["aux_loss"] = tuple(m(x[rows], token_mask=here_mask)[1] for m in (layer, whole))
        found["inference"] = (layer(mine, is_inference_mode=True, token_mask=here_mask)[0], expected[rows])
    ep.close()
    return {name: float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for name, (a, b) in found.items()}


def compiled(tokens: Sequence[int]) -> list[str]:
    """The graph breaks around what travels, and the rest is as without ``torch.compile``."""
    ep = make()
    torch.manual_seed(3)
    layer = MoE(E, K, H, I, "swiglu", True, 0.3, expert_parallel=ep)
    x = torch.randn(tokens[ep.rank], H)
    results = []
    for function in (layer, torch.compile(layer, backend="eager")):
        mine = leaf(x)
        out, aux = function(mine)
        (out.square().sum() + aux).backward()
        results.append([out, mine.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    ep.close()
    return [f"result {i}" for i, (a, b) in enumerate(zip(*results, strict=True)) if not torch.equal(a, b)]


def of_rank_0(t: Tensor) -> Tensor:
    t = t.detach().clone()
    dist.broadcast(t, 0)
    return t
