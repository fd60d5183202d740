"""GELU(x Wᵀ + b) with GELU in the product's epilogue: a contestant, not yet measured on a GPU.

x is [T, H], W [I, H], b [I]; e bytes an element. Beside today's way (cuBLAS's product, then `bias_gelu`):

                            read             written        FLOPs
    today   product         (T + I) H e      T I e (pre)    2 T H I
            bias_gelu       T I e            T I e (y)
    here    both            (T + I) H e      2 T I e        2 T H I

Both leave pre = x Wᵀ, without its bias, and y, so the backward is the same one, to the bit; with pre alone the down
projection would have no input, and y alone does not give pre. What is spared is a read of e I bytes a token, 4 eH of
the 56 eH that `docs/step.md` counts a layer, and a launch.

What that is worth. Let r be the rate of products and c that of copies. The separate pass takes 2 e I / c a token; the
product takes 2 H I / r, and its own traffic, e (H + 2 I) / c, fits beneath it. So at most the whole pass goes: with
r = 790 TFLOP/s and c = 4.3 TB/s, assumed there, 2.9 ns of a token and layer, or 3.5 % of BERT-base's step; and a
product that is slower than cuBLAS's by e r / (H c), 48 % at H = 768 and 36 % at 1024, has eaten it up. (A short product
makes this one of the better places for an epilogue: the share falls as 1 / H.)

What it costs. The epilogue is about 20 instructions an element, by erf and by tanh (counted in sm_90 code). A Hopper
multiprocessor has 128 lanes for them and does 4096 FLOPs a clock in 16 bits: 16 · 20 / H of the product's own time, or
42 % at H = 768. Run one after the other, product and epilogue would gain next to nothing on the 48 % above; there is
something to win only where one tile's epilogue runs beneath another tile's product. Hence two tilings, between which
the clock decides:

    "pair"  tiles of 128 × 128, two programs a multiprocessor: one multiplies while the other computes GELU
    "wide"  tiles of 128 × 256, one program: 3/4 of the bytes through L2, (1/128 + 1/256) e H an element, but only the
            next tile's loads run beneath the epilogue

On sm_90 and later tiles come and go through tensor descriptors (TMA) and a program walks over tiles, the loads of the
next running ahead; elsewhere, and where rows do not begin at multiples of 16 bytes, a program has one tile and loads
through pointers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import backend
from ...kernels.backend import tl, triton
from ...kernels.gelu import APPROXIMATIONS, gelu
from ...kernels.rows import as_rows, multiprocessors, row_stride


class Tiling(NamedTuple):
    """How the product is cut up: tiles, warps and buffers of a program, programs that share a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    slices: int  # of columns, in which the epilogue goes through a tile: fewer buffers in shared memory
    num_warps: int
    num_stages: int
    programs: int


TILINGS = ("pair", "wide")
# By what the compiler makes of them (`fusebert.bench.aot`): no spills, and as many programs as are named fit. A key is
# the lowest architecture it is for; below 90 there is no TMA.
_TABLE = {
    80: {"pair": Tiling(128, 128, 32, 1, 4, 4, 2), "wide": Tiling(128, 256, 32, 1, 8, 4, 1)},
    90: {"pair": Tiling(128, 128, 64, 2, 4, 3, 2), "wide": Tiling(128, 256, 64, 1, 8, 3, 1)},
}
_FLOAT32 = Tiling(64, 64, 32, 1, 4, 3, 2)
GROUP = 8  # tiles, one below the other, that are worked on before the next column's: they share W's tile, in L2


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row, column) of the tile, counted in tiles: down a group of rows, then on to the next column."""
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def load_tile(
    x,  # [num_rows, WIDTH]: a descriptor, or a pointer
    row,
    column,
    stride,
    num_rows,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if TMA:
        tile = x.load([row, column])
    else:
        # Rows beyond the last are the last again, and are not stored: cheaper than a mask.
        rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1)
        columns = column + tl.arange(0, COLUMNS)
        pointers = x + tl.cast(rows, tl.int64)[:, None] * (WIDTH if stride is None else stride) + columns[None, :]
        if WIDTH % COLUMNS == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def store_tile(
    y,  # [num_rows, WIDTH] contiguous: a descriptor, or a pointer
    tile,
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
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (rows[:, None] < num_rows) & (columns[None, :] < WIDTH)
        tl.store(y + tl.cast(rows, tl.int64)[:, None] * WIDTH + columns[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_gelu(
    x,  # [T, H]; this and the next, and both results: descriptors if TMA, else pointers
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
    # The epilogue counts tiles for itself: in the flattened loop the loads are already at the next one.
    finished = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=TMA):
        row, column = tile_position(tile, row_tiles, column_tiles, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(H, BLOCK_K)):
            a = load_tile(x, row * BLOCK_M, k * BLOCK_K, stride_x, num_rows, H, TMA, BLOCK_M, BLOCK_K)
            b = load_tile(weight, column * BLOCK_N, k * BLOCK_K, stride_w, I, H, TMA, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)

        finished += programs
        row, column = tile_position(finished, row_tiles, column_tiles, GROUP)
        parts = (acc,)
        if SLICES == 2:
            parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, SLICE)), (0, 2, 1)))  # left half, right half
        for i in tl.static_range(SLICES):
            start = column * BLOCK_N + i * SLICE
            columns = start + tl.arange(0, SLICE)
            bias = tl.load(bias_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)
            store_tile(pre, parts[i], row * BLOCK_M, start, num_rows, I, TMA, BLOCK_M, SLICE)
            z = parts[i] + bias[None, :]
            store_tile(y, gelu(z, TANH), row * BLOCK_M, start, num_rows, I, TMA, BLOCK_M, SLICE)


# ------------------------------------------------------------------------------------------------------------ launcher


def take_descriptors(*tensors: Tensor) -> bool:
    """Whether TMA can address these [.., .] tensors: 16 bits an element, rows at multiples of 16 bytes."""
    return all(
        x.element_size() == 2 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors
    )


def _launch(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tiling: str) -> tuple[Tensor, Tensor]:
    """(y, pre)."""
    (size, hidden_size), rows = weight.shape, as_rows(x, weight.shape[1])
    pre, y = (torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, pre
    weight, flat_pre, flat_y = as_rows(weight, hidden_size), pre.view(-1, size), y.view(-1, size)
    arch = backend.architecture()
    tma = arch >= 90 and take_descriptors(rows, weight, flat_pre, flat_y)
    chosen = _TABLE[90 if tma else 80][tiling] if x.element_size() == 2 else _FLOAT32
    tiles = triton.cdiv(rows.shape[0], chosen.block_m) * triton.cdiv(size, chosen.block_n)
    given: list[Any] = [rows, weight, bias.contiguous(), flat_pre, flat_y]
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = (chosen.block_m, chosen.block_k), (chosen.block_n, chosen.block_k)
        slice_of_tile = (chosen.block_m, chosen.block_n // chosen.slices)
        for i, block in zip((0, 1, 3, 4), (*blocks, slice_of_tile, slice_of_tile), strict=True):
            given[i] = TensorDescriptor.from_tensor(given[i], list(block))
        resident = chosen.programs * (multiprocessors(x.device) if x.is_cuda else 2)
    with torch.cuda.device_of(x):
        _linear_gelu[(min(tiles, resident) if tma else tiles,)](
            *given,
            row_stride(rows),
            row_stride(weight),
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
    return y, pre


# ------------------------------------------------------------------------------------------------------------ operator

_library = torch.library.Library("fusebert", "FRAGMENT")
_library.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, str approximate, str tiling) -> (Tensor y, Tensor pre)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("linear_gelu", _launch, _device)


@torch.library.register_fake("fusebert::linear_gelu", lib=_library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tiling: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


class _LinearGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tiling: str) -> Tensor:
        y, pre = torch.ops.fusebert.linear_gelu(x, weight, bias, approximate, tiling)
        ctx.save_for_backward(x, weight, bias, pre)
        ctx.approximate = approximate
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, pre = ctx.saved_tensors
        dpre, dbias = torch.ops.fusebert.bias_gelu_backward(dy, pre, bias, ctx.approximate, True)
        dweight = dpre.reshape(-1, weight.shape[0]).t() @ x.reshape(-1, weight.shape[1])
        return dpre @ weight, dweight, dbias, None, None


# ---------------------------------------------------------------------------------------------------------- public name


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    tiling: str = "pair",
) -> Tensor:
    """GELU(x Wᵀ + b) in one kernel, wherever Triton runs; it has no other path.

    Args:
        x: [.., H], bfloat16, float16 or float32.
        weight: [I, H], x's dtype.
        bias: [I], x's dtype or float32.
        approximate: as `fusebert.kernels.bias_gelu`'s.
        tiling: "pair" or "wide", see the head of this file.

    Returns:
        [.., I], contiguous.

    Raises:
        ValueError: a shape, ``approximate`` or ``tiling``.
        TypeError: a dtype.
    """
    if approximate not in APPROXIMATIONS or tiling not in TILINGS:
        raise ValueError(
            f"approximate must be one of {', '.join(APPROXIMATIONS)}, tiling one of {', '.join(TILINGS)}; "
            f"got {approximate!r}, {tiling!r}"
        )
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"x, weight and bias must have shapes [.., H], [I, H] and [I]; got {shapes}")
    if x.dtype not in backend.KERNEL_DTYPES or weight.dtype != x.dtype or bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            "x must be bfloat16, float16 or float32, weight of x's dtype, bias of x's or float32; got "
            f"{x.dtype}, {weight.dtype}, {bias.dtype}"
        )
    return _LinearGELU.apply(x, weight, bias, approximate, tiling)


__all__ = ["GROUP", "TILINGS", "Tiling", "linear_gelu", "load_tile", "store_tile", "take_descriptors", "tile_position"]
