"""A backend of ``torch.compile`` that runs graphs as they are and keeps them, since tests ask how many there were."""

from __future__ import annotations

from typing import Any

import torch


class Graphs(list[torch.fx.GraphModule]):
    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Any:
        self.append(graph)
        return graph.forward
