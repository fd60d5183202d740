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

Two routes, by shape: `attention_short` and `attention_long`. N rows a segment, D a head, e bytes an element, B rows a
tile, h heads a tile; per segment and head:

    route                 programs   FLOPs       bytes through HBM   L2 → tiles     the floor
    short forward         1 / h       4 h N²D    4 NDe + 8 N         the same       4 N²D, the same
    short backward        1 / h      10 h N²D    7 NDe + 8 N         the same       10 N²D, the same
    long forward          N / B       4 N²D      4 NDe + 8 N         2 (N/B) NDe    4 N²D, the same
    long backward, dQ     N / B       6 N²D      6 NDe + 12 N }      2 (N/B) NDe    10 N²D FLOPs,
    long backward, dK dV  N / B       8 N²D      6 NDe + 12 N }      2 (N/B) NDe    7 NDe + 8 N

Short is for segments that fit in one tile, which BERT's often do; h = 1 but for N ≤ 32, where the products are free:
h N / 2 FLOPs a byte, at most 32. The long backward trades two more matrix products, and a second read of Q, K, V and
dO, for the same absence of atomics. Either way every gradient has one owner, so the same inputs give the same bits.
Full tiles of the long route are not masked; the last, ragged one is peeled (under a mask or window all are masked).

Considered for 128 < N ≤ 512 and left out, until a clock can choose: one backward program a (segment, head), with dK and
dV in registers while the queries pass. 10 N²D FLOPs, and an exponential and a draw of dropout a weight where the split
has two. All 256 keys of N ≤ 256 in one tile, 32 queries a step: as compiled for sm_90 at D = 64 a step is 17
instructions a weight (31 with dropout) against the split's 8 + 17 (14 + 28), in 234 registers (253): none is left to
load ahead (a second stage spills 48 bytes), and a multiprocessor has one block of 8 warps to hide that behind. Beyond
256 keys dQ must be added up in fp32 scratch, key tile by key tile of B: (8 N/B − 4) ND bytes, and Q and dO again for
each, 2 (N/B) NDe: at N = 512, B = 128, e = 2 that is 44 ND through L2 against the split's 32 ND.

float32 is multiplied on the plain cores, in full, unless PyTorch allows TF32. Three TF32 products ("tf32x3") would use
the matrix units, but tiles of 64 rows then spill at D = 64 on sm_90 (88 bytes forward, 288 and 848 backward), and
whether they keep to twice PyTorch's float32 error only a GPU can show.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import choose_backend
from ..dropout import keep_threshold, resolve_seed
from . import torch_path as attention_fallback
from .launch import NO_WINDOW, Problem, backward, forward, like_query, new_stats

MAX_HEAD_DIM = 256


# ----------------------------------------------------------------------------------------------------------- operators
#
# out is saved although the short route does not read it: whatever consumes it, a projection, keeps the same tensor.
# Two, because gradients want the layout their tensor has: dqkv is written as [T, 3, H, D], where autograd, given three
# views, would gather three gradients in a pass of its own. Registered as layernorm's are, for the same reason.

_library = torch.library.Library("fusebert", "FRAGMENT")
_OPTIONS = "Tensor? seed, SymInt max_q, SymInt max_k, float scale, float dropout_p, SymInt window"
_PROBLEM = f"Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, {_OPTIONS}"
_PACKED = "Tensor qkv, Tensor cu_seqlens, Tensor? seed, SymInt max_seqlen, float scale, float dropout_p, SymInt window"
_TO_BACKWARD = "Tensor out, Tensor stats, Tensor dout"


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _problem(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Problem:
    return Problem(_dense_rows(q), _dense_rows(k), _dense_rows(v), *rest)


def _packed_problem(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, *rest: Any) -> Problem:
    q, k, v = _dense_rows(qkv).unbind(1)
    return Problem(q, k, v, cu_seqlens, cu_seqlens, None, seed, max_seqlen, max_seqlen, *rest)


def _run_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    out, stats = like_query(problem.q), new_stats(problem.q)
    with torch.cuda.device_of(problem.q):
        forward(problem, out, stats)
    return out, stats


def _attention(*problem: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(_problem(*problem))


def _attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, out, stats, dout = args
    problem = _problem(*inputs)
    dq, dk, dv = like_query(problem.q), like_query(problem.k), like_query(problem.v)
    with torch.cuda.device_of(problem.q):
        backward(problem, out, stats, _dense_rows(dout), dq, dk, dv)
    return dq, dk, dv


def _attention_qkv(*problem: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(_packed_problem(*problem))


def _attention_qkv_backward(*args: Any) -> Tensor:
    *inputs, out, stats, dout = args
    problem = _packed_problem(*inputs)
    dqkv = torch.empty(inputs[0].shape, dtype=dout.dtype, device=dout.device)
    with torch.cuda.device_of(dqkv):
        backward(problem, out, stats, _dense_rows(dout), *dqkv.unbind(1))
    return dqkv


def _fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_query(q), new_stats(q)


def _fake_attention_backward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like_query(q), like_query(k), like_query(v)


def _fake_attention_qkv(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_query(qkv[:, 0]), new_stats(qkv[:, 0])


def _fake_attention_qkv_backward(qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


for _schema, _run, _fake in (
    (f"attention({_PROBLEM}) -> (Tensor out, Tensor stats)", _attention, _fake_attention),
    (
        f"attention_backward({_PROBLEM}, {_TO_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv)",
        _attention_backward,
        _fake_attention_backward,
    ),
    (f"attention_qkv({_PACKED}) -> (Tensor out, Tensor stats)", _attention_qkv, _fake_attention_qkv),
    (
        f"attention_qkv_backward({_PACKED}, {_TO_BACKWARD}) -> Tensor dqkv",
        _attention_qkv_backward,
        _fake_attention_qkv_backward,
    ),
):
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"fusebert::{_name}", _fake, lib=_library)


class _Attention(torch.autograd.Function):
    """(out, stats) of separate q, k, v, packed or padded. Takes the fields of `Problem`; cu_seqlens_k None stands for
    cu_seqlens_q: Dynamo does not trace a Function that is given one tensor twice."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        if inputs[4] is None:
            inputs = (*inputs[:4], inputs[3], *inputs[5:])
        out, stats = torch.ops.fusebert.attention(*inputs)
        ctx.save_for_backward(*inputs[:7], out, stats)
        ctx.options = inputs[7:]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # or zeros are filled in for its gradient, a launch a layer
        return out, stats

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor, _dstats: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, stats = ctx.saved_tensors
        gradients = torch.ops.fusebert.attention_backward(*tensors, *ctx.options, out, stats, dout)
        return *gradients, *(None,) * (len(Problem._fields) - 3)


class _AttentionQKV(torch.autograd.Function):
    """(out, stats) of packed self-attention on [T, 3, H, D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        out, stats = torch.ops.fusebert.attention_qkv(qkv, cu_seqlens, seed, *options)
        ctx.save_for_backward(qkv, cu_seqlens, seed, out, stats)
        ctx.options = options
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # or zeros are filled in for its gradient, a launch a layer
        return out, stats

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor, _dstats: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, seed, out, stats = ctx.saved_tensors
        dqkv = torch.ops.fusebert.attention_qkv_backward(qkv, cu_seqlens, seed, *ctx.options, out, stats, dout)
        return dqkv, *(None,) * (2 + len(ctx.options))


def _lse(stats: Tensor, scale: float) -> Tensor:
    """L = scale · m + ln l; not differentiable."""
    m, log2_l = stats.detach().unbind(0)
    return scale * m + math.log(2.0) * log2_l


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
    if not isinstance(max_seqlen, int | torch.SymInt) or isinstance(max_seqlen, bool) or max_seqlen < 1:
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
            change it), or None: drawn from torch's generator. The mask is
            `attention_dropout_mask(dropout_p, seed, N_q, N_k, planes=B·H)`, plane b·H + h.
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
        out, stats = _Attention.apply(q, k, v, None, None, mask, drawn, q.shape[2], k.shape[2], scale, dropout_p, limit)
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
        out, stats = _AttentionQKV.apply(qkv, cu_seqlens.contiguous(), drawn, max_seqlen, scale, dropout_p, limit)
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
        of_q = cu_seqlens_q.contiguous()
        of_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.contiguous()
        out, stats = _Attention.apply(
            q, k, v, of_q, of_k, None, drawn, max_seqlen_q, max_seqlen_k, scale, dropout_p, limit
        )
        lse = _lse(stats, scale) if return_lse else None
    return (out, lse.detach()) if return_lse and lse is not None else out


__all__ = ["MAX_HEAD_DIM", "attention", "attention_varlen", "attention_varlen_separate"]
