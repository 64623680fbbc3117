"""Tests of one group run in one process: they share what is expensive, or must not meet on a GPU."""

import pytest


@pytest.mark.xdist_group("of one")
def test_processes_know_of_groups(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("groups are for --dist loadgroup, which make test uses")
    assert request.node.nodeid.endswith("@of one")
