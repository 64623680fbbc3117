"""The suites, in the order of ``supersonic-moe bench --help``."""

from typing import Any

from supersonic_moe.bench.suite import Suite
from supersonic_moe.bench.suites.breakdown import Breakdown
from supersonic_moe.bench.suites.cold_start import ColdStart
from supersonic_moe.bench.suites.ep import Ep
from supersonic_moe.bench.suites.exchange import Exchange
from supersonic_moe.bench.suites.gemm import Gemm
from supersonic_moe.bench.suites.infer import Infer
from supersonic_moe.bench.suites.kernels import Kernels
from supersonic_moe.bench.suites.layer import Layer
from supersonic_moe.bench.suites.mega import Mega
from supersonic_moe.bench.suites.precision import Precision
from supersonic_moe.bench.suites.train import Train
from supersonic_moe.bench.suites.transformers import Transformers

SUITES: tuple[type[Suite[Any, Any]], ...] = (
    Layer,
    Infer,
    Gemm,
    Kernels,
    Breakdown,
    ColdStart,
    Precision,
    Train,
    Transformers,
    Ep,
    Exchange,
    Mega,
)
