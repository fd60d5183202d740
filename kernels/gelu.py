"""GELU(x + bias) over the last axis, forward and backward: the step between a feed-forward's two matrix products.

A row has I elements, z = x + bias, Φ is the standard normal's distribution function and φ its density:

    forward     y = z Φ(z)
    backward    dx = dy (Φ(z) + z φ(z))     dbias = Σ_rows dx
    "none"      Φ(z) = ½ (1 + erf(z / √2))
    "tanh"      Φ(z) = ½ (1 + tanh w) = σ(2w),  φ(z) = Φ'(z) = 2w' σ(2w) σ(−2w),  w = √(2/π) (z + 0.044715 z³)

(Hendrycks and Gimpel 2016, the exact GELU and its first approximation; BERT's is the exact one.) All of it is float32
in registers, and z is never rounded to the activations' dtype. Both Φ satisfy Φ(z) = 1 − Φ(−z), so with a = |z|

    z Φ(z) = max(z, 0) − a Φ(−a)            Φ(z) + z φ(z) = t where z < 0, else 1 − t,   t = Φ(−a) − a φ(a)

and only the tail Φ(−a) is computed: nothing cancels where z is very negative, as in 1 + erf, and nothing overflows.

The linear before this step need not add its bias, and its backward need not read dx again to sum it. Kept for the
backward: x, the linear's own result, and nothing else; z, Φ and φ are computed again, since y alone does not give them.

Bytes through HBM a row of e-byte elements, which are also the fewest possible, and FLOPs:

                                        read            written         bytes         FLOPs, "none"   "tanh"
    forward                             x               y               2 eI          27 I            14 I
    backward                            dy x            dx              3 eI          33 I            22 I
    F.linear with bias, F.gelu, both    x, dy x, dx     y, dx           6 eI          the last read is dbias's

Beside them 4 I bytes of bias, and in the backward 8 PI: each of P programs a column adds up its own rows in registers
and leaves a float32 row of partial sums, which a second small kernel adds in a fixed order: no atomics, so the same
inputs give the same bits.

Near ten operations a byte arithmetic begins to show. An H200 issues about 30 T instructions a second (132
multiprocessors, 128 lanes, 1.75 GHz) and copies at 4.3 TB/s. With libdevice's erf the forward is 35 instructions an
element of bf16, at most 3.4 TB/s; with the tail below 20, and the backward's loop 30, each at most 6 TB/s: the memory
sets the time again. (Counted in sm_90 code; not yet measured on a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import reference
from .backend import choose_backend, tl, triton
from .rows import as_rows, launch_sum_partials, num_programs_for, row_stride

APPROXIMATIONS = ("none", "tanh")


# ------------------------------------------------------------------------------------------------------------- kernels
#
# A program works on tiles of BLOCK_M rows by BLOCK_I columns. Offsets are 64 bits: row · stride may pass 2³¹.


@triton.jit
def _tile(row_tile, column_tile, stride, num_rows, I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):
    """(offsets, mask) of a tile in a tensor whose rows are stride elements apart (None: I), each [BLOCK_M, BLOCK_I]."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    row_offsets = tl.cast(rows, tl.int64) * (I if stride is None else stride)
    mask = rows[:, None] < num_rows
    if I % BLOCK_I != 0:
        mask = mask & (columns[None, :] < I)
    return row_offsets[:, None] + columns[None, :], mask


@triton.jit
def _bias(bias_ptr, column_tile, I: tl.constexpr, BLOCK_I: tl.constexpr):
    columns = column_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    return tl.load(bias_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _distance(z):
    # |z|, up to where the tail is 0 in float32: an infinity must not meet that 0. NaN stays NaN.
    return tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tail(a, TANH: tl.constexpr):
    """Φ(−a) for 0 ≤ a ≤ 16."""
    if TANH:
        return 1.0 / (1.0 + tl.exp2((a + 0.044715 * a * a * a) * 2.302208198))  # 2 √(2/π) log₂ e
    # 2^(a P(a) − 1), P of degree 9 fitted to log₂(2 Φ(−a)) / a, errors weighted by √Φ(−a): within 3.5e-8 of Φ(−a) with
    # float32's own rounding, within 1.5e-4 Φ(−a) as far as a = 6, where it is 1e-9; beyond it falls faster than Φ.
    p = -3.09242232e-08 * a + 9.00011401e-07
    p = p * a - 1.12612861e-05
    p = p * a + 7.72678468e-05
    p = p * a - 2.79371219e-04
    p = p * a - 6.56783232e-06
    p = p * a + 6.96118735e-03
    p = p * a - 5.24542034e-02
    p = p * a - 4.59215909e-01
    p = p * a - 1.15110481
    return tl.exp2(p * a - 1.0)


@triton.jit
def _density(a, tail, TANH: tl.constexpr):
    """φ(a), the tail's rate of fall, for 0 ≤ a ≤ 16."""
    if TANH:
        return tail * (1.0 - tail) * (1.595769122 + 0.2140644488 * a * a)  # 2w' = 2 √(2/π) (1 + 3 · 0.044715 a²)
    return tl.exp2(-0.7213475204 * a * a - 1.325748065)  # e^(−a²/2) / √(2π)


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """z Φ(z), float32."""
    a = _distance(z)
    return tl.maximum(z, 0.0) - a * _tail(a, TANH)


@triton.jit
def gelu_slope(z, TANH: tl.constexpr):
    """Φ(z) + z φ(z), float32."""
    a = _distance(z)
    tail = _tail(a, TANH)
    t = tail - a * _density(a, tail, TANH)
    return tl.where(z < 0.0, t, 1.0 - t)


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x_ptr,  # [M, I]
    bias_ptr,  # [I] or None
    y_ptr,  # [M, I] contiguous
    stride_x,  # elements from row to row, or None: I
    num_rows,
    I: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row_tile, column_tile = tl.program_id(0) // tl.cdiv(I, BLOCK_I), tl.program_id(0) % tl.cdiv(I, BLOCK_I)
    offsets, mask = _tile(row_tile, column_tile, stride_x, num_rows, I, BLOCK_M, BLOCK_I)
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += _bias(bias_ptr, column_tile, I, BLOCK_I)
    offsets, mask = _tile(row_tile, column_tile, None, num_rows, I, BLOCK_M, BLOCK_I)
    tl.store(y_ptr + offsets, gelu(z, TANH).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    dy_ptr,  # [M, I]
    x_ptr,  # [M, I]
    bias_ptr,  # [I] or None
    dx_ptr,  # [M, I] contiguous
    dbias_ptr,  # [P, I] float32 or None: partial sums, a row for each program of a column tile
    stride_dy,  # elements from row to row, or None: I
    stride_x,
    num_rows,
    I: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    column_tiles: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    program, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    num_programs = tl.num_programs(0) // column_tiles
    if bias_ptr is not None:
        bias = _bias(bias_ptr, column_tile, I, BLOCK_I)
    # Summed over the tile's rows only at the end: until then no thread waits for another.
    dbias = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)

    # The few programs that this grid has must keep the memory busy by themselves: STAGES tiles are in flight.
    for row_tile in tl.range(program, tl.cdiv(num_rows, BLOCK_M), num_programs, num_stages=STAGES):
        offsets, mask = _tile(row_tile, column_tile, stride_dy, num_rows, I, BLOCK_M, BLOCK_I)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = _tile(row_tile, column_tile, stride_x, num_rows, I, BLOCK_M, BLOCK_I)
        z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z += bias
        dx = dy * gelu_slope(z, TANH)
        offsets, mask = _tile(row_tile, column_tile, None, num_rows, I, BLOCK_M, BLOCK_I)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dx

    if dbias_ptr is not None:
        columns = column_tile * BLOCK_I + tl.arange(0, BLOCK_I)
        tl.store(dbias_ptr + program * I + columns, tl.sum(dbias, axis=0), mask=columns < I)


# ------------------------------------------------------------------------------------------------------------ launcher


def _blocks(width: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_I): 4096 elements; columns a power of two up to 512, which divides BERT's widths, or 256."""
    block_i = min(triton.next_power_of_2(width), max(256, min(512, width & -width)))
    return min(64, 4096 // block_i), block_i


def _launch_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    width = x.shape[-1]
    rows = as_rows(x, width)
    # 32 elements a thread. Eight rows share one read of the bias: with two, a third of the L2's traffic would be bias.
    block_m, block_i = _blocks(width)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows.shape[0], block_m) * triton.cdiv(width, block_i),)](
            rows,
            None if bias is None else bias.contiguous(),
            y,
            row_stride(rows),
            rows.shape[0],
            I=width,
            TANH=approximate == "tanh",
            BLOCK_M=block_m,
            BLOCK_I=block_i,
            num_warps=4,
        )
    return y


def _launch_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbias = _empty_bias_gradient(x, bias if bias_grad else None)
    if x.numel() == 0:
        return dx, dbias.zero_()
    width = x.shape[-1]
    dy_rows, x_rows = as_rows(dy, width), as_rows(x, width)
    num_rows = x_rows.shape[0]
    block_m, block_i = _blocks(width)
    num_warps = 8
    row_tiles, column_tiles = triton.cdiv(num_rows, block_m), triton.cdiv(width, block_i)
    num_programs = max(1, num_programs_for(x.device, row_tiles * column_tiles, num_warps) // column_tiles)
    partial = torch.empty((num_programs, width), dtype=torch.float32, device=x.device) if bias_grad else None
    with torch.cuda.device_of(x):
        _backward[(num_programs * column_tiles,)](
            dy_rows,
            x_rows,
            None if bias is None else bias.contiguous(),
            dx,
            partial,
            row_stride(dy_rows),
            row_stride(x_rows),
            num_rows,
            I=width,
            TANH=approximate == "tanh",
            BLOCK_M=block_m,
            BLOCK_I=block_i,
            STAGES=3,
            num_warps=num_warps,
        )
        launch_sum_partials([(partial, dbias)])
    return dx, dbias


def _empty_bias_gradient(x: Tensor, bias: Tensor | None) -> Tensor:
    shape, dtype = ((0,), x.dtype) if bias is None else (bias.shape, bias.dtype)
    return torch.empty(shape, dtype=dtype, device=x.device)


# ------------------------------------------------------------------------------------------------------------ operator
#
# define/impl with the autograd.Function outside, as `layernorm`'s: one boundary a call.

_library = torch.library.Library("fusebert", "FRAGMENT")
_library.define("bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate, bool bias_grad) "
    "-> (Tensor dx, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("bias_gelu", _launch_forward, _device)
    _library.impl("bias_gelu_backward", _launch_backward, _device)
_forward_op = torch.ops.fusebert.bias_gelu.default
_backward_op = torch.ops.fusebert.bias_gelu_backward.default


@torch.library.register_fake("fusebert::bias_gelu", lib=_library)
def _fake_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fusebert::bias_gelu_backward", lib=_library)
def _fake_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_bias_gradient(x, bias if bias_grad else None)


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _forward_op(x, bias, approximate)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[1]
        dx, dbias = _backward_op(dy, x, bias, ctx.approximate, bias_grad)
        return dx, dbias if bias_grad else None, None


# -------------------------------------------------------------------------------------------------------- public names


def _check_approximate(approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be 'none' (erf) or 'tanh'; got {approximate!r}")


def _check(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    _check_approximate(approximate)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [.., I]; got a scalar")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have shape {tuple(x.shape[-1:])}, x's last; got {tuple(bias.shape)}")
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"bias must have x's dtype {x.dtype} or float32; got {bias.dtype}")
    if bias.device != x.device:
        raise ValueError(f"bias must be on x's device {x.device}; got {bias.device}")


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """GELU(x + bias) over the last axis (Hendrycks and Gimpel 2016).

    The sum is float32 and the result has x's dtype, under autocast too. Autograd keeps x and bias and nothing else.
    Differentiable once: asking for second derivatives of the Triton path raises RuntimeError.

    Args:
        x: [.., I], any strides, bfloat16, float16 or float32; float64 and tensors on the CPU run the reference.
        bias: [I], x's dtype or float32; or None: 0.
        approximate: "none" is z Φ(z) by the error function, which BERT uses; "tanh" its approximation by tanh.

    Returns:
        [.., I], contiguous.

    Raises:
        ValueError: a shape, a device, or another ``approximate``.
        TypeError: a dtype.
    """
    _check(x, bias, approximate)
    if choose_backend(x) == "reference":
        return reference.bias_gelu(x, bias, approximate=approximate).to(x.dtype)  # a float32 bias widens the sum
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _BiasGELU.apply(x, bias, approximate)
    return _forward_op(x, bias, approximate)


class FusedLinearGELU(nn.Linear):
    """GELU(Linear(input)): cuBLAS's product, then `bias_gelu`; parameters and ``state_dict`` of `nn.Linear`.

    Raises:
        ValueError: ``approximate`` is neither "none" nor "tanh".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        approximate: Literal["none", "tanh"] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_approximate(approximate)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.approximate = approximate
        self.linear: Callable[..., Tensor] = F.linear  # an fp8 product may stand in for it

    def forward(self, input: Tensor) -> Tensor:
        if choose_backend(input) == "reference":  # a CPU's product adds the bias in passing
            return F.gelu(self.linear(input, self.weight, self.bias), approximate=self.approximate)
        return bias_gelu(self.linear(input, self.weight), self.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


__all__ = ["FusedLinearGELU", "bias_gelu", "gelu", "gelu_slope"]
