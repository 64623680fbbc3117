"""Expert parallelism: the experts of a layer spread over the ranks of a process group.

:class:`ExpertParallel` (``expert_parallel.py``) is the entry; ``MoE(..., expert_parallel=...)`` and
:func:`shard_experts` are built on it. :class:`MegaMoE` (``mega.py``) is the FP8 layer for serving.
"""

from supersonic_moe.parallel.expert_parallel import ExpertParallel
from supersonic_moe.parallel.mega import MegaMoE
from supersonic_moe.parallel.shard import shard_experts
from supersonic_moe.parallel.trip import Dispatched
from supersonic_moe.parallel.watch import ExpertParallelError

__all__ = ["Dispatched", "ExpertParallel", "ExpertParallelError", "MegaMoE", "shard_experts"]
