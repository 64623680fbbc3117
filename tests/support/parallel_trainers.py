"""Expert parallelism behind the interfaces of trainers, by the names and signatures that they publish.

    torchtitan 0.3.0        RoutedExperts.forward, and a token dispatcher with wire_meshes, dispatch and combine
    Megatron, core 0.16.1   a token dispatcher of six steps around its grouped experts; experts as modules
                            (SonicMoEMlpNode)

Each is compared with one process that has the tokens of all ranks, in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import E, H, Inputs, K, Results, here, inputs, leaf, make, one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from supersonic_moe import SonicMoEMlpNode
from supersonic_moe.parallel import ExpertParallel


def experts_loop(x_RH: Tensor, counts: Any, w1: Tensor, w2: Tensor) -> Tensor:
    """SwiGLU experts, interleaved, one by one, on rows sorted by expert: what a trainer has itself."""
    rows = [int(n) for n in counts]
    outs = [(F.silu((x @ w1[e].T)[:, 0::2]) * (x @ w1[e].T)[:, 1::2]) @ w2[e].T for e, x in enumerate(x_RH.split(rows))]
    return torch.cat(outs)


# ---- torchtitan ------------------------------------------------------------------------------------------------------


class RoutedExperts(nn.Module):
    """In place of torchtitan's: dispatch, experts and combine in one."""

    def __init__(self, ep: ExpertParallel, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.ep, self.w1, self.w2 = ep, w1, w2

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        tokens, ids, scores = (t.flatten(0, 1) for t in (x_BLD, topk_expert_ids_BLK, topk_scores_BLK))
        return self.ep.experts(tokens, ids, scores, self.w1, self.w2).view_as(x_BLD)


class TitanDispatcher:
    """In place of torchtitan's, for those who keep their experts."""

    def wire_meshes(self, *, ep_mesh: DeviceMesh | None) -> None:
        assert ep_mesh is not None, "one rank needs no dispatcher"
        self.ep = ExpertParallel(ep_mesh, num_experts=E, top_k=K, hidden=H, max_tokens=512, timeout_s=60)

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        got = self.ep.dispatch(x_TD, topk_expert_ids_TK, topk_scores_TK)
        return got.x[got.plan.gather_index], torch.tensor(got.rows_per_expert), got

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        plan, scores_S = metadata.plan, metadata.scores.reshape(-1)
        weighted = routed_output_RD * scores_S[plan.scatter_index][:, None]
        part = torch.zeros_like(metadata.x).index_add(0, plan.gather_index, weighted)
        return self.ep.combine(part, metadata.handle)


# ---- Megatron --------------------------------------------------------------------------------------------------------


class MegatronDispatcher:
    """The six steps of ``MoETokenDispatcher``; probabilities come dense, (T, E), beside a boolean map."""

    def __init__(self, ep: ExpertParallel) -> None:
        self.ep = ep

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.shape = tokens.shape
        chosen, ids = routing_map.to(torch.uint8).topk(K, dim=1)
        self.ids = torch.where(chosen.bool(), ids, -1)
        return tokens.reshape(-1, self.shape[-1]), probs.gather(1, ids)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.got = self.ep.dispatch(hidden_states, self.ids, probs)
        return self.got.x, self.got.scores

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan = self.got.plan
        permuted = hidden_states[plan.gather_index]
        return permuted, torch.tensor(self.got.rows_per_expert), probs.reshape(-1)[plan.scatter_index]

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(self.got.x).index_add(0, self.got.plan.gather_index, hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return self.ep.combine(hidden_states, self.got.handle)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self.shape)


# ---- each of them ----------------------------------------------------------------------------------------------------


def titan_experts(ep: ExpertParallel, x: Tensor, mine: Inputs, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    counts = torch.bincount(mine.ids.flatten(), minlength=E)
    return RoutedExperts(ep, w1, w2)(x[None], scores[None], mine.ids[None], counts)[0]


def titan_dispatcher(ep: ExpertParallel, x: Tensor, mine: Inputs, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    dispatcher = TitanDispatcher()
    dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    counts = torch.bincount(mine.ids.flatten(), minlength=E)
    routed, rows, metadata = dispatcher.dispatch(x, scores, mine.ids, counts)
    return dispatcher.combine(experts_loop(routed, rows, w1, w2), metadata, x)


def megatron_dispatcher(ep: ExpertParallel, x: Tensor, mine: Inputs, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    nothing = x.new_zeros(x.shape[0], E)
    probs, routing_map = nothing.scatter(1, mine.ids, scores), nothing.bool().scatter(1, mine.ids, True)
    d, tokens = MegatronDispatcher(ep), x[:, None]  # (S, B, H)
    rows, counts, row_probs = d.dispatch_postprocess(
        *d.token_dispatch(*d.dispatch_preprocess(tokens, routing_map, probs))
    )
    y = experts_loop(rows, counts, w1, w2) * row_probs[:, None]
    return d.combine_postprocess(d.token_combine(d.combine_preprocess(y)))[:, 0]


def megatron_layer(ep: ExpertParallel, x: Tensor, mine: Inputs, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """In place of experts and dispatcher, on tokens (S, B, H): each projection is a module of its own, whose hooks and
    ``main_grad`` Megatron's DistributedDataParallel knows; weight gradients go there, here those of w1 and w2.
    """
    projections = nn.ModuleDict({"fc1": Weight(w1), "fc2": Weight(w2)})
    for weight, projection in ((w1, projections["fc1"]), (w2, projections["fc2"])):
        weight.grad = projection.weight.main_grad = torch.zeros_like(weight)
    tokens = x.reshape(-1, 1, H)
    out = ep.experts(
        tokens.view(-1, H), mine.ids, scores, projections["fc1"].weight, projections["fc2"].weight,
        accumulate_into_main_grad=True,
    ).view_as(tokens)  # fmt: skip
    out.view(-1, H).backward(mine.dout)
    assert all(projection.weight.grad is None for projection in projections.values())
    return out.detach().view(-1, H)


class Weight(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Any = nn.Parameter(weight.detach().clone())


def mlp_node(ep: ExpertParallel, x: Tensor, mine: Inputs, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Experts as parameters of their own; ``step`` adds to their ``main_grad``, here the gradients of w1 and w2."""
    w1.grad, w2.grad = torch.zeros_like(w1), torch.zeros_like(w2)
    pairs = [(nn.Parameter(a), nn.Parameter(b)) for a, b in zip(w1.detach(), w2.detach(), strict=True)]
    for pair, grads in zip(pairs, zip(w1.grad, w2.grad, strict=True), strict=True):
        for parameter, grad in zip(pair, grads, strict=True):
            parameter.main_grad = grad  # type: ignore[attr-defined]
    node = SonicMoEMlpNode(pairs, len(pairs), H, w2.shape[2], layout="interleaved")
    got = ep.dispatch(x, mine.ids, scores)
    out = ep.combine(node(got.x, got.rows_per_expert, got.ids, got.scores), got.handle)
    out.backward(mine.dout, retain_graph=False)
    node.step()
    return out.detach()


FORMS = {f.__name__: f for f in (titan_experts, titan_dispatcher, megatron_dispatcher, megatron_layer, mlp_node)}


def against_one_process(form: str, tokens: tuple[int, ...]) -> dict[str, float]:
    given = inputs(tokens, torch.float64)
    mine, ep = here(given, tokens), make()
    x, scores, w1, w2 = map(leaf, (mine.x, mine.scores, mine.w1, mine.w2))
    out = FORMS[form](ep, x, mine, scores, w1, w2)
    if out.requires_grad:
        out.backward(mine.dout)
    want, rank = one_process(given, dist.get_world_size()), dist.get_rank()
    rows, own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1])), slice(rank * len(w1), (rank + 1) * len(w1))
    got = Results(out.detach(), x.grad, scores.grad, w1.grad, w2.grad, None, None)
    ep.close()
    return {
        name: float((a - b[own if name in ("dw1", "dw2") else rows]).abs().max()) if a.numel() else 0.0
        for name, a, b in zip(Results._fields, got, want, strict=True)
        if a is not None and b is not None
    }
