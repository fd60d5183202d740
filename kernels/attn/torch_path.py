"""Attention by PyTorch's own operators, for tensors that the kernels do not take: on a CPU, or float64.

``scaled_dot_product_attention`` computes what it can; `reference` the rest: a window, a seeded mask, the log-sum-exp. A
seed gives the same dropout mask as the kernels. Autograd differentiates all of it.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..checks import segment_lengths
from ..torch_dropout import draws_here
from .dropout_tile import attention_dropout_mask

# Scores of padding a segment up to which one call for all segments is faster than a call for each. Measured on a CPU,
# with and without dropout, forward and backward.
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
        return attend(q, k, v, mask, dropout_p, scale), None
    kept = None
    if dropout_p > 0.0 and seed is not None:
        kept = attention_dropout_mask(dropout_p, seed, n_q, n_k, b * h, q.device).view(b, h, n_q, n_k)
    return reference.attention(
        q, k, v, key_padding_mask=key_padding_mask, scale=scale, dropout_p=dropout_p, dropout_mask=kept, window=window
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
    """Attention [B, H, N_q, D] of q [B, H, N_q, D] to k, v [B, H_k, N_k, D]; its memory is often [B, N_q, H, D].

    SDPA has no fused kernel for dropout on a CPU: its products, softmax and dropout are written here with faster masks.

    Args:
        mask: None; bool, True where a query attends to a key; or a term that is added to the scores. It broadcasts, and
            in a term each query must have a key, which SDPA would look for.
        scale: multiplies the scores; None: 1/√D.
    """
    groups = q.shape[1] // k.shape[1]
    has_keys = mask is None or mask.dtype != torch.bool
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if dropout_p > 0.0 and has_keys and q.dtype == torch.float32 and draws_here(q, dropout_p):
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q * scale) @ k.transpose(-1, -2)  # [B, H, N_q, N_k]
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return reference.dropout(weights, dropout_p) @ v
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=bool(groups != 1)
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
    lengths = zip(segment_lengths(cu_seqlens_q), segment_lengths(cu_seqlens_k), strict=True)
    pairs = [pair for pair in lengths if any(pair)] or [(0, 0)]  # a batch of static shape ends with empty segments
    lengths_q, lengths_k = ([pair[i] for pair in pairs] for i in range(2))
    rest_q, rest_k = q.shape[0] - sum(lengths_q), k.shape[0] - sum(lengths_k)  # rows after the last segment
    attend_to = functools.partial(attend, dropout_p=dropout_p, scale=scale)
    if rest_q == rest_k == 0 and len(set(lengths_q)) == len(set(lengths_k)) == 1 and lengths_q[0] and lengths_k[0]:
        batch = [x.unflatten(0, (len(lengths_q), -1)).transpose(1, 2) for x in (q, k, v)]  # each [S, h, n, D]
        return attend_to(*batch, mask=None).transpose(1, 2).flatten(0, 1)

    longest_q, longest_k = max(lengths_q), max(lengths_k)
    scores = sum(map(operator.mul, lengths_q, lengths_k))
    if longest_q * longest_k - scores / len(lengths_q) < WORTH_PADDING and min(lengths_q) and min(lengths_k):
        rows_q, slots = _padding(tuple(lengths_q), q.device, q.dtype)[:2]
        rows_k, _, mask = _padding(tuple(lengths_k), k.device, k.dtype)
        out = attend_to(
            *(_spread(x, rows, len(lengths_q)) for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k))),
            mask=mask,
        )
        out = out.transpose(1, 2).flatten(0, 1).index_select(0, slots)
        return torch.cat([out, reference.zeros_of(q[q.shape[0] - rest_q :])]) if rest_q else out

    def split(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        return x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)  # each [1, h, n, D]

    *queries, rest = split(q, [*lengths_q, rest_q])
    keys, values = split(k, [*lengths_k, rest_k])[:-1], split(v, [*lengths_k, rest_k])[:-1]
    outs = [
        attend_to(x, y, z, mask=None) if y.shape[2] else reference.zeros_of(x)
        for x, y, z in zip(queries, keys, values, strict=True)
        if x.shape[2]
    ]
    if rest_q or not outs:
        outs.append(reference.zeros_of(rest))
    return torch.cat([x.transpose(1, 2) for x in outs], dim=1)[0]  # SDPA's memory is [1, n, h, D]


@functools.lru_cache(maxsize=4)  # every layer has the same segments
def _padding(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Segments, none empty, padded to the longest: the row of each slot [S·longest], the slot of each row [T], and the
    term that masks the keys of slots without a row, [S, 1, 1, longest]. SDPA would make it of a bool mask at each call.

    A slot of padding repeats the last row of its own segment: NaN in another segment cannot reach it.
    """
    with torch.inference_mode(False):  # autograd saves these tensors, also if the first call is without it
        n = torch.tensor(lengths, device=device)[:, None]  # [S, 1]
        position = torch.arange(max(lengths), device=device)
        real = position < n
        rows = n.cumsum(0) - n + torch.minimum(position, n - 1)
        mask = torch.zeros(real.shape, device=device, dtype=dtype).masked_fill(~real, -math.inf)
        return rows.flatten(), real.flatten().nonzero().squeeze(-1), mask[:, None, None]


def _spread(x: Tensor, rows: Tensor, segments: int) -> Tensor:
    """[S, h, longest, D]: the ``rows`` of x [T, h, D]."""
    return x.index_select(0, rows).unflatten(0, (segments, -1)).transpose(1, 2)


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
