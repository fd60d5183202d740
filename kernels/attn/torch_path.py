"""Attention by PyTorch's own operators, for tensors that the kernels do not take: on a CPU, or float64.

``scaled_dot_product_attention`` computes what it can; `reference` the rest: a window, a seeded mask, the log-sum-exp. A
seed gives the same dropout mask as the kernels. Autograd differentiates all of it.
"""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..checks import segment_lengths
from .dropout_tile import attention_dropout_mask

# Scores of padding a segment up to which, with dropout, one call for all segments is faster than a call for each: then
# PyTorch has no fused kernel on a CPU, and a segment costs as much as about 900 scores before its first. Measured.
WORTH_PADDING = 500


def padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int | Tensor | None,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) for q [B, H, N_q, D] and k, v [B, H_k, N_k, D]."""
    b, h, n_q, _ = q.shape
    n_k = k.shape[2]
    if window is None and not return_lse and (seed is None or dropout_p == 0.0):
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=bool(h != k.shape[1])
        ), None
    kept = None
    if dropout_p > 0.0 and seed is not None:
        kept = attention_dropout_mask(dropout_p, seed, n_q, n_k, b * h, q.device).view(b, h, n_q, n_k)
    return reference.attention(
        q, k, v, key_padding_mask=key_padding_mask, scale=scale, dropout_p=dropout_p, dropout_mask=kept, window=window
    )


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    seed: int | Tensor | None,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) for q [T_q, H, D] and k, v [T_k, H_k, D]."""
    if window is None and not return_lse and (seed is None or dropout_p == 0.0):
        if torch.compiler.is_compiling():
            return _padded_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, dropout_p), None
        return _segment_by_segment(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, dropout_p), None
    kept = None
    if dropout_p > 0.0 and seed is not None:
        num_segments, h = cu_seqlens_q.numel() - 1, q.shape[1]
        planes = attention_dropout_mask(dropout_p, seed, max_q, max_k, num_segments * h, q.device)
        lengths = zip(segment_lengths(cu_seqlens_q), segment_lengths(cu_seqlens_k), strict=True)
        kept = [planes[s * h : (s + 1) * h, :n_q, :n_k] for s, (n_q, n_k) in enumerate(lengths)]
    return reference.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, dropout_p=dropout_p, dropout_masks=kept, window=window
    )


def packed_qkv(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: int | Tensor | None,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) for qkv [T, 3, H, D]."""
    q, k, v = qkv.unbind(1)
    segments = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return packed(q, k, v, *segments, scale, dropout_p, seed, window, return_lse)


def _segment_by_segment(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """One call per segment, which on a CPU is faster than padding; a single call for equal or short segments."""
    lengths_q, lengths_k = segment_lengths(cu_seqlens_q), segment_lengths(cu_seqlens_k)
    rest_q, rest_k = q.shape[0] - sum(lengths_q), k.shape[0] - sum(lengths_k)  # rows after the last segment
    sdpa = functools.partial(
        F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1])
    )
    if rest_q == rest_k == 0 and len(set(lengths_q)) == len(set(lengths_k)) == 1 and lengths_q[0] and lengths_k[0]:
        batch = [x.unflatten(0, (len(lengths_q), -1)).transpose(1, 2) for x in (q, k, v)]  # each [S, h, n, D]
        return sdpa(*batch).transpose(1, 2).flatten(0, 1)

    longest_q, longest_k = max(lengths_q), max(lengths_k)
    scores = sum(map(operator.mul, lengths_q, lengths_k))
    if dropout_p > 0.0 and longest_q * longest_k - scores / len(lengths_q) < WORTH_PADDING:
        real_q, real_k = (_real_slots(x, n) for x, n in ((cu_seqlens_q, longest_q), (cu_seqlens_k, longest_k)))
        out = sdpa(_spread(q, real_q), _spread(k, real_k), _spread(v, real_k), attn_mask=real_k[:, None, None])
        out = out.transpose(1, 2).flatten(0, 1).index_select(0, real_q.flatten().nonzero().squeeze(-1))
        return torch.cat([out, reference.zeros_of(q[q.shape[0] - rest_q :])]) if rest_q else out

    def split(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        return x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)  # each [1, h, n, D]

    *queries, rest = split(q, [*lengths_q, rest_q])
    keys, values = split(k, [*lengths_k, rest_k])[:-1], split(v, [*lengths_k, rest_k])[:-1]
    outs = [
        sdpa(x, y, z) if y.shape[2] else reference.zeros_of(x)
        for x, y, z in zip(queries, keys, values, strict=True)
        if x.shape[2]
    ]
    if rest_q or not outs:
        outs.append(reference.zeros_of(rest))
    return torch.cat([x.transpose(1, 2) for x in outs], dim=1)[0]  # SDPA's memory is [1, n, h, D]


def _real_slots(cu_seqlens: Tensor, longest: int) -> Tensor:
    """bool [S, longest]: the slots of segments, padded to ``longest``, that hold a row."""
    return torch.arange(longest, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]


def _spread(x: Tensor, real: Tensor) -> Tensor:
    """[S, h, longest, D] from rows [T, h, D]: those of the segments in the slots of ``real`` [S, longest], else 0."""
    slots = real.flatten().nonzero().squeeze(-1)
    padded = x.new_zeros(real.numel(), *x.shape[1:]).index_copy(0, slots, x[: len(slots)])
    return padded.unflatten(0, real.shape).transpose(1, 2)


def _padded_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Pads all segments to max_q and max_k: no shape depends on a value, so it compiles without a graph break."""

    def pad(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        slots = torch.arange(longest, device=x.device)
        rows = (cu_seqlens[:-1, None] + slots).clamp(max=x.shape[0] - 1)  # [S, longest]
        real = slots < cu_seqlens.diff()[:, None]  # other rows may hold NaN
        return torch.where(real[..., None, None], x[rows], 0.0).transpose(1, 2)  # [S, h, longest, D]

    real = torch.arange(max_k, device=q.device) < cu_seqlens_k.diff()[:, None]  # [S, max_k]
    out = F.scaled_dot_product_attention(
        pad(q, cu_seqlens_q, max_q),
        pad(k, cu_seqlens_k, max_k),
        pad(v, cu_seqlens_k, max_k),
        attn_mask=real[:, None, None, :],
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=bool(q.shape[1] != k.shape[1]),
    ).transpose(1, 2)  # [S, max_q, h, D]
    rows = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens_q.dtype)
    segment = torch.bucketize(rows, cu_seqlens_q[1:], right=True)  # [T_q]; S after the last segment
    in_range = segment.clamp(max=cu_seqlens_q.numel() - 2)
    out = out[in_range, (rows - cu_seqlens_q[in_range]).clamp(max=max_q - 1)]  # [T_q, h, D]
    return torch.where((segment == in_range)[:, None, None], out, 0.0)
