"""LAMB (You et al. 2019, algorithm 2): Adam with a step length for each matrix, for batches of 10,000s of examples.

    m ← β₁m + (1 − β₁)g      v ← β₂v + (1 − β₂)g²      r = m̂ / (√v̂ + ε) + λw
    w ← w − lr · (‖w‖ / ‖r‖) · r

The ratio is 1 if ‖w‖ or ‖r‖ is 0, and for parameters without decay (biases, LayerNorms), as in the authors' code.
PyTorch has no LAMB; those of timm and pytorch-optimizer read the step count and the loss scale on the host, so they
cannot be captured in a CUDA graph. This one uses PyTorch's multi-tensor kernels, about 80 bytes a parameter. One fused
pass (28 bytes, as in AdamW) is not possible, because the update needs the norms first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .device_optimizer import DeviceOptimizer, check_options


class LAMB(DeviceOptimizer):
    """LAMB over float32 parameters. Its state has AdamW's names: exp_avg, exp_avg_sq, step.

    Args:
        lr: a float, or a tensor on the parameters' device that a captured step reads.
        weight_decay: λ of groups without their own; groups with 0 use Adam's step.

    Raises:
        ValueError: lr, β, ε or λ is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        check_options(lr, betas, eps, weight_decay)
        # capturable makes load_state_dict keep the step counts on the parameters' device.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": True}
        super().__init__(params, defaults)

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update_group(group, params, grad_scale, found_inf)

    def _update_group(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        m, v, steps = self.adam_state(params)
        (beta1, beta2), lr = group["betas"], group["lr"]
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
        squares: list[Tensor] = list(torch._foreach_mul(grads, grads))
        if found_inf is None:
            torch._foreach_add_(steps, 1)
        else:
            # On overflow the step must be a no-op, without a host sync: m and v are updated with themselves, lr is 0.
            overflow = found_inf.bool()
            grads = [torch.where(overflow, old, new) for old, new in zip(m, grads, strict=True)]
            squares = [torch.where(overflow, old, new) for old, new in zip(v, squares, strict=True)]
            torch._foreach_add_(steps, 1.0 - found_inf)
            lr = lr * (1.0 - found_inf)
        torch._foreach_lerp_(m, grads, 1.0 - beta1)
        torch._foreach_lerp_(v, squares, 1.0 - beta2)
        # Bias corrections 1 − β^step, in float64 because they start near 0. The clamp is for an overflow in step 1.
        step = steps[0].double().clamp(min=1.0)
        update = torch._foreach_div(v, 1.0 - beta2**step)
        torch._foreach_sqrt_(update)
        torch._foreach_add_(update, group["eps"])
        torch._foreach_mul_(update, 1.0 - beta1**step)
        torch._foreach_reciprocal_(update)
        torch._foreach_mul_(update, m)  # m̂ / (√v̂ + ε)
        if group["weight_decay"] > 0.0:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            w_norm, r_norm = (torch.stack(torch._foreach_norm(each)) for each in (params, update))
            ratio = torch.where((w_norm > 0.0) & (r_norm > 0.0), w_norm / r_norm, 1.0)
            torch._foreach_mul_(update, list(ratio.unbind()))
        torch._foreach_mul_(update, lr)
        torch._foreach_sub_(params, update)
