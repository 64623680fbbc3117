"""The GEMM suite: grouped products alone, ours against the peers', on the same operands and in the same rounds.

Two products (``GemmCase``), each in the variants that a layer runs:

    ours              to bf16, rows of A read in order
    ours_gathered     A's rows read through an index inside the load; the index is a random permutation of all rows
    ours_accumulate   wgrad only: added to an fp32 buffer (``main_grad``)

Contenders are compared where they do the same work: a peer that adds to fp32 meets ``ours_accumulate``, one that writes
bf16 meets ``ours``. A gathered product meets the same product of rows that somebody has gathered already: ``ours``, and
in wgrad torch's too. In the file each variant is a case of its own: ``ref_up``, ``ref_up_gathered``.

Nobody's speed is reported before the first, the middle and the last expert of its result agree with an fp64 product of
the same operands: a relative Frobenius error over ``LIMITS`` is a reason to be missing.

What is multiplied, by whom and with what exact result is told by an :data:`OperandFormat`: ``gemm_bf16.contenders``, or
``gemm_fp8.contenders``, which has variants of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.bench.report import CaseResult
from supersonic_moe.bench.shapes import GemmCase
from supersonic_moe.bench.timing import Clock, Missing, attempt, measure, required
from supersonic_moe.kernels import registry

#: By kind of case: which of ours meets whom. A case in the file is named by its shape and what follows ``ours``.
Compared = Mapping[str, Mapping[str, tuple[str, ...]]]

COMPARED: Compared = {
    "gemm": {"ours": ("deep_gemm", "torch_grouped_mm"), "ours_gathered": ("ours",)},
    "wgrad": {
        "ours": ("torch_grouped_mm",),
        "ours_gathered": ("ours", "torch_grouped_mm"),
        "ours_accumulate": ("deep_gemm",),
    },
}

#: Relative Frobenius error up to which a result is right, by its dtype. One rounding to bf16 gives 0.0017.
LIMITS = {torch.bfloat16: 3e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Contender:
    run: Callable[[], Any]  # the whole product: (P, N) of a gemm, (E, M, N) of a wgrad
    exact: Callable[[int], Tensor]  # the product of one expert in fp64
    initial: float = 0.0  # what every element of the output holds before the first call, where calls add to it
    value: Callable[[Any], Tensor] = lambda result: result  # what of a result is compared with ``exact``
    limit: float | None = None  # of its error, where that of its dtype in LIMITS is not meant


#: Allocates the operands of a case, and returns how to build each contender: a peer may not be installed.
OperandFormat = Callable[[GemmCase, torch.device], Mapping[str, Callable[[], Contender]]]


@dataclass
class GemmResult(CaseResult):
    """All contenders of one shape."""

    kind: str = "gemm"
    compared: Compared = field(default_factory=lambda: COMPARED)

    @property
    def failed(self) -> list[str]:
        return [name for name in self.compared[self.kind] if name in self.missing]

    def cases(self) -> list[CaseResult]:
        """A case for each variant of ours that was measured, with the peers that do the same work."""
        found = []
        for name, peers in self.compared[self.kind].items():
            if name in self.metrics:
                metrics = {who: self.metrics[who] for who in (name, *peers) if who in self.metrics}
                missing = {who: self.missing[who] for who in peers if who in self.missing}
                found.append(CaseResult(self.case + name.removeprefix("ours"), metrics, missing))
        return found


def check_device(device: torch.device) -> None:
    """Raise ValueError where our kernels cannot run at all."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability != (9, 0):
        what = "a CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
        raise ValueError(
            f"this suite times the sm_90 kernels alone and needs a GPU of compute capability 9.0 (H100, H200); got "
            f"{device}, {what}. `supersonic-moe bench layer` measures whole layers on any device."
        )
    if not (registry.HAS_TRITON and registry.HAS_DRIVER_BINDINGS):
        missing = "cuda-bindings" if registry.HAS_TRITON else "triton"
        raise ValueError(
            f'the sm_90 kernels need {missing}, which is not installed: pip install "supersonic-moe[cuda13]"'
        )


def run_case(
    case: GemmCase,
    operands: OperandFormat,
    device: torch.device,
    clock: Clock,
    *,
    warm_ms: float,
    min_ms: float,
    compared: Compared = COMPARED,
    progress: Callable[[str], None] = lambda _: None,
) -> GemmResult:
    """Check every contender, then time those that are right."""
    progress("random operands")
    result, calls = GemmResult(case.name, kind=case.kind, compared=compared), {}
    for name, build in required(case.name, partial(_allocate, case, operands, device)).items():
        progress(f"checking {name}")
        checked = attempt(partial(_checked, case, build))
        if isinstance(checked, Missing):
            result.missing[name] = checked.reason
        else:
            calls[name], result.metrics[name] = checked

    progress("timing " + ", ".join(calls))
    run = partial(measure, calls, clock, warm_ms=warm_ms, min_ms=min_ms)
    for name, timing in required(f"{case}, timing", run).items():
        if isinstance(timing, Missing):
            result.missing[name] = timing.reason
            del result.metrics[name]
        else:
            rate = {"us": timing.us, "spread": timing.spread, "tflops": case.flops / timing.us / 1e6}
            result.metrics[name] |= rate | timing.energy(case.flops)
    return result


def _allocate(case: GemmCase, operands: OperandFormat, device: torch.device) -> Mapping[str, Callable[[], Contender]]:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # one shape's fragments must not starve the next
    return operands(case, device)


def _checked(case: GemmCase, build: Callable[[], Contender]) -> tuple[Callable[[], Any], dict[str, float]]:
    """The call to time and the error of its first result; raises ArithmeticError if that is wrong."""
    contender = build()
    got = contender.value(contender.run())
    limit = LIMITS[got.dtype] if contender.limit is None else contender.limit
    experts = {0, case.experts // 2, case.experts - 1}
    error = float(torch.stack([_relative_error(case, contender, got, e) for e in experts]).max())  # NaN stays NaN
    if not error <= limit:
        raise ArithmeticError(f"wrong result: its relative Frobenius error is {error:.2g}, over the limit of {limit:g}")
    return contender.run, {"rel_fro": error}


def _relative_error(case: GemmCase, contender: Contender, got: Tensor, expert: int) -> Tensor:
    got_e = got.reshape(case.experts, -1, got.shape[-1])[expert].double() - contender.initial
    exact_e = contender.exact(expert)
    error: Tensor = (got_e - exact_e).norm() / exact_e.norm()
    return error
