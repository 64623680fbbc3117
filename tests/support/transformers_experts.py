"""The experts classes of Transformers, found by asking the library, and small random modules of them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

TOKENS, HIDDEN, WIDTH, EXPERTS, CHOICES = 13, 16, 24, 5, 3

_SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
    "hidden_size": HIDDEN,
    "moe_latent_size": None,
}
_CONSTANTS = {"alpha": 1.3, "swiglu_alpha": 1.3, "limit": 0.9, "swiglu_limit": 0.9}
"""Other than the models', so that clamps are reached and a constant that is not read shows."""


def decorated_classes() -> dict[str, type[nn.Module]]:
    """Every class that ``use_experts_implementation`` decorates, by its name."""
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            for name, cls in inspect.getmembers(module, inspect.isclass):
                if cls.__module__ == module.__name__ and hasattr(cls, "_apply_gate"):
                    found[name] = cls
    return found


def config_of(cls: type[nn.Module], **changes: Any) -> SimpleNamespace:
    """What the class reads of its model's default config, in small sizes."""
    module = inspect.getmodule(cls)
    configs = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, PreTrainedConfig)]
    experts = [c for c in configs if any(hasattr(c(), name) for name in list(_SIZES)[:3])]
    text = [c for c in experts if "Text" in c.__name__] or experts
    return SimpleNamespace(**{**text[0]().to_dict(), **_SIZES, "_experts_implementation": "eager", **changes})


def random_experts(cls: type[nn.Module], dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A module with weights so spread that clamps are reached."""
    torch.manual_seed(0)
    module = cls(config_of(cls, **changes)).to(dtype)
    for name, value in _CONSTANTS.items():
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, value)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def inputs(module: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, ids, router weights): a token of one expert thrice, as a hash router has it; an expert without
    tokens.
    """
    weight = module.gate_up_proj if module.has_gate else module.up_proj
    width = weight.shape[1] if module.is_transposed else weight.shape[2]
    torch.manual_seed(1)
    x = torch.randn(TOKENS, width, dtype=dtype)
    ids = torch.randint(weight.shape[0] - 1, (TOKENS, CHOICES))
    ids[3] = 2
    return x.requires_grad_(), ids, torch.rand(TOKENS, CHOICES, dtype=dtype).requires_grad_()


def outputs_and_gradients(module: nn.Module, implementation: str, *given: Tensor) -> dict[str, Tensor]:
    """Of the hidden states, the router weights and every parameter."""
    module.config._experts_implementation = implementation
    x, ids, scores = given
    out = module(x, ids, scores)
    leaves = {"x": x, "scores": scores, **dict(module.named_parameters())}
    torch.manual_seed(2)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
