"""LayerNorm over the last axis, alone and after dropout and a residual, forward and backward.

A row has H elements. Z is the dropout mask (0 or 1, P(Z = 1) = 1 − p), c = 1 / (1 − p), ⟨·⟩ a mean over the row:

    forward     s = residual + c Z∘x        μ = ⟨s⟩        r = (⟨(s − μ)²⟩ + eps)^−½
                x̂ = (s − μ) r               y = w∘x̂ + b
    backward    g = w∘dy                    ds = r (g − ⟨g⟩ − x̂ ⟨g∘x̂⟩)  (+ the gradient of s, where s was returned)
                dresidual = ds              dx = c Z∘ds    dw = Σ_rows dy∘x̂      db = Σ_rows dy

(Ba et al. 2016; the end of both of BERT's sub-layers, Devlin et al. 2018.) `layernorm` is the case s = x.
All of it is float32 in registers. s is rounded to the activations' dtype once, where two PyTorch calls would round it,
and everything follows from the rounded s, so the backward differentiates what the forward computed.

The variance takes a second pass over the registers, never E[s²] − μ², which for a row of mean 10⁴ and deviation 1 has
no correct digit left. The same pass corrects the mean: with d = s − μ as rounded, μ += ⟨d⟩ and var = ⟨d²⟩ − ⟨d⟩² (the
corrected two-pass algorithm: Chan, Golub, LeVeque 1983), so that a constant row is not its mean's last digit over √eps.

Kept for the backward: s (where s = x: nothing new) and μ, r in float32, eH + 8 bytes a row of e-byte elements. The
backward needs x̂, H numbers a row, and r; the mask is drawn again from the seed (8 bytes in all). y, which the next
layer keeps anyway, would do in place of s only where no weight is 0, and loses |b / w| in precision elsewhere.

Bytes through HBM a row, which are also the fewest possible, and FLOPs:

                                        read            written         bytes         FLOPs
    layernorm forward                   x               y               2 eH + 8       9 H
    layernorm backward                  dy x            dx              3 eH + 8      13 H
    dropout_add_layernorm forward       x residual      y s             4 eH + 8      11 H and Philox, 20 H of integers
    dropout_add_layernorm backward      dy s            dresidual dx    4 eH + 8      14 H and Philox again
      without dropout                   dy s            ds              3 eH + 8      13 H

Two to five operations a byte: the memory sets the time. dw and db are sums over all rows: each program of the backward
adds up its own rows in registers and leaves a float32 row of partial sums, 8 PH bytes for P programs (one or two a
multiprocessor), which a second small kernel adds in a fixed order: no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import reference
from ._triton import tl, triton
from .backend import choose_backend
from .dropout import dropout_mask, keep_threshold, resolve_seed
from .rows import as_rows, num_programs_for, row_keep, row_stride, row_tile, sum_partials

# A row must fit in the registers of one program (above 8192 the backward spills a tenth of it); wider: the reference.
MAX_HIDDEN_SIZE = 16384


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def row_statistics(s, mask, eps, H: tl.constexpr):
    """(x̂, mean, rstd) of rows [BLOCK_M, BLOCK_H]; the module docstring says why in two passes."""
    mean = tl.sum(s, axis=1) / H
    d = tl.where(mask, s - mean[:, None], 0.0)
    mean_d = tl.sum(d, axis=1) / H
    variance = tl.maximum(tl.sum(d * d, axis=1) / H - mean_d * mean_d, 0.0)
    rstd = tl.rsqrt(variance + eps)
    return (d - mean_d[:, None]) * rstd[:, None], mean + mean_d, rstd


@triton.jit
def normalised(s, mean, rstd, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """x̂ again from the forward's statistics."""
    xhat = (s - mean[:, None]) * rstd[:, None]
    if H < BLOCK_H:
        # Beyond H dy is 0, but 0 · x̂ is not where −μ r overflowed.
        xhat = tl.where(tl.arange(0, BLOCK_H)[None, :] < H, xhat, 0.0)
    return xhat


@triton.jit
def sum_gradient(g, xhat, rstd, H: tl.constexpr):
    """ds = r (g − ⟨g⟩ − x̂ ⟨g∘x̂⟩)."""
    mean_g = tl.sum(g, axis=1) / H
    mean_gx = tl.sum(g * xhat, axis=1) / H
    return (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["num_rows", "p_threshold"])
def _forward(
    x_ptr,  # [M, H]
    residual_ptr,  # [M, H] or None
    weight_ptr,  # [H] or None
    bias_ptr,  # [H] or None
    seed_ptr,  # [1] int64, or None: no dropout
    y_ptr,  # [M, H] contiguous
    s_ptr,  # as y, or None: not kept
    mean_ptr,  # [M] float32, or None: not kept
    rstd_ptr,  # as mean
    stride_x,  # elements from row to row, or None: H
    stride_residual,
    num_rows,
    p_threshold,
    keep_scale,
    eps,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tile = tl.program_id(0)
    offsets, mask = row_tile(tile, stride_x, num_rows, H, BLOCK_M, BLOCK_H)
    s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        s = tl.where(row_keep(seed_ptr, p_threshold, tile, H, BLOCK_M, BLOCK_H), s * keep_scale, 0.0)
    if residual_ptr is not None:
        offsets, mask = row_tile(tile, stride_residual, num_rows, H, BLOCK_M, BLOCK_H)
        s += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    s = s.to(y_ptr.dtype.element_ty).to(tl.float32)

    y, mean, rstd = row_statistics(s, mask, eps, H)
    columns = tl.arange(0, BLOCK_H)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if s_ptr is not None:
        tl.store(s_ptr + offsets, s.to(s_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "p_threshold"])
def _backward(
    dy_ptr,  # [M, H]
    ds_out_ptr,  # [M, H] or None: gradient of s as an output
    s_ptr,  # [M, H]
    weight_ptr,  # [H] or None
    mean_ptr,  # [M] float32
    rstd_ptr,  # as mean
    seed_ptr,  # [1] int64, or None: no dropout
    dx_ptr,  # [M, H] contiguous
    dresidual_ptr,  # as dx, or None: it equals dx
    dweight_ptr,  # [P, H] float32 or None: partial sums, a row a program
    dbias_ptr,  # as dweight
    stride_dy,  # elements from row to row, or None: H
    stride_ds_out,
    stride_s,
    num_rows,
    p_threshold,
    keep_scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_H)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    # Summed over the tile's rows only at the end: until then no thread waits for another.
    dweight = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)

    # The few programs that this grid has must keep the memory busy by themselves: STAGES tiles are in flight.
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets, mask = row_tile(tile, stride_dy, num_rows, H, BLOCK_M, BLOCK_H)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = row_tile(tile, stride_s, num_rows, H, BLOCK_M, BLOCK_H)
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)

        xhat = normalised(s, mean, rstd, H, BLOCK_H)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        g = dy
        if weight_ptr is not None:
            g = dy * weight
        ds = sum_gradient(g, xhat, rstd, H)
        if ds_out_ptr is not None:
            offsets, mask = row_tile(tile, stride_ds_out, num_rows, H, BLOCK_M, BLOCK_H)
            ds += tl.load(ds_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = row_tile(tile, None, num_rows, H, BLOCK_M, BLOCK_H)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if seed_ptr is not None:
            ds = tl.where(row_keep(seed_ptr, p_threshold, tile, H, BLOCK_M, BLOCK_H), ds * keep_scale, 0.0)
        tl.store(dx_ptr + offsets, ds.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0) * H + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=columns < H)


# ------------------------------------------------------------------------------------------------------------ launcher


class Config(NamedTuple):
    """Tile and warps of one kernel."""

    block_m: int
    block_h: int
    num_warps: int


def forward_config(hidden_size: int) -> Config:
    # 32 elements a thread. Up to 1024 columns a row lies in one warp, which reduces it without a barrier; the masked
    # columns of a width such as 768 are then whole registers, and the compiler drops them.
    block_h = max(4, triton.next_power_of_2(hidden_size))  # Philox makes 4 columns a call
    return Config(min(64, max(1, 1024 // block_h)), block_h, min(16, max(1, block_h // 1024)))


def _backward_config(hidden_size: int) -> Config:
    # 16 elements a thread: besides the tile, dweight and dbias have to stay in registers.
    block_h = max(4, triton.next_power_of_2(hidden_size))
    return Config(min(64, max(1, 4096 // block_h)), block_h, 8 if block_h <= 4096 else 16)


def _kept_shapes(x: Tensor, residual: Tensor | None, keep: bool) -> tuple[torch.Size, torch.Size]:
    """Shapes of s and of mean: [0] where they are not kept, and of s where it is x itself."""
    nothing = torch.Size([0])
    return x.shape if keep and residual is not None else nothing, x.shape[:-1] if keep else nothing


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_size = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s_shape, mean_shape = _kept_shapes(x, residual, keep)
    s = torch.empty(s_shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(mean_shape, dtype=torch.float32, device=x.device)
    rstd = torch.empty(mean_shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, s, mean, rstd
    x_rows = as_rows(x, hidden_size)
    residual_rows = None if residual is None else as_rows(residual, hidden_size)
    num_rows = x_rows.shape[0]
    config = forward_config(hidden_size)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(num_rows, config.block_m),)](
            x_rows,
            residual_rows,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            seed,
            y,
            s if keep and residual is not None else None,
            mean if keep else None,
            rstd if keep else None,
            row_stride(x_rows),
            row_stride(residual_rows),
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            eps,
            H=hidden_size,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            num_warps=config.num_warps,
        )
    return y, s, mean, rstd


def _launch_backward(
    dy: Tensor,
    ds_out: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    separate: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_size = s.shape[-1]
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dresidual = torch.empty(s.shape if separate else (0,), dtype=s.dtype, device=s.device)
    dweight, dbias = empty_affine_gradients(s, weight, bias, weight_grad, bias_grad)
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    dy_rows, s_rows = as_rows(dy, hidden_size), as_rows(s, hidden_size)
    ds_out_rows = None if ds_out is None else as_rows(ds_out, hidden_size)
    num_rows = s_rows.shape[0]
    config = _backward_config(hidden_size)
    num_programs = num_programs_for(s.device, triton.cdiv(num_rows, config.block_m), config.num_warps)
    partial = (num_programs, hidden_size)
    dweight_partial = torch.empty(partial, dtype=torch.float32, device=s.device) if weight_grad else None
    dbias_partial = torch.empty(partial, dtype=torch.float32, device=s.device) if bias_grad else None
    with torch.cuda.device_of(s):
        _backward[(num_programs,)](
            dy_rows,
            ds_out_rows,
            s_rows,
            None if weight is None else weight.contiguous(),
            mean,
            rstd,
            seed,
            dx,
            dresidual if separate else None,
            dweight_partial,
            dbias_partial,
            row_stride(dy_rows),
            row_stride(ds_out_rows),
            row_stride(s_rows),
            num_rows,
            keep_threshold(p),
            1.0 / (1.0 - p),
            H=hidden_size,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            STAGES=2,
            num_warps=config.num_warps,
        )
        if weight_grad or bias_grad:
            block_c = 16
            sum_partials[(triton.cdiv(hidden_size, block_c),)](
                dweight_partial,
                dbias_partial,
                dweight if weight_grad else None,
                dbias if bias_grad else None,
                num_programs,
                H=hidden_size,
                BLOCK_P=256,
                BLOCK_C=block_c,
                num_warps=8,
            )
    return dx, dresidual, dweight, dbias


def empty_affine_gradients(
    s: Tensor, weight: Tensor | None, bias: Tensor | None, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    wanted = (weight if weight_grad else None), (bias if bias_grad else None)
    dweight, dbias = (
        torch.empty(0 if of is None else of.shape, dtype=s.dtype if of is None else of.dtype, device=s.device)
        for of in wanted
    )
    return dweight, dbias


# ------------------------------------------------------------------------------------------------------------ operator
#
# define/impl with the autograd.Function outside, one boundary a call: a forward with gradient costs 7 µs of dispatch,
# through register_autograd 25 (torch 2.13, one CPU core).

_library = torch.library.Library("fusebert", "FRAGMENT")
_library.define(
    "dropout_add_layernorm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p, float eps, "
    "bool keep) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dropout_add_layernorm_backward(Tensor dy, Tensor? ds_out, Tensor s, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, Tensor? seed, float p, bool separate, bool weight_grad, bool bias_grad) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("dropout_add_layernorm", _launch_forward, _device)
    _library.impl("dropout_add_layernorm_backward", _launch_backward, _device)
_forward_op = torch.ops.fusebert.dropout_add_layernorm.default
_backward_op = torch.ops.fusebert.dropout_add_layernorm_backward.default


@torch.library.register_fake("fusebert::dropout_add_layernorm", lib=_library)
def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s_shape, mean_shape = _kept_shapes(x, residual, keep)
    mean, rstd = (x.new_empty(mean_shape, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(s_shape), mean, rstd


@torch.library.register_fake("fusebert::dropout_add_layernorm_backward", lib=_library)
def _fake_backward(
    dy: Tensor,
    ds_out: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    separate: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias = empty_affine_gradients(s, weight, bias, weight_grad, bias_grad)
    return s.new_empty(s.shape), s.new_empty(s.shape if separate else (0,)), dweight, dbias


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        p: float,
        eps: float,
        return_sum: bool,
    ) -> Any:
        y, s, mean, rstd = _forward_op(x, residual, weight, bias, seed, p, eps, True)
        ctx.save_for_backward(x if residual is None else s, weight, bias, mean, rstd, seed)
        ctx.p = p
        ctx.set_materialize_grads(False)  # the gradient of an s that nobody used is None, not a tensor of zeros
        return (y, s) if return_sum else y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, ds_out: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, weight, bias, mean, rstd, seed = ctx.saved_tensors
        _, residual_grad, weight_grad, bias_grad = ctx.needs_input_grad[:4]
        # Without dropout x and residual have the same gradient: written once, returned twice.
        separate = ctx.p > 0.0 and residual_grad
        dx, dresidual, dweight, dbias = _backward_op(
            torch.zeros_like(s) if dy is None else dy, ds_out, s, weight, bias, mean, rstd, seed, ctx.p, separate,
            weight_grad, bias_grad,
        )  # fmt: skip
        return (
            dx,
            (dresidual if separate else dx) if residual_grad else None,
            dweight if weight_grad else None,
            dbias if bias_grad else None,
            None,
            None,
            None,
            None,
        )


# -------------------------------------------------------------------------------------------------------- public names


def _check(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, p: float
) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [.., H]; got a scalar")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}; got {residual.dtype}: convert one of them")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}; got {residual.device}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, x's last; got {tuple(parameter.shape)}")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must have x's dtype {x.dtype} or float32; got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {parameter.device}")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative; got {eps}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p, the dropout probability, must be in [0, 1); got {p}")


def _run_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: int | Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(y, s) by PyTorch's operators, dtypes as the kernels'."""
    s = x
    if p > 0.0:
        mask = None
        if seed is not None:
            rows = x.numel() // max(x.shape[-1], 1)
            mask = dropout_mask(p, resolve_seed(seed, x.device), rows, x.shape[-1], device=x.device).view(x.shape)
        s = reference.dropout(x, p, mask)
    if residual is not None:
        s = residual + s
    dtype = x.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
    # Autocast would return float32, where the kernels keep x's dtype.
    return reference.layernorm(s.to(dtype), weight, bias, eps=eps).to(x.dtype), s


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: int | Tensor | None,
    p: float,
    eps: float,
    return_sum: bool,
) -> Any:
    _check(x, residual, weight, bias, eps, p)
    if choose_backend(x) == "reference" or x.shape[-1] > MAX_HIDDEN_SIZE:
        y, s = _run_reference(x, residual, weight, bias, seed, p, eps)
        return (y, s) if return_sum else y
    seed = resolve_seed(seed, x.device) if p > 0.0 else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        return _DropoutAddLayerNorm.apply(x, residual, weight, bias, seed, p, eps, return_sum)
    y, s, _, _ = _forward_op(x, residual, weight, bias, seed, p, eps, return_sum)
    return (y, s) if return_sum else y


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over the last axis, var the mean squared deviation (Ba et al. 2016).

    Statistics are float32 and the result has x's dtype, under autocast too (where ``F.layer_norm`` returns float32).
    Differentiable once: asking for second derivatives of the Triton path raises RuntimeError.

    Args:
        x: [.., H], any strides, bfloat16, float16 or float32; float64 runs the reference, and so do H > 16384 and
            tensors on the CPU.
        weight, bias: [H], each None (1 and 0), x's dtype or float32.
        eps: added to the variance; BERT's is 1e-12.

    Returns:
        [.., H], contiguous.

    Raises:
        ValueError: a shape, a device, or a negative eps.
        TypeError: a dtype.
    """
    return _apply(x, None, weight, bias, None, 0.0, eps, False)


@overload
def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    p: float = ...,
    seed: int | Tensor | None = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...


@overload
def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    p: float = ...,
    seed: int | Tensor | None = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """layernorm(residual + Dropout(x)): the end of a post-LN sub-layer (Vaswani et al. 2017, section 5.4).

    Args:
        x, residual: [.., H] of one shape, dtype and device; as `layernorm`'s x. Under autocast a residual of another
            dtype is converted to x's.
        weight, bias, eps: as `layernorm`.
        p: the probability that an element of x is dropped; the others are scaled by 1 / (1 − p).
        seed: which mask. An int, or an int64 tensor of one element on x's device, names one for every backend and
            device: `dropout_mask`'s, whose rows are x's in order. (On the reference path that is slow: it is there to
            compare and to debug.) None draws from torch's generator, so ``torch.manual_seed`` governs.
        return_sum: also return s = residual + Dropout(x), which a pre-LN model carries on. The forward keeps it anyway.

    Returns:
        y [.., H], contiguous, of x's dtype; with return_sum (y, s).

    Raises:
        ValueError: a shape, a device, a negative eps, p outside [0, 1), or a seed tensor that is no single element.
        TypeError: a dtype, or a seed of another type.
    """
    if residual.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
    return _apply(x, residual, weight, bias, seed, p, eps, return_sum)


class FusedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over one axis, by `layernorm`: same arguments, parameters and ``state_dict``.

    Raises:
        ValueError: ``normalized_shape`` has more than one axis, or the input's last axis is not it.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"normalized_shape must be one axis, the last; got {tuple(self.normalized_shape)}: use nn.LayerNorm, "
                "or flatten these axes"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check_last_axis(input)
        return layernorm(input, self.weight, self.bias, eps=self.eps)

    def _check_last_axis(self, x: Tensor) -> None:
        if x.shape[-1:] != self.normalized_shape:
            raise ValueError(
                f"the last axis of the input must be {self.normalized_shape[0]}; got shape {tuple(x.shape)}"
            )


class FusedDropoutAddLayerNorm(FusedLayerNorm):
    """LayerNorm(residual + Dropout(x)), dropout while training; parameters and ``state_dict`` of `nn.LayerNorm`.

    Raises:
        ValueError: as `FusedLayerNorm`, or ``p`` outside [0, 1).
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        p: float = 0.1,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p, the dropout probability, must be in [0, 1); got {p}")
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        self._check_last_axis(x)
        p = self.p if self.training else 0.0
        return dropout_add_layernorm(x, residual, self.weight, self.bias, eps=self.eps, p=p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


__all__ = ["FusedDropoutAddLayerNorm", "FusedLayerNorm", "dropout_add_layernorm", "layernorm"]
