"""Backends against the protocols: mypy checks the types where ``registry.kernels`` puts a backend together; names and
defaults of arguments, which it does not compare, are checked here.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import CAPABILITIES, Quantized, Rows, functions_of


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in registry.BACKENDS if name != "auto"])
def test_backends_name_their_arguments_as_the_protocols_do(name: str, capability: str) -> None:
    if name != "reference":
        pytest.importorskip("triton")
    backend = getattr(registry.kernels(name), capability)
    assert (backend is None) == (name == "triton" and capability == "fp8")
    wanted = functions_of(CAPABILITIES[capability])
    assert len(wanted) >= 5
    for function in wanted if backend is not None else ():
        assert parameters(getattr(backend, function)) == parameters(getattr(CAPABILITIES[capability], function)), (
            function
        )


def test_rows_count_what_is_read() -> None:
    x, index = torch.zeros(5, 3), torch.zeros(7, dtype=torch.int32)
    assert Rows(x).num_rows == 5 and Rows(x, index).num_rows == 7
    assert Rows(Quantized(x, x)).num_rows == 5 and Rows(Quantized(x, x), index).num_rows == 7
