"""What LAMB and Muon share: checks of their options, Adam's state, and a step that takes a GradScaler's findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeviceOptimizer(torch.optim.Optimizer):
    """An optimiser with a step that does not synchronise, so that a CUDA graph can hold it."""

    # With this GradScaler passes found_inf as a device tensor, without a host sync.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Parameters without a gradient do not change. Does not synchronise."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step of all groups.

        Args:
            grad_scale: [], what the gradients are divided by; None: 1.
            found_inf: [], 1.0 if a gradient is not finite, then nothing changes; None: the gradients are finite.
        """
        raise NotImplementedError

    def adam_state(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(exp_avg, exp_avg_sq, step) of ``params``; zeros before their first step."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        exp_avg, exp_avg_sq, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        return exp_avg, exp_avg_sq, steps


def check_options(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raises ValueError if an option of Adam's is out of range."""
    for name, value, right, allowed in (
        ("lr", float(lr), lr >= 0.0, "at least 0"),
        ("betas", betas, all(0.0 <= beta < 1.0 for beta in betas), "in [0, 1)"),
        ("eps", eps, eps > 0.0, "positive"),
        ("weight_decay", weight_decay, weight_decay >= 0.0, "at least 0"),
    ):
        if not right:
            raise ValueError(f"{name} must be {allowed}; got {value}")
