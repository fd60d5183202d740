"""What the ahead-of-time tables compile: every operator, forward and backward, at the shapes that matter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch

from ...kernels import bias_gelu, dropout_add_layernorm, embed_layernorm, layernorm, masked_lm_loss
from ..operators.gelu_epilogue_kernels import TILINGS, gelu_linear, linear_gelu
from . import attention_cases


def _dropout_add_layernorm(hidden_size: int, p: float, biased: bool, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(64, hidden_size, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, linear_bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(3))
    y = dropout_add_layernorm(x, residual, weight, bias, linear_bias=linear_bias if biased else None, p=p, seed=1)
    y.sum().backward()


def _layernorm(hidden_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(64, hidden_size, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(2))
    layernorm(x, weight, bias).sum().backward()


def _bias_gelu(width: int, approximate: Literal["none", "tanh"], dtype: torch.dtype) -> None:
    x = torch.randn(64, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(width, requires_grad=True)
    bias_gelu(x, bias, approximate=approximate).sum().backward()


def _linear_gelu(hidden_size: int, tiling: str, dtype: torch.dtype) -> None:
    x, weight = (torch.empty(rows, hidden_size, dtype=dtype) for rows in (64, 4 * hidden_size))
    linear_gelu(x, weight, torch.empty(4 * hidden_size), tiling=tiling)


def _gelu_linear(hidden_size: int, tiling: str, dtype: torch.dtype) -> None:
    x, weight = (torch.empty(rows, 4 * hidden_size, dtype=dtype, requires_grad=True) for rows in (64, hidden_size))
    bias = torch.empty(4 * hidden_size, requires_grad=True)
    gelu_linear(x, weight, bias, tiling=tiling).backward(torch.empty(64, hidden_size, dtype=dtype))


def _embed_layernorm(hidden_size: int, p: float, dtype: torch.dtype) -> None:
    words, types, positions = (torch.randn(rows, hidden_size, requires_grad=True) for rows in (100, 2, 64))
    weight, bias = (torch.randn(hidden_size, requires_grad=True) for _ in range(2))
    ids = torch.zeros(64, dtype=torch.int64)
    out = embed_layernorm(ids, ids, ids, words, types, positions, weight, bias, eps=1e-12, p=p, seed=1, out_dtype=dtype)
    out.sum().backward()


def _masked_lm_loss(vocab_size: int, hidden_size: int, dtype: torch.dtype, **options: Any) -> None:
    hidden = torch.randn(32, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, dtype=dtype, requires_grad=True)
    bias = torch.zeros(vocab_size, dtype=dtype, requires_grad=True)
    loss: Any = masked_lm_loss(hidden, weight, bias, torch.arange(32), **options)
    loss.sum().backward()


def cases(arch: int, dtype: torch.dtype = torch.bfloat16, *, heaviest: bool = False) -> dict[str, Callable[[], None]]:
    """Name → a call of an operator, to be made within `compiled_kernels`.

    Args:
        heaviest: of attention, only one variant for each entry of its tables.
    """
    found = attention_cases.cases(arch, heaviest=heaviest)

    def add(name: str, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        found[name] = functools.partial(call, *arguments, dtype, **options)

    for hidden_size in (256, 768, 1000, 1024, 4096, 5120, 8192, 16384):
        for p, biased in itertools.product((0.0, 0.1), (False, True)):
            name = f"dropout_add_layernorm H={hidden_size} dropout={p}" + (" linear_bias" if biased else "")
            add(name, _dropout_add_layernorm, hidden_size, p, biased)
        add(f"layernorm H={hidden_size}", _layernorm, hidden_size)
    add("embed_layernorm H=768 dropout=0.1", _embed_layernorm, 768, 0.1)
    add("bias_gelu I=3072 erf", _bias_gelu, 3072, "none")
    add("bias_gelu I=3072 tanh", _bias_gelu, 3072, "tanh")
    for hidden_size, tiling in itertools.product((768, 1024), TILINGS):
        add(f"linear_gelu H={hidden_size} {tiling}", _linear_gelu, hidden_size, tiling)
        add(f"gelu_linear H={hidden_size} {tiling}", _gelu_linear, hidden_size, tiling)
    # The chunked kernels do not depend on the hidden size; it is a constant of the lean ones.
    for vocab_size in (8192, 30522):
        add(f"masked_lm_loss V={vocab_size}", _masked_lm_loss, vocab_size, 64)
    add("masked_lm_loss V=30522 smoothing", _masked_lm_loss, 30522, 64, label_smoothing=0.1)
    add("masked_lm_loss V=30522 per row", _masked_lm_loss, 30522, 64, reduction="none")
    for hidden_size in (256, 768, 1024, 4096):
        add(f"masked_lm_loss lean H={hidden_size}", _masked_lm_loss, 30522, hidden_size, lean=True)
    smoothed = {"label_smoothing": 0.1, "z_loss": 1e-4}
    add("masked_lm_loss lean H=768 options", _masked_lm_loss, 30522, 768, lean=True, **smoothed)
    add("masked_lm_loss lean H=768 skipping", _masked_lm_loss, 30522, 768, lean=True, skip_tolerance=0.002)
    return found
