"""Shared test set-up: without a GPU, Triton kernels are interpreted and tests marked ``gpu`` skipped. CUDA kernels are
compiled once a session, by the process that needs them first. Processes share a GPU, and none keeps much of its memory
between tests. Hypothesis draws the same examples in every run; ``--hypothesis-profile=default`` looks for new ones.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, hence here
    if importlib.util.find_spec("triton"):
        triton_interpreter = importlib.import_module("triton_interpreter")
        triton_interpreter.hasten()


def pytest_configure(config: pytest.Config) -> None:
    """Give this session a kernel cache of its own. Processes that it starts, those of xdist included, inherit it."""
    if "SUPERSONIC_MOE_CACHE_DIR" not in os.environ:
        directory = tempfile.TemporaryDirectory(prefix="supersonic-moe-kernels-")
        config.add_cleanup(directory.cleanup)
        os.environ["SUPERSONIC_MOE_CACHE_DIR"] = directory.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        if "gpu" in item.keywords and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "multigpu" in item.keywords and gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA GPUs"))


KEPT_BYTES = 2 << 30
"""Of a GPU, in the cache of free blocks between tests: ten processes then leave most of 139 GB to a large test."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """The fixtures' tensors are gone when this goes on. What is compiled goes too: torch gives up on a function after a
    number of compilations, however many tests they were for.
    """
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _what_a_test_replaces_is_called(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that replaces functions sees each of their calls: nothing is played from a tape, but in tests of tapes."""
    if "monkeypatch" not in request.fixturenames or "tape" in request.module.__name__:
        yield
        return
    from supersonic_moe.jit.tape import without_tapes  # Triton may not be imported before this file has run

    with without_tapes():
        yield


@pytest.fixture(autouse=True)
def _fresh_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A tiny model is too small to share out, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
