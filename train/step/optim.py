"""BERT's optimiser: AdamW or LAMB, sparing biases and LayerNorms the decay; warm-up, then linear decay to zero.

AdamW (Loshchilov & Hutter 2019) for a parameter w with gradient g, and the rate when a share x of the run is done:

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w ← w − lr·(m̂ / (√v̂ + ε) + λw)
    lr(x) = peak · min(x / warmup, (1 − x) / (1 − warmup))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .lamb import LAMB

OPTIMIZERS = ("adamw", "lamb")
BETAS = (0.9, 0.999)
EPS = 1e-6  # BERT's, and LAMB's; Adam's usual 1e-8 is below what bf16-sized gradients can tell from zero


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings decay, what has one axis (biases, LayerNorm weights) does not."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, name: str = "adamw") -> torch.optim.Optimizer:
    """AdamW (PyTorch's fused kernel: one pass over the parameters, on CPU and GPU) or `LAMB` over `parameter_groups`.

    On a GPU the rate is a tensor there, which a CUDA graph reads anew at each replay: see `set_learning_rate`.

    Raises:
        ValueError: another ``name``.
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
    """Sets every group's rate, in place where it is a tensor. Waits for nothing."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """The rate when ``progress`` (0 … 1) of the run is done: up to ``peak`` over the first ``warmup`` of it, then
    linearly down to 0 at its end."""
    rise = progress / warmup if warmup > 0.0 else 1.0
    return peak * max(0.0, min(rise, (1.0 - progress) / (1.0 - warmup)))


__all__ = ["OPTIMIZERS", "learning_rate", "make_optimizer", "parameter_groups", "set_learning_rate"]
