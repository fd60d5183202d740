"""Attention's operators under ``torch.ops.fusebert``, and the autograd functions around them.

``attention`` takes q, k, v as three tensors, packed or padded; ``attention_qkv`` takes one packed [T, 3, H, D]. Both
exist because a gradient has the layout of its tensor: dqkv is written in place, where autograd would gather the
gradients of three views in a pass of its own.

The functions `padded`, `packed` and `packed_qkv` are the kernels' side of the public calls; torch_path.py has
functions of the same names and signatures.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import resolve_seed
from ..library import register
from .launch import NO_WINDOW, Problem, launch_backward, launch_forward, new_output, new_stats

_OPTIONS = "Tensor? seed, SymInt max_q, SymInt max_k, float scale, float dropout_p, SymInt window"
_PROBLEM = f"Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, {_OPTIONS}"
_QKV = "Tensor qkv, Tensor cu_seqlens, Tensor? seed, SymInt max_seqlen, float scale, float dropout_p, SymInt window"
_BACKWARD = "Tensor out, Tensor stats, Tensor dout"


def _new_out(q: Tensor) -> Tensor:
    """As `new_output`, but not a view: autograd refuses to modify a view that a function returns."""
    order = (0, 2, 1, 3) if q.dim() == 4 else (0, 1, 2)
    return torch.empty_permuted(q.shape, order, dtype=q.dtype, device=q.device)


def _forward(problem: Problem) -> tuple[Tensor, Tensor]:
    out, stats = _new_out(problem.q), new_stats(problem.q)
    launch_forward(problem, out, stats)
    return out, stats


def _qkv_problem(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, *options: Any) -> Problem:
    q, k, v = qkv.unbind(1)
    return Problem(q, k, v, cu_seqlens, cu_seqlens, None, seed, max_seqlen, max_seqlen, *options)


def _attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, out, stats, dout = arguments
    problem = Problem(*inputs)
    dq, dk, dv = new_output(problem.q), new_output(problem.k), new_output(problem.v)
    launch_backward(problem, out, stats, dout, dq, dk, dv)
    return dq, dk, dv


def _attention_qkv_backward(*arguments: Any) -> Tensor:
    *inputs, out, stats, dout = arguments
    problem = _qkv_problem(*inputs)
    dqkv = torch.empty(inputs[0].shape, dtype=dout.dtype, device=dout.device)
    launch_backward(problem, out, stats, dout, *dqkv.unbind(1))
    return dqkv


_attention_op = register(
    f"attention({_PROBLEM}) -> (Tensor out, Tensor stats)",
    lambda *inputs: _forward(Problem(*inputs)),
    lambda q, *_: (_new_out(q), new_stats(q)),
)
_attention_backward_op = register(
    f"attention_backward({_PROBLEM}, {_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_backward,
    lambda q, k, v, *_: (new_output(q), new_output(k), new_output(v)),
)
_attention_qkv_op = register(
    f"attention_qkv({_QKV}) -> (Tensor out, Tensor stats)",
    lambda *inputs: _forward(_qkv_problem(*inputs)),
    lambda qkv, *_: (_new_out(qkv[:, 0]), new_stats(qkv[:, 0])),
)
_attention_qkv_backward_op = register(
    f"attention_qkv_backward({_QKV}, {_BACKWARD}) -> Tensor dqkv",
    _attention_qkv_backward,
    lambda qkv, *_: torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
)


# Both functions save out, which the short backward does not read: the projection that consumes it keeps it anyway. They
# do not materialize gradients: autograd would fill zeros for that of stats, one launch per layer.


def _aside(out: Tensor) -> tuple[Tensor, tuple[Tensor, int] | None]:
    """What to save of out where the caller may modify it in place, and what `_is_modified` reads.

    The first shares out's memory but not its version, so that the backward does not raise; the second its version but
    not its memory. A compiled graph has no in-place arithmetic: it saves out itself.
    """
    if torch.compiler.is_compiling():
        return out, None
    version = out.detach()
    version.data = _nothing(out.dtype, out.device)
    return out.data, (version, version._version)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _is_modified(aside: tuple[Tensor, int] | None) -> bool:
    return aside is not None and aside[0]._version != aside[1]


class _Attention(torch.autograd.Function):
    """(out, stats) of q, k and v. cu_seqlens_k None: cu_seqlens_q. Dynamo cannot trace one tensor given twice."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        key_mask: Tensor | None,
        seed: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        tensors = (q, k, v, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, key_mask, seed)
        out, stats = _attention_op(*tensors, *options)
        saved, ctx.version = _aside(out)
        ctx.save_for_backward(*tensors, saved, stats)
        ctx.options = options
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor, _dstats: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, stats = ctx.saved_tensors
        if _is_modified(ctx.version):
            out, _ = _attention_op(*tensors, *ctx.options)
        dq, dk, dv = _attention_backward_op(*tensors, *ctx.options, out, stats, dout)
        return dq, dk, dv, None, None, None, None, *(None,) * len(ctx.options)


class _AttentionQKV(torch.autograd.Function):
    """(out, stats) of packed self-attention on qkv."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        out, stats = _attention_qkv_op(qkv, cu_seqlens, seed, *options)
        saved, ctx.version = _aside(out)
        ctx.save_for_backward(qkv, cu_seqlens, seed, saved, stats)
        ctx.options = options
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor, _dstats: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, seed, out, stats = ctx.saved_tensors
        if _is_modified(ctx.version):
            out, _ = _attention_qkv_op(qkv, cu_seqlens, seed, *ctx.options)
        dqkv = _attention_qkv_backward_op(qkv, cu_seqlens, seed, *ctx.options, out, stats, dout)
        return dqkv, None, None, *(None,) * len(ctx.options)


def _kernel_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    return resolve_seed(seed, device) if dropout_p > 0.0 else None


def _kernel_window(window: int | None) -> int:
    return NO_WINDOW if window is None else window


def _lse(stats: Tensor, scale: float) -> Tensor:
    """L = scale · m + ln l; not differentiable."""
    m, log2_l = stats.detach().unbind(0)
    return scale * m + math.log(2.0) * log2_l


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
    mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    tensors = (q, k, v, None, None, mask, _kernel_seed(seed, dropout_p, q.device))
    out, stats = _Attention.apply(*tensors, q.shape[2], k.shape[2], scale, dropout_p, _kernel_window(window))
    return out, _lse(stats, scale) if return_lse else None


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
    own_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.contiguous()
    tensors = (q, k, v, cu_seqlens_q.contiguous(), own_k, None, _kernel_seed(seed, dropout_p, q.device))
    out, stats = _Attention.apply(*tensors, max_q, max_k, scale, dropout_p, _kernel_window(window))
    return out, _lse(stats, scale) if return_lse else None


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
    tensors = (qkv, cu_seqlens.contiguous(), _kernel_seed(seed, dropout_p, qkv.device))
    out, stats = _AttentionQKV.apply(*tensors, max_seqlen, scale, dropout_p, _kernel_window(window))
    return out, _lse(stats, scale) if return_lse else None
