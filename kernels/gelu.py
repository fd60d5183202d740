"""GELU(x + bias) over the last axis, forward and backward: the step between a feed-forward's two matrix products.

A row has I elements, z = x + bias, Φ is the normal distribution function and φ its density (Hendrycks and Gimpel 2016):

    forward     y = z Φ(z)
    backward    dx = dy (Φ(z) + z φ(z))     dbias = Σ_rows dx
    "none"      Φ(z) = ½ (1 + erf(z / √2)), which BERT uses
    "tanh"      Φ(z) = ½ (1 + tanh u) = σ(2u),  φ(z) = Φ'(z) = 2u' σ(2u) σ(−2u),  u = √(2/π) (z + 0.044715 z³)

Everything is float32 in registers; z is not rounded to x's dtype. Both Φ satisfy Φ(z) = 1 − Φ(−z), so with a = |z|

    z Φ(z) = max(z, 0) − a Φ(−a)            Φ(z) + z φ(z) = t where z < 0, else 1 − t,   t = Φ(−a) − a φ(a)

Only the tail Φ(−a) is computed: nothing cancels where z is very negative, as 1 + erf does, and nothing overflows. At ±∞
the results are those of the formulas in IEEE arithmetic, as in PyTorch: y = ∞ at ∞ and NaN (−∞ · 0) at −∞, dx = NaN at
both. The limits 0 and 1 would hide from a trainer that its activations overflowed.

Saved for the backward: x. z, Φ and φ are recomputed, since y does not determine them. Bytes through HBM a row of e-byte
elements, which are the fewest possible, and FLOPs:

                                        read            written         bytes         FLOPs, "none"   "tanh"
    forward                             x               y               2 e I         29 I            16 I
    backward                            dy x            dx              3 e I         33 I            22 I
    F.linear with bias, F.gelu, both    x, dy x, dx     y, dx           6 e I         (the last read is dbias's)

The bias adds 4 I bytes, and its gradient 8 P I for P programs a column tile (`rows`).

At ten operations a byte arithmetic begins to limit. An H200 issues about 30 T instructions a second (132
multiprocessors × 128 lanes × 1.75 GHz) and copies at 4.3 TB/s. With libdevice's erf the forward takes 35 instructions a
bf16 element, at most 3.4 TB/s. With the tail it takes 21 and the backward 30, at most 5.7 and 6 TB/s: memory sets the
time again. (Counted in sm_90 code, not measured.)
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
from .checks import check_choice, check_dtype, check_has_columns, check_vector
from .library import register
from .rows import (
    Config,
    as_rows,
    contiguous,
    empty_gradient,
    empty_partials,
    launch_sum_partials,
    num_programs_for,
    row_stride,
)

APPROXIMATIONS = ("none", "tanh")


@triton.jit
def gelu_tile(tile_m, tile_i, stride, num_rows, I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):
    """(offsets, mask) of a tile in a tensor with rows stride elements apart (None: I), each [BLOCK_M, BLOCK_I]."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    row_offsets = tl.cast(rows, tl.int64) * (I if stride is None else stride)  # [BLOCK_M], 64 bits: may exceed 2³¹
    mask = rows[:, None] < num_rows  # [BLOCK_M, 1]
    if I % BLOCK_I != 0:
        mask = mask & (columns[None, :] < I)
    return row_offsets[:, None] + columns[None, :], mask


@triton.jit
def load_bias(bias_ptr, tile_i, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """[1, BLOCK_I] float32."""
    columns = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    return tl.load(bias_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)[None, :]


@triton.jit
def capped_distance(z):
    """min(|z|, 16), where the tail and the density are 0 in float32 already. NaN stays NaN."""
    return tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normal_tail(a, TANH: tl.constexpr):
    """Φ(−a) for 0 ≤ a ≤ 16."""
    if TANH:
        return 1.0 / (1.0 + tl.exp2((a + 0.044715 * a * a * a) * 2.302208198))  # 2 √(2/π) log₂ e
    # 2^(a P(a) − 1), P of degree 9 fitted to log₂(2 Φ(−a)) / a with errors weighted by √Φ(−a). The error with float32's
    # rounding is ≤ 3.5e-8, and ≤ 1.5e-4 Φ(−a) up to a = 6, where Φ(−a) = 1e-9. Beyond, the fit falls faster than Φ.
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
def normal_density(a, tail, TANH: tl.constexpr):
    """φ(a) for any a, with TANH for 0 ≤ a ≤ 16; tail = Φ(−a)."""
    if TANH:
        return tail * (1.0 - tail) * (1.595769122 + 0.2140644488 * a * a)  # 2u' = 2 √(2/π) (1 + 3 · 0.044715 a²)
    return tl.exp2(-0.7213475204 * a * a - 1.325748065)  # e^(−a²/2) / √(2π)


@triton.jit
def gelu_value(z, TANH: tl.constexpr):
    """z Φ(z), float32."""
    a = capped_distance(z)
    positive = 0.5 * z + 0.5 * tl.abs(z)  # max(z, 0), but NaN at −∞
    return positive - a * normal_tail(a, TANH)


@triton.jit
def gelu_slope(z, TANH: tl.constexpr):
    """Φ(z) + z φ(z), float32."""
    a = capped_distance(z)
    tail = normal_tail(a, TANH)
    # |z| without the cap: NaN at ±∞. φ(z) where it may be, which frees a's registers before.
    t = tail - tl.abs(z) * normal_density(a if TANH else z, tail, TANH)
    return tl.where(z < 0.0, t, 1.0 - t)


@triton.jit(do_not_specialize=["num_rows"])
def bias_gelu_forward(
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
    tile_m, tile_i = tl.program_id(0) // tl.cdiv(I, BLOCK_I), tl.program_id(0) % tl.cdiv(I, BLOCK_I)
    offsets, mask = gelu_tile(tile_m, tile_i, stride_x, num_rows, I, BLOCK_M, BLOCK_I)  # [BLOCK_M, BLOCK_I]
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_I]
    if bias_ptr is not None:
        z += load_bias(bias_ptr, tile_i, I, BLOCK_I)
    offsets, mask = gelu_tile(tile_m, tile_i, None, num_rows, I, BLOCK_M, BLOCK_I)
    tl.store(y_ptr + offsets, gelu_value(z, TANH).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def bias_gelu_backward(
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
    program, tile_i = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    num_programs = tl.num_programs(0) // column_tiles
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, tile_i, I, BLOCK_I)  # [1, BLOCK_I]
    # Reduced over the tile's rows after the loop: a reduction in the loop would synchronise the warps at each tile.
    dbias = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)

    # The grid has two programs a multiprocessor, too few to hide the latency of loads: STAGES tiles are in flight.
    for tile_m in tl.range(program, tl.cdiv(num_rows, BLOCK_M), num_programs, num_stages=STAGES):
        offsets, mask = gelu_tile(tile_m, tile_i, stride_dy, num_rows, I, BLOCK_M, BLOCK_I)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_I]
        offsets, mask = gelu_tile(tile_m, tile_i, stride_x, num_rows, I, BLOCK_M, BLOCK_I)
        z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_I]
        if bias_ptr is not None:
            z += bias
        dx = dy * gelu_slope(z, TANH)  # [BLOCK_M, BLOCK_I]
        offsets, mask = gelu_tile(tile_m, tile_i, None, num_rows, I, BLOCK_M, BLOCK_I)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dx

    if dbias_ptr is not None:
        columns = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
        tl.store(dbias_ptr + program * I + columns, tl.sum(dbias, axis=0), mask=columns < I)


def _config(width: int, num_warps: int) -> Config:
    """4096 elements a tile; columns a power of two up to 512, which divides BERT's widths, or 256.

    Eight rows and more share one read of the bias: with two, a third of L2's traffic would be bias.
    """
    columns = min(triton.next_power_of_2(width), max(256, min(512, width & -width)))
    return Config(min(64, 4096 // columns), columns, num_warps)


def _launch_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    width = x.shape[-1]
    rows = as_rows(x, width)
    config = _config(width, num_warps=4)
    with torch.cuda.device_of(x):
        bias_gelu_forward[(triton.cdiv(rows.shape[0], config.rows) * triton.cdiv(width, config.columns),)](
            rows,
            contiguous(bias),
            y,
            row_stride(rows),
            rows.shape[0],
            I=width,
            TANH=approximate == "tanh",
            BLOCK_M=config.rows,
            BLOCK_I=config.columns,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return y


def _launch_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    dx, dbias = _empty_backward(dy, x, bias, approximate, bias_grad)
    if x.numel() == 0:
        return dx, dbias.zero_()
    width = x.shape[-1]
    dy_rows, x_rows = as_rows(dy, width), as_rows(x, width)
    num_rows = x_rows.shape[0]
    config = _config(width, num_warps=8)
    row_tiles, column_tiles = triton.cdiv(num_rows, config.rows), triton.cdiv(width, config.columns)
    num_programs = max(1, num_programs_for(x.device, row_tiles * column_tiles, config.num_warps) // column_tiles)
    partial = empty_partials(num_programs, width, bias_grad, x.device)
    with torch.cuda.device_of(x):
        bias_gelu_backward[(num_programs * column_tiles,)](
            dy_rows,
            x_rows,
            contiguous(bias),
            dx,
            partial,
            row_stride(dy_rows),
            row_stride(x_rows),
            num_rows,
            I=width,
            TANH=approximate == "tanh",
            BLOCK_M=config.rows,
            BLOCK_I=config.columns,
            STAGES=3,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
        launch_sum_partials([(partial, dbias)])
    return dx, dbias


def _empty_backward(dy: Tensor, x: Tensor, bias: Tensor | None, _: str, bias_grad: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), empty_gradient(x, bias, bias_grad)


_forward_op = register(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor", _launch_forward, lambda x, *_: x.new_empty(x.shape)
)
_backward_op = register(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate, bool bias_grad) "
    "-> (Tensor dx, Tensor dbias)",
    _launch_backward,
    _empty_backward,
)


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


def _check(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    check_choice("approximate", approximate, APPROXIMATIONS)
    check_has_columns("x", x, "I")
    check_dtype("x", x)
    check_vector("bias", bias, x.shape[-1], "x's last axis", "x", x)


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """GELU(x + bias) over the last axis (Hendrycks and Gimpel 2016).

    The sum is float32 and the result has x's dtype, under autocast too. Autograd saves x and bias only. A second
    derivative of the Triton path raises RuntimeError.

    Args:
        x: [.., I], any strides, bfloat16, float16 or float32. float64 and CPU tensors run the reference.
        bias: [I] of x's dtype or float32, or None for 0.
        approximate: "none" uses the error function, as BERT does; "tanh" approximates it.

    Returns:
        [.., I] of x's dtype, contiguous.

    Raises:
        ValueError: a shape or a device does not fit, or ``approximate`` is neither.
        TypeError: a dtype is not allowed.
    """
    _check(x, bias, approximate)
    if choose_backend(x) == "reference":
        return reference.bias_gelu(x, bias, approximate=approximate).to(x.dtype)  # a float32 bias widens the sum
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _BiasGELU.apply(x, bias, approximate)
    return _forward_op(x, bias, approximate)


class FusedLinearGELU(nn.Linear):
    """GELU(Linear(input)): cuBLAS's matrix product, then `bias_gelu`; parameters and ``state_dict`` of `nn.Linear`.

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
        check_choice("approximate", approximate, APPROXIMATIONS)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.approximate = approximate
        self.linear: Callable[..., Tensor] = F.linear  # model/fp8.py replaces it with an fp8 product

    def forward(self, input: Tensor) -> Tensor:
        if choose_backend(input) == "reference":  # F.linear on a CPU adds the bias for free
            return F.gelu(self.linear(input, self.weight, self.bias), approximate=self.approximate)
        return bias_gelu(self.linear(input, self.weight), self.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"
