"""Cautious weight decay (Chen et al. 2025, arXiv 2510.12402): only where it does not act against the update.

For a weight w with an optimiser's update u, where AdamW has w ← w − lr·(u + λw):

    w ← w − lr·(u + λw·[uw ≥ 0])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

KEY = "cautious_decay"  # of a parameter group: λ


def agrees(update: Tensor, p: Tensor) -> Tensor:
    """[uw ≥ 0], elementwise, without a product that could underflow."""
    return update.sign() * p.sign() >= 0.0


@torch.no_grad()
def decay_cautiously(
    params: Iterable[Tensor],
    exp_avg: Iterable[Tensor | None],
    beta1: float,
    amount: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The decay of one step of AdamW, before the step, in place.

    AdamW's update has the sign of its new first moment, β₁m + (1 − β₁)g, which is computed here once more.

    Args:
        params: with gradients.
        exp_avg: m of each, None before the first step.
        amount: lr·λ.
        grad_scale, found_inf: as in `DeviceOptimizer.update`.
    """
    if found_inf is not None:
        amount = amount * (1.0 - found_inf)
    for p, m in zip(params, exp_avg, strict=True):
        if p.grad is None:
            continue
        g = p.grad if grad_scale is None else p.grad / grad_scale
        update = g if m is None else m.lerp(g, 1.0 - beta1)
        p.sub_(p * agrees(update, p) * amount)


def before_adamw(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook of ``torch.optim.AdamW``, for `Optimizer.register_step_pre_hook`: decays the groups with `KEY`."""
    found_inf = getattr(optimizer, "found_inf", None)
    grad_scale = getattr(optimizer, "grad_scale", None)
    for group in optimizer.param_groups:
        if group.get(KEY):
            moments = [optimizer.state[p].get("exp_avg") if p in optimizer.state else None for p in group["params"]]
            amount = group["lr"] * group[KEY]
            decay_cautiously(group["params"], moments, group["betas"][0], amount, grad_scale, found_inf)
