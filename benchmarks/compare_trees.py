"""Two trees of this package in one process on one GPU: are they equal in bits, and is one faster?

    git worktree add /tmp/before v0.1.0
    python benchmarks/compare_trees.py /tmp/before . --bits --speed --host --json out.json

Each tree is copied under a name of its own (``supersonic_moe`` becomes ``before`` and ``after``, ops included), so both
run on the same tensors, with the same driver, and alternate slice by slice on a card whose clock moves with its load.

``--bits``: outputs and all gradients of many small cases (activations, layouts, biases, recipes, entry points, ragged
and empty experts, main_grad) must have the same bits; prints a hash of all results of each tree, and how many of the
compiled configurations ran.

``--speed``: forward + backward of whole layers, and of each kernel inside them by the profiler's trace. A pair is one
slice of each tree, in alternating order; the figure is the median over pairs of before / after: above 1, after is
faster. The interval is of the median, by order statistics (95 %).

``--host``: the same pairs of a layer so small that the GPU waits for the host: what Python and the driver cost. Nothing
waits for the GPU inside a slice. Forward alone and forward + backward, of ``moe_layer``, which quantizes its weights in
every FP8 call, and of ``MoE``, which keeps the copies, with its auxiliary loss.

``--tapes``: what ``--bits`` compares of the second tree is the third run of each case, which is played from tapes
(``jit/tape.py``). One tree given twice shows what tapes alone change.

Only public names are used, so trees far apart can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

SETTLE_S, SLICE_S = 0.12, 0.2  # a slice follows the other tree at once: the clock settles within a tenth of a second
HOST_SIZES, HOST_CALLS = (512, 256, 128, 8, 2), 100
SHAPES = {  # T, H, I, E, K: the five of the layer suite, then those whose products are flash_l1/l2 and pro_l1/l2
    "T8192_H3072_I1536_E8_K8": (8192, 3072, 1536, 8, 8),
    "T32768_H4096_I1024_E128_K8": (32768, 4096, 1024, 128, 8),
    "T8192_H4096_I4096_E8_K8": (8192, 4096, 4096, 8, 8),
    "T16384_H2048_I768_E128_K8": (16384, 2048, 768, 128, 8),
    "T16384_H7168_I2048_E32_K8": (16384, 7168, 2048, 32, 8),
    "T6144_H4096_I2048_E32_K8": (6144, 4096, 2048, 32, 8),
    "T6144_H7168_I3072_E48_K8": (6144, 7168, 3072, 48, 8),
}


class Tree(NamedTuple):
    name: str
    package: ModuleType


def load(checkout: Path, name: str, into: Path) -> Tree:
    shutil.copytree(checkout / "src" / "supersonic_moe", into / name)
    for file in (into / name).rglob("*.py"):
        file.write_text(re.sub(r"\bsupersonic_moe\b", name, file.read_text("utf-8")), "utf-8")
    return Tree(name, importlib.import_module(name))


@contextmanager
def launches(tree: Tree) -> Iterator[set[str]]:
    """The configurations that run meanwhile."""
    module, seen = importlib.import_module(f"{tree.name}.jit.launch"), set[str]()
    # Up to 0.1.0 every kernel launched through one method; since then each has a function of its own around `enqueue`.
    owner, method, spec = (
        (module.Kernel, "launch", "spec") if hasattr(module.Kernel, "launch") else (module._Slots, "enqueue", "_spec")
    )
    original = getattr(owner, method)

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(str(getattr(self, spec)))
        return original(self, *args, **kwargs)

    setattr(owner, method, recording)
    try:
        yield seen
    finally:
        setattr(owner, method, original)


# ---- bits ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    sizes: tuple[int, int, int, int, int]  # T, H, I, E, K
    options: Callable[[ModuleType], dict[str, Any]]
    bias: bool = False
    transposed: bool = False
    entry: str = "moe_layer"
    skew: float = 0.0


def cases() -> Iterator[Case]:
    activations: dict[str, Callable[[ModuleType], Any]] = {
        **{name: (lambda _, name=name: name) for name in ("swiglu", "geglu", "reglu", "relu_sq", "gelu")},
        "gpt_oss": lambda m: m.Activation.gpt_oss(),
    }
    small, large = (333, 264, 200, 6, 2), (1500, 512, 256, 3, 2)
    wide, many = (700, 4096, 512, 2, 2), (2048, 512, 4096, 4, 2)
    layouts, entries = ("interleaved", "gate_up", "up_gate"), ("moe_layer", "dispatched_experts")
    for (act, make), layout, sizes, entry in itertools.product(activations.items(), layouts, (small, large), entries):
        options = lambda m, a=make, y=layout: {"activation": a(m), "layout": y}  # noqa: E731
        yield Case(f"bf16 {act} {layout} T{sizes[0]} {entry}", sizes, options, entry=entry)
    for sizes in (small, wide, many, (1, 64, 64, 4, 1), (129, 72, 40, 16, 4), (4096, 1024, 768, 64, 8)):
        for transposed, entry in itertools.product((False, True), entries):
            for main in (False, True):
                options = lambda m, g=main: {"accumulate_into_main_grad": g}  # noqa: E731
                name = f"bf16 T{sizes[0]} transposed {transposed} main {main} {entry}"
                yield Case(name, sizes, options, True, transposed, entry, skew=3.0 * transposed)
    recipes = list(itertools.product(("fp8", "bf16"), ("fp8", "bf16", "recompute"), ("fp32", "pow2"), (True, False)))
    for wgrad, saved, scale, kept in recipes:

        def recipe(m: ModuleType, w: str = wgrad, s: str = saved, c: str = scale, k: bool = kept) -> Any:
            return m.Fp8Recipe(wgrad=w, save_preactivation=s, scale=c, keep_transposed=k)

        name = f"fp8 wgrad {wgrad} saved {saved} {scale} kept {kept}"
        for (act, make), layout in itertools.product(activations.items(), layouts):
            if (saved == "recompute" or scale == "pow2" or not kept) and (act, layout) != ("swiglu", "gate_up"):
                continue
            options = lambda m, r=recipe, a=make, y=layout: {"recipe": r(m), "activation": a(m), "layout": y}  # noqa: E731
            for sizes, entry in itertools.product((small, large), entries):
                yield Case(f"{name} {act} {layout} T{sizes[0]} {entry}", sizes, options, entry=entry)
            yield Case(f"{name} {act} {layout} bias", small, options, bias=True)
    for sizes in (wide, many, (1, 128, 128, 4, 1), (4096, 1024, 768, 64, 8)):
        for main, transposed in itertools.product((False, True), (False, True)):
            options = lambda m, g=main: {"recipe": m.Fp8Recipe(), "accumulate_into_main_grad": g}  # noqa: E731
            yield Case(
                f"fp8 T{sizes[0]} main {main} transposed {transposed}", sizes, options, False, transposed, skew=2.0
            )
    for entry in ("topk_experts", "routed_experts", "dispatched_experts"):
        yield Case(f"bf16 {entry}", small, lambda m: {}, True, entry=entry)
        yield Case(f"fp8 {entry}", small, lambda m: {"recipe": m.Fp8Recipe()}, entry=entry)
    yield Case("token rounding", (2048, 256, 128, 8, 2), lambda m: {"router": m.TokenRounding(tile=128)})
    yield Case("sigmoid", small, lambda m: {"router": m.SigmoidGroupedTopK(num_groups=2, scaling_factor=2.5)})


def operands(case: Case) -> dict[str, Tensor]:
    t, h, i, e, _ = case.sizes
    generator = torch.Generator("cuda").manual_seed(len(case.name) + t)
    gated = not any(word in case.name for word in ("relu_sq", "gelu "))
    n1 = 2 * i if gated else i

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * std).bfloat16()

    def weight(n: int, k: int) -> Tensor:
        w = normal(e, k, n, std=k**-0.5).mT if case.transposed else normal(e, n, k, std=k**-0.5)
        return w

    router = normal(e, h, std=h**-0.5)
    if case.skew:  # some experts get nearly everything, some nothing
        router *= torch.linspace(0, case.skew, e, device="cuda").bfloat16()[:, None]
    out = {"x": normal(t, h), "router": router, "w1": weight(n1, h), "w2": weight(h, i), "dout": normal(t, h)}
    if case.bias:
        out |= {"b1": normal(e, n1), "b2": normal(e, h)}
    return out


def results(tree: Tree, case: Case) -> list[Tensor]:
    """Output and gradients of one case, on tensors that are the same for every tree."""
    m, data, k = tree.package, operands(case), case.sizes[4]
    dout = data.pop("dout")
    leaves = {name: t.detach().requires_grad_() for name, t in data.items()}
    x, router, w1, w2 = (leaves.pop(name) for name in ("x", "router", "w1", "w2"))
    options = case.options(m) | leaves
    inputs = [x, w1, w2, *leaves.values()]
    if options.get("accumulate_into_main_grad"):
        for w in (w1, w2):
            w.main_grad = torch.ones(w.shape, device="cuda")
    if case.entry == "moe_layer":
        out = m.moe_layer(x, router, w1, w2, k, **options).output
        inputs.append(router)
    else:
        logits = (x.detach().float() @ router.detach().float().T).softmax(1)
        scores, ids = logits.topk(k)
        scores.requires_grad_()
        inputs.append(scores)
        if case.entry == "topk_experts":
            out = m.topk_experts(x, ids, scores, w1, w2, **options)
        elif case.entry == "routed_experts":
            tokens = torch.arange(x.shape[0], device="cuda").repeat_interleave(k)
            out = m.routed_experts(x, tokens, ids.reshape(-1), scores.reshape(-1), w1, w2, **options)
        else:
            ends = torch.tensor(
                [x.shape[0] * (j + 1) // w1.shape[0] - j % 2 for j in range(w1.shape[0])], device="cuda"
            )
            out = m.dispatched_experts(x, ends, w1, w2, scores_R=scores[:, 0], **options)
    out.backward(dout)
    grads = [t.main_grad if hasattr(t, "main_grad") else t.grad for t in inputs]
    return [out.detach(), *(g for g in grads if g is not None)]


def compare_bits(trees: tuple[Tree, Tree], tapes: bool) -> dict[str, Any]:
    hashes, unequal, count = [hashlib.sha256(), hashlib.sha256()], [], 0
    with launches(trees[0]) as ran_before, launches(trees[1]) as ran:
        for case in cases():
            count += 1
            for _ in range(2 if tapes else 0):  # one that runs, one that is recorded
                results(trees[1], case)
            per_tree = [results(tree, case) for tree in trees]
            for hasher, tensors in zip(hashes, per_tree, strict=True):
                for t in tensors:
                    hasher.update(t.contiguous().view(torch.uint8).cpu().numpy().tobytes())
            if len(per_tree[0]) != len(per_tree[1]) or not all(
                torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
                for a, b in zip(*per_tree, strict=True)
            ):
                unequal.append(case.name)
                print(f"  differs: {case.name}", flush=True)
    registered = [str(spec) for spec in importlib.import_module("after.kernels.sm90").registered_specs()]
    idle = [spec for spec in registered if spec not in ran]
    print(f"{len(idle)} of {len(registered)} configurations did not run", flush=True)
    digests = [h.hexdigest()[:16] for h in hashes]
    counts = [len(ran_before), len(ran)]
    print(f"bits: {count} cases, {len(unequal)} differ; hashes {digests}; configurations run {counts}", flush=True)
    return {"cases": count, "unequal": unequal, "hashes": digests, "configurations": counts, "not_run": idle}


# ---- speed -----------------------------------------------------------------------------------------------------------


def step_of(tree: Tree, sizes: tuple[int, int, int, int, int], fp8: bool) -> Callable[[], None]:
    t, h, i, e, k = sizes
    generator = torch.Generator("cuda").manual_seed(t)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * std).bfloat16()

    leaves = [normal(t, h), normal(e, h, std=h**-0.5), normal(e, 2 * i, h, std=h**-0.5), normal(e, h, i, std=i**-0.5)]
    for leaf in leaves:
        leaf.requires_grad_()
    dout, recipe = normal(t, h), tree.package.Fp8Recipe() if fp8 else None

    def step() -> None:
        out = tree.package.moe_layer(*leaves, k, recipe=recipe).output
        torch.autograd.grad(out, leaves, dout)

    return step


def slice_us(step: Callable[[], None], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(max(1, round(calls * SETTLE_S / SLICE_S))):
        step()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def kernels_us(step: Callable[[], None], calls: int) -> dict[str, float]:
    """Microseconds of each kernel in a step: the second half of 2 ``calls`` steps, when the clock has settled."""
    seen: dict[str, list[float]] = defaultdict(list)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(2 * calls):
            step()
        torch.cuda.synchronize()
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seen[event.name].append(event.device_time_total)
    return {name: sum(times[len(times) // 2 :]) / calls for name, times in seen.items()}


def median_ratio(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Median of before / after, and the 95 % interval of that median by order statistics."""
    ratios = sorted(a / b for a, b in pairs)
    n = len(ratios)
    reach = math.ceil(0.98 * math.sqrt(n))
    return statistics.median(ratios), ratios[max(0, n // 2 - reach)], ratios[min(n - 1, (n - 1) // 2 + reach)]


def compare_speed(trees: tuple[Tree, Tree], pairs: int, recipes: list[str], shapes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for shape, recipe in itertools.product(shapes, recipes):
        steps = [step_of(tree, SHAPES[shape], recipe == "fp8") for tree in trees]
        for step in steps:
            step()
        torch.cuda.synchronize()
        calls = max(2, round(SLICE_S * 1e6 / slice_us(steps[0], 3)))
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            slice_us(steps[1], calls)
        walls: list[tuple[float, float]] = []
        parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        orders = list(itertools.islice(itertools.cycle([(0, 1), (1, 0)]), pairs))
        for order in orders:
            wall = {which: slice_us(steps[which], calls) for which in order}
            walls.append((wall[0], wall[1]))
        for order in orders[: max(3, pairs // 2)]:
            kernels = {which: kernels_us(steps[which], calls) for which in order}
            for name in set(kernels[0]) & set(kernels[1]):
                parts[name].append((kernels[0][name], kernels[1][name]))
        row = {"case": shape, "recipe": recipe, "fwd_bwd": _row(walls), "kernels": {}}
        print(f"{shape} {recipe}: {_text(walls)}", flush=True)
        for name, values in sorted(parts.items(), key=lambda item: -item[1][0][0]):
            if statistics.median(b for _, b in values) > 0.01 * row["fwd_bwd"]["after_us"]:
                row["kernels"][name[:60]] = _row(values)
                print(f"    {name[:46]:46} {_text(values)}", flush=True)
        rows.append(row)
        del steps
        torch.cuda.empty_cache()
    ratios = [row["fwd_bwd"]["ratio"] for row in rows]
    print(f"geometric mean of {len(rows)} layers: {math.exp(statistics.fmean(map(math.log, ratios))):.4f}")
    return rows


# ---- host ------------------------------------------------------------------------------------------------------------


def host_steps(tree: Tree, entry: str, fp8: bool) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward, of a small layer."""
    t, h, i, e, k = HOST_SIZES
    recipe = tree.package.Fp8Recipe() if fp8 else None
    module = tree.package.MoE(e, k, h, i, "swiglu", False, 0.02, recipe=recipe).to("cuda", torch.bfloat16)
    x = torch.randn(t, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout, daux = torch.randn_like(x), torch.ones((), device="cuda")
    weights = list(module.parameters())

    def layer() -> tuple[Tensor]:
        return (tree.package.moe_layer(x, *weights, k, recipe=recipe).output,)

    def forward() -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = layer() if entry == "moe_layer" else module(x)
        return outputs

    def forward_backward() -> None:
        outputs = forward()
        torch.autograd.grad(outputs, [x, *weights], (dout, daux)[: len(outputs)])

    return {"fwd": forward, "fwd_bwd": forward_backward}


def host_us(step: Callable[[], Any]) -> float:
    """Microseconds of a call, after some of the other kind have left the processor's caches to this one."""
    for _ in range(HOST_CALLS // 10):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        step()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    if time.perf_counter() - issued > 0.1 * (issued - start):
        print("    the GPU was still busy when the host was done: this is not the time of the host alone", flush=True)
    return (issued - start) * 1e6 / HOST_CALLS


def compare_host(trees: tuple[Tree, Tree], pairs: int, recipes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for entry, recipe in itertools.product(("moe_layer", "MoE"), recipes):
        steps = [host_steps(tree, entry, recipe == "fp8") for tree in trees]
        for metric in ("fwd", "fwd_bwd"):
            for which in (0, 1) * 3:
                host_us(steps[which][metric])
            walls = []
            for order in itertools.islice(itertools.cycle([(0, 1), (1, 0)]), pairs):
                wall = {which: host_us(steps[which][metric]) for which in order}
                walls.append((wall[0], wall[1]))
            rows.append({"case": entry, "recipe": recipe, "metric": metric, **_row(walls)})
            print(f"host {entry:9} {recipe} {metric:7} {_text(walls)}", flush=True)
    return rows


# ---- reports ---------------------------------------------------------------------------------------------------------


def _row(pairs: list[tuple[float, float]]) -> dict[str, float]:
    ratio, low, high = median_ratio(pairs)
    before, after = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    return {"before_us": before, "after_us": after, "ratio": ratio, "low": low, "high": high, "pairs": len(pairs)}


def _text(pairs: list[tuple[float, float]]) -> str:
    row = _row(pairs)
    return (
        f"{row['before_us']:9.1f} -> {row['after_us']:9.1f} us   {row['ratio']:.4f} "
        f"[{row['low']:.4f}, {row['high']:.4f}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("after", type=Path, help="checkout under test")
    parser.add_argument("--bits", action="store_true", help="compare results bit by bit")
    parser.add_argument("--speed", action="store_true", help="compare times in alternating pairs")
    parser.add_argument("--host", action="store_true", help="compare host times in alternating pairs")
    parser.add_argument("--tapes", action="store_true", help="of the second tree, compare the bits of what is played")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of slices a case (default 20)")
    parser.add_argument("--recipes", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("compare_trees needs a CUDA GPU; torch sees none here.")
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        trees = (load(args.before, "before", Path(folder)), load(args.after, "after", Path(folder)))
        report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        if args.bits:
            report["bits"] = compare_bits(trees, args.tapes)
        if args.speed:
            report["speed"] = compare_speed(trees, args.pairs, args.recipes, args.shapes)
        if args.host:
            report["host"] = compare_host(trees, args.pairs, args.recipes)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    if args.bits and report["bits"]["unequal"]:
        sys.exit("the trees differ in bits")


if __name__ == "__main__":
    main()
