"""The command line. One file per command; ``app`` puts them together, and ``main`` is where a process enters."""

import importlib.util
import os
import sys

NEEDED = ("typer", "rich", "matplotlib")  # the extra [cli]


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The command line needs {', '.join(missing)}: pip install 'supersonic-moe[cli]'")
    # OpenMP threads that wait for each other sleep instead of spinning: on two cores with one busy neighbour a training
    # step of the demo is nine times faster (0.23 s, was 2.1 s). Read when torch loads OpenMP, hence before any command.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from supersonic_moe.cli.app import app

    app(prog_name="supersonic-moe")
