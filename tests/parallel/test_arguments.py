"""Arguments of the wrong kind say what belongs there, and right ones are quiet."""

from __future__ import annotations

import re

import parallel_arguments as arguments
from ranks import run_ranks


def test_arguments_of_the_wrong_kind_say_what_belongs_there() -> None:
    for groups, meshes, handles, routers in run_ranks(2, arguments.errors):
        group, number, outside = groups
        assert re.match(r"TypeError: expert_parallel must be a parallel\.ExpertParallel; got .*ProcessGroup", group)
        assert re.match(r"TypeError: expert_parallel must be a parallel\.ExpertParallel; got 2\. Make one", number)
        assert re.match(r"ValueError: .*this process is not one of them", outside)
        group, dimensions, order, right, replaced = meshes
        assert re.match(r"TypeError: mesh must be a DeviceMesh; got ProcessGroup", group)
        assert re.match(r"ValueError: mesh must have ranks \[0, 1\] .*; got \[\[0\], \[1\]\]", dimensions)
        assert re.match(r"ValueError: mesh must have ranks \[0, 1\] .*; got \[1, 0\]", order)
        assert right == "no error"
        assert re.match(r"TypeError: c_fc must be what the MoE was made with; got Sequential", replaced)
        whole, nothing, right, sparse = handles
        assert re.match(r"TypeError: handle must be the \.handle of what dispatch\(\) returned; got Dispatched", whole)
        assert re.match(r"TypeError: handle must be .*; got NoneType", nothing)
        assert right == "no error"
        assert re.match(r"TypeError: x must be a dense tensor; got a sparse_coo tensor", sparse)
        dtype, experts, right = routers
        assert re.match(r"TypeError: router_weight and x must have one dtype; got float64", dtype)
        assert re.match(r"ValueError: the router's output must have shape \(3, 8\) .*; got \(3, 9\)", experts)
        assert right == "no error"


def test_an_fp8_wire_refuses_what_an_exact_one_refuses() -> None:
    """Its kernels would read beside weights that do not fit, and an error there ends the whole group."""
    for exact, fp8 in run_ranks(2, arguments.errors_of_wires):
        *wrong, right = [error.partition("; got ")[0] for error in fp8]
        assert [error.partition("; got ")[0] for error in exact] == [*wrong, right]
        assert right == "no error" and all(re.match("(Type|Value)Error: ", error) for error in wrong), wrong


def test_a_step_warns_of_nothing() -> None:
    assert run_ranks(2, arguments.warnings_of_steps) == [{"exact": [], "capacity": [], "gather": []}] * 2


def test_explain_counts_what_is_sent() -> None:
    """Rows of partial outputs, 128 bytes each: needed ones with an exact capacity, all places else."""
    for *said, name in run_ranks(2, arguments.explanations):
        sent = [float(re.search(r"partial outputs (\S+)", text)[1]) for text in said]  # type: ignore[index]
        needed = 512 * (1 - 12 / 56)
        assert sent == [float(f"{rows * 128 / 1e6:.3g}") for rows in (needed, 512, 64, 512, 512)]
        assert "transport: gather, instead of push, by collectives of torch.distributed (gloo)" in said[-1]
        assert name and name != "undefined"


def test_an_automatic_wire_is_fp8_where_that_costs_nothing() -> None:
    assert run_ranks(2, arguments.wires_of_auto) == [[True, False, False, False]] * 2
