"""One cold start, measured from inside: the child process of ``bench/cold_start.py``. Prints its seconds as JSON.

    python -P -X pycache_prefix=DIRECTORY first_call.py STARTED T,H,I,E,K DEVICE KERNEL_CACHE TRITON_CACHE

Run by path and not as a module, because ``-m`` would import the package before the first mark. STARTED is the parent's
``time.monotonic()``, a clock that all processes of a machine share.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    marks = [float(sys.argv[1]), time.monotonic()]

    def mark() -> None:
        marks.append(time.monotonic())

    tokens, hidden, intermediate, experts, top_k = map(int, sys.argv[2].split(","))
    os.environ["SUPERSONIC_MOE_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = sys.argv[4:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.dont_write_bytecode = False  # whatever PYTHONDONTWRITEBYTECODE says: it goes to the benchmark's own directory

    import torch

    mark()
    device = torch.device(sys.argv[3])
    torch.ones(1, device=device).sum().item()  # creates the context and waits for it
    mark()
    torch.autograd.backward(torch.ones(1, device=device, requires_grad=True).sum())  # imports sympy, for any graph
    mark()

    from supersonic_moe import MoE

    mark()
    with torch.device(device):
        layer = MoE(experts, top_k, hidden, intermediate, "swiglu", False, 0.02).bfloat16()
        x_TH = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        dout_TH = torch.randn(tokens, hidden, dtype=torch.bfloat16)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    mark()
    for _ in range(2):
        layer(x_TH)[0].backward(dout_TH)
        synchronize()
        mark()

    steps = ("start_s", "import_s", "context_s", "backward_s", "library_s", "build_s", "call_s", "again_s")
    seconds = {name: end - begin for name, (begin, end) in zip(steps, itertools.pairwise(marks), strict=True)}
    seconds["first_call_s"] = seconds["library_s"] + seconds["build_s"] + seconds["call_s"]
    seconds["total_s"] = sum(seconds[name] for name in steps if name != "again_s")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
