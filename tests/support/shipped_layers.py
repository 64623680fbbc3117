"""Which Triton kernels a wheel carries compiled, and the program that puts them there: ``make wheel``.

    python -m shipped_layers        with src and tests/support on the path

What a layer launches depends on its sizes, not on the batch. So each layer below runs on a CPU that poses as a GPU
(``pretended_gpu.py``), where each launch is noted and none happens, and Triton compiles what was noted for sm_90.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pretended_gpu import Machine, pretend_hopper
from recorded_launches import forget_kernels

import supersonic_moe as sm
from supersonic_moe.inference import decode
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.kernels.triton import shipped
from supersonic_moe.training import layer as layer_in_one


class Layer(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    router: sm.SoftmaxAfterTopK | sm.SoftmaxBeforeTopK | sm.SigmoidGroupedTopK = sm.SoftmaxAfterTopK()
    activation: sm.Activation = sm.Activation("swiglu")
    biases: bool = False


_GPT_OSS = sm.Activation.gpt_oss()
LAYERS = {
    "T8192 H3072 I1536 E8 K8": Layer(3072, 1536, 8, 8),
    "T8192 H4096 I4096 E8 K8": Layer(4096, 4096, 8, 8),
    "T32768 H4096 I1024 E128 K8": Layer(4096, 1024, 128, 8),
    "Mixtral 8x7B": Layer(4096, 14336, 8, 2),
    "Mixtral 8x22B": Layer(6144, 16384, 8, 2),
    "OLMoE": Layer(2048, 1024, 64, 8, sm.SoftmaxBeforeTopK()),
    "Qwen3-30B-A3B": Layer(2048, 768, 128, 8),
    "Qwen3-235B-A22B": Layer(4096, 1536, 128, 8),
    "Qwen3-Next-80B-A3B": Layer(2048, 512, 512, 10),
    "gpt-oss-20b": Layer(2880, 2880, 32, 4, activation=_GPT_OSS, biases=True),
    "gpt-oss-120b": Layer(2880, 2880, 128, 4, activation=_GPT_OSS, biases=True),
    "DeepSeek-V2-Lite": Layer(2048, 1408, 64, 6, sm.SoftmaxBeforeTopK()),
    "Moonlight-16B-A3B": Layer(2048, 1408, 64, 6, sm.SigmoidGroupedTopK(scaling_factor=2.446)),
    "DeepSeek-V3": Layer(7168, 2048, 256, 8, sm.SigmoidGroupedTopK(num_groups=8, topk_groups=4, scaling_factor=2.5)),
    "DeepSeek-V3, one rank of eight": Layer(7168, 2048, 32, 8),
    "Kimi-K2": Layer(7168, 2048, 384, 8, sm.SigmoidGroupedTopK(scaling_factor=2.827)),
    "GLM-4.5-Air": Layer(4096, 1408, 128, 8, sm.SigmoidGroupedTopK()),
    "GLM-4.5": Layer(5120, 1536, 160, 8, sm.SigmoidGroupedTopK(scaling_factor=2.5)),
    "MiniMax-M2": Layer(3072, 1536, 256, 8, sm.SigmoidGroupedTopK()),
}
FEW, MANY = 40, 2000  # tokens: the plan of few slots is one kernel, that of many is three
BY_EXPERTS = {"router", "aux_loss", "plan", "pick", "pad_segments"}
"""Files whose kernels depend on the number of experts and not on sizes of weights."""


class Noted(NamedTuple):
    """A launch, as Triton would compile it."""

    file: str
    kernel: str
    args: tuple[Any, ...]
    """A dtype for a tensor, which starts at a multiple of 16 bytes."""
    constants: tuple[Any, ...]
    num_warps: int


class Noting(Machine):
    """A driver that notes launches of Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[Noted, None] = {}

    def get(self, key: Any) -> Any:
        self.noted[noted_of(key)] = None
        return super().get(key)


def noted_of(key: Any) -> Noted:
    """``key``: of ``kernels/triton/launch.py``."""
    fn, _, num_warps, constants, *signs = key
    args = tuple([_argument(sign) for sign in signs])
    return Noted(fn.__module__.rpartition(".")[2], fn.__name__, args, constants, num_warps)


def _argument(sign: Any) -> Any:
    """One that has this sign."""
    if sign is None or sign is float:
        return None if sign is None else 0.5
    if isinstance(sign[0], torch.dtype):
        assert sign[1], "memory that starts anywhere"
        return sign[0]
    one, sixteen, high = sign
    assert high == 0, sign
    return 1 if one else 16 if sixteen else 17


def launches_of(layer: Layer) -> Iterator[Noted]:
    """Of training and inference with it, in BF16 and FP8, of ``MoE`` and of ``topk_experts``."""
    for part, experts in (_sized(layer), False), (layer._replace(hidden=128, intermediate=128), True):
        machine = Noting()
        with pytest.MonkeyPatch.context() as patch:
            pretend_hopper(patch, machine)
            patch.setattr(layer_in_one, "suits", lambda x, backend: True)
            forget_kernels()
            for recipe in (None, sm.Fp8Recipe()):
                _use(part, recipe, machine)
            if not experts:
                _decode(part)
        forget_kernels()
        yield from (noted for noted in machine.noted if (noted.file in BY_EXPERTS) == experts)


def _sized(layer: Layer) -> Layer:
    """With as few experts as there can be, because nothing but the memory of weights depends on them here."""
    return layer._replace(experts=layer.top_k, router=sm.SoftmaxAfterTopK())


def _use(layer: Layer, recipe: sm.Fp8Recipe | None, machine: Machine) -> None:
    sizes = layer.experts, layer.top_k, layer.hidden, layer.intermediate
    moe = sm.MoE(
        *sizes, layer.activation, layer.biases, 0.02, router=layer.router, recipe=recipe, device="meta",
        dtype=torch.bfloat16,
    ).to_empty(device="cpu")  # fmt: skip
    for tokens in (FEW, MANY):
        x = torch.empty(tokens, layer.hidden, dtype=torch.bfloat16, requires_grad=True)
        out, aux_loss = moe(x)
        (out.float().sum() + aux_loss).backward()
        if recipe is None:  # in FP8 it is the operator's, with kernels of sm_90 alone
            moe(x, is_inference_mode=True)
        ids = torch.zeros(tokens, layer.top_k, dtype=torch.int32)
        weights = moe.c_fc.weight, moe.c_proj.weight
        for dtype in (torch.float32, torch.bfloat16):
            scores = torch.empty(ids.shape, dtype=dtype, requires_grad=True)
            sm.topk_experts(x, ids, scores, *weights, recipe=recipe).sum().backward()
        machine.alive.clear()


def _decode(layer: Layer) -> None:
    """As Transformers stores the weights: gate and up in halves; in gpt-oss interleaved, with biases, and turned."""
    hidden, width = layer.hidden, 2 * layer.intermediate

    def memory(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    if layer.biases:
        w1, w2 = memory(layer.experts, hidden, width).mT, memory(layer.experts, layer.intermediate, hidden).mT
        biases: Any = memory(layer.experts, width), memory(layer.experts, hidden)
        order = sm.GateUpLayout.INTERLEAVED
    else:
        w1, w2 = memory(layer.experts, width, hidden), memory(layer.experts, hidden, layer.intermediate)
        biases, order = (None, None), sm.GateUpLayout.GATE_UP
    ids = torch.zeros(1, layer.top_k, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.empty(ids.shape, dtype=dtype)
        operands = decode.Operands(memory(1, hidden), ids, scores, w1, biases[0], w2, biases[1])
        with torch.no_grad():
            decode.run(operands, Gate(layer.activation, order))


_PTX = {"pointer": "u64", "i32": "u32", "i64": "u64", "fp32": "f32"}


class Made(NamedTuple):
    variant: str
    entry: shipped.Entry
    image: bytes


def made(noted: Noted) -> Made:
    """Compiled by Triton for sm_90, with no GPU."""
    import triton
    from offline_hopper import OfflineHopper
    from triton.runtime.jit import MockTensor

    triton.runtime.driver.set_active(OfflineHopper())
    triton.knobs.compilation.disable_line_info = True
    kernel = getattr(importlib.import_module(f"supersonic_moe.kernels.triton.{noted.file}"), noted.kernel)
    args = [MockTensor(arg, (1,)) if isinstance(arg, torch.dtype) else arg for arg in noted.args]
    compiled = kernel.warmup(*args, *noted.constants, grid=(1,), num_warps=noted.num_warps)
    meta, types = compiled.metadata, list(compiled.src.signature.values())
    assert (meta.num_ctas, meta.launch_pdl, meta.launch_cooperative_grid) == (1, False, False)
    assert meta.global_scratch_size == meta.profile_scratch_size == 0
    kinds = [(i, "pointer" if kind.startswith("*") else kind) for i, kind in enumerate(types) if kind != "constexpr"]
    declared = re.findall(r"\.param \.(\w+)", re.findall(r"\.entry \w+\(([^)]*)\)", compiled.asm["ptx"])[0])
    assert declared[: len(kinds)] == [_PTX[kind] for _, kind in kinds], (kinds, declared)
    assert set(declared[len(kinds) :]) <= {"u64"}
    image = compiled.asm["cubin"]
    entry = shipped.Entry(
        f"{hashlib.sha256(image).hexdigest()[:24]}.cubin", meta.name, 32 * meta.num_warps, meta.shared, kinds,
        scratch=len(declared) - len(kinds),
    )  # fmt: skip
    shape = [torch.empty(0, dtype=arg) if isinstance(arg, torch.dtype) else arg for arg in noted.args]
    return Made(shipped.variant(kernel, shape, noted.constants, noted.num_warps), entry, image)


def compile_into(folder: Path, noted: Iterable[Noted]) -> int:
    """All of ``noted`` and nothing else; returns the number of variants."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        all_made = list(pool.map(made, dict.fromkeys(noted), chunksize=4))
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for _, entry, image in all_made:
        (folder / entry.file).write_bytes(image)
    index = {"digest": shipped.digest(), "variants": {variant: entry for variant, entry, _ in all_made}}
    (folder / shipped.INDEX).write_text(json.dumps(index, sort_keys=True) + "\n")
    return len(index["variants"])


def main() -> int:
    folder = Path(str(shipped.FOLDER))
    count = compile_into(folder, (noted for layer in LAYERS.values() for noted in launches_of(layer)))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{count} Triton kernels of {len(LAYERS)} layers, {size / 1e6:.1f} MB, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
