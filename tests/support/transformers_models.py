"""Small random models of Transformers, one a family, with everything that their experts do switched on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import supersonic_moe.integrations.transformers  # noqa: F401  registers "supersonic"

VOCABULARY, EXPERTS = 96, 6

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT_ATTENTION = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3_moe": {},
    "qwen3_next": {
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v2": {**_LATENT_ATTENTION, **_ONE_GROUP, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT_ATTENTION, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v4": {  # the first layer routes by a hash of the token
        "num_key_value_heads": 1,
        "q_lora_rank": 8,
        "o_lora_rank": 8,
        "o_groups": 2,
        "qk_rope_head_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "num_hash_layers": 1,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
    },
    "glm4_moe": _ONE_GROUP,
    "gpt_oss": {},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 16,
        "chunk_size": 16,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {},
    "minimax_m2": {"rotary_dim": 8},
    "phimoe": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
    },
    "hunyuan_v1_moe": {"moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "exaone_moe": {
        **_ONE_GROUP,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """In evaluation mode, with experts so spread that clamps are reached and routers that tell experts apart."""
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="supersonic").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.3 if "gate.weight" in name or "router" in name else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # a hash router's experts of each token; a checkpoint has them, a config zeros
            buffer.random_(EXPERTS)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length))


def with_gradients(model: nn.Module, implementation: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    found = model(ids, labels=ids)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **gradients}
