"""Results files made by hand, for the pages that show them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from supersonic_moe.bench import report
from supersonic_moe.bench.report import CaseResult


def write(path: Path, suite: str, results: Iterable[CaseResult]) -> None:
    about = {
        "suite": suite,
        "command": "c",
        "device": "H200",
        "torch": "2.11",
        "commit": "0" * 40,
        "date": "2026-11-30",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"rows": [asdict(row) for result in results for row in report.rows(result)]}))
