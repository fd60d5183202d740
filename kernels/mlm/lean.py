"""The masked-LM loss in the least memory: tiles of hidden · weightᵀ stay in registers (Wijmans et al. 2024).

The launchers of `lean_kernels`, and the operator. README.md has the equations, the costs and the bound on what skipping
leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..backend import triton
from ..library import register
from .lean_kernels import mlm_lean_backward, mlm_lean_forward, mlm_lean_merge
from .softmax_rows import refuse_second_derivative, relative_to_largest

MOST_PROGRAMS = 1024  # of the forward: about eight on each multiprocessor of the largest GPUs


def _launch_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, m, l: float32 [M]; correct: int32 [M])."""
    (rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    losses, row_max, row_sum = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
    correct = labels.new_empty(rows, dtype=torch.int32)
    if not rows:
        return losses, row_max, row_sum, correct
    block_m, block_n, block_k = (128, 128, 64) if hidden.element_size() == 2 else (64, 64, 32)
    if backend.architecture() >= 100:
        block_n = 64  # 128 columns spill: sm_100 reads them whole from tensor memory, sm_120 lacks a few registers
    block_k = min(block_k, max(triton.next_power_of_2(hidden_size), 16))
    tiles, word_blocks = triton.cdiv(rows, block_m), triton.cdiv(vocab_size, block_n)
    share = triton.cdiv(word_blocks, min(word_blocks, max(MOST_PROGRAMS // tiles, 1))) * block_n
    shares = triton.cdiv(vocab_size, share)
    floats = hidden.new_empty(4 if label_smoothing > 0 else 3, shares, rows, dtype=torch.float32)
    best = labels.new_empty(shares, rows, dtype=torch.int32)
    logit_sum = floats[3] if label_smoothing > 0 else None
    mlm_lean_forward[(tiles * shares,)](
        hidden, weight, bias, labels, floats[0], floats[1], floats[2], logit_sum, best, hidden.stride(0),
        weight.stride(0), rows, vocab_size, share, H=hidden_size, SMOOTHING=label_smoothing > 0,
        PRECISION=backend.dot_precision(hidden.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8,
        num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    mlm_lean_merge[(triton.cdiv(rows, 128),)](
        labels, floats[0], floats[1], floats[2], logit_sum, best, losses, row_max, row_sum, correct, rows, shares,
        vocab_size, ignore_index, label_smoothing, z_loss, SMOOTHING=label_smoothing > 0, BLOCK_M=128, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return losses, row_max, row_sum, correct


def _tiling(own: Tensor, skip: bool) -> tuple[bool, int, int, int, int]:
    """(RESIDENT, most columns of H that a program sums, BLOCK_OWN, BLOCK_VISITED, BLOCK_H) of `mlm_lean_backward`.

    Chosen by what the compiler makes of them (`fusebert.bench.aot`): nothing spills. Not yet timed on a GPU. The sums,
    at most 1024 columns of 32 vectors, take half of the register file; on Blackwell they are in tensor memory.
    """
    hidden_size, arch = own.shape[1], backend.tile_architecture()
    whole = max(triton.next_power_of_2(hidden_size), 16)
    if own.element_size() == 4:
        return False, 256, 32, 16, min(64, whole)
    if arch // 10 == 9 and hidden_size <= 768 and not skip:  # the branch of skipping needs these registers
        return True, 768, 64 if hidden_size <= 256 else 32, 64, min(128, whole)
    wide = arch >= 100 and hidden_size <= 768
    return False, 1024, 64 if wide else 32, 64 if arch >= 90 else 32, min(256, whole)


def _launch_gradient(
    own: Tensor,
    visited: Tensor,
    owns_words: bool,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_grad: Tensor,
    factor: Tensor,
    out: Tensor | None,
    dbias: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
) -> None:
    """Writes ``out``, the gradient of ``own``, and ``dbias``; (own, visited) is (weight, hidden) or the reverse."""
    (num_own, hidden_size), num_visited = own.shape, visited.shape[0]
    # Triton 3.7 cannot carry sums in tensor memory through a branch: on Blackwell nothing is skipped.
    skip = tolerance > 0 and backend.tile_architecture() < 100
    resident, most, block_own, block_visited, block_h = _tiling(own, skip)
    slices = triton.cdiv(min(hidden_size, most), block_h)
    word_tiles = triton.cdiv(num_own, block_own) if owns_words else triton.cdiv(num_visited, block_visited)
    groups = triton.cdiv(hidden_size, slices * block_h) if out is not None else 1
    mlm_lean_backward[(triton.cdiv(num_own, block_own), groups)](
        own, visited, bias, labels, row_max, row_sum, row_grad, factor, out, dbias, own.stride(0),
        visited.stride(0), num_own, num_visited, label_smoothing, z_loss, tolerance / word_tiles,
        H=hidden_size, OWNS_WORDS=owns_words, Z_LOSS=z_loss > 0, SKIP=skip, PRECISION=backend.dot_precision(own.dtype),
        RESIDENT=resident, SLICES=slices, BLOCK_OWN=block_own, BLOCK_VISITED=block_visited, BLOCK_H=block_h,
        BLOCK_K=min(64, block_h), num_warps=8, num_stages=1 if resident else 3, enable_fp_fusion=True,
    )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [M] int64
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,  # of the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses (float32 [M]), the count of correct rows (int64 []), m and l (float32 [M])."""
    hidden, weight, bias = _unit_stride(hidden), _unit_stride(weight), None if bias is None else _unit_stride(bias)
    losses, row_max, row_sum, correct = _launch_statistics(
        hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss
    )
    return losses, correct.sum(), row_max, row_sum


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
    losses, row_max, row_sum = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, labels.new_empty(()), row_max, row_sum


def _empty_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [M, H], dweight [V, H], dbias float32 [V]; without elements where not needed."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if need_weight else (0, weight.shape[1])),
        hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


def _backward(
    dlosses: Tensor,  # [M] float32
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = _unit_stride(hidden), _unit_stride(weight), None if bias is None else _unit_stride(bias)
    dhidden, dweight, dbias = _empty_gradients(hidden, weight, need_hidden, need_weight, need_bias)
    row_grad, factor = relative_to_largest(torch.where(labels != ignore_index, dlosses, 0.0))
    words = labels.clamp(-1, weight.shape[0]).to(torch.int32)
    rows = (bias, words, row_max, row_sum, row_grad, factor)
    options = (label_smoothing, z_loss, tolerance)
    if need_hidden and hidden.shape[0]:
        _launch_gradient(hidden, weight, False, *rows, dhidden, None, *options)
    if need_weight or need_bias:
        _launch_gradient(
            weight, hidden, True, *rows, dweight if need_weight else None, dbias if need_bias else None, *options
        )
    return dhidden, dweight, dbias


_forward_op = register(
    "lean_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, SymInt ignore_index, "
    "float label_smoothing, float z_loss, float tolerance) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = register(
    "lean_linear_cross_entropy_backward(Tensor d_losses, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor row_max, Tensor row_sum, SymInt ignore_index, float label_smoothing, float z_loss, float tolerance, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dlosses, hidden, weight, *rest: _empty_gradients(hidden, weight, *rest[-3:]),
)


class _LeanLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        losses, correct, row_max, row_sum = _forward_op(hidden, weight, bias, labels, *options)
        ctx.save_for_backward(hidden, weight, bias, labels, row_max, row_sum)
        ctx.options = options
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)  # otherwise zeros are filled in for correct's gradient, one more launch
        return losses, correct

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if dlosses is None:
            return (None,) * 8
        bias, needs = ctx.saved_tensors[2], ctx.needs_input_grad[:3]
        dhidden, dweight, dbias = _backward_op(dlosses, *ctx.saved_tensors, *ctx.options, *needs)
        return (
            dhidden if needs[0] else None,
            dweight if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            *(None,) * 5,
        )


def lean_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """(losses float32 [M], count of correct rows int64 []) of hidden [M, H], weight [V, H], bias [V], labels [M]."""
    options = (ignore_index, label_smoothing, z_loss, tolerance)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return _LeanLosses.apply(hidden, weight, bias, labels, *options)
    return _forward_op(hidden, weight, bias, labels, *options)[:2]
