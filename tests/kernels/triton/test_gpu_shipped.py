"""A layer whose Triton kernels the package carries compiled has the bits of one whose kernels Triton compiles here."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from shipped_layers import compile_into, noted_of
from torch import Tensor

import supersonic_moe as sm
from supersonic_moe.inference import decode
from supersonic_moe.jit.tape import without_tapes
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.kernels.triton import launch as launch_module
from supersonic_moe.kernels.triton import shipped

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

T, H, I, E, K = 700, 256, 128, 4, 2  # noqa: E741


def steps() -> list[Tensor]:
    """Training in BF16 and FP8 with many and few tokens, and decode: what each gives, one after the other."""
    torch.manual_seed(0)
    router, w1, w2 = (
        (torch.randn(shape, device="cuda") / 16).bfloat16().requires_grad_()
        for shape in ((E, H), (E, 2 * I, H), (E, H, I))
    )
    found: list[Tensor] = []
    for recipe in (None, sm.Fp8Recipe()):
        for tokens in (T, 40):
            x = torch.randn(tokens, H, device="cuda").bfloat16().requires_grad_()
            out, logits, *_ = sm.moe_layer(x, router, w1, w2, K, recipe=recipe)
            found += [out, logits, *torch.autograd.grad(out.float().square().sum(), (x, router, w1, w2))]
    with torch.no_grad():
        scores, ids = logits.float().softmax(1).topk(K)
        operands = decode.Operands(x.detach(), ids, scores, w1, None, w2, None)
        found.append(decode.run(operands, Gate(sm.Activation("swiglu"), sm.GateUpLayout.INTERLEAVED)))
    return found


@pytest.mark.parametrize("tapes", [False, True])
def test_bits_are_those_of_what_triton_compiles_here(tapes: bool, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the fixture of that name would switch tapes off
        patch.setattr(launch_module, "_LAUNCHERS", {})
        with without_tapes():
            want = steps()
        assert compile_into(tmp_path, map(noted_of, launch_module._LAUNCHERS)) > 10

        patch.setattr(launch_module, "_LAUNCHERS", {})
        patch.setattr(shipped, "FOLDER", tmp_path)
        shipped.index.cache_clear()
        for _ in range(4 if tapes else 1):  # run, recorded, played
            with nullcontext() if tapes else without_tapes():
                got = steps()
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        launchers = launch_module._LAUNCHERS.values()
        assert launchers and all(isinstance(launcher, shipped.Carried) for launcher in launchers)
    shipped.index.cache_clear()
