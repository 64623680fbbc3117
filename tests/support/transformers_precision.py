"""How far models of Transformers in 16 bits are from themselves in fp32, with our experts and with the library's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from held_choices import HeldChoices
from oracle import rel_fro
from torch import Tensor, nn
from transformers_models import model_of, with_gradients

BOTH = ("supersonic", "eager")
NO_STEPS: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"swiglu_limit": 16.0},  # no clamp is reached
    "phimoe": {"router_jitter_noise": 2.0},  # no logit is so small that it is left out
}
"""Without what jumps where a value passes a bound, and rounding makes it pass. Clamps are compared in fp32 and fp64."""


def far_apart(ours: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> dict[str, float]:
    """Tensors further apart than ``bound`` of their own norm and of a hundredth of the largest gradient: where a true
    gradient is 0, all that is there is rounding.
    """
    assert ours.keys() == wanted.keys()
    largest = max(t.norm() for name, t in wanted.items() if name not in ("logits", "loss"))
    errors = {name: float((ours[name] - wanted[name]).norm()) for name in wanted}
    return {
        name: error
        for name, error in errors.items()
        if not error <= bound * max(float(wanted[name].norm()), 0.01 * float(largest))
    }


Errors = dict[str, dict[str, float]]
"""By experts implementation and name."""


def model_without_steps(family: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(the model, a copy in fp32 with the library's own experts)"""
    model = model_of(family, dtype, **NO_STEPS.get(family, {}))
    exact = copy.deepcopy(model).float()
    exact.set_experts_implementation("eager")  # type: ignore[operator]
    return model, exact


def errors_of_training(family: str, dtype: torch.dtype, ids: Tensor, device: torch.device) -> Errors:
    """Of the logits and of every gradient, relative to itself in fp32 on the CPU, or to a hundredth of the largest
    gradient: where a true gradient is 0, all that is there is rounding. Every token has the experts that fp32 chooses.
    """
    model, exact = model_without_steps(family, dtype)
    held = HeldChoices()
    with held:
        wanted = with_gradients(exact, "eager", ids)
    del wanted["loss"]
    largest = max(float(t.norm()) for name, t in wanted.items() if name != "logits")
    model, ids = model.to(device), ids.to(device)
    errors: Errors = {}
    for implementation in BOTH:
        with held.again():
            found = with_gradients(model, implementation, ids)
        assert found.keys() == {"loss", *wanted}
        assert all(t.isfinite().all() for t in found.values())
        errors[implementation] = {
            name: float((found[name].cpu().float() - want).norm()) / max(float(want.norm()), 0.01 * largest)
            for name, want in wanted.items()
        }
    return errors


def assert_no_further(errors: Errors, dtype: torch.dtype) -> None:
    """Than the library's own experts: logits and the mean over gradients closely, each gradient roughly, for one of a
    few numbers has a few roundings.
    """
    ours, eager = (errors[implementation] for implementation in BOTH)
    assert ours["logits"] < 1.15 * eager["logits"], (ours["logits"], eager["logits"])
    means = [torch.tensor([e for name, e in found.items() if name != "logits"]).norm() for found in (ours, eager)]
    assert means[0] < 1.25 * means[1], means
    bounds = {name: 2 * error + torch.finfo(dtype).eps for name, error in eager.items()}
    assert {name: (ours[name], eager[name]) for name in ours if not ours[name] < bounds[name]} == {}


def errors_of_generation(family: str, dtype: torch.dtype, ids: Tensor, device: torch.device, count: int) -> Errors:
    """Of the logits of each token that ``generate`` is asked for, one at a time with a cache. Every implementation says
    what fp32 on the CPU says, and every token has the experts that it has there.
    """
    model, exact = model_without_steps(family, dtype)
    held = HeldChoices()
    with held:
        said, wanted = generated(exact, ids, count)
    model, ids = model.to(device), ids.to(device)
    errors: Errors = {}
    for implementation in BOTH:
        model.set_experts_implementation(implementation)  # type: ignore[operator]
        with held.again():
            sequences, logits = generated(model, ids, count, say=said)
        assert torch.equal(sequences.cpu(), said)
        errors[implementation] = {"logits": rel_fro(logits.float(), wanted)}
    return errors


def generated(model: Any, ids: Tensor, count: int, say: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tokens, logits of each of ``count`` steps), greedy, or with the tokens of ``say``."""
    only = None if say is None else lambda row, sent: [int(say[row, len(sent)])]
    out = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, prefix_allowed_tokens_fn=only,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)
