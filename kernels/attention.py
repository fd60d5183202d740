"""Bidirectional attention, forward and backward, for packed segments and for padded batches.

For every segment and head, with S = scale · QKᵀ and Z the dropout mask (0 or 1, P(Z = 1) = 1 − p), c = 1 / (1 − p):

    forward     L_i = log Σ_j exp S_ij        P_ij = exp(S_ij − L_i)        O = c (P∘Z) V
    backward    dV = c (P∘Z)ᵀ dO              dP = c Z ∘ (dO Vᵀ)            δ_i = Σ_j P_ij dP_ij = Σ_d dO_id O_id
                dS = P ∘ (dP − δ)             dQ = scale · dS K             dK = scale · dSᵀ Q

(Vaswani et al. 2017, eq. 1; Dao 2023, "FlashAttention-2", algorithms 1 and 2.) The scores never reach memory: the
forward keeps a row's maximum and log₂ of its sum, 8 bytes, and the backward recomputes P from them (not from L, which
rounds at the size of the scores: in float32 that is a larger error than PyTorch's). Z is drawn again from the seed.
c leaves every loop: with dP' = Z ∘ (dO Vᵀ) and δ' = δ / c, dS = c P ∘ (dP' − δ'), so c and scale multiply the finished
sums. Exponentials are base 2, with log₂e folded into the scale, because that is the instruction the hardware has.

Two routes, by shape: `attention_short` and `attention_long`. N rows a segment, D a head, e bytes an element; per
segment and head:

    route                 programs over                  FLOPs      bytes through HBM              the floor
    short forward         (segment, head)                 4 N²D      4 NDe + 8 N                    the same
    short backward        (segment, head)                10 N²D      7 NDe + 8 N                    the same
    long forward          (query tile, segment, head)     4 N²D      4 NDe + 8 N                    the same
    long backward, dQ     (query tile, segment, head)     6 N²D      6 NDe + 12 N }                 10 N²D FLOPs,
    long backward, dK dV  (key tile, segment, key head)   8 N²D      6 NDe + 12 N }                  7 NDe + 8 N

(the long route reads K and V, or Q and dO, once a tile more, from L2). Short is for segments that fit in one tile,
which BERT's often do; the long backward trades two more matrix products for the same absence of atomics. Either
way every gradient has one owner, so the same inputs give the same bits.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import attention_config, attention_fallback
from ._triton import triton
from .attention_long import long_backward_dk_dv, long_backward_dq, long_forward
from .attention_short import short_backward, short_forward
from .backend import choose_backend
from .dropout import keep_threshold, resolve_seed

MAX_HEAD_DIM = 256
NO_WINDOW = -1  # what the operators take for window=None


# ------------------------------------------------------------------------------------------------------------- launcher
#
# Packed tensors are [T, H, D] and come with cu_seqlens, padded ones [B, H, N, D] without. The statistics of a query, m
# and log₂ l, have the same axes, rows last: [2, H, T] and [2, B, H, N]. The kernels see both as (origin, row, head).


class _Problem(NamedTuple):
    """One call, as both directions need it. ``max_q``, ``max_k``: no segment is longer."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    scale: float
    dropout_p: float
    window: int

    @property
    def programs(self) -> int:
        """Segments that get programs: packed, one more, for the rows behind the last."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel()

    @property
    def empty(self) -> bool:
        """Nothing to compute or to write."""
        return self.q.numel() + self.k.numel() == 0

    def short_forward(self) -> attention_config.Config | None:
        return attention_config.short_forward(self.q.shape[-1], self.max_q, self.max_k, self.q.dtype)

    def short_backward(self) -> attention_config.Config | None:
        groups = self.q.shape[1] // self.k.shape[1]
        return attention_config.short_backward(self.q.shape[-1], self.max_q, self.max_k, groups, self.q.dtype)

    def arguments(self, config: attention_config.Config) -> dict[str, Any]:
        """What every kernel takes."""
        rows = 0 if self.cu_seqlens_q is not None else 2
        head_dim = self.q.shape[-1]
        precision = "tf32" if self.q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
        return {
            "cu_seqlens_q_ptr": self.cu_seqlens_q,
            "cu_seqlens_k_ptr": self.cu_seqlens_k,
            "key_mask_ptr": self.key_mask,
            "seed_ptr": self.seed,
            "num_segments": self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1,
            "num_heads": self.q.shape[1],
            "num_q": self.q.shape[rows],
            "num_k": self.k.shape[rows],
            "window": self.window,
            "scale": self.scale,
            "p_threshold": keep_threshold(self.dropout_p),
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
            "GROUPS": self.q.shape[1] // self.k.shape[1],
            "D": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "VARLEN": self.cu_seqlens_q is not None,
            "MASKED": self.key_mask is not None,
            "WINDOW": self.window != NO_WINDOW,
            "DROPOUT": self.dropout_p > 0.0,
            "EXACT": self.q.dtype == torch.float32,
            "PRECISION": precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(origin, row, head) strides of [T, H, D] or [B, H, N, D]."""
    return (x.stride(0), x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(2), x.stride(1))


def _stats_strides(stats: Tensor) -> tuple[int, int, int]:
    """(m to l, origin, head) strides of [2, H, T] or [2, B, H, N]."""
    return (stats.stride(0), 1 if stats.dim() == 3 else stats.stride(1), stats.stride(-2))


def _forward(a: _Problem, out: Tensor, stats: Tensor) -> None:
    """Writes out and stats."""
    if a.empty:
        return
    tensors = (a.q, a.k, a.v, out, stats)
    strides = {"q_strides": _strides(a.q), "k_strides": _strides(a.k), "v_strides": _strides(a.v)}
    strides |= {"out_strides": _strides(out), "stats_strides": _stats_strides(stats)}
    heads = a.programs * a.q.shape[1]
    if config := a.short_forward():
        short_forward[(heads,)](*tensors, **strides, max_q=a.max_q, max_k=a.max_k, **a.arguments(config))
    else:
        config = attention_config.long_forward(a.q.shape[-1], a.q.dtype)
        num_tiles = triton.cdiv(max(a.max_q, 1), config.block_m)
        long_forward[(num_tiles * heads,)](
            *tensors, **strides, num_tiles=num_tiles, max_q=a.max_q, max_k=a.max_k, **a.arguments(config)
        )


def _backward(a: _Problem, out: Tensor | None, stats: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq, dk and dv. ``out`` is read by the long route alone."""
    if a.empty:
        return
    of_q, of_k = {"q_strides": _strides(a.q)}, {"k_strides": _strides(a.k), "v_strides": _strides(a.v)}
    strides = {**of_q, **of_k, "dout_strides": _strides(dout), "stats_strides": _stats_strides(stats)}
    to_q, to_k = {"dq_strides": _strides(dq)}, {"dk_strides": _strides(dk), "dv_strides": _strides(dv)}
    heads, key_heads = a.programs * a.q.shape[1], a.programs * a.k.shape[1]
    if config := a.short_backward():
        short_backward[(heads,)](
            a.q, a.k, a.v, dout, dq, dk, dv, stats, **strides, **to_q, **to_k, **a.arguments(config)
        )  # fmt: skip
        return
    assert out is not None
    delta = torch.empty_like(stats[0])
    config = attention_config.long_backward_dq(a.q.shape[-1], a.q.dtype)
    num_tiles = triton.cdiv(max(a.max_q, 1), config.block_m)
    long_backward_dq[(num_tiles * heads,)](
        a.q, a.k, a.v, out, dout, dq, stats, delta,
        out_strides=_strides(out), num_tiles=num_tiles, **strides, **to_q, **a.arguments(config),
    )  # fmt: skip
    config = attention_config.long_backward_dk_dv(a.q.shape[-1], a.q.dtype)
    num_tiles = triton.cdiv(max(a.max_k, 1), config.block_n)
    long_backward_dk_dv[(num_tiles * key_heads,)](
        a.q, a.k, a.v, dout, dk, dv, stats, delta, num_tiles=num_tiles, **strides, **to_k, **a.arguments(config)
    )


# ------------------------------------------------------------------------------------------------------------ operators
#
# Two, because gradients want the layout their tensor has: dqkv is written as [T, 3, H, D], where autograd, given three
# views, would gather three gradients in a pass of its own.


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_query(q: Tensor) -> Tensor:
    """Uninitialised, as q; memory is [.., rows, heads, D] whatever q's, which is what the next projection reads."""
    if q.dim() == 3:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    b, h, n, d = q.shape
    return torch.empty((b, n, h, d), dtype=q.dtype, device=q.device).transpose(1, 2)


def _new_stats(q: Tensor) -> Tensor:
    shape = (2, q.shape[1], q.shape[0]) if q.dim() == 3 else (2, *q.shape[:-1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _lse(stats: Tensor, scale: float) -> Tensor:
    """L = scale · m + ln l; not differentiable."""
    m, log2_l = stats.detach().unbind(0)
    return scale * m + math.log(2.0) * log2_l


@torch.library.custom_op("fusebert::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """(out, stats) of separate q, k, v, packed or padded."""
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    out, stats = _like_query(q), _new_stats(q)
    problem = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, seed, max_q, max_k, scale, dropout_p, window)
    with torch.cuda.device_of(q):
        _forward(problem, out, stats)
    return out, stats


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_query(q), _new_stats(q)


@torch.library.custom_op("fusebert::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    window: int,
    out: Tensor | None,
    stats: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dout = _dense_rows(q), _dense_rows(k), _dense_rows(v), _dense_rows(dout)
    dq, dk, dv = _like_query(q), _like_query(k), _like_query(v)
    problem = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, seed, max_q, max_k, scale, dropout_p, window)
    with torch.cuda.device_of(q):
        _backward(problem, out, stats, dout, dq, dk, dv)
    return dq, dk, dv


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_query(q), _like_query(k), _like_query(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    problem = _Problem(*inputs)
    out, stats = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*problem[:7], out if problem.short_backward() is None else None, stats)
    ctx.constants = problem[7:]


def _attention_gradients(ctx: Any, dout: Tensor | None, _dstats: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, stats = ctx.saved_tensors
    if dout is None:
        return (None,) * len(_Problem._fields)
    gradients = _attention_backward(*tensors, *ctx.constants, out, stats, dout)
    return *gradients, *(None,) * (len(_Problem._fields) - 3)


_attention.register_autograd(_attention_gradients, setup_context=_save)


@torch.library.custom_op("fusebert::attention_qkv", mutates_args=())
def _attention_qkv(
    qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, scale: float, dropout_p: float, window: int
) -> tuple[Tensor, Tensor]:
    """(out, stats) of packed self-attention on [T, 3, H, D]."""
    q, k, v = _dense_rows(qkv).unbind(1)
    out, stats = _like_query(q), _new_stats(q)
    cu = cu_seqlens
    problem = _Problem(q, k, v, cu, cu, None, seed, max_seqlen, max_seqlen, scale, dropout_p, window)
    with torch.cuda.device_of(q):
        _forward(problem, out, stats)
    return out, stats


@_attention_qkv.register_fake
def _(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_query(qkv[:, 0]), _new_stats(qkv[:, 0])


@torch.library.custom_op("fusebert::attention_qkv_backward", mutates_args=())
def _attention_qkv_backward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    window: int,
    out: Tensor | None,
    stats: Tensor,
    dout: Tensor,
) -> Tensor:
    q, k, v = _dense_rows(qkv).unbind(1)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    cu = cu_seqlens
    problem = _Problem(q, k, v, cu, cu, None, seed, max_seqlen, max_seqlen, scale, dropout_p, window)
    with torch.cuda.device_of(q):
        _backward(problem, out, stats, _dense_rows(dout), *dqkv.unbind(1))
    return dqkv


@_attention_qkv_backward.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, seed, max_seqlen, *_ = inputs
    out, stats = output
    needs_out = attention_config.short_backward(qkv.shape[-1], max_seqlen, max_seqlen, 1, qkv.dtype) is None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cu_seqlens, seed, out if needs_out else None, stats)
    ctx.constants = inputs[3:]


def _attention_qkv_gradients(ctx: Any, dout: Tensor | None, _dstats: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, cu_seqlens, seed, out, stats = ctx.saved_tensors
    if dout is None:
        return (None,) * 7
    return _attention_qkv_backward(qkv, cu_seqlens, seed, *ctx.constants, out, stats, dout), *(None,) * 6


_attention_qkv.register_autograd(_attention_qkv_gradients, setup_context=_save_qkv)


# --------------------------------------------------------------------------------------------------------------- checks


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As ``scaled_dot_product_attention`` is under autocast: in its dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _check_tensors(**tensors: Tensor) -> None:
    """Floating point, one dtype, one device, a head the kernels can hold."""
    (name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {first.dtype}")
    for other, x in others:
        if x.dtype != first.dtype:
            raise TypeError(f"{other} must have {name}'s dtype, {first.dtype}; got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{other} must be on {name}'s device, {first.device}; got {x.device}")
    if not 1 <= first.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"the head size (last axis of {name}) must be 1 … {MAX_HEAD_DIM}; got {first.shape[-1]}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head size, {q.shape[-1]}; got {k.shape[-1]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q's heads must be a multiple of k's; got {q.shape[1]} and {k.shape[1]}")


def _check_options(scale: float | None, head_dim: int, dropout_p: float, window: int | None) -> float:
    """The scale to use."""
    keep_threshold(dropout_p)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 0):
        raise ValueError(f"window must be None or an int of at least 0; got {window!r}")
    if scale is not None and not scale > 0.0:
        raise ValueError(f"scale must be positive; got {scale!r}")
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


def _check_cu_seqlens(
    name: str, cu_seqlens: Tensor, total: int, max_name: str, max_seqlen: int, device: torch.device
) -> None:
    """Shape and dtype always; the content where reading it costs no synchronisation."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must have shape [S + 1], S at least 1; got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on {device}; got {cu_seqlens.device}")
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool) or max_seqlen < 1:
        raise ValueError(f"{max_name} must be an int of at least 1; got {max_seqlen!r}")
    if device.type != "cpu" or torch.compiler.is_compiling() or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > total or lengths.min() < 0:
        raise ValueError(
            f"{name} must start at 0, never fall and end at most at {total}, the number of rows; got "
            f"{cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else cu_seqlens}"
        )
    if lengths.max() > max_seqlen:
        raise ValueError(f"{max_name} is {max_seqlen}, but the longest segment has {int(lengths.max())} rows")


# --------------------------------------------------------------------------------------------------------------- public


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
    """softmax(QKᵀ · scale)V for each sequence and head of a padded batch, without a causal mask (module docstring).

    Args:
        q: [B, H, N_q, D], bfloat16, float16, float32 (float64: by PyTorch), any strides, D at most 256.
        k, v: [B, H_k, N_k, D], q's dtype. H is a multiple of H_k: each group of H / H_k heads shares a key head.
        key_padding_mask: bool [B, N_k], True where a key is real. Padding is not attended to; a query without any
            real key gives zeros and has zero gradients.
        scale: multiplies the scores, positive; 1/√D when None.
        dropout_p: probability of dropping an attention weight, in [0, 1). Pass 0 when not training.
        seed: int, or int64 tensor of one element on q's device (read by the kernel, so a replayed CUDA graph may
            change it), or None: drawn from torch's generator. The mask is `dropout_mask(dropout_p, seed, N_q, N_k,
            planes=B·H)`, plane b·H + h.
        window: query i attends to key j only where |i − j| ≤ window (N_q = N_k); None: no limit.
        return_lse: return also the log of each query's softmax denominator, not differentiable.

    Returns:
        out [B, H, N_q, D], whose memory is [B, N_q, H, D]; with return_lse (out, lse float32 [B, H, N_q], −inf where
        no key is real).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit; the message names the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape [B, H, N, D]; got {tuple(x.shape)}")
    _check_tensors(q=q, k=k, v=v)
    _check_heads(q, k, v)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch size, {q.shape[0]}; got {k.shape[0]}")
    scale = _check_options(scale, q.shape[-1], dropout_p, window)
    if window is not None and q.shape[2] != k.shape[2]:
        raise ValueError(f"window needs as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, True where a key is real; got {key_padding_mask.dtype}")
        if key_padding_mask.shape != (k.shape[0], k.shape[2]) or key_padding_mask.device != q.device:
            raise ValueError(
                f"key_padding_mask must have shape {(k.shape[0], k.shape[2])} and be on {q.device}; got "
                f"{tuple(key_padding_mask.shape)} on {key_padding_mask.device}"
            )
    q, k, v = _under_autocast(q, k, v)
    if choose_backend(q) == "reference":
        out, lse = attention_fallback.padded(q, k, v, key_padding_mask, scale, dropout_p, seed, window, return_lse)
    else:
        mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
        drawn = resolve_seed(seed, q.device) if dropout_p > 0.0 else None
        limit = NO_WINDOW if window is None else window
        out, stats = _attention(q, k, v, None, None, mask, drawn, q.shape[2], k.shape[2], scale, dropout_p, limit)
        lse = _lse(stats, scale) if return_lse else None
    return (out, lse.detach()) if return_lse and lse is not None else out


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
    """`attention` within each segment of a packed batch: no padding exists. Reads qkv as its projection wrote it.

    Args:
        qkv: [T, 3, H, D]: queries, keys and values of T rows.
        cu_seqlens: int32 [S + 1] on qkv's device, from 0, never falling: segment s is rows cu_seqlens[s] …
            cu_seqlens[s + 1] − 1. Segments may be empty. Rows behind the last are in no segment: their output and
            gradients are zeros. On a GPU the content is not checked, for that would synchronise: no content makes
            the kernels read or write outside their tensors.
        max_seqlen: no segment is longer. On a GPU the output of one that is longer is NaN.
        scale, dropout_p, seed, window, return_lse: as in `attention`. Dropout's plane is s·H + h.

    Returns:
        out [T, H, D], contiguous; with return_lse (out, lse float32 [H, T], defined for the rows of segments).

    Raises:
        ValueError, TypeError: as in `attention`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [T, 3, H, D]; got {tuple(qkv.shape)}")
    _check_tensors(qkv=qkv)
    scale = _check_options(scale, qkv.shape[-1], dropout_p, window)
    _check_cu_seqlens("cu_seqlens", cu_seqlens, qkv.shape[0], "max_seqlen", max_seqlen, qkv.device)
    (qkv,) = _under_autocast(qkv)
    if choose_backend(qkv) == "reference":
        q, k, v = qkv.unbind(1)
        cu, longest = cu_seqlens, max_seqlen
        out, lse = attention_fallback.packed(
            q, k, v, cu, cu, longest, longest, scale, dropout_p, seed, window, return_lse
        )
    else:
        drawn = resolve_seed(seed, qkv.device) if dropout_p > 0.0 else None
        limit = NO_WINDOW if window is None else window
        out, stats = _attention_qkv(qkv, cu_seqlens.contiguous(), drawn, max_seqlen, scale, dropout_p, limit)
        lse = _lse(stats, scale) if return_lse else None
    return (out, lse.detach()) if return_lse and lse is not None else out


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
    """`attention_varlen` for q, k and v in tensors of their own: rotated, grouped, or of different lengths.

    Args:
        q: [T_q, H, D]. k, v: [T_k, H_k, D], H a multiple of H_k.
        cu_seqlens_q, max_seqlen_q: the queries' segments, as in `attention_varlen`.
        cu_seqlens_k, max_seqlen_k: the keys' segments, as many; the queries' when None. A query whose segment has no
            key gives zeros.
        scale, dropout_p, seed, window, return_lse: as in `attention_varlen`; a window needs cu_seqlens_k None.

    Returns:
        out [T_q, H, D], contiguous; with return_lse (out, lse float32 [H, T_q]).

    Raises:
        ValueError, TypeError: as in `attention`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must have shape [T, H, D]; got {tuple(x.shape)}")
    _check_tensors(q=q, k=k, v=v)
    _check_heads(q, k, v)
    scale = _check_options(scale, q.shape[-1], dropout_p, window)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k must be given together")
    if window is not None and cu_seqlens_k is not None:
        raise ValueError("window needs the queries' own segments: leave cu_seqlens_k and max_seqlen_k out")
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q, q.device)
    if cu_seqlens_k is None or max_seqlen_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"k must have q's rows, {q.shape[0]}, where cu_seqlens_k is not given; got {k.shape[0]}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have as many segments as cu_seqlens_q; got shapes {tuple(cu_seqlens_k.shape)} and "
            f"{tuple(cu_seqlens_q.shape)}"
        )
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k, q.device)
    q, k, v = _under_autocast(q, k, v)
    if choose_backend(q) == "reference":
        out, lse = attention_fallback.packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, dropout_p, seed, window, return_lse
        )
    else:
        drawn = resolve_seed(seed, q.device) if dropout_p > 0.0 else None
        limit = NO_WINDOW if window is None else window
        of_q, of_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        out, stats = _attention(q, k, v, of_q, of_k, None, drawn, max_seqlen_q, max_seqlen_k, scale, dropout_p, limit)
        lse = _lse(stats, scale) if return_lse else None
    return (out, lse.detach()) if return_lse and lse is not None else out


__all__ = ["MAX_HEAD_DIM", "attention", "attention_varlen", "attention_varlen_separate"]
