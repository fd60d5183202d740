"""BERT's optimiser: AdamW or LAMB, no decay of biases and LayerNorms; linear warm-up, then linear decay to zero.

AdamW (Loshchilov & Hutter 2019) for a parameter w with gradient g, and the learning rate at progress x of the run:

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w ← w − lr·(m̂ / (√v̂ + ε) + λw)
    lr(x) = peak · min(x / warmup, (1 − x) / (1 − warmup))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .lamb import LAMB

OPTIMIZERS = ("adamw", "lamb")
BETAS = (0.9, 0.999)
EPS = 1e-6  # as in BERT and LAMB; Adam's default of 1e-8 is below the resolution of bf16 gradients


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings, which decay; vectors (biases, LayerNorm weights), which do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, name: str = "adamw") -> torch.optim.Optimizer:
    """AdamW or `LAMB` over `parameter_groups`. AdamW is PyTorch's fused kernel: one pass over the parameters.

    On a GPU the learning rate is a tensor on the device, so that a CUDA graph reads its current value at each replay:
    see `set_learning_rate`.

    Args:
        model: on its device.
        lr: learning rate.
        name: "adamw" or "lamb".

    Raises:
        ValueError: ``name`` has another value.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    rate: float | Tensor = torch.tensor(lr, device=device) if on_gpu else lr
    groups = parameter_groups(model, weight_decay)
    if name == "lamb":
        return LAMB(groups, lr=rate, betas=BETAS, eps=EPS)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPS, fused=True, capturable=on_gpu)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, in place if it is a tensor. Does not synchronise."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """The learning rate at ``progress`` (0 … 1) of the run: rises linearly to ``peak`` at ``warmup``, then falls
    linearly to 0 at 1."""
    rise = progress / warmup if warmup > 0.0 else 1.0
    return peak * max(0.0, min(rise, (1.0 - progress) / (1.0 - warmup)))
