"""A small causal transformer over bytes whose feed-forward layers are :class:`supersonic_moe.MoE`.

    x = the sum of an embedding of each of the last 4 bytes (a table for each distance)
    x = x + attention(norm(x))      in each block
    x = x + moe(norm(x))            K of E experts for each byte, chosen by a learned router
    logits = norm(x) @ embedding    the table of distance 0, tied

Only the first line is unusual. One byte says little, and a model that trains for minutes should not spend them on
learning to look at its neighbours: four tables of 256 rows do for bytes what a tokenizer does for words, and are worth
0.2 bits per byte after 400 000 bytes of training.

Names end in the axes of the tensor: B sequences, L positions, H hidden size, A attention heads, D head dimension,
V = 256 byte values, N = 4 nearest bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supersonic_moe import ActivationType, MoE

from .data import VOCAB

if TYPE_CHECKING:
    from supersonic_moe.parallel import ExpertParallel

NEAREST = 4


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; ``context`` is the longest sequence it reads. Defaults: the one for two CPU cores."""

    context: int = 256
    hidden: int = 192
    layers: int = 2
    heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    intermediate: int = 256

    @property
    def init_std(self) -> float:
        """0.02 at H = 1024, 0.05 at H = 192: a layer's output keeps the scale of its input."""
        return 0.67 / math.sqrt(self.hidden)

    @property
    def residual_std(self) -> float:
        """For the weights whose outputs add up in the residual stream, two a layer (GPT-2)."""
        return self.init_std / math.sqrt(2 * self.layers)

    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: all but the experts it is not sent to."""
        attention = 4 * self.hidden**2
        moe = self.hidden * self.experts + self.experts_per_token * 3 * self.hidden * self.intermediate
        return self.layers * (attention + moe) + VOCAB * self.hidden

    def train_flops_per_token(self) -> int:
        """6 for each active weight (2 forward, 4 backward), and 6 L H for each layer of causal attention.

        Attention: two products, each 2 FLOPs × H × the L/2 positions that a token sees on average; backward twice that.
        """
        return 6 * self.active_parameters() + 6 * self.layers * self.context * self.hidden


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary position embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        nn.init.normal_(self.qkv.weight, std=config.init_std)
        nn.init.normal_(self.out.weight, std=config.residual_std)

    def forward(self, x_BLH: Tensor, rotation_2LD: Tensor) -> Tensor:
        B, L, H = x_BLH.shape
        q_BALD, k_BALD, v_BALD = self.qkv(x_BLH).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BALD, k_BALD = rotate(q_BALD, rotation_2LD), rotate(k_BALD, rotation_2LD)
        y_BALD = F.scaled_dot_product_attention(q_BALD, k_BALD, v_BALD, is_causal=True)
        out_BLH: Tensor = self.out(y_BALD.transpose(1, 2).reshape(B, L, H))
        return out_BLH


class Block(nn.Module):
    """Attention, then the mixture of experts, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, expert_parallel: ExpertParallel | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = MoE(
            config.experts,
            config.experts_per_token,
            config.hidden,
            config.intermediate,
            ActivationType.SWIGLU,
            add_bias=False,
            std=config.init_std,
            expert_parallel=expert_parallel,
        )
        nn.init.normal_(self.moe.c_proj.weight, std=config.residual_std)

    def forward(self, x_BLH: Tensor, rotation_2LD: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BLH = x_BLH + self.attention(self.attention_norm(x_BLH), rotation_2LD)
        y_BLH, aux_loss = self.moe(self.moe_norm(x_BLH), is_inference_mode=not self.training)
        return x_BLH + y_BLH, aux_loss


class ByteTransformer(nn.Module):
    """(B, L) bytes to (B, L, V) logits of the next byte; in training, also the sum of the load-balancing losses."""

    rotation_2LD: Tensor
    table_N: Tensor

    def __init__(self, config: ModelConfig, expert_parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(NEAREST * VOCAB, config.hidden)  # the table of distance 0 first
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.blocks = nn.ModuleList(Block(config, expert_parallel) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.register_buffer("table_N", VOCAB * torch.arange(NEAREST), persistent=False)
        rotation_2LD = rotary_table(config.context, config.hidden // config.heads)
        self.register_buffer("rotation_2LD", rotation_2LD, persistent=False)

    def forward(self, bytes_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        # Each byte and the N - 1 before it, nearest first; before the text stands byte 0, the end of some other file.
        nearest_BLN = F.pad(bytes_BL, (NEAREST - 1, 0)).unfold(1, NEAREST, 1).flip(2)
        x_BLH = self.embedding(nearest_BLN + self.table_N).sum(2)
        aux_losses = []
        for block in self.blocks:
            x_BLH, aux_loss = block(x_BLH, self.rotation_2LD[:, : bytes_BL.shape[1]])
            aux_losses.append(aux_loss)
        logits_BLV = self.norm(x_BLH) @ self.embedding.weight[:VOCAB].T
        return logits_BLV, torch.stack(aux_losses).sum() if self.training else None

    def expert_counts(self) -> Tensor:
        """(layers, E): how many tokens each expert received in the last forward."""
        return torch.stack([layer.expert_counts for layer in self.modules() if isinstance(layer, MoE)])

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, *, temperature: float = 0.6, seed: int = 0) -> Iterator[bytes]:
        """Continue ``prompt`` by one sampled byte at a time (it recomputes the window for each)."""
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(length):
            window_BL = torch.tensor([text[-self.config.context :]], device=self.embedding.weight.device)
            logits_V = self(window_BL)[0][0, -1].float().cpu()
            text.append(int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)))
            yield bytes(text[-1:])


def rotary_table(length: int, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosine and sine of position × frequency for each pair of dimensions (RoFormer, arXiv 2104.09864)."""
    frequency_D = base ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle_LD = torch.arange(length)[:, None] * frequency_D
    return torch.stack([angle_LD.cos(), angle_LD.sin()])


def rotate(x_BALD: Tensor, rotation_2LD: Tensor) -> Tensor:
    """Turn the pair (x[i], x[i + D/2]) by its position's angle: q · k then depends on how far apart the two are."""
    cos_LD, sin_LD = rotation_2LD.to(x_BALD.dtype)
    a, b = x_BALD.chunk(2, dim=-1)
    return torch.cat([a * cos_LD - b * sin_LD, a * sin_LD + b * cos_LD], dim=-1)
