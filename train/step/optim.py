"""BERT's optimiser: AdamW, LAMB or Muon, no decay of biases and LayerNorms; the learning rate's schedules.

AdamW (Loshchilov & Hutter 2019) for a parameter w with gradient g:

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w ← w − lr·(m̂ / (√v̂ + ε) + λw)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...model.encoder import BertEncoder, BertLayer
from . import cautious
from .lamb import LAMB
from .muon import Muon

OPTIMIZERS = ("adamw", "lamb", "muon")
# The learning rate after the warm-up, as a share of its peak, by the share y of the remaining run that is done.
# linear: Devlin et al. 2018. cosine: Loshchilov & Hutter 2017. wsd: Hu et al. 2024 (arXiv 2404.06395), linear decay.
COOLDOWN = 0.2  # of the run, in which wsd decays
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, warmup: (1.0 - x) / (1.0 - warmup),
    "cosine": lambda x, warmup: 0.5 + 0.5 * math.cos(math.pi * (x - warmup) / (1.0 - warmup)),
    "wsd": lambda x, warmup: (1.0 - x) / min(COOLDOWN, 1.0 - warmup),
    "constant": lambda x, warmup: 1.0,
}
BETAS = (0.9, 0.999)
EPS = 1e-6  # as in BERT and LAMB; Adam's default of 1e-8 is below the resolution of bf16 gradients


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings, which decay; vectors (biases, LayerNorm weights), which do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """The groups of `parameter_groups` of each layer, with the learning rate times layer_decay^d (Clark et al. 2020).

    d is 0 in the head, 1 in the last layer, L in the first, and L + 1 in the embeddings.
    """
    encoder: BertEncoder = model.encoder  # type: ignore[assignment]
    parts: list[nn.Module] = [encoder.embeddings, *encoder.layers]
    parts.append(nn.ModuleList(child for child in model.children() if child is not encoder))
    scales = [layer_decay**d for d in reversed(range(len(parts)))]
    groups = [
        {**group, "lr_scale": scale}
        for part, scale in zip(parts, scales, strict=True)
        for group in parameter_groups(part, weight_decay)
    ]
    return [group for group in groups if group["params"]]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The groups of `parameter_groups`, and before them two of the matrices of the layers, for `Muon`."""
    layers = [layer for layer in model.modules() if isinstance(layer, BertLayer)]
    stacked = [layer.qkv.weight for layer in layers]
    single = [each.weight for layer in layers for each in (layer.attention_output, layer.intermediate, layer.output)]
    taken = set(stacked + single)
    matrices, vectors = parameter_groups(model, weight_decay)
    rest = [p for p in matrices["params"] if p not in taken]  # type: ignore[attr-defined]
    muon = {"muon": True, "weight_decay": weight_decay}
    return [
        {"params": stacked, "blocks": 3, **muon},
        {"params": single, **muon},
        {"params": rest, "weight_decay": weight_decay},
        vectors,
    ]


def make_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    name: str = "adamw",
    *,
    muon_scale: float = 1.0,
    muon_dtype: torch.dtype | None = None,
    layer_decay: float = 1.0,
    cautious_decay: bool = False,
) -> torch.optim.Optimizer:
    """AdamW or `LAMB` over `parameter_groups`, or `Muon` over `muon_groups`.

    AdamW is PyTorch's fused kernel: one pass over the parameters. On a GPU the learning rate is a tensor on the device,
    so that a CUDA graph reads its current value at each replay: see `set_learning_rate`.

    Args:
        model: on its device.
        lr: learning rate.
        name: one of `OPTIMIZERS`.
        muon_scale, muon_dtype: `Muon`'s ``scale`` and ``dtype``.
        layer_decay: see `layer_groups`; 1: one learning rate for all. AdamW only.
        cautious_decay: the weight decay is that of `cautious`. Not with LAMB, which scales update and decay together.

    Raises:
        ValueError: ``name`` has another value, or is "lamb" with ``cautious_decay``.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    if cautious_decay and name == "lamb":
        raise ValueError("cautious_decay is not possible with lamb")
    rate: float | Tensor = torch.tensor(lr, device=device) if on_gpu else lr
    if name == "muon":
        groups = _cautious(muon_groups(model, weight_decay), cautious_decay)
        return Muon(groups, lr=rate, betas=BETAS, eps=EPS, scale=muon_scale, dtype=muon_dtype)
    groups = parameter_groups(model, weight_decay)
    if name == "lamb":
        return LAMB(groups, lr=rate, betas=BETAS, eps=EPS)
    if layer_decay != 1.0:
        groups = layer_groups(model, weight_decay, layer_decay)
        if on_gpu:
            groups = [{**group, "lr": torch.tensor(lr, device=device)} for group in groups]
    groups = _cautious(groups, cautious_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPS, fused=True, capturable=on_gpu)
    if cautious_decay:
        optimizer.register_step_pre_hook(cautious.before_adamw)
    return optimizer


def _cautious(groups: list[dict[str, object]], wanted: bool) -> list[dict[str, object]]:
    """``groups`` with their weight decay as a cautious one, if it is ``wanted``."""
    if not wanted:
        return groups
    return [{**group, cautious.KEY: group["weight_decay"], "weight_decay": 0.0} for group in groups]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, in place if it is a tensor. Does not synchronise."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(peak: float, progress: float, warmup: float, schedule: str = "linear") -> float:
    """The learning rate at ``progress`` (0 … 1) of the run.

    It rises linearly to ``peak`` at ``warmup``. After that, with x for ``progress`` and w for ``warmup``:

        linear      peak · (1 − x) / (1 − w)
        cosine      peak · (1 + cos(π(x − w) / (1 − w))) / 2
        wsd         peak · min(1, (1 − x) / c), the last share c = min(0.2, 1 − w) of the run falls
        constant    peak
    """
    rise = progress / warmup if warmup > 0.0 else 1.0
    if progress >= 1.0 and schedule != "constant":
        return 0.0
    after = SCHEDULES[schedule](progress, warmup) if progress > warmup else 1.0
    return peak * max(0.0, min(rise, 1.0, after))
