"""Attention in the benchmark: packed segments through `attention_varlen`, padded batches through torch's SDPA.

Least work over segments of lengths n, with H heads of D, e bytes an element, T = Σ n tokens:

    pass        FLOPs            bytes
    forward     4 D H Σ n²       4 T H D e  (q, k, v read, the result written)
    backward    10 D H Σ n²      7 T H D e  (q, k, v and the result's gradient read, three gradients written)

Only real tokens count, so a padded contestant pays for its padding. Who competes is in `attention_peers`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels import attention_dropout_mask, reference
from ..measure.case import Case, Tensors, leaf
from ..measure.shapes import Key, Operator, Shape
from .attention_peers import contestants
from .attention_segments import GRADIENTS, Segments
from .lengths import CHOICES, segment_lengths


def _inputs(shape: Segments, dtype: torch.dtype, seed: int) -> Tensors:
    generator = torch.Generator(shape.device).manual_seed(seed)
    size = (shape.tokens, shape.heads, shape.head_dim)
    return {
        "qkv": torch.randn((size[0], 3, *size[1:]), generator=generator, dtype=dtype, device=shape.device),
        "dout": torch.randn(size, generator=generator, dtype=dtype, device=shape.device),
        "seed": torch.tensor([seed], dtype=torch.int64, device=shape.device),
    }


def _plain(shape: Segments, dtype: torch.dtype, inputs: Tensors, dropout_p: float) -> Tensors:
    """The reference at ``dtype``, chunk by chunk, with the mask our kernels draw."""
    keep = None
    if dropout_p:
        planes = len(shape.lengths) * shape.heads
        keep = attention_dropout_mask(dropout_p, inputs["seed"], shape.longest, shape.longest, planes, shape.device)
        keep = keep.unflatten(0, (len(shape.lengths), shape.heads))
    parts: dict[str, list[Tensor]] = {name: [] for name in ("out", *GRADIENTS)}
    starts = np.concatenate([[0], np.cumsum(shape.lengths)])
    for first, last in shape.chunks():
        n, rows = shape.lengths[first], slice(int(starts[first]), int(starts[last]))
        by_head: dict[str, list[Tensor]] = {name: [] for name in parts}
        for heads in shape.head_chunks(n):

            def split(x: Tensor, n: int = n, rows: slice = rows, heads: slice = heads) -> Tensor:
                return x[rows, heads].to(dtype).unflatten(0, (-1, n)).transpose(1, 2)  # (b, h, n, D)

            q, k, v = (leaf(split(x)) for x in inputs["qkv"].unbind(1))
            mask = None if keep is None else keep[first:last, heads, :n, :n]
            out, _ = reference.attention(q, k, v, dropout_p=dropout_p, dropout_mask=mask)
            gradients = torch.autograd.grad(out, (q, k, v), split(inputs["dout"]))
            for name, x in zip(by_head, (out, *gradients), strict=True):
                by_head[name].append(x.detach().transpose(1, 2).flatten(0, 1))
        for name, pieces in by_head.items():
            parts[name].append(torch.cat(pieces, dim=1))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def _keys(device: torch.device) -> Mapping[str, Key]:
    """What a shape may say; BERT-base's heads and 64 k tokens on a GPU, little on a CPU."""
    tokens, heads = (65536, 12) if device.type == "cuda" else (1024, 4)
    return {
        "N": Key("the longest segment", 128),
        "T": Key("real tokens, in segments of N or shorter", tokens),
        "H": Key("heads", heads),
        "D": Key("size of a head", 64),
        "lengths": Key("of the segments, see bench/operators/lengths.py", "equal", CHOICES),
        "p": Key("dropout probability", 0.0),
    }


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything."""
    defaults = _keys(device)
    longest, tokens, heads, head_dim = (int(shape[name]) for name in ("N", "T", "H", "D"))
    lengths, dropout_p = str(shape["lengths"]), float(shape["p"])
    segments = Segments(segment_lengths(lengths, tokens, longest), heads, head_dim, device)
    name = f"N={longest}"
    name += "".join(f" {key}={shape[key]}" for key in ("D", "H", "T") if shape[key] != defaults[key].default)
    name += (f" {lengths} lengths" if lengths != "equal" else "") + (f" dropout={dropout_p}" if dropout_p else "")
    return case(name, value, segments, dtype, dropout_p, quick=quick)


def case(
    name: str, value: int, segments: Segments, dtype: torch.dtype, dropout_p: float, *, quick: bool = False
) -> Case:
    """The case of these segments."""
    found, missing = contestants(segments, dtype, dropout_p, quick=quick)
    size = dtype.itemsize
    return Case(
        op="attention",
        name=name,
        dtype=dtype,
        device=segments.device,
        shape={
            "tokens": segments.tokens,
            "segments": len(segments.lengths),
            "longest": segments.longest,
            "heads": segments.heads,
            "head_dim": segments.head_dim,
            "padding": round(1 - segments.tokens / (len(segments.lengths) * segments.longest), 4),
        },
        inputs=functools.partial(_inputs, segments, dtype),
        oracle=functools.partial(_plain, segments, torch.float64),
        yardstick=functools.partial(_plain, segments, dtype),
        passes={
            "forward": segments.cost(True, False, size),
            "forward+backward": segments.cost(True, True, size),
        },
        contestants=tuple(found),
        missing=tuple(missing),
        dropout_p=dropout_p,
        value=value,
    )


# (value, shapes): lengths short to long at 64 k tokens, what padding costs, and each dropout beside its pair without.
_ON_A_GPU = (
    (0, "N=128; N=512"),
    (2, "N=512,lengths=real; N=128,p=0.1; N=512,p=0.1"),
    (4, "N=256; N=512,lengths=half; N=128,lengths=real; N=1024"),
    (7, "N=2048; N=64; N=4096; N=8192"),
    (9, "N=128,D=128,H=6; N=512,D=128,H=6; N=2048,D=128,H=6; N=512,lengths=real,p=0.1"),
    (11, "N=64,D=128,H=6; N=256,D=128,H=6; N=1024,D=128,H=6; N=4096,D=128,H=6; N=8192,D=128,H=6"),
)
_ON_A_CPU = (
    (0, "N=128"),
    (1, "N=512"),
    (2, "N=512,lengths=real"),
    (3, "N=128,p=0.1"),
    (5, "N=256; N=512,lengths=half"),
)


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    """N = 64 … 8192 at equal lengths, real and half-padded ones, dropout, D = 64 and 128; a few, smaller, on a CPU."""
    return _ON_A_GPU if device.type == "cuda" else _ON_A_CPU


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR", "case"]
