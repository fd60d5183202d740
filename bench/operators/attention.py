"""Attention: packed segments through `attention_varlen`, padded batches through torch's SDPA, and other peers.

Least work over segments of lengths n, with H heads of D, e bytes an element, T = Σ n tokens:

    pass        FLOPs            bytes
    forward     4 D H Σ n²       4 T H D e  q, k, v read, the result written
    backward    10 D H Σ n²      7 T H D e  q, k, v and the result's gradient read, three gradients written

Only real tokens count, so the work on padding lowers a padded contestant's share of the roofline.

Each contestant gets q, k and v in the layout that suits it best: ours and flash-attn one packed [T, 3, H, D]; SDPA
three tensors that are [B, N, H, D] in memory and seen as [B, H, N, D]; nested tensors and xformers three packed ones.
What depends on the lengths alone (masks, block masks, offsets) is made once and not timed, as a model makes it once
for all its layers: a contestant is a function of the segments that makes it and returns the call to time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import kernels
from ...kernels import attention_dropout_mask, reference
from ..measure.case import OURS, Cost, Run, Tensors, leaf
from ..measure.shapes import Shape
from .build import Dimension, Operator, Random, by_name, compiled, cuda_only, half_only, needs, slow_to_compile
from .segments import CHOICES, Segments

RESULTS = ("out", "dq", "dk", "dv")
MOST_SCORES_BYTES = 24 << 30  # of the peers that hold the scores [B, H, N, N]: about six such tensors in a backward

# (q, k, v, dropout_p) → the result. A call with a parameter "seed" also gets the inputs' seed.
Call = Callable[..., Tensor]
Make = Callable[[Segments], Call]


class Attention(Operator):
    name = "attention"
    dimensions = (
        Dimension("N", "the longest segment", gpu=128, cpu=128),
        Dimension("T", "real tokens, in segments of N or shorter", gpu=65536, cpu=1024),
        Dimension("H", "heads", gpu=12, cpu=4),
        Dimension("D", "size of a head", gpu=64, cpu=64),
        Dimension("lengths", "of the segments, see bench/operators/segments.py", "equal", "equal", CHOICES),
        Dimension("p", "dropout probability", gpu=0.0, cpu=0.0),
    )
    # Short to long lengths at 64 k tokens, what padding costs, and each dropout beside its pair without.
    gpu_shapes = (
        (0, "N=128; N=512"),
        (2, "N=512,lengths=real; N=128,p=0.1; N=512,p=0.1"),
        (4, "N=256; N=512,lengths=half; N=128,lengths=real; N=1024"),
        (7, "N=2048; N=64; N=4096; N=8192"),
        (9, "N=128,D=128,H=6; N=512,D=128,H=6; N=2048,D=128,H=6; N=512,lengths=real,p=0.1"),
        (11, "N=64,D=128,H=6; N=256,D=128,H=6; N=1024,D=128,H=6; N=4096,D=128,H=6; N=8192,D=128,H=6"),
    )
    cpu_shapes = (
        (0, "N=128"),
        (1, "N=512"),
        (2, "N=512,lengths=real"),
        (3, "N=128,p=0.1"),
        (5, "N=256; N=512,lengths=half"),
    )
    passes = ("forward", "forward+backward")

    def setting(self, shape: Shape, device: torch.device, dtype: torch.dtype, quick: bool) -> Segments:
        return Segments(shape, device, dtype, quick)

    def inputs(self, segments: Segments, random: Random) -> Tensors:
        size = (segments.heads, segments.head_dim)
        return {"qkv": random.normal(segments.tokens, 3, *size), "dout": random.normal(segments.tokens, *size)}

    def cost(self, segments: Segments) -> tuple[Cost, Cost]:
        return segments.cost(products=2, tensors=4), segments.cost(products=5, tensors=7)

    def describe(self, segments: Segments) -> tuple[str, dict[str, Any]]:
        shape, defaults = segments.shape, self.keys(segments.device)
        words = [f"N={segments.longest}"]
        words += [f"{key}={shape[key]}" for key in ("D", "H", "T") if shape[key] != defaults[key].default]
        words += [f"{shape['lengths']} lengths"] if shape["lengths"] != "equal" else []
        words += [f"dropout={segments.dropout_p}"] if segments.dropout_p else []
        return " ".join(words), {
            "tokens": segments.tokens,
            "segments": len(segments.lengths),
            "longest": segments.longest,
            "heads": segments.heads,
            "head_dim": segments.head_dim,
            "padding": round(1 - segments.tokens / (len(segments.lengths) * segments.longest), 4),
        }

    def evaluate(self, segments: Segments, inputs: Tensors, dropout_p: float) -> Tensors:
        """The reference at the setting's dtype, chunk by chunk, with the dropout mask that our kernels draw."""
        keep = None
        if dropout_p:
            planes, n = len(segments.lengths) * segments.heads, segments.longest
            keep = attention_dropout_mask(dropout_p, inputs["seed"], n, n, planes, segments.device)
            keep = keep.unflatten(0, (len(segments.lengths), segments.heads))
        parts: dict[str, list[Tensor]] = {name: [] for name in RESULTS}
        bounds = segments.cu_seqlens.tolist()
        for first, last in segments.chunks():
            n, rows = segments.lengths[first], slice(bounds[first], bounds[last])
            by_head: dict[str, list[Tensor]] = {name: [] for name in RESULTS}
            for heads in segments.head_chunks(n):

                def split(x: Tensor, n: int = n, rows: slice = rows, heads: slice = heads) -> Tensor:
                    return x[rows, heads].to(segments.dtype).unflatten(0, (-1, n)).transpose(1, 2)  # (b, h, n, D)

                q, k, v = (leaf(split(x)) for x in inputs["qkv"].unbind(1))
                mask = None if keep is None else keep[first:last, heads, :n, :n]
                out, _ = reference.attention(q, k, v, dropout_p=dropout_p, dropout_mask=mask)
                gradients = torch.autograd.grad(out, (q, k, v), split(inputs["dout"]))
                for name, x in zip(RESULTS, (out, *gradients), strict=True):
                    by_head[name].append(x.detach().transpose(1, 2).flatten(0, 1))
            for name, pieces in by_head.items():
                parts[name].append(torch.cat(pieces, dim=1))
        return {name: torch.cat(pieces) for name, pieces in parts.items()}


OPERATOR = Attention()


# Layouts. Each binds the call that ``make(segments)`` returns, made once, to its own form of the inputs.


def _call(segments: Segments, make: Make, inputs: Tensors, dropout_p: float) -> Call:
    call = segments.once(make)
    options = by_name(call, {"dropout_p": dropout_p, "seed": inputs.get("seed")})
    return lambda *tensors: call(*tensors, **options)


def qkv(segments: Segments, make: Make, inputs: Tensors, dropout_p: float) -> Run:
    """``call(qkv)`` on one packed tensor [T, 3, H, D]."""
    packed, call = leaf(inputs["qkv"]), _call(segments, make, inputs, dropout_p)

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        return dict(zip(RESULTS, (out, *gradients[0].unbind(1)), strict=True))

    return Run(lambda: call(packed), (packed,), inputs["dout"], named)


def separate(segments: Segments, make: Make, inputs: Tensors, dropout_p: float) -> Run:
    """``call(q, k, v)`` on three packed tensors [T, H, D]."""
    q, k, v = (leaf(x.contiguous()) for x in inputs["qkv"].unbind(1))
    call = _call(segments, make, inputs, dropout_p)

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        return dict(zip(RESULTS, (out, *gradients), strict=True))

    return Run(lambda: call(q, k, v), (q, k, v), inputs["dout"], named)


def padded(segments: Segments, make: Make, inputs: Tensors, dropout_p: float) -> Run:
    """``call(q, k, v)`` on three padded tensors [B, H, N, D]."""
    q, k, v = (leaf(segments.pad(x)) for x in inputs["qkv"].unbind(1))
    call = _call(segments, make, inputs, dropout_p)

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        return dict(zip(RESULTS, map(segments.unpad, (out, *gradients)), strict=True))

    return Run(lambda: call(q, k, v), (q, k, v), segments.pad(inputs["dout"]), named)


# Gaps.


def too_large(segments: Segments) -> str | None:
    """A gap where the scores do not fit."""
    size = 6 * len(segments.lengths) * segments.heads * segments.longest**2 * segments.dtype.itemsize
    return None if size < MOST_SCORES_BYTES else f"would hold {size / 1e9:.0f} GB of scores"


def no_dropout(segments: Segments) -> str | None:
    return "has no dropout" if segments.dropout_p else None


def no_cpu_backward(segments: Segments) -> str | None:
    return "has no backward on a CPU" if segments.device.type == "cpu" else None


def ragged_only(segments: Segments) -> str | None:
    return "for segments of different lengths" if segments.equal else None


def sdpa_flash(segments: Segments) -> str | None:
    """SDPA's flash backend is a kernel of its own on a CPU, in every dtype."""
    if not segments.equal:
        return "takes no padding mask"
    if segments.device.type == "cuda":
        return half_only(segments)
    return "has no dropout on a CPU" if segments.dropout_p else None


# Contestants.


@OPERATOR.contestant("fusebert attention_varlen", role=OURS, bind=qkv, replays_dropout=True)
def attention_varlen(segments: Segments) -> Call:
    bounds, longest = segments.cu_seqlens, segments.longest

    def call(qkv: Tensor, dropout_p: float, seed: Tensor | None) -> Any:
        return kernels.attention_varlen(qkv, bounds, longest, dropout_p=dropout_p, seed=seed)

    return call


@OPERATOR.contestant("fusebert attention", role=OURS, bind=padded, replays_dropout=True)
def attention(segments: Segments) -> Call:
    mask = None if segments.equal else segments.real

    def call(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, seed: Tensor | None) -> Any:
        return kernels.attention(q, k, v, key_padding_mask=mask, dropout_p=dropout_p, seed=seed)

    return call


def sdpa(segments: Segments) -> Call:
    mask = None if segments.equal else segments.real[:, None, None, :].expand(-1, 1, segments.longest, -1)

    def call(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)

    return call


for _name, _backend, *_gaps in (
    ("flash", SDPBackend.FLASH_ATTENTION, sdpa_flash),
    ("cudnn", SDPBackend.CUDNN_ATTENTION, cuda_only, half_only),
    ("efficient", SDPBackend.EFFICIENT_ATTENTION, cuda_only),
    ("math", SDPBackend.MATH, too_large),
):
    OPERATOR.contestant(f"sdpa {_name}", *_gaps, bind=padded, context=functools.partial(sdpa_kernel, _backend))(sdpa)


def plain(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, dropout_p: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, N]
    if padding is not None:
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ v


def _with_padding(function: Callable[..., Any], segments: Segments) -> Call:
    padding = None if segments.equal else ~segments.real[:, None, None, :]

    def call(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Any:
        return function(q, k, v, padding, dropout_p)

    return call


@OPERATOR.contestant("torch eager", too_large, bind=padded)
def eager(segments: Segments) -> Call:
    return _with_padding(plain, segments)


@OPERATOR.contestant("torch.compile", slow_to_compile, too_large, bind=padded)
def eager_compiled(segments: Segments) -> Call:
    return _with_padding(compiled(plain), segments)


def _block_mask(segments: Segments, mask_mod: Callable[..., Tensor], batch: int | None, length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    on_gpu = segments.device.type == "cuda"  # without _compile it would write an entry for each pair of tokens
    return create_block_mask(mask_mod, batch, None, length, length, device=segments.device, _compile=on_gpu)


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


@OPERATOR.contestant("flex_attention", no_cpu_backward, no_dropout, slow_to_compile, bind=padded)
def flex_padded(segments: Segments) -> Call:
    lengths = segments.cu_seqlens.diff()

    def real(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < lengths[b]) & (j < lengths[b])  # rows of padding attend to nothing: their blocks are left out

    mask = None if segments.equal else _block_mask(segments, real, len(segments.lengths), segments.longest)
    return functools.partial(_flex_attention(), block_mask=mask)


@OPERATOR.contestant("flex_attention packed", ragged_only, no_cpu_backward, no_dropout, slow_to_compile, bind=separate)
def flex_packed(segments: Segments) -> Call:
    count = torch.arange(len(segments.lengths), device=segments.device)
    segment = torch.repeat_interleave(count, segments.cu_seqlens.diff())  # [T]

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segment[i] == segment[j]

    mask, flex = _block_mask(segments, same, None, segments.tokens), _flex_attention()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # [1, H, T, D]
        return flex(q, k, v, block_mask=mask).transpose(1, 2)[0]

    return call


@OPERATOR.contestant("nested tensors", ragged_only, bind=separate)
def nested(segments: Segments) -> Call:
    offsets = segments.cu_seqlens.long()
    shortest, longest = min(segments.lengths), segments.longest  # given, so that nothing waits for the GPU

    def jagged(x: Tensor) -> Tensor:
        tensor = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
        return tensor.transpose(1, 2)  # [B, H, n, D]

    def call(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        out = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v), dropout_p=dropout_p)
        return out.transpose(1, 2).values()

    return call


@OPERATOR.contestant(
    "flash-attn",
    needs("flash_attn", "pip install flash-attn --no-build-isolation"),
    cuda_only,
    half_only,
    bind=qkv,
)
def flash_attn(segments: Segments) -> Call:
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func

    bounds, longest, equal = segments.cu_seqlens, segments.longest, segments.equal

    def call(qkv: Tensor, dropout_p: float) -> Tensor:
        if not equal:
            return flash_attn_varlen_qkvpacked_func(qkv, bounds, longest, dropout_p=dropout_p)
        batch = qkv.unflatten(0, (-1, longest))  # [B, N, 3, H, D]: needs no bounds
        return flash_attn_qkvpacked_func(batch, dropout_p=dropout_p).flatten(0, 1)

    return call


@OPERATOR.contestant("xformers", needs("xformers", "pip install xformers"), cuda_only, half_only, bind=separate)
def xformers(segments: Segments) -> Call:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(segments.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return memory_efficient_attention(q[None], k[None], v[None], bias, p=dropout_p)[0]

    return call
