"""GELU(x + b) Wᵀ whose backward has GELU' in a product's epilogue: a contestant, not yet measured on a GPU.

x is [T, I], the up projection without its bias b, W the down projection, [H, I]; dy [T, H]; e bytes an element.

    forward     a = GELU(x + b)   y = a Wᵀ                                     as ever: `bias_gelu`, cuBLAS
    backward    dx = (dy W) ∘ GELU'(x + b)   db = Σ_rows dx   dW = dyᵀ a       dx and db in one kernel, cuBLAS

The first product of the backward, and what follows it:

                            read                written           FLOPs
    today   product         (T + I) H e         T I e (da)        2 T H I
            bias_gelu's     2 T I e             T I e (dx)
    here    both            (T + I) H e + T I e T I e             2 T H I

What is spared is a write and a read of e I bytes a token, 8 eH of the 56 eH that `docs/step.md` counts a layer, and a
launch: twice what the forward's epilogue spares (`linear_gelu_epilogue`, where r, c and the reasoning are). At most the
whole separate pass goes, 3 e I / c: 4.3 ns of a token and layer, or 5.3 % of BERT-base's step; a product slower than
cuBLAS's by 3 e r / (2 H c), 72 % at H = 768, has eaten it up. The epilogue's 30 instructions an element are 16 · 30 / H
of the product's own time, 63 % at H = 768: they too have to run beneath another tile's product.

b's gradient: each tile leaves a float32 row of its columns' sums, 4 I / 128 bytes a token, and a second small kernel
adds them in a fixed order: no atomics, so the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import backend
from ...kernels.backend import tl, triton
from ...kernels.gelu import APPROXIMATIONS, gelu_slope
from ...kernels.rows import as_rows, launch_sum_partials, multiprocessors, row_stride
from .linear_gelu_epilogue import GROUP, TILINGS, Tiling, load_tile, store_tile, take_descriptors, tile_position

# As `linear_gelu_epilogue`'s. The epilogue has one tensor more in shared memory, hence two slices, and of a pair's
# buffers one less.
_TABLE = {
    80: {"pair": Tiling(128, 128, 32, 2, 4, 4, 2), "wide": Tiling(128, 256, 32, 2, 8, 4, 1)},
    90: {"pair": Tiling(128, 128, 64, 2, 4, 2, 2), "wide": Tiling(128, 256, 64, 2, 8, 3, 1)},
}
_FLOAT32 = Tiling(64, 64, 32, 1, 4, 3, 2)


@triton.jit(do_not_specialize=["num_rows"])
def _product_gelu_slope(
    dy,  # [T, H]; this and the next two, and dx: descriptors if TMA, else pointers
    weight,  # [H, I]
    x,  # [T, I]
    bias_ptr,  # [I]
    dx,  # [T, I]
    dbias_ptr,  # [row tiles, I] float32: sums over a tile's rows
    stride_dy,  # elements from row to row, or None: the width
    stride_w,
    stride_x,
    num_rows,
    H: tl.constexpr,
    I: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    SLICE: tl.constexpr = BLOCK_N // SLICES
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(I, BLOCK_N)
    programs = tl.num_programs(0)
    # The epilogue counts tiles for itself: in the flattened loop the loads are already at the next one.
    finished = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=TMA):
        row, column = tile_position(tile, row_tiles, column_tiles, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(H, BLOCK_K)):
            # Beyond H dy is 0: what is loaded of W there (a row again, through pointers) does not matter.
            a = load_tile(dy, row * BLOCK_M, k * BLOCK_K, stride_dy, num_rows, H, TMA, BLOCK_M, BLOCK_K)
            b = load_tile(weight, k * BLOCK_K, column * BLOCK_N, stride_w, H, I, TMA, BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

        finished += programs
        row, column = tile_position(finished, row_tiles, column_tiles, GROUP)
        parts = (acc,)
        if SLICES == 2:
            parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, SLICE)), (0, 2, 1)))  # left half, right half
        for i in tl.static_range(SLICES):
            start = column * BLOCK_N + i * SLICE
            columns = start + tl.arange(0, SLICE)
            bias = tl.load(bias_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)
            z = load_tile(x, row * BLOCK_M, start, stride_x, num_rows, I, TMA, BLOCK_M, SLICE).to(tl.float32)
            part = parts[i] * gelu_slope(z + bias[None, :], TANH)
            if not TMA:  # there dy's rows beyond the last are zeros
                rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
                part = tl.where(rows[:, None] < num_rows, part, 0.0)
            store_tile(dx, part, row * BLOCK_M, start, num_rows, I, TMA, BLOCK_M, SLICE)
            tl.store(dbias_ptr + row * I + columns, tl.sum(part, axis=0), mask=columns < I)


def _launch(
    dy: Tensor, weight: Tensor, x: Tensor, bias: Tensor, approximate: str, tiling: str
) -> tuple[Tensor, Tensor]:
    """(dx, db)."""
    hidden_size, size = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbias = torch.empty_like(bias)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    dy, weight, rows, flat = as_rows(dy, hidden_size), as_rows(weight, size), as_rows(x, size), dx.view(-1, size)
    tma = backend.architecture() >= 90 and take_descriptors(dy, weight, rows, flat)
    chosen = _TABLE[90 if tma else 80][tiling] if x.element_size() == 2 else _FLOAT32
    row_tiles = triton.cdiv(rows.shape[0], chosen.block_m)
    tiles = row_tiles * triton.cdiv(size, chosen.block_n)
    partial = torch.empty((row_tiles, size), dtype=torch.float32, device=x.device)
    given: list[Any] = [dy, weight, rows, bias.contiguous(), flat]
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        slice_of_tile = [chosen.block_m, chosen.block_n // chosen.slices]
        given[0] = TensorDescriptor.from_tensor(dy, [chosen.block_m, chosen.block_k])
        given[1] = TensorDescriptor.from_tensor(weight, [chosen.block_k, chosen.block_n])
        given[2], given[4] = (TensorDescriptor.from_tensor(tensor, slice_of_tile) for tensor in (rows, flat))
        resident = chosen.programs * (multiprocessors(x.device) if x.is_cuda else 2)
    with torch.cuda.device_of(x):
        _product_gelu_slope[(min(tiles, resident) if tma else tiles,)](
            *given,
            partial,
            row_stride(dy),
            row_stride(weight),
            row_stride(rows),
            rows.shape[0],
            H=hidden_size,
            I=size,
            TANH=approximate == "tanh",
            PRECISION=backend.dot_precision(x.dtype),
            TMA=tma,
            GROUP=GROUP,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_K=chosen.block_k,
            SLICES=chosen.slices,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
        launch_sum_partials([(partial, dbias)])
    return dx, dbias


_library = torch.library.Library("fusebert", "FRAGMENT")
_library.define(
    "product_gelu_slope(Tensor dy, Tensor weight, Tensor x, Tensor bias, str approximate, str tiling) "
    "-> (Tensor dx, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("product_gelu_slope", _launch, _device)


@torch.library.register_fake("fusebert::product_gelu_slope", lib=_library)
def _fake(dy: Tensor, weight: Tensor, x: Tensor, bias: Tensor, approximate: str, tiling: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(bias)


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, approximate: str, tiling: str) -> Tensor:
        a = torch.ops.fusebert.bias_gelu(x, bias, approximate)
        ctx.save_for_backward(x, bias, weight, a)
        ctx.approximate, ctx.tiling = approximate, tiling
        return a @ weight.t()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight, a = ctx.saved_tensors
        dx, dbias = torch.ops.fusebert.product_gelu_slope(dy, weight, x, bias, ctx.approximate, ctx.tiling)
        return dx, dbias, dy.reshape(-1, weight.shape[0]).t() @ a.reshape(-1, weight.shape[1]), None, None


def gelu_linear(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    tiling: str = "pair",
) -> Tensor:
    """GELU(x + b) Wᵀ with that backward, wherever Triton runs; it has no other path.

    Args:
        x: [.., I], bfloat16, float16 or float32.
        bias: [I], x's dtype or float32.
        weight: [H, I], x's dtype.
        approximate: as `fusebert.kernels.bias_gelu`'s.
        tiling: "pair" or "wide", see `linear_gelu_epilogue`.

    Returns:
        [.., H].

    Raises:
        ValueError: a shape, ``approximate`` or ``tiling``.
        TypeError: a dtype.
    """
    if approximate not in APPROXIMATIONS or tiling not in TILINGS:
        raise ValueError(
            f"approximate must be one of {', '.join(APPROXIMATIONS)}, tiling one of {', '.join(TILINGS)}; "
            f"got {approximate!r}, {tiling!r}"
        )
    if weight.dim() != 2 or not x.shape[-1:] == bias.shape == weight.shape[1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, bias, weight))
        raise ValueError(f"x, bias and weight must have shapes [.., I], [I] and [H, I]; got {shapes}")
    if x.dtype not in backend.KERNEL_DTYPES or weight.dtype != x.dtype or bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            "x must be bfloat16, float16 or float32, weight of x's dtype, bias of x's or float32; got "
            f"{x.dtype}, {weight.dtype}, {bias.dtype}"
        )
    return _GELULinear.apply(x, bias, weight, approximate, tiling)


__all__ = ["gelu_linear"]
