"""The same forward again: what activation checkpointing must find as it was.

``torch.utils.checkpoint`` keeps the arguments of a forward and calls it once more inside backward. A layer also reads
what is no argument, and what may be another by then: its recipe (``fp8_training`` has been left), its correction bias
(it has been moved), its mode (``eval()`` has been called: no more token rounding), the step of token rounding (a draw
of torch's generator, which the checkpoint restores unless it is told not to). So a layer remembers what its last
forward read, and a forward inside backward reads that:

    recipe    the object itself
    bias      the tensor itself while it is unchanged, else a copy of E floats, made by the first forward that sees a
              new value; in a CUDA graph by every forward, because a replay shows no change on the host
    mode      whether it was training
    step      the fresh draw if it is one of the last 64, which is what a restored generator gives; else the last one

An evaluation in between is no such forward: in ``eval()`` and without gradients. But so is the first run of a reentrant
checkpoint around a layer in ``eval()``, which may get a backward. It is told by who runs it again.

With several forwards under way, as in a pipeline, the last one stands for all: change neither recipe, bias nor mode
between the first of them and the last backward, and let the checkpoint keep the generator's state, as it does by
default. What ``torch.compile`` has compiled reads recipe, bias and mode as they are.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from supersonic_moe.config.recipe import Recipe
from supersonic_moe.private_api import dispatch_modes, in_backward, in_checkpoint_function, versions_of

STEPS = 64


class LastForward:
    """What the last forward of a layer read. Copies and pickles of the layer start without."""

    def __init__(self) -> None:
        self.block: Recipe | None = None
        """That of ``fp8_training`` inside backward, for the forwards within."""
        self._recipe: Recipe | None = None
        """None before a forward."""
        self._evaluated: Recipe | None = None
        """The recipe of the last forward in ``eval()`` without gradients; None where there was none since."""
        self._training: bool | None = None
        self._fused: bool | None = None
        self._bias_E: Tensor | None = None
        self._version = 0
        self._copy_E: Tensor | None = None
        self._copied_in_graph = False
        self._steps: deque[Tensor] = deque(maxlen=STEPS)

    def __reduce__(self) -> tuple[type[LastForward], tuple[()]]:
        return LastForward, ()

    def settings(
        self, recipe: Recipe, bias_E: Tensor | None, training: bool, counts: bool, evaluates: bool
    ) -> tuple[Recipe, Tensor | None, bool]:
        """What a forward is to read: what the layer has now; in backward, what the last forward read.

        Args:
            counts: this forward may get a backward, so remember what it reads.
            evaluates: it may get one by reentrant checkpointing alone.
        """
        if in_backward():
            if self._of_evaluation(training):
                return self.block or self._evaluated or recipe, bias_E, training
            training = training if self._training is None else self._training
            return self.block or self._recipe or recipe, self._bias_then(bias_E), training
        if counts:
            self._recipe, self._training, self._evaluated = recipe, training, None
            if bias_E is not None and not bias_E.is_inference():  # such a tensor counts no changes
                self._remember(bias_E)
        elif evaluates:
            self._evaluated = recipe
        return recipe, bias_E, training

    def fuses(self, fused: bool, training: bool, counts: bool) -> bool:
        """Whether the router's product is fused, which saves other tensors: in backward, as in the last forward. Hooks
        of all modules may have come since, those of a FLOP counter around backward for instance.
        """
        if in_backward():
            return fused if self._fused is None or self._of_evaluation(training) else self._fused
        if counts:
            self._fused = fused
        return fused

    def _of_evaluation(self, training: bool) -> bool:
        """In backward: whether the forward that runs again was one in ``eval()`` without gradients."""
        return self._evaluated is not None and not training and in_checkpoint_function()

    def step(self, drawn: Tensor) -> Tensor:
        """The step of token rounding for a forward that drew ``drawn``, (1,) int64."""
        steps, again = self._steps, in_backward()
        if not again:
            if steps and steps[-1].device != drawn.device:
                steps.clear()
            steps.append(drawn)
        if not steps or not (again or dispatch_modes()):  # selective checkpointing wants the same ops in both
            return drawn
        known = torch.cat(list(steps) if again else [drawn])
        return torch.where((known == drawn).any(), drawn, known[-1:])

    def _remember(self, bias_E: Tensor) -> None:
        (version,) = versions_of((bias_E,))
        in_graph = bias_E.is_cuda and torch.cuda.is_current_stream_capturing()
        if not in_graph and not self._copied_in_graph and bias_E is self._bias_E and version == self._version:
            return
        self._bias_E, self._version, self._copied_in_graph = bias_E, version, in_graph
        self._copy_E = bias_E.detach().clone()

    def _bias_then(self, bias_E: Tensor | None) -> Tensor | None:
        if bias_E is None or self._copy_E is None:
            return bias_E
        unchanged = bias_E is self._bias_E and versions_of((bias_E,)) == [self._version]
        return bias_E if unchanged and not self._copied_in_graph else self._copy_E
