"""An exponential moving average of the weights over the steps (Polyak & Juditsky 1992):

    a ← d·a + (1 − d)·w,  d = min(decay, (1 + n) / (10 + n)) after step n

The rise of d is TensorFlow's: the average forgets the first weights soon, however short the run is. It is an entry of
the optimiser's state, so it is saved, checked and loaded as moments are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

KEY = "average"


class WeightAverage:
    """The average of the weights of ``optimizer``.

    Args:
        decay: in (0, 1).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._optimizer, self._decay = optimizer, decay

    def update(self, step: int) -> None:
        """Call it after each step, with the number of the steps done. Does not synchronise with the device."""
        state = self._optimizer.state
        if not state:  # until the first step that was not skipped: in fp16 that takes a few
            return
        if any(KEY not in each for each in state.values()):
            for weight, each in state.items():
                each[KEY] = weight.detach().clone()
            return
        averages: list[Tensor] = [each[KEY] for each in state.values()]
        get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))(averages, list(state), 0)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the weights to their average. Before the first step there is none, and they stay."""
        for weight, each in self._optimizer.state.items():
            if KEY in each:
                weight.copy_(each[KEY])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are their average inside the context, and the same bits as before after it."""
        weights = [weight for weight, each in self._optimizer.state.items() if KEY in each]
        kept = [weight.detach().clone() for weight in weights]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(value)
