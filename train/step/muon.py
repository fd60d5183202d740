"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for everything else, as one optimiser.

For a matrix W (rows × columns) with gradient G:

    M ← μM + (1 − μ)G                    momentum
    U = orthogonal((1 − μ)G + μM)        Nesterov; UUᵀ ≈ I: all singular values become about 1
    W ← W − lr · (scale · 0.2·√max(rows, columns) · U + λW)

The factor 0.2·√max gives the update the root mean square that AdamW's has (Liu et al. 2025, arXiv 2502.16982), so that
both share one learning rate and λ. `orthogonalize` runs five Newton-Schulz iterations. PyTorch's Muon runs them in
bf16, which a CPU multiplies slowly, one matrix at a time, and takes no other parameters. Here matrices of one shape are
one batched product, in the dtype of the step, and a CPU iterates on the smaller Gram matrix where that is less work.

A parameter may hold several matrices one below another, as ``qkv`` does: each is made orthogonal by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from .cautious import KEY, agrees, decay_cautiously
from .device_optimizer import DeviceOptimizer, check_options

# Jordan et al. 2024: they maximise the slope at 0, and map singular values in (0, 1] to about 0.7 … 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # of AdamW's update, as measured by Liu et al.
EPS = 1e-7  # of the norm that the first iteration divides by


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrices UVᵀ of the singular value decompositions UΣVᵀ of ``matrices``, to about 30 %.

        X ← X/‖X‖;  five times: A = XXᵀ,  P = aI + bA + cA²,  X ← PX

    Every P is a polynomial of the first A, so they commute, and X need not be multiplied five times: A ← PAP, at the
    end X ← P₅P₄P₃P₂P₁X ("Gram Newton-Schulz", Zhang, Amsel, Chen & Dao 2026). For m × rm matrices this takes 2r + 17
    products of m × m instead of 10r + 5: 25 instead of 45 for a feed-forward layer. A rounding error of the first A
    grows by a² an iteration, to eps · a⁸: 1e-3 in float32. So 16 bits do not use it, nor GPUs, which may multiply in
    TF32.

    Args:
        matrices: [count, rows, columns].
        dtype: of the products; None: that of ``matrices``.

    Returns:
        [count, rows, columns], in the dtype of ``matrices``.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype or matrices.dtype)
    x = x.mT if tall else x  # so that XXᵀ is the smaller of the two products
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    exact = x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    if exact and x.shape[2] >= 2 * x.shape[1]:
        x = _product_of_polynomials(x @ x.mT) @ x
    else:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _product_of_polynomials(gram: Tensor) -> Tensor:
    """P₅P₄P₃P₂P₁ of `orthogonalize`, [count, m, m], for A of the first iteration."""
    a, b, c = COEFFICIENTS
    product = None
    for iteration in range(ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if iteration < ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product


class Muon(DeviceOptimizer):
    """Muon for groups with ``"muon": True``, AdamW for the others; their weights are float32.

    Its state is ``momentum`` for a matrix, and AdamW's ``exp_avg``, ``exp_avg_sq``, ``step`` for any other parameter.

    Args:
        params: groups. Those of matrices may have ``"blocks"``, the number of matrices in each parameter. Any may have
            ``"cautious_decay"``, λ of the decay of `cautious`, beside a weight decay of 0.
        lr: a float, or a tensor on the parameters' device that a captured step reads.
        weight_decay: λ of groups without their own.
        momentum: μ.
        scale: of the matrices' update.
        dtype: of Muon's products; None: float32.

    Raises:
        ValueError: an option is out of range, or a parameter of a Muon group is not a matrix of that many blocks.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(lr, betas, eps, weight_decay)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1); got {momentum}")
        if not scale > 0.0:
            raise ValueError(f"scale must be positive; got {scale}")
        self.dtype = dtype
        # fused makes load_state_dict keep AdamW's step counts on the parameters' device.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        defaults |= {"muon": False, "blocks": 1, "momentum": momentum, "scale": scale, KEY: 0.0}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else []:
                if p.ndim != 2 or p.shape[0] % group["blocks"]:
                    raise ValueError(f"params has {tuple(p.shape)} in a group of {group['blocks']} matrices each")

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and not group["muon"]:
                self._adamw(group, params, grad_scale, found_inf)
        matrices = [group for group in self.param_groups if group["muon"]]
        self._muon(matrices, grad_scale, found_inf)

    def _adamw(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        exp_avg, exp_avg_sq, steps = self.adam_state(params)
        beta1, beta2 = group["betas"]
        if group[KEY]:
            decay_cautiously(params, exp_avg, beta1, group["lr"] * group[KEY], grad_scale, found_inf)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            exp_avg,
            exp_avg_sq,
            [],
            steps,
            fused=True,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, groups: Sequence[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        work = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
        updates: dict[tuple[int, ...], list[Tensor]] = {}  # matrices of one shape, whichever parameter they are of
        for group, p in work:
            gradient = p.grad if grad_scale is None else p.grad / grad_scale
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"]
            if found_inf is not None:  # then the step changes nothing, without a host sync
                gradient = torch.where(found_inf.bool(), momentum, gradient)
            momentum.lerp_(gradient, 1.0 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"]).view(group["blocks"], -1, p.shape[1])
            updates.setdefault(update.shape[1:], []).extend(update.unbind())
        orthogonal = {
            shape: iter(orthogonalize(torch.stack(each), self.dtype).unbind()) for shape, each in updates.items()
        }
        for group, p in work:
            shape = p.shape[0] // group["blocks"], p.shape[1]
            lr = group["lr"] if found_inf is None else group["lr"] * (1.0 - found_inf)
            update = torch.cat([next(orthogonal[shape]) for _ in range(group["blocks"])])
            decay = p * agrees(update, p) if group[KEY] else p
            update.mul_(group["scale"] * RMS * max(shape) ** 0.5).add_(decay, alpha=group[KEY] or group["weight_decay"])
            p.sub_(update.mul_(lr))
