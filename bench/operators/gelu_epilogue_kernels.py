"""GELU in the epilogue of a Triton matrix product: two experiments, not yet measured on a GPU.

T rows, H hidden and I intermediate elements, e bytes per element; dy is the gradient of the result:

    linear_gelu   y = GELU(x Wᵀ + b)   x [T, H], W [I, H], b [I]   GELU in the epilogue of the forward's product
    gelu_linear   y = GELU(x + b) Wᵀ   x [T, I], W [H, I], b [I]   GELU' in the epilogue of a product of the backward:
                                                                   dx = (dy W) ∘ GELU'(x + b)   db = Σ_rows dx

The model computes cuBLAS's product, then `bias_gelu` or its backward, with as many FLOPs, 2 T H I:

                  two passes read              written       one pass reads               written
    linear_gelu   (T + I) H e + T I e          2 T I e       (T + I) H e                  2 T I e
    gelu_linear   (T + I) H e + 2 T I e        2 T I e       (T + I) H e + T I e          T I e

Both ways of linear_gelu keep pre = x Wᵀ for the backward, which is the same. docs/step.md says what the saved bytes are
worth and how much slower than cuBLAS the products may be.

The epilogue is about 20 instructions per element, GELU' 30 (counted in sm_90 code). A Hopper multiprocessor has 128
lanes for them and does 4096 FLOPs per clock in 16 bits: at H = 768, 42 % and 63 % of the product's own time. There is a
gain only if one tile's epilogue overlaps another tile's product, so there are two tilings to compare:

    "pair"  tiles of 128 × 128, two programs per multiprocessor: one multiplies while the other computes GELU
    "wide"  tiles of 128 × 256, one program: 3/4 of the bytes through L2, (1/128 + 1/256) e H an element, but only the
            next tile's loads overlap the epilogue

On sm_90 and later, tensor descriptors (TMA) load and store tiles and a program loops over tiles, prefetching the next.
Elsewhere, and if rows do not start at multiples of 16 bytes, a program has one tile and loads through pointers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import backend
from ...kernels.backend import tl, triton
from ...kernels.checks import check_choice, check_dtype, check_same_dtype, check_vector
from ...kernels.gelu import APPROXIMATIONS, gelu_slope, gelu_value
from ...kernels.rows import as_rows, launch_sum_partials, multiprocessors, row_stride


class Tiling(NamedTuple):
    """Tiles, warps and buffers of a program, and programs that share a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    slices: int  # column slices in which the epilogue processes a tile, to use less shared memory
    num_warps: int
    num_stages: int
    programs: int


TILINGS = ("pair", "wide")
# Chosen by what the compiler makes of them (`fusebert.bench.aot`): no spills, and `programs` of them fit. A key is the
# lowest `tile_architecture` of its entry; below 90 there is no TMA, or too little shared memory for it.
_LINEAR_GELU = {
    80: {"pair": Tiling(128, 128, 32, 1, 4, 4, 2), "wide": Tiling(128, 256, 32, 1, 8, 4, 1)},
    90: {"pair": Tiling(128, 128, 64, 2, 4, 3, 2), "wide": Tiling(128, 256, 64, 1, 8, 3, 1)},
}
# This epilogue reads x through shared memory: two slices, and one stage less for "pair" on sm_90.
_GELU_LINEAR = {
    80: {"pair": Tiling(128, 128, 32, 2, 4, 4, 2), "wide": Tiling(128, 256, 32, 2, 8, 4, 1)},
    90: {"pair": Tiling(128, 128, 64, 2, 4, 2, 2), "wide": Tiling(128, 256, 64, 2, 8, 3, 1)},
}
_FLOAT32 = Tiling(64, 64, 32, 1, 4, 3, 2)
GROUP = 8  # tiles of one column that run one after the other and share W's tile in L2


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row, column) of a tile, counted in tiles: down a group of rows, then the next column."""
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def load_matrix_tile(
    x,  # [num_rows, WIDTH]: a descriptor, or a pointer
    row,
    column,
    stride,  # None: WIDTH
    num_rows,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x[row : row + ROWS, column : column + COLUMNS], 0 in columns beyond WIDTH: [ROWS, COLUMNS]."""
    if TMA:
        tile = x.load([row, column])
    else:
        # Rows beyond the last repeat it, which is cheaper than a mask; their results are not stored.
        rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1)  # [ROWS]
        columns = column + tl.arange(0, COLUMNS)  # [COLUMNS]
        pointers = x + tl.cast(rows, tl.int64)[:, None] * (WIDTH if stride is None else stride) + columns[None, :]
        if WIDTH % COLUMNS == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def store_matrix_tile(
    y,  # [num_rows, WIDTH] contiguous: a descriptor, or a pointer
    tile,  # [ROWS, COLUMNS]
    row,
    column,
    num_rows,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if TMA:
        y.store([row, column], tile)
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)  # [ROWS], [COLUMNS]
        mask = (rows[:, None] < num_rows) & (columns[None, :] < WIDTH)  # [ROWS, COLUMNS]
        tl.store(y + tl.cast(rows, tl.int64)[:, None] * WIDTH + columns[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_gelu_forward(
    x,  # [T, H]; x, weight, pre and y are descriptors if TMA, else pointers
    weight,  # [I, H]
    bias_ptr,  # [I]
    pre,  # [T, I]: x Wᵀ
    y,  # [T, I]
    stride_x,  # elements from row to row, or None: H
    stride_w,
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
    # The epilogue counts tiles itself: in the flattened loop the loads are already at the next tile.
    finished = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=TMA):
        row, column = tile_position(tile, row_tiles, column_tiles, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
        for k in range(0, tl.cdiv(H, BLOCK_K)):
            # a [BLOCK_M, BLOCK_K], b [BLOCK_N, BLOCK_K]
            a = load_matrix_tile(x, row * BLOCK_M, k * BLOCK_K, stride_x, num_rows, H, TMA, BLOCK_M, BLOCK_K)
            b = load_matrix_tile(weight, column * BLOCK_N, k * BLOCK_K, stride_w, I, H, TMA, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)

        finished += programs
        row, column = tile_position(finished, row_tiles, column_tiles, GROUP)
        parts = (acc,)  # SLICES × [BLOCK_M, SLICE]
        if SLICES == 2:
            parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, SLICE)), (0, 2, 1)))  # left half, right half
        for i in tl.static_range(SLICES):
            start = column * BLOCK_N + i * SLICE
            columns = start + tl.arange(0, SLICE)  # [SLICE]
            bias = tl.load(bias_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)  # [SLICE]
            store_matrix_tile(pre, parts[i], row * BLOCK_M, start, num_rows, I, TMA, BLOCK_M, SLICE)
            z = parts[i] + bias[None, :]  # [BLOCK_M, SLICE]
            store_matrix_tile(y, gelu_value(z, TANH), row * BLOCK_M, start, num_rows, I, TMA, BLOCK_M, SLICE)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_linear_backward(
    dy,  # [T, H]; dy, weight, x and dx are descriptors if TMA, else pointers
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
    # The epilogue counts tiles itself: in the flattened loop the loads are already at the next tile.
    finished = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=TMA):
        row, column = tile_position(tile, row_tiles, column_tiles, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
        for k in range(0, tl.cdiv(H, BLOCK_K)):
            # a [BLOCK_M, BLOCK_K], b [BLOCK_K, BLOCK_N]. Beyond H a is 0, so the rows of b there may be anything.
            a = load_matrix_tile(dy, row * BLOCK_M, k * BLOCK_K, stride_dy, num_rows, H, TMA, BLOCK_M, BLOCK_K)
            b = load_matrix_tile(weight, k * BLOCK_K, column * BLOCK_N, stride_w, H, I, TMA, BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

        finished += programs
        row, column = tile_position(finished, row_tiles, column_tiles, GROUP)
        parts = (acc,)  # SLICES × [BLOCK_M, SLICE]
        if SLICES == 2:
            parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, SLICE)), (0, 2, 1)))  # left half, right half
        for i in tl.static_range(SLICES):
            start = column * BLOCK_N + i * SLICE
            columns = start + tl.arange(0, SLICE)  # [SLICE]
            bias = tl.load(bias_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)  # [SLICE]
            z = load_matrix_tile(x, row * BLOCK_M, start, stride_x, num_rows, I, TMA, BLOCK_M, SLICE).to(tl.float32)
            part = parts[i] * gelu_slope(z + bias[None, :], TANH)  # [BLOCK_M, SLICE]
            if not TMA:  # through descriptors dy's rows beyond the last are 0
                rows = row * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                part = tl.where(rows[:, None] < num_rows, part, 0.0)
            store_matrix_tile(dx, part, row * BLOCK_M, start, num_rows, I, TMA, BLOCK_M, SLICE)
            tl.store(dbias_ptr + row * I + columns, tl.sum(part, axis=0), mask=columns < I)


def _choose(tilings: dict[int, dict[str, Tiling]], tiling: str, *matrices: Tensor) -> tuple[Tiling, bool]:
    """The tiling, and whether TMA can address the matrices: 16 bits per element, rows at multiples of 16 bytes."""
    if matrices[0].element_size() != 2:
        return _FLOAT32, False
    tma = backend.tile_architecture() >= 90 and all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 for x in matrices)
    return tilings[90 if tma else 80][tiling], tma


def _operand(matrix: Tensor, tma: bool, rows: int, columns: int) -> Any:
    """What a kernel gets for a matrix: a descriptor of tiles of [rows, columns], or the tensor."""
    if not tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _launch(kernel: Any, chosen: Tiling, tma: bool, x: Tensor, arguments: tuple[Any, ...], **sizes: Any) -> None:
    """Launches on x's device: a program for each tile, or with TMA as many as are resident."""
    grid = triton.cdiv(x.shape[0], chosen.block_m) * triton.cdiv(sizes["I"], chosen.block_n)
    if tma:
        grid = min(grid, chosen.programs * (multiprocessors(x.device) if x.is_cuda else 2))
    with torch.cuda.device_of(x):
        kernel[(grid,)](
            *arguments,
            x.shape[0],
            **sizes,
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


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tiling: str) -> tuple[Tensor, Tensor]:
    """(y, pre) of `linear_gelu`."""
    size, hidden_size = weight.shape
    pre, y = (torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, pre
    x, weight = as_rows(x, hidden_size), as_rows(weight, hidden_size)
    flat_pre, flat_y = pre.view(-1, size), y.view(-1, size)
    chosen, tma = _choose(_LINEAR_GELU, tiling, x, weight, flat_pre, flat_y)
    slice_of_tile = chosen.block_m, chosen.block_n // chosen.slices
    arguments = (
        _operand(x, tma, chosen.block_m, chosen.block_k),
        _operand(weight, tma, chosen.block_n, chosen.block_k),
        bias.contiguous(),
        _operand(flat_pre, tma, *slice_of_tile),
        _operand(flat_y, tma, *slice_of_tile),
        row_stride(x),
        row_stride(weight),
    )
    _launch(linear_gelu_forward, chosen, tma, x, arguments, H=hidden_size, I=size, TANH=approximate == "tanh")
    return y, pre


def _launch_backward(
    dy: Tensor, weight: Tensor, x: Tensor, bias: Tensor, approximate: str, tiling: str
) -> tuple[Tensor, Tensor]:
    """(dx, dbias) of `gelu_linear`."""
    hidden_size, size = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbias = torch.empty_like(bias)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    dy, weight, x, flat_dx = as_rows(dy, hidden_size), as_rows(weight, size), as_rows(x, size), dx.view(-1, size)
    chosen, tma = _choose(_GELU_LINEAR, tiling, dy, weight, x, flat_dx)
    slice_of_tile = chosen.block_m, chosen.block_n // chosen.slices
    # A float32 row for each tile of rows, which a second kernel adds in a fixed order: no atomics.
    partial = torch.empty((triton.cdiv(x.shape[0], chosen.block_m), size), dtype=torch.float32, device=x.device)
    arguments = (
        _operand(dy, tma, chosen.block_m, chosen.block_k),
        _operand(weight, tma, chosen.block_k, chosen.block_n),
        _operand(x, tma, *slice_of_tile),
        bias.contiguous(),
        _operand(flat_dx, tma, *slice_of_tile),
        partial,
        row_stride(dy),
        row_stride(weight),
        row_stride(x),
    )
    _launch(gelu_linear_backward, chosen, tma, x, arguments, H=hidden_size, I=size, TANH=approximate == "tanh")
    with torch.cuda.device_of(x):
        launch_sum_partials([(partial, dbias)])
    return dx, dbias


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dyᵀ x over all rows, of a linear x ↦ x Wᵀ."""
    return dy.reshape(-1, weight.shape[0]).t() @ x.reshape(-1, weight.shape[1])


class _LinearGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tiling: str) -> Tensor:
        y, pre = _launch_forward(x, weight, bias, approximate, tiling)
        ctx.save_for_backward(x, weight, bias, pre)
        ctx.approximate = approximate
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, pre = ctx.saved_tensors
        dpre, dbias = torch.ops.fusebert.bias_gelu_backward(dy, pre, bias, ctx.approximate, True)
        return dpre @ weight, _weight_gradient(dpre, x, weight), dbias, None, None


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tiling: str) -> Tensor:
        a = torch.ops.fusebert.bias_gelu(x, bias, approximate)
        ctx.save_for_backward(x, weight, bias, a)
        ctx.approximate, ctx.tiling = approximate, tiling
        return a @ weight.t()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a = ctx.saved_tensors
        dx, dbias = _launch_backward(dy, weight, x, bias, ctx.approximate, ctx.tiling)
        return dx, _weight_gradient(dy, a, weight), dbias, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, bias_axis: int, approximate: str, tiling: str) -> None:
    check_choice("approximate", approximate, APPROXIMATIONS)
    check_choice("tiling", tiling, TILINGS)
    check_dtype("x", x, backend.KERNEL_DTYPES)
    check_same_dtype("weight", weight, "x", x)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight must have x's last axis as its second; got {tuple(weight.shape)} for {tuple(x.shape)}"
        )
    check_vector("bias", bias, weight.shape[bias_axis], "one element for each column of GELU's input", "x", x)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    tiling: str = "pair",
) -> Tensor:
    """GELU(x Wᵀ + b) in one Triton kernel. There is no other path.

    Args:
        x: [.., H], bfloat16, float16 or float32.
        weight: [I, H], x's dtype.
        bias: [I], x's dtype or float32.
        approximate: as in `fusebert.kernels.bias_gelu`.
        tiling: "pair" or "wide", see the top of this file.

    Returns:
        [.., I], contiguous.

    Raises:
        ValueError: a shape, device, ``approximate`` or ``tiling`` that is not allowed.
        TypeError: a dtype that is not allowed.
    """
    _check(x, weight, bias, 0, approximate, tiling)
    return _LinearGELU.apply(x, weight, bias, approximate, tiling)


def gelu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    tiling: str = "pair",
) -> Tensor:
    """GELU(x + b) Wᵀ with GELU' in the backward product's epilogue. There is no other path than Triton.

    Args:
        x: [.., I], bfloat16, float16 or float32.
        weight: [H, I], x's dtype.
        bias: [I], x's dtype or float32.
        approximate, tiling: as in `linear_gelu`.

    Returns:
        [.., H].

    Raises:
        ValueError, TypeError: as `linear_gelu`.
    """
    _check(x, weight, bias, 1, approximate, tiling)
    return _GELULinear.apply(x, weight, bias, approximate, tiling)
