"""A small call of every public operator: ``CALLS[name]()`` gives the function and its arguments, tensors among them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from oracle import DEVICE

from fusebert.kernels import (
    attention,
    attention_varlen,
    attention_varlen_separate,
    bias_gelu,
    cross_entropy,
    dropout_add_layernorm,
    embed_layernorm,
    layernorm,
    masked_lm_loss,
    rmsnorm,
)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def ids(count: int, below: int) -> torch.Tensor:
    return torch.randint(0, below, (count,), device=DEVICE)


def packed() -> dict[str, Any]:
    return {"cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE), "max_seqlen_q": 4}


def masked_lm() -> dict[str, Any]:
    return {
        "hidden": floats(3, 8),
        "weight": floats(11, 8),
        "bias": floats(11),
        "labels": ids(3, 11),
        "max_labels": 3,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
    }


DROPOUT = {"dropout_p": 0.1, "seed": 3}
CALLS = {
    "attention": lambda: (
        attention,
        {name: floats(1, 2, 4, 16) for name in "qkv"}
        | {"key_padding_mask": torch.ones(1, 4, dtype=torch.bool, device=DEVICE), "scale": 0.5, **DROPOUT},
    ),
    "attention_varlen": lambda: (
        attention_varlen,
        {"qkv": floats(4, 3, 2, 16), **{key.removesuffix("_q"): x for key, x in packed().items()}, **DROPOUT},
    ),
    "attention_varlen_separate": lambda: (
        attention_varlen_separate,
        {name: floats(4, 2, 16) for name in "qkv"}
        | {**packed(), **{key.replace("_q", "_k"): x for key, x in packed().items() if key != "cu_seqlens_q"}}
        | {"cu_seqlens_k": packed()["cu_seqlens_q"], **DROPOUT},
    ),
    "dropout_add_layernorm": lambda: (
        dropout_add_layernorm,
        {"x": floats(3, 8), "residual": floats(3, 8), "weight": floats(8), "bias": floats(8)}
        | {"linear_bias": floats(8), "p": 0.1, "seed": 3, "eps": 1e-5},
    ),
    "layernorm": lambda: (layernorm, {"x": floats(3, 8), "weight": floats(8), "bias": floats(8), "eps": 1e-5}),
    "rmsnorm": lambda: (rmsnorm, {"x": floats(3, 8), "weight": floats(8), "eps": 1e-5}),
    "bias_gelu": lambda: (bias_gelu, {"x": floats(3, 8), "bias": floats(8)}),
    "masked_lm_loss": lambda: (masked_lm_loss, masked_lm()),
    "masked_lm_loss, lean": lambda: (functools.partial(masked_lm_loss, lean=True), masked_lm()),
    "cross_entropy": lambda: (
        cross_entropy,
        {"logits": floats(3, 11), "labels": ids(3, 11), "label_smoothing": 0.1, "z_loss": 0.1},
    ),
    "embed_layernorm": lambda: (
        embed_layernorm,
        {"input_ids": ids(3, 5), "token_type_ids": ids(3, 2), "position_ids": ids(3, 4)}
        | {"word_weight": floats(5, 8), "token_type_weight": floats(2, 8), "position_weight": floats(4, 8)}
        | {"norm_weight": floats(8), "norm_bias": floats(8), "eps": 1e-5, "p": 0.1, "seed": 3},
    ),
}
