"""The masked-LM loss for `fusebert.bench.aot`: its calls, forward and backward, at the shapes that matter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...kernels import masked_lm_loss


def _call(vocab_size: int, hidden_size: int, dtype: torch.dtype, **options: Any) -> None:
    hidden = torch.randn(32, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, dtype=dtype, requires_grad=True)
    bias = torch.zeros(vocab_size, dtype=dtype, requires_grad=True)
    loss: Any = masked_lm_loss(hidden, weight, bias, torch.arange(32), **options)
    loss.sum().backward()


def cases(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Name -> a call. Only the lean kernels have the hidden size among their constants."""
    found: dict[str, Callable[[], None]] = {}
    for vocab_size in (8192, 30522):
        found[f"masked_lm_loss V={vocab_size}"] = functools.partial(_call, vocab_size, 64, dtype)
    found["masked_lm_loss V=30522 smoothing"] = functools.partial(_call, 30522, 64, dtype, label_smoothing=0.1)
    found["masked_lm_loss V=30522 per row"] = functools.partial(_call, 30522, 64, dtype, reduction="none")
    for hidden_size in (256, 768, 1024, 4096):
        found[f"masked_lm_loss lean H={hidden_size}"] = functools.partial(_call, 30522, hidden_size, dtype, lean=True)
    options = {"label_smoothing": 0.1, "z_loss": 1e-4}
    found["masked_lm_loss lean H=768 options"] = functools.partial(_call, 30522, 768, dtype, lean=True, **options)
    found["masked_lm_loss lean H=768 skipping"] = functools.partial(
        _call, 30522, 768, dtype, lean=True, skip_tolerance=0.002
    )
    return found


__all__ = ["cases"]
