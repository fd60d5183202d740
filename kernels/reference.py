"""The specification of every operator, in plain, differentiable PyTorch.

In float64 these functions are the oracle that the kernels are checked against. They also serve CPU tensors, so they use
PyTorch's fused operators where those compute the same thing.

Where an operator drops elements, ``dropout_mask`` (bool, True = kept) replaces PyTorch's own draw. With the mask of
`fusebert.kernels.dropout_mask` or `attention_dropout_mask` a function here replays a kernel's dropout exactly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .torch_dropout import draws_here, keep_scale


def dropout(x: Tensor, p: float, dropout_mask: Tensor | None = None) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014): kept elements are scaled by 1 / (1 − p), dropped ones are 0.

    Args:
        x: any shape. dropout_mask: bool, x's shape.
    """
    if p == 0.0:
        return x
    if dropout_mask is not None:
        return x * dropout_mask / (1.0 - p)
    return x * keep_scale(x, p) if draws_here(x, p) else F.dropout(x, p)


def widest(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the widest of their dtypes: float32 parameters with bfloat16 activations compute in float32."""
    dtype = x.dtype
    for parameter in parameters:
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    return (x.to(dtype), *(None if parameter is None else parameter.to(dtype) for parameter in parameters))


def zeros_of(x: Tensor) -> Tensor:
    """Zeros of x's shape, also where x is not finite, for which autograd gives x zero gradients."""
    return x.masked_fill(x.new_ones((), dtype=torch.bool), 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ · scale)V and its log-sum-exp for each head (Vaswani et al. 2017, eq. 1), without a causal mask.

    Args:
        q: [B, H, N_q, D]. k, v: [B, H_k, N_k, D], H a multiple of H_k (grouped queries share a key head).
        key_padding_mask: bool [B, N_k], True where a key is real. A query without a real key gives zeros.
        scale: 1/√D when None.
        dropout_mask: bool [B, H, N_q, N_k].
        window: query i attends to key j only where |i − j| ≤ window. None: no limit.

    Returns:
        (out [B, H, N_q, D], lse [B, H, N_q]: natural log of the softmax denominator, −inf where no key is real).
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * scale) @ k.transpose(-1, -2)  # [B, H, N_q, N_k]
    if key_padding_mask is None and window is None and k.shape[2] > 0:
        lse = torch.logsumexp(scores, dim=-1)  # [B, H, N_q]
        probabilities = torch.softmax(scores, dim=-1)  # [B, H, N_q, N_k]
    else:
        real = torch.ones_like(scores, dtype=torch.bool)  # [B, H, N_q, N_k]
        if key_padding_mask is not None:
            real = real & key_padding_mask[:, None, None, :]
        if window is not None:
            i, j = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
            real = real & ((i[:, None] - j).abs() <= window)
        lse = torch.logsumexp(scores.masked_fill(~real, -math.inf), dim=-1)
        # Fill with a finite number first, then with zeros: a row without a real key has no NaN and no gradient.
        finite = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
        probabilities = torch.softmax(finite, dim=-1).masked_fill(~real, 0.0)
    return dropout(probabilities, dropout_p, dropout_mask) @ v, lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_masks: list[Tensor] | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` over packed segments: segment s is rows cu_seqlens[s] … cu_seqlens[s+1] − 1.

    Args:
        q: [T_q, H, D]. k, v: [T_k, H_k, D]. cu_seqlens_q, cu_seqlens_k: int32 [S + 1], from 0, never falling.
        dropout_masks: bool [H, n_q, n_k] for each segment.

    Returns:
        (out [T_q, H, D], lse [H, T_q]). Rows after the last segment are zeros, their lse −inf.
    """
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, T, D]
    outs, lses = [], []
    for s in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(bounds_q[s], bounds_q[s + 1]), slice(bounds_k[s], bounds_k[s + 1])
        out, lse = attention(
            q[None, :, rows_q],
            k[None, :, rows_k],
            v[None, :, rows_k],
            scale=scale,
            dropout_p=dropout_p,
            dropout_mask=None if dropout_masks is None else dropout_masks[s][None],
            window=window,
        )
        outs.append(out[0])
        lses.append(lse[0])
    rest = zeros_of(q[:, bounds_q[-1] :])
    outs.append(rest)
    lses.append(torch.full_like(rest[..., 0], -math.inf))
    return torch.cat(outs, dim=1).transpose(0, 1), torch.cat(lses, dim=1)


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over the last axis, var the mean squared deviation (Ba et al. 2016).

    Args:
        x: [.., H]. weight, bias: [H], or None for 1 and 0.

    Returns:
        [.., H] of the widest of the dtypes.
    """
    x, weight, bias = widest(x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rmsnorm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x / √(⟨x²⟩ + eps) · weight over the last axis (Zhang and Sennrich 2019). Args, Returns: as in `layernorm`."""
    x, weight = widest(x, weight)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def dropout_add(
    x: Tensor,
    residual: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    p: float = 0.0,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """residual + Dropout(x + linear_bias), in x's dtype. x, residual: [.., H]; linear_bias: [H]."""
    if linear_bias is not None:
        x = (x + linear_bias).to(x.dtype)
    x = dropout(x, p, dropout_mask)
    return x if residual is None else residual + x


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    eps: float,
    p: float = 0.0,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + Dropout(x + linear_bias)), the end of each BERT sub-layer (Devlin et al. 2018).

    Args:
        x, residual: [.., H]. weight, bias, linear_bias: [H]. dropout_mask: bool [.., H].
    """
    s = dropout_add(x, residual, linear_bias=linear_bias, p=p, dropout_mask=dropout_mask)
    return layernorm(s, weight, bias, eps=eps)


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """−Σ_w y_w log p(w) + z_loss · lse² for each row, y = (1 − label_smoothing) · onehot + label_smoothing / V.

    Args:
        logits: [M, V]. labels: int64 [M].

    Returns:
        [M], 0 where the label is ``ignore_index``. float32 or wider: bfloat16 near 10 has steps of 0.06.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        penalty = z_loss * torch.logsumexp(logits, dim=-1).square()
        losses = losses + penalty.masked_fill(labels == ignore_index, 0.0)
    return losses


def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of hidden @ weightᵀ + bias over the rows with a label other than ``ignore_index``.

    Args:
        hidden: [T, H]. weight: [V, H]. bias: [V] or None. labels: int64 [T].
        reduction: "mean" over the labelled rows (0 when there are none), "sum", or "none" ([T], 0 where ignored).
        chunk_rows: compute the logits of at most so many labelled rows at a time, and recompute them in the backward.
            None, and always under torch.compile: all at once.

    Returns:
        (loss, int64 scalar: number of labelled rows with the label as arg max, ties going to the first column).
    """
    labelled = labels != ignore_index
    if torch.compiler.is_compiling():
        rows = torch.arange(labels.shape[0], device=labels.device)  # every row: a compiled graph has constant shapes
    else:
        rows = torch.nonzero(labelled).squeeze(-1)  # [M]: only labelled rows are multiplied by weight
    hidden, targets = hidden[rows], labels[rows]  # [M, H], [M]

    def rows_loss(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)  # [M, V]
        losses = cross_entropy_rows(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
        return losses, ((logits.detach().argmax(-1) == targets) & (targets != ignore_index)).sum()

    if chunk_rows is None or targets.shape[0] <= chunk_rows or torch.compiler.is_compiling():
        losses, correct = rows_loss(hidden, targets)
    else:
        chunks = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
        results = [checkpoint(rows_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        losses, correct = torch.cat([loss for loss, _ in results]), sum(right for _, right in results)
    if reduction == "none":
        return losses.new_zeros(labels.shape).index_put((rows,), losses), correct
    total = losses.sum()
    return total / labelled.sum().clamp(min=1) if reduction == "mean" else total, correct


def embed_layernorm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    token_type_weight: Tensor,
    position_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    p: float = 0.0,
    padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Dropout(LayerNorm(word + token type + position)), BERT's input (Devlin et al. 2018, figure 2).

    Args:
        input_ids, token_type_ids, position_ids: integers [..].
        word_weight, token_type_weight, position_weight: [V, H], [token types, H], [positions, H].
        norm_weight, norm_bias: [H], or None for 1 and 0.
        padding_idx: the row of word_weight that gets no gradient.
        out_dtype: the dtype of the result; the tables' when None.
        dropout_mask: bool [.., H].
    """
    s = F.embedding(input_ids, word_weight, padding_idx) + F.embedding(token_type_ids, token_type_weight)  # [.., H]
    s = s + F.embedding(position_ids, position_weight)
    y = layernorm(s, norm_weight, norm_bias, eps=eps)
    return dropout(y.to(word_weight.dtype if out_dtype is None else out_dtype), p, dropout_mask)


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: str = "none") -> Tensor:
    """GELU(x + bias) by the error function or by tanh (Hendrycks and Gimpel 2016). x: [.., I]; bias: [I] or None."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)
