"""The routing kernels of the inference operator, compiled for the CPU and run lane by lane, against the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings.nvrtc")

from routed_rows import RULES, check_rows, empty_tables, local_experts, put_special

from supersonic_moe.config.grouped_routing import GroupedRouting
from supersonic_moe.jit.launch import Launch
from supersonic_moe.jit.spec import KERNEL_ROOT
from supersonic_moe.kernels.reference import local_ids, route_grouped
from supersonic_moe.kernels.sm90.route_rows import Choices, route_rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STAND_INS = Path(__file__).parents[2] / "support" / "cpu"
BLOCKS = 3


@pytest.fixture(name="compiled", scope="module")
def compiled_for_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[int, Any] = {}

    def route(values: int) -> Any:
        if values not in made:
            library = tmp_path_factory.mktemp("routing") / f"routing{values}.so"
            options = ("-std=c++20", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", f"-DVALUES={values}")
            folders = (f"-I{STAND_INS}", f"-I{KERNEL_ROOT}")
            subprocess.run(["g++", *options, *folders, STAND_INS / "routing.cpp", "-o", library], check=True)
            made[values] = ctypes.CDLL(str(library)).route
        return made[values]

    return route


def logits_of(tokens: int, experts: int) -> Tensor:
    """Equal ones among them, and none that one ulp of a score would put in another order; then special ones."""
    logits = torch.randint(0, 48, (tokens, experts), generator=torch.Generator().manual_seed(0)) / 8
    put_special(logits)
    logits[8] = 100 * logits[8] - 300  # beyond what exp can take
    return logits


def argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value or 0)


def run(route: Any, launches: list[Launch]) -> None:
    count, place = (launch.arguments for launch in launches)
    blocks = {"span": -(-count["tokens"] // BLOCKS), "blocks": BLOCKS}
    values = {name: value for name, value in (count | place | blocks).items() if name not in ("num_local", "received")}
    parameters = re.search(r"void route\((.*?)\)", (STAND_INS / "routing.cpp").read_text(), re.DOTALL)
    names = re.findall(r"\w+(?=,|$)", parameters[1])
    assert set(names) == set(values)
    route(*(argument(values[name]) for name in names))


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", [*RULES, "two_of_kept"])
def test_many_tokens(name: str, streamed: bool, compiled: Any) -> None:
    rule = RULES.get(name) or GroupedRouting(num_experts=256, top_k=16, topk_group=1)  # too few lanes for a bound
    experts, tokens = rule.num_experts, 150
    logits = logits_of(tokens, experts)
    bias = None if streamed else (torch.arange(experts) % 5 / 16).to(torch.bfloat16)
    choices = Choices(experts, experts // 2, experts // 4, rule.top_k, shared=name == "kimi_k2")
    tables = empty_tables(tokens, choices, "cpu", streamed=streamed)
    launches = route_rows(logits, bias, rule, choices, tables)
    run(compiled(dict(launches[0].kernel.spec.constants)["VALUES"]), launches)

    weights, ids = route_grouped(logits, bias, rule)
    slots_TC = torch.full((tokens, choices.per_token), choices.routed, dtype=torch.int32)
    slots_TC[:, : rule.top_k] = local_ids(ids, choices.routed, choices.offset, experts)
    assert torch.equal(local_experts(tables, choices.num_local), slots_TC)
    torch.testing.assert_close(tables.weights[:, : rule.top_k], weights, rtol=1e-5, atol=1e-9, equal_nan=True)
    assert tables.weights[:, rule.top_k :].eq(1).all()
    check_rows(tables, slots_TC, choices.num_local)
