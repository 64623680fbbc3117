"""Experts of FP8 checkpoints, made directly as the library's quantizer makes them, which refuses to load without a GPU;
and whole checkpoints on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers_models import model_of

BLOCK = 128

H, I, E, T, K = 256, 128, 4, 9, 3  # noqa: E741
SERVED_CLASS = use_experts_implementation(experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
UNGATED_CLASS = use_experts_implementation(
    experts_class=type("UngatedFP8Experts", (FP8Experts,), {}),
    experts_interface=ALL_FP8_EXPERTS_FUNCTIONS,
    has_gate=False,
)


def experts(
    scale_fmt: str = "float",
    block_size: Any = (128, 128),
    scheme: str = "dynamic",
    has_gate: bool = True,
    **changes: Any,
) -> nn.Module:
    sizes = {"num_experts": E, "moe_intermediate_size": I, "hidden_size": H, "hidden_act": "silu"}
    config = SimpleNamespace(**{**sizes, "_experts_implementation": "supersonic", **changes})
    cls = SERVED_CLASS if has_gate else UNGATED_CLASS
    module = cls(config, block_size, scheme, scale_fmt=scale_fmt, has_gate=has_gate)
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("_scale_inv"):
            parameter.copy_((2.0 ** torch.randint(-9, -6, parameter.shape)).to(parameter.dtype))
            if parameter.dtype is torch.float32:
                parameter.mul_(1 + torch.rand(parameter.shape))
        elif parameter.element_size() == 1:
            parameter.copy_((16 * torch.randn(parameter.shape)).to(parameter.dtype))
    return module


def inputs(
    dtype: torch.dtype = torch.bfloat16, positive: bool = False, *, tokens: int = T, hidden: int = H
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(tokens, hidden)
    ids = torch.randint(E, (tokens, K))
    ids[0] = 1  # thrice the same
    return (x.abs() if positive else x).to(dtype), ids, torch.rand(tokens, K)


def exact(module: Any, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """In fp64 from weights times the scales of their blocks of 128 x 128, with the module's own gate."""

    def dequantized(w: Tensor, scale: Tensor) -> Tensor:
        by_row = scale.detach().double().repeat_interleave(BLOCK, 1)
        return w.detach().double() * by_row.repeat_interleave(BLOCK, 2)

    w1 = dequantized(module.gate_up_proj, module.gate_up_proj_scale_inv)
    w2 = dequantized(module.down_proj, module.down_proj_scale_inv)
    out = torch.zeros_like(x, dtype=torch.float64)
    for e in range(len(w1)):
        share = torch.where(ids == e, scores.double(), 0).sum(1, keepdim=True)
        out += share * (module._apply_gate(x.double() @ w1[e].T) @ w2[e].T)
    return out


def checkpoint(folder: Path, scale_fmt: str = "float") -> nn.Module:
    """Write a Qwen3-MoE whose experts are e4m3 with a scale for each block of 128 x 128, as published ones are, and
    return the model with these weights in BF16.
    """
    model: Any = model_of("qwen3_moe", torch.bfloat16, hidden_size=256, moe_intermediate_size=128)
    with torch.no_grad():
        for layer in model.model.layers:  # a part of the residual, so that the next layer does not enlarge roundings
            for p in layer.mlp.experts.parameters():
                p.mul_(0.4)
    model.save_pretrained(folder)
    written: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for name, w in load_file(folder / "model.safetensors").items():
        read[name] = written[name] = w
        if ".experts." in name:
            w_blocks = w.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = w_blocks.abs().amax((1, 3)) / 448
            if scale_fmt == "ue8m0":
                scale = torch.exp2(scale.log2().ceil())
            codes = (w_blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            written[name] = codes.flatten(2).flatten(0, 1)
            read[name] = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1).bfloat16()
            kept = torch.float8_e8m0fnu if scale_fmt == "ue8m0" else torch.float32
            written[name.removesuffix(".weight") + ".weight_scale_inv"] = scale.to(kept)
    save_file(read, folder / "model.safetensors", metadata={"format": "pt"})
    model = type(model).from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="supersonic")
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "scale_fmt": scale_fmt,
        "modules_to_not_convert": [".*self_attn", "lm_head"],  # the library downloads a kernel for these
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model
