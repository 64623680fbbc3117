"""Experts as trainers have them, rows that a dispatch delivered, and the loop over experts that a node must match."""

from __future__ import annotations

import oracle
import torch
from torch import nn

from supersonic_moe import SonicMoEMlpNode

H, I, E, K = 16, 8, 5, 3  # noqa: E741


class Expert(nn.Module):
    """An expert as trainers have it: two projections under names of theirs."""

    def __init__(self, names, n1, hidden, inner, *, transposed=False, bias=False):
        super().__init__()
        for name, (rows, columns) in zip(names, ((n1, hidden), (hidden, inner)), strict=True):
            sizes = (rows, columns) if transposed else (columns, rows)
            self.add_module(name, nn.Linear(*sizes, bias=bias))


def make_experts(form="linear_fc1 linear_fc2", fan=2, *, hidden=H, inner=I, dtype=torch.float64, main=True):
    """E experts, and all their weights: first projections, then second ones."""
    transposed = form.startswith("up_gate")
    experts = [Expert(("a", "b"), fan * inner, hidden, inner, transposed=transposed).to(dtype) for _ in range(E)]
    firsts, seconds = [e.a.weight for e in experts], [e.b.weight for e in experts]
    for p in firsts + seconds:
        nn.init.normal_(p, std=p.shape[0 if transposed else 1] ** -0.5)
        if main:
            p.main_grad = torch.randn(p.shape, dtype=torch.promote_types(dtype, torch.float32))
    if form == "pairs":
        return list(zip(firsts, seconds, strict=True)), firsts + seconds
    if form == "parameters":
        for e in experts:
            e.w1, e.w2 = e.a.weight, e.b.weight
    else:
        for e in experts:
            for old, new in zip("ab", form.split(), strict=True):
                e.add_module(new, getattr(e, old))
    return nn.ModuleList(experts), firsts + seconds


def received(rows=13, *, hidden=H, dtype=torch.float64, seed=0):
    """What a dispatch delivers: (x, counts, ids, probabilities). Expert 2 gets nothing; some choices are masked."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(rows)]) if rows else torch.zeros(0, K).long()
    ids[(torch.rand(ids.shape, generator=g) < 0.3) | (ids == 2)] = -1
    x = torch.randn(rows, hidden, generator=g, dtype=torch.float64).to(dtype)
    probs = torch.rand(ids.shape, generator=g, dtype=torch.promote_types(dtype, torch.float32))
    counts = torch.bincount(ids[ids >= 0], minlength=E).tolist()
    return x.requires_grad_(), counts, ids, probs.requires_grad_()


def looped(batch, weights, act, layout, transposed=False):
    """The same by a loop over tokens and experts, from the parameters themselves."""
    x, _, ids, probs = batch
    ws = [w.T if transposed else w for w in weights]
    triples = oracle.topk_triples(ids, probs, E)
    return oracle.experts(x, triples, torch.stack(ws[:E]), None, torch.stack(ws[E:]), None, act, layout)


def run(node, batch):
    out = node(*batch)
    out.backward(torch.ones_like(out))
    return out.detach()


def mains(weights):
    return [w.main_grad.clone() for w in weights]


def small(**kwargs):
    """A node in fp32 and its weights, with main_grad at zero."""
    experts, weights = make_experts(dtype=torch.float32)
    for w in weights:
        w.main_grad.zero_()
    return SonicMoEMlpNode(experts, E, H, I, **kwargs), weights


def batch32(rows=13, seed=0):
    return received(rows, dtype=torch.float32, seed=seed)


def swap_data(w):
    w.data = 2 * w.data


def move_away_and_back(w):
    """Where a freed address is given out again, the weight has changed and nothing but its storage is another."""
    address = w.data_ptr()
    held = 2 * w.data
    w.data = torch.empty(0)
    for _ in range(100):
        w.data = held.clone()
        if w.data_ptr() == address:
            break


def add_in_place(w):
    with torch.no_grad():
        w.mul_(2)
