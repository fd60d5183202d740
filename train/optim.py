"""BERT's optimiser: AdamW that spares biases and LayerNorms from the decay, and warm-up then linear decay to zero.

AdamW (Loshchilov & Hutter 2019) for a parameter w with gradient g, and the rate when a share x of the run is done:

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w ← w − lr·(m̂ / (√v̂ + ε) + λw)
    lr(x) = peak · min(x / warmup, (1 − x) / (1 − warmup))
"""

from __future__ import annotations

import torch
from torch import nn

BETAS = (0.9, 0.999)
EPS = 1e-6  # BERT's; Adam's usual 1e-8 is below what bf16-sized gradients can tell from zero


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two AdamW groups: matrices and embeddings decay, what has one axis (biases, LayerNorm weights) does not."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, PyTorch's fused kernel (one pass over the parameters, on CPU and GPU)."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, eps=EPS, fused=True)


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """The rate when ``progress`` (0 … 1) of the run is done: up to ``peak`` over the first ``warmup`` of it, then
    linearly down to 0 at its end."""
    rise = progress / warmup if warmup > 0.0 else 1.0
    return peak * max(0.0, min(rise, (1.0 - progress) / (1.0 - warmup)))


__all__ = ["learning_rate", "make_optimizer", "parameter_groups"]
