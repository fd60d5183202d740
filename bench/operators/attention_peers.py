"""Who computes attention: ours packed and padded, and every peer, each with q, k and v in the layout it likes best.

Ours and flash-attn take one packed [T, 3, H, D]; SDPA three tensors that are [B, N, H, D] in memory and seen as
[B, H, N, D]; nested tensors and xformers three packed ones. What depends on the lengths alone (masks, block masks,
offsets) is made once and not timed, for everybody: a model makes it once for all its layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import attention, attention_varlen
from ..measure.case import COMPILE_IS_SLOW, OURS, Contestant, Missing, Run, Tensors, installed, leaf
from .attention_segments import GRADIENTS, Segments

MOST_SCORES_BYTES = 24 << 30  # what materialises [B, H, N, N] holds about six such tensors through a backward
CUDA_ONLY, HALF_ONLY = "runs on CUDA only", "takes only fp16 and bf16"

Call = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _named_packed(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **dict(zip(GRADIENTS, gradients[0].unbind(1), strict=True))}


def _bind_varlen(shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    qkv = leaf(inputs["qkv"])

    def forward() -> Tensor:
        seed = inputs.get("seed")
        return cast(Tensor, attention_varlen(qkv, shape.cu_seqlens, shape.longest, dropout_p=dropout_p, seed=seed))

    return Run(forward, (qkv,), inputs["dout"], _named_packed)


def bind_padded(shape: Segments, call: Call, inputs: Tensors, dropout_p: float) -> Run:
    """``call(q, k, v, dropout_p)`` on padded tensors [B, H, N, D]."""
    q, k, v = (leaf(shape.pad(x)) for x in inputs["qkv"].unbind(1))

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        unpadded = (shape.unpad(x) for x in (out, *gradients))
        return dict(zip(("out", *GRADIENTS), unpadded, strict=True))

    return Run(lambda: call(q, k, v, dropout_p), (q, k, v), shape.pad(inputs["dout"]), named)


def _bind_ours_padded(shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    mask = None if shape.equal else shape.real

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return cast(Tensor, attention(q, k, v, key_padding_mask=mask, dropout_p=p, seed=inputs.get("seed")))

    return bind_padded(shape, call, inputs, dropout_p)


def _bind_sdpa(shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    mask = None if shape.equal else shape.real[:, None, None, :].expand(-1, 1, shape.longest, -1)

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    return bind_padded(shape, call, inputs, dropout_p)


def _eager(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, p: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if padding is not None:
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    return F.dropout(torch.softmax(scores, dim=-1), p) @ v


def _bind_eager(function: Any, shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    padding = None if shape.equal else ~shape.real[:, None, None, :]
    return bind_padded(shape, lambda q, k, v, p: function(q, k, v, padding, p), inputs, dropout_p)


def _bind_flex_padded(function: Any, block_mask: Callable[[], Any], shape: Segments, inputs: Tensors, p: float) -> Run:
    mask = None if shape.equal else block_mask()
    return bind_padded(shape, lambda q, k, v, _: function(q, k, v, block_mask=mask), inputs, p)


def _bind_packed(shape: Segments, call: Call, inputs: Tensors, dropout_p: float) -> Run:
    """``call(q, k, v, dropout_p)`` on three packed tensors [T, H, D]."""
    q, k, v = (leaf(x.contiguous()) for x in inputs["qkv"].unbind(1))

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        return dict(zip(("out", *GRADIENTS), (out, *gradients), strict=True))

    return Run(lambda: call(q, k, v, dropout_p), (q, k, v), inputs["dout"], named)


def _bind_flex_packed(function: Any, block_mask: Callable[[], Any], shape: Segments, inputs: Tensors, p: float) -> Run:
    mask = block_mask()

    def call(q: Tensor, k: Tensor, v: Tensor, _: float) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # (1, H, T, D)
        return cast(Tensor, function(q, k, v, block_mask=mask).transpose(1, 2)[0])

    return _bind_packed(shape, call, inputs, p)


def _bind_nested(shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    offsets = shape.cu_seqlens.long()
    shortest, longest = min(shape.lengths), shape.longest  # known: looking would wait for the GPU

    def jagged(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
        return nested.transpose(1, 2)  # (B, H, n, D)

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        out = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v), dropout_p=p)
        return out.transpose(1, 2).values()

    return _bind_packed(shape, call, inputs, dropout_p)


def _bind_flash_attn(shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func

    qkv = leaf(inputs["qkv"])

    def forward() -> Tensor:
        if not shape.equal:
            return flash_attn_varlen_qkvpacked_func(qkv, shape.cu_seqlens, shape.longest, dropout_p=dropout_p)
        padded = qkv.unflatten(0, (-1, shape.longest))  # (B, N, 3, H, D): spares it the bounds
        return flash_attn_qkvpacked_func(padded, dropout_p=dropout_p).flatten(0, 1)

    return Run(forward, (qkv,), inputs["dout"], _named_packed)


def _bind_xformers(shape: Segments, inputs: Tensors, dropout_p: float) -> Run:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(shape.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return memory_efficient_attention(q[None], k[None], v[None], bias, p=p)[0]

    return _bind_packed(shape, call, inputs, dropout_p)


def _padded_block_mask(shape: Segments) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = shape.cu_seqlens.diff()

    def real(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < lengths[b]) & (j < lengths[b])  # rows of padding see nothing: their blocks are left out

    n, on_gpu = shape.longest, shape.device.type == "cuda"
    return create_block_mask(real, len(shape.lengths), None, n, n, device=shape.device, _compile=on_gpu)


def _packed_block_mask(shape: Segments) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    count = torch.arange(len(shape.lengths), device=shape.device)
    segment = torch.repeat_interleave(count, shape.cu_seqlens.diff())  # (T,)

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segment[i] == segment[j]

    on_gpu = shape.device.type == "cuda"  # there T is large: without _compile it would write all T² entries
    return create_block_mask(same, None, None, shape.tokens, shape.tokens, device=shape.device, _compile=on_gpu)


def contestants(
    shape: Segments, dtype: torch.dtype, dropout_p: float, *, quick: bool
) -> tuple[list[Contestant], list[Missing]]:
    """Ours, the peers that can run this case here, and those that cannot, with the reason.

    Args:
        quick: leave out what has to be compiled.
    """
    found: list[Contestant] = []
    missing: list[Missing] = []

    def enter(name: str, bind: Callable[[Tensors, float], Run], *gaps: str | None, **options: Any) -> None:
        gap = next(filter(None, gaps), None)
        if gap is None:
            found.append(Contestant(name, bind, **options))
        else:
            missing.append(Missing(name, gap))

    of = functools.partial
    no_cuda = None if shape.device.type == "cuda" else CUDA_ONLY
    not_half = None if dtype in (torch.float16, torch.bfloat16) else HALF_ONLY
    enter("fusebert attention_varlen", of(_bind_varlen, shape), role=OURS, replays_dropout=True)
    enter("fusebert attention", of(_bind_ours_padded, shape), role=OURS, replays_dropout=True)

    gigabytes = 6 * len(shape.lengths) * shape.heads * shape.longest**2 * dtype.itemsize
    too_large = None if gigabytes < MOST_SCORES_BYTES else f"would hold {gigabytes / 1e9:.0f} GB of scores"
    on_cpu = shape.device.type == "cpu"  # flash there is a kernel of its own, in every dtype
    for name, backend, gaps in (
        ("flash", SDPBackend.FLASH_ATTENTION, (None if shape.equal else "takes no padding mask", not_half)),
        ("cudnn", SDPBackend.CUDNN_ATTENTION, (no_cuda, not_half)),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION, (no_cuda,)),
        ("math", SDPBackend.MATH, (too_large,)),
    ):
        if on_cpu and name == "flash":
            gaps = (gaps[0], "has no dropout on a CPU" if dropout_p else None)
        enter(f"sdpa {name}", of(_bind_sdpa, shape), *gaps, context=of(sdpa_kernel, backend))
    enter("torch eager", of(_bind_eager, _eager, shape), too_large)
    slow = COMPILE_IS_SLOW if quick else None
    enter("torch.compile", of(_bind_eager, torch.compile(_eager, dynamic=False), shape), slow, too_large)

    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    flex_gaps = (None if on_cpu is False else "has no backward on a CPU", "has no dropout" if dropout_p else None, slow)
    padded, packed = (functools.cache(of(make, shape)) for make in (_padded_block_mask, _packed_block_mask))
    enter("flex_attention", of(_bind_flex_padded, flex, padded, shape), *flex_gaps)
    all_equal = "for segments of different lengths" if shape.equal else None
    enter("flex_attention packed", of(_bind_flex_packed, flex, packed, shape), all_equal, *flex_gaps)
    enter("nested tensors", of(_bind_nested, shape), all_equal)

    for name, package, bind, install in (
        ("flash-attn", "flash_attn", _bind_flash_attn, "pip install flash-attn --no-build-isolation"),
        ("xformers", "xformers", _bind_xformers, "pip install xformers"),
    ):
        lacking = None if installed(package) else f"not installed: {install}"
        enter(name, of(bind, shape), lacking, no_cuda, not_half)
    return found, missing


__all__ = ["bind_padded", "contestants"]
