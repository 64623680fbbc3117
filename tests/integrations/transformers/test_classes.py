"""Every experts class that Transformers lets a backend compute, against its own forward, in fp64: outputs and the
gradients of hidden states, router weights and all parameters.

The list of classes is the library's. A release that adds one fails :func:`test_every_class_is_placed` until someone has
looked at its gate.
"""

from __future__ import annotations

import pytest
import torch
from oracle import rel_fro
from transformers_experts import decorated_classes, inputs, outputs_and_gradients, random_experts

import supersonic_moe.integrations.transformers  # registers the backend  # noqa: F401
from supersonic_moe.integrations.transformers.gates import gate_of

CLASSES = decorated_classes()

SWIGLU = """
    AfmoeExperts AXK1Experts AXK2Experts Cohere2MoeExperts DeepseekOcr2TextExperts DeepseekV2Experts DeepseekV3Experts
    DeepseekV32Experts Dots1Experts Ernie4_5_MoeExperts Ernie4_5_VLMoeMoeExperts ExaoneMoeExperts FlexOlmoExperts
    Glm4MoeExperts Glm4MoeLiteExperts Glm4vMoeTextExperts GlmMoeDsaExperts GraniteMoeExperts GraniteMoeSWAExperts
    GraniteMoeHybridExperts GraniteMoeSharedExperts HunYuanMoEV1Experts HYV3Experts InklingExperts JambaExperts
    KimiLinearExperts LagunaExperts Lfm2MoeExperts MellumExperts MiMoV2FlashExperts MiniMaxExperts MiniMaxM2Experts
    Mistral4Experts MixtralExperts OlmoeExperts PhimoeExperts Qwen2MoeExperts Qwen3_5MoeExperts Qwen3MoeExperts
    Qwen3NextExperts Qwen3OmniMoeThinkerTextExperts Qwen3OmniMoeTalkerTextExperts Qwen3VLMoeTextExperts
    Qwen4ExpTextExperts SolarOpenExperts ZayaExperts
"""
PLACED = {
    **dict.fromkeys(SWIGLU.split(), ("swiglu", None, 0.0)),
    **dict.fromkeys(("Gemma4TextExperts", "DiffusionGemmaTextExperts"), ("geglu_tanh", None, 0.0)),
    "NemotronHExperts": ("relu_sq", None, 0.0),
    **dict.fromkeys(("DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts"), ("swiglu", 0.9, 0.0)),
    **dict.fromkeys(("GptOssExperts", "OpenAIPrivacyFilterExperts", "MiniMaxM3VLExperts"), ("swiglu", 0.9, 1.0)),
}
"""(activation, limit, offset of up) of each class."""


def test_every_class_is_placed() -> None:
    assert set(CLASSES) == set(PLACED)


@pytest.mark.parametrize("name", CLASSES)
def test_class_computes_what_its_own_forward_does(name: str) -> None:
    module = random_experts(CLASSES[name])
    gate = gate_of(module)
    assert gate is not None
    assert (gate.activation.type.value, gate.activation.limit, gate.activation.up_offset) == PLACED[name]
    assert gate.activation.alpha == (1.3 if gate.activation.up_offset else 1.0)
    given = inputs(module)
    ours = outputs_and_gradients(module, "supersonic", *given)
    eager = outputs_and_gradients(module, "eager", *given)
    bound = 1e-6 if name == "OpenAIPrivacyFilterExperts" else 1e-13  # whose own forward adds in fp32
    errors = {leaf: rel_fro(ours[leaf], eager[leaf]) for leaf in eager}
    assert all(ours[leaf].dtype is torch.float64 for leaf in eager)
    assert {leaf: error for leaf, error in errors.items() if error > bound} == {}


def test_nemotron_in_a_latent_width() -> None:
    """Experts that do not have the width of the model."""
    module = random_experts(CLASSES["NemotronHExperts"], moe_latent_size=8)
    given = inputs(module)
    assert given[0].shape[1] == 8
    ours, eager = (outputs_and_gradients(module, name, *given) for name in ("supersonic", "eager"))
    assert max(rel_fro(ours[leaf], eager[leaf]) for leaf in eager) < 1e-13
