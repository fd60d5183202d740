"""Bidirectional attention for padded batches and packed segments: the public calls. Equations: README.md."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from ..backend import choose_backend, in_autocast_dtype
from ..checks import (
    check_attention_options,
    check_cu_seqlens,
    check_key_padding_mask,
    check_max_seqlen,
    check_packed_qkv,
    check_separate_qkv,
)
from . import op, torch_path


def _scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


def _result(out_and_lse: tuple[Tensor, Tensor | None], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = out_and_lse
    return (out, lse.detach()) if return_lse and lse is not None else out


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(QKᵀ · scale) V for each sequence and head of a padded batch, without a causal mask.

    Args:
        q: [B, H, N_q, D], bfloat16, float16 or float32 (float64 is computed by PyTorch), any strides, D at most 256.
        k, v: [B, H_k, N_k, D], q's dtype. H is a multiple of H_k: each group of H / H_k query heads shares a key head.
        key_padding_mask: bool [B, N_k], True where a key is real. Padding is not attended to. A query without a real
            key gives zeros and has zero gradients.
        scale: multiplies the scores, positive. None: 1/√D.
        dropout_p: probability of dropping an attention weight, in [0, 1). Pass 0 when not training.
        seed: int; or int64 tensor of one element on q's device, which the kernel reads, so that a replayed CUDA graph
            may change it; or None, to draw one from torch's generator. The mask is
            ``attention_dropout_mask(dropout_p, seed, N_q, N_k, planes=B·H)``, plane b·H + h.
        window: query i attends to key j only where |i − j| ≤ window (N_q = N_k). None: no limit.
        return_lse: return also the log of each query's softmax denominator, which is not differentiable.

    Returns:
        out [B, H, N_q, D], in memory [B, N_q, H, D]. With return_lse (out, lse): lse float32 [B, H, N_q], −inf where no
        key is real.

    Raises:
        TypeError: a dtype or a Python type is not one of the above. The message names the argument.
        ValueError: a shape, a device or a value is not one of the above. The message names the argument.

    Source: Vaswani et al. 2017, "Attention is all you need", eq. 1.
    """
    check_separate_qkv(q, k, v, "[B, H, N, D]")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch size, {q.shape[0]}; got {k.shape[0]}")
    check_attention_options(scale, dropout_p, seed, window, q.device)
    if window is not None and q.shape[2] != k.shape[2]:
        raise ValueError(f"window needs as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
    check_key_padding_mask(key_padding_mask, q, k)
    q, k, v = in_autocast_dtype(q, k, v)
    path = torch_path if choose_backend(q) == "reference" else op
    options = (_scale(scale, q.shape[-1]), dropout_p, seed, window, return_lse)
    return _result(path.padded(q, k, v, key_padding_mask, *options), return_lse)


@overload
def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each segment of a packed batch, which has no padding. Reads qkv as its projection wrote it.

    Args:
        qkv: [T, 3, H, D]: queries, keys and values of T rows; dtypes and D as in `attention`.
        cu_seqlens: int32 [S + 1] on qkv's device. It starts at 0 and never falls: segment s is rows cu_seqlens[s] …
            cu_seqlens[s + 1] − 1. Segments may be empty. Rows after the last segment have zero output and gradients.
            On a GPU the values are not checked, because that would synchronise: no value makes the kernels read or
            write outside their tensors.
        max_seqlen: at least the rows of the longest segment. On a GPU a longer segment has NaN output.
        scale, dropout_p, seed, window, return_lse: as in `attention`. The dropout mask's plane is s·H + h.

    Returns:
        out [T, H, D], contiguous. With return_lse (out, lse): lse float32 [H, T], defined for the rows of segments.

    Raises:
        TypeError, ValueError: as in `attention`.
    """
    check_packed_qkv(qkv)
    check_attention_options(scale, dropout_p, seed, window, qkv.device)
    check_cu_seqlens("cu_seqlens", cu_seqlens, qkv.shape[0], "qkv", qkv)
    check_max_seqlen("max_seqlen", max_seqlen, cu_seqlens)
    (qkv,) = in_autocast_dtype(qkv)
    path = torch_path if choose_backend(qkv) == "reference" else op
    options = (_scale(scale, qkv.shape[-1]), dropout_p, seed, window, return_lse)
    return _result(path.packed_qkv(qkv, cu_seqlens, max_seqlen, *options), return_lse)


@overload
def attention_varlen_separate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen_separate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen_separate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_varlen` for q, k and v in three tensors: with rotary positions, grouped heads or different lengths.

    Args:
        q: [T_q, H, D]; dtypes and D as in `attention`.
        k, v: [T_k, H_k, D], H a multiple of H_k.
        cu_seqlens_q, max_seqlen_q: the queries' segments, as in `attention_varlen`.
        cu_seqlens_k, max_seqlen_k: the keys' segments, as many as the queries'. None: the queries' segments. A query
            without a key in its segment gives zeros.
        scale, dropout_p, seed, window, return_lse: as in `attention_varlen`. A window needs cu_seqlens_k None.

    Returns:
        out [T_q, H, D], contiguous. With return_lse (out, lse): lse float32 [H, T_q].

    Raises:
        TypeError, ValueError: as in `attention`.
    """
    check_separate_qkv(q, k, v, "[T, H, D]")
    check_attention_options(scale, dropout_p, seed, window, q.device)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k must be given together; got one of them")
    if window is not None and cu_seqlens_k is not None:
        raise ValueError("window needs the queries' own segments: leave cu_seqlens_k and max_seqlen_k out")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q", q)
    check_max_seqlen("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    if cu_seqlens_k is None or max_seqlen_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"k must have q's rows, {q.shape[0]}, where cu_seqlens_k is not given; got {k.shape[0]}")
    else:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], "q", q)
        check_max_seqlen("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"cu_seqlens_k must have as many segments as cu_seqlens_q, {cu_seqlens_q.numel() - 1}; got "
                f"{cu_seqlens_k.numel() - 1}"
            )
    q, k, v = in_autocast_dtype(q, k, v)
    path = torch_path if choose_backend(q) == "reference" else op
    options = (_scale(scale, q.shape[-1]), dropout_p, seed, window, return_lse)
    return _result(path.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options), return_lse)
