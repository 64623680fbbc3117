"""From a `KernelSpec` to a cubin: shipped, cached or compiled now, under a policy that decides whether compiling is
welcome.

The order of lookup is: cubins shipped inside the package (any NVRTC version made them, so their key leaves it out),
memory, disk, compiler. The policy, `$SUPERSONIC_MOE_JIT_POLICY` or `set_policy`, speaks only about the last step:

    allow   compile; a step of more than two seconds says what it compiles
    warn    compile; every compilation is logged as a warning
    error   raise, with the command that compiles everything beforehand (for fleets that must not compile in production)

`compile_all`, which `supersonic-moe warmup` and the tests use, is an explicit request and compiles under every policy.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast, get_args

from supersonic_moe.jit import nvrtc
from supersonic_moe.jit.cache import (
    SHIPPED_CUBINS,
    Cubin,
    CubinCache,
    DamagedEntryError,
    default_cache,
    entry_name,
    read_entry,
)
from supersonic_moe.jit.nvrtc import JitError
from supersonic_moe.jit.spec import KernelSpec, Program, resolve

log = logging.getLogger("supersonic_moe.jit")

Policy = Literal["allow", "warn", "error"]
POLICY_VARIABLE = "SUPERSONIC_MOE_JIT_POLICY"
PATIENCE_S = 2.0  # a compilation that takes longer than this says so

_chosen_policy: Policy | None = None


class JitPolicyError(JitError):
    """A kernel would have to be compiled, and the policy is "error"."""


@dataclass(frozen=True)
class BuildResult:
    """Outcome of one spec of `compile_all`: a cubin or an error."""

    spec: KernelSpec
    cubin: Cubin | None
    error: JitError | None
    seconds: float


def policy() -> Policy:
    """The policy in force: the last `set_policy`, else the environment, else "allow"."""
    return _chosen_policy or _as_policy(os.environ.get(POLICY_VARIABLE) or "allow", f"${POLICY_VARIABLE}")


def set_policy(value: Policy | None) -> None:
    """Choose the policy of this process; None returns to the environment's."""
    global _chosen_policy
    _chosen_policy = None if value is None else _as_policy(value, "the JIT policy")


def build(spec: KernelSpec, cache: CubinCache | None = None, *, shipped: bool = True) -> Cubin:
    """The cubin of `spec`, compiled only where no copy exists and the policy lets it. `shipped=False` passes over the
    package's own copy, which an older driver cannot load."""
    return _build(spec, cache or default_cache(), policy(), position=(1, 1), shipped=shipped)


def compile_all(
    specs: Sequence[KernelSpec],
    progress: Callable[[int, int, BuildResult], None] | None = None,
    workers: int | None = None,
    cache: CubinCache | None = None,
) -> list[BuildResult]:
    """Build every spec, `workers` at a time (default: the cores of this machine, at most 8), and go on past errors.

    `progress(done, total, result)` is called from the worker threads, one at a time; without it, a compilation that
    takes long says so. Results come in the order of `specs`.
    """
    target = cache or default_cache()
    total, done, report_lock = len(specs), 0, threading.Lock()

    def one(index: int) -> BuildResult:
        nonlocal done
        started = time.perf_counter()
        cubin, error = None, None
        try:
            cubin = _build(specs[index], target, "allow", position=(index + 1, total), speak=progress is None)
        except JitError as caught:
            error = caught
        result = BuildResult(specs[index], cubin, error, time.perf_counter() - started)
        with report_lock:
            done += 1
            if progress is not None:
                progress(done, total, result)
        return result

    with ThreadPoolExecutor(max_workers=workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, range(total)))


def _build(
    spec: KernelSpec, cache: CubinCache, rule: Policy, position: tuple[int, int], *, speak: bool = True,
    shipped: bool = True,
) -> Cubin:  # fmt: skip
    program = resolve(spec)
    if shipped and (cubin := _shipped(spec, program)) is not None:
        return cubin
    key = program.digest(nvrtc.nvrtc_build())
    if (cubin := cache.load(spec.name, key)) is not None:
        return cubin
    if rule == "error":
        raise JitPolicyError(
            f"kernel {spec} is not compiled yet and the JIT policy is 'error'. Run `supersonic-moe warmup` once on a "
            f"machine that shares the cache directory {cache.directory}, or set {POLICY_VARIABLE}=allow"
        )
    if rule == "warn":
        log.warning("compiling kernel %s", spec)
    patience = _speak_when_slow(spec, cache, position) if speak else contextlib.nullcontext()
    with patience, cache.exclusive(spec.name, key):
        if (cubin := cache.load(spec.name, key)) is not None:  # another process compiled it while this one waited
            return cubin
        image, report = nvrtc.compile_cubin(program.source, program.file_name, program.headers, program.options)
        cubin = Cubin(image, report)
        cache.store(spec.name, key, cubin)
    log.info("compiled kernel %s in %.2f s", spec, report.seconds)
    return cubin


def _shipped(spec: KernelSpec, program: Program) -> Cubin | None:
    key = program.digest()
    path = SHIPPED_CUBINS / entry_name(spec.name, key)
    try:
        return read_entry(path, key, "shipped")
    except (DamagedEntryError, OSError) as error:
        log.warning("%s, a cubin of the installed package, is unusable (%s); reinstall supersonic-moe", path, error)
        return None


@contextlib.contextmanager
def _speak_when_slow(spec: KernelSpec, cache: CubinCache, position: tuple[int, int]) -> Iterator[None]:
    """Log one warning when the body takes more than PATIENCE_S: a warning, so that it shows where logging is not set
    up."""
    timer = threading.Timer(
        PATIENCE_S,
        log.warning,
        (
            "compiling kernel %s (%d of %d) takes more than %.0f s; this happens once, the result is kept in %s",
            spec,
            *position,
            PATIENCE_S,
            cache.directory or "the memory of this process",
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _as_policy(value: str, source: str) -> Policy:
    if value not in get_args(Policy):
        raise JitError(f"{source} must be one of {', '.join(get_args(Policy))}; got {value!r}")
    return cast(Policy, value)
