"""Print ``main.py`` as a FlashInfer-Bench solution in JSON:

    python benchmarks/flashinfer_bench/pack.py > solution.json

The package itself is a dependency and must be installed where the solution runs: its kernels are compiled there.
"""

import json
from pathlib import Path

DEFINITION = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
SOURCE = Path(__file__).with_name("main.py")


def solution() -> dict[str, object]:
    return {
        "name": f"supersonic_moe_{DEFINITION}",
        "definition": DEFINITION,
        "author": "supersonic-moe",
        "description": "moe_fp8_ds_routed of supersonic-moe: every row computed, nothing cached between calls.",
        "spec": {
            "language": "python",
            "target_hardware": ["NVIDIA_H100", "NVIDIA_H200"],
            "entry_point": f"{SOURCE.name}::run",
            "dependencies": ["supersonic-moe"],
            "destination_passing_style": True,
        },
        "sources": [{"path": SOURCE.name, "content": SOURCE.read_text(encoding="utf-8")}],
    }


if __name__ == "__main__":
    print(json.dumps(solution(), indent=2))
