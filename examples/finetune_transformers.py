"""Train a small Qwen3-MoE of Hugging Face Transformers with ``Trainer``, its experts on supersonic-moe.

    pip install supersonic-moe "transformers>=5.17" accelerate
    python examples/finetune_transformers.py                        # in BF16, then in FP8, from the same weights
    python examples/finetune_transformers.py --experts eager grouped_mm supersonic

The only line that concerns this package is ``experts_implementation=``; the import makes its names known. The model is
random and reads bytes, and the text is the standard library of Python, so nothing is downloaded. A checkpoint of yours
takes the same line: ``AutoModelForCausalLM.from_pretrained(name, experts_implementation="supersonic")``.
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

from supersonic_moe.integrations.transformers import served

CONTEXT = 256  # bytes a sequence
SIZES = {
    "cuda": {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 4},
    "cpu": {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4, "num_hidden_layers": 2},
}


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Windows of the sources of Python's standard library: token = byte."""

    def __init__(self, megabytes: float = 4.0) -> None:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(path.read_bytes() for path in sources)[: int(megabytes * 2**20)]
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.tokens) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * CONTEXT : (index + 1) * CONTEXT].long()
        return {"input_ids": window, "labels": window}


def build(experts: str, device: str) -> PreTrainedModel:
    """A random Qwen3-MoE in BF16; the same weights for every implementation."""
    set_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=SIZES[device]["hidden_size"] // 8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        **SIZES[device],
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation=experts)


def train(experts: str, device: str, steps: int, batch: int) -> None:
    model = build(experts, device).to(device)
    print(f"\n{experts}\n{served(model)[0]}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 5),
            use_cpu=device == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=Bytes())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    speed = steps * batch * CONTEXT / seconds
    first, last = float(losses[0]), float(losses[-1])
    print(f"loss {first:.3f} -> {last:.3f} nats a byte, {speed:,.0f} tokens/s with the first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", nargs="+", default=["supersonic", "supersonic_fp8"], metavar="IMPLEMENTATION")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, help="sequences a step; default: 32 on a GPU, 4 on a CPU")
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if given.batch is not None and given.batch < 1:
        parser.error(f"--batch must be at least 1, got {given.batch}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for experts in given.experts:
        train(experts, device, given.steps, given.batch or (32 if device == "cuda" else 4))


if __name__ == "__main__":
    main()
