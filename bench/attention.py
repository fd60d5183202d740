"""Attention in the benchmark: packed segments through `attention_varlen`, padded batches through torch's SDPA.

Least work over segments of lengths n, with H heads of D, e bytes an element, T = Σ n tokens:

    pass        FLOPs            bytes
    forward     4 D H Σ n²       4 T H D e  (q, k, v read, the result written)
    backward    10 D H Σ n²      7 T H D e  (q, k, v and the result's gradient read, three gradients written)

Only real tokens count, so a padded contestant pays for its padding. Every contestant gets q, k and v in the layout it
likes best: ours one packed [T, 3, H, D], SDPA three tensors that are [B, N, H, D] in memory and seen as [B, H, N, D].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import attention, attention_varlen, dropout_mask, reference
from .batches import draw_lengths
from .cases import OURS, Case, Contestant, Cost, Missing, Run, Tensors, installed, leaf

GRADIENTS = ("dq", "dk", "dv")
# The reference holds scores of a chunk of segments at a time: float64 [chunk, H, n, n] of at most so many elements.
CHUNK_ELEMENTS = 1 << 27


class _Shape:
    """Segment lengths and heads, and the index tensors that go with them."""

    def __init__(self, lengths: list[int], heads: int, head_dim: int, device: torch.device) -> None:
        self.lengths, self.heads, self.head_dim, self.device = lengths, heads, head_dim, device
        self.tokens, self.longest = sum(lengths), max(lengths)
        self.equal = min(lengths) == self.longest
        self.cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
        columns = torch.arange(self.longest, device=device)
        self.real = columns < torch.tensor(lengths, device=device)[:, None]  # (B, N)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of consecutive segments of one length, as many as the reference may hold."""
        first = 0
        while first < len(self.lengths):
            n = self.lengths[first]
            most = max(1, CHUNK_ELEMENTS // (self.heads * n * n))
            last = first
            while last < len(self.lengths) and last - first < most and self.lengths[last] == n:
                last += 1
            yield first, last
            first = last

    def head_chunks(self, n: int) -> Iterator[slice]:
        """Slices of the heads, for segments of which even one is too long to hold with all its heads."""
        most = max(1, min(self.heads, CHUNK_ELEMENTS // (n * n)))
        for first in range(0, self.heads, most):
            yield slice(first, first + most)

    def cost(self, forward: bool, backward: bool, element_size: int) -> Cost:
        squares = sum(n * n for n in self.lengths)
        flops = (4 * forward + 10 * backward) * self.head_dim * self.heads * squares
        return Cost(flops, (4 * forward + 7 * backward) * self.tokens * self.heads * self.head_dim * element_size)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H, D] → [B, H, N, D] over memory that is [B, N, H, D], zeros on padding."""
        padded = packed.new_zeros(len(self.lengths), self.longest, self.heads, self.head_dim)
        padded[self.real] = packed
        return padded.transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, H, N, D] → [T, H, D], the real rows."""
        return padded.transpose(1, 2)[self.real]


def _inputs(shape: _Shape, dtype: torch.dtype, seed: int) -> Tensors:
    generator = torch.Generator(shape.device).manual_seed(seed)
    size = (shape.tokens, shape.heads, shape.head_dim)
    return {
        "qkv": torch.randn((size[0], 3, *size[1:]), generator=generator, dtype=dtype, device=shape.device),
        "dout": torch.randn(size, generator=generator, dtype=dtype, device=shape.device),
        "seed": torch.tensor([seed], dtype=torch.int64, device=shape.device),
    }


def _plain(shape: _Shape, dtype: torch.dtype, inputs: Tensors, dropout_p: float) -> Tensors:
    """The reference at ``dtype``, chunk by chunk, with the mask our kernels draw."""
    keep = None
    if dropout_p:
        planes = len(shape.lengths) * shape.heads
        keep = dropout_mask(dropout_p, inputs["seed"], shape.longest, shape.longest, planes, shape.device)
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


def _named_packed(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **dict(zip(GRADIENTS, gradients[0].unbind(1), strict=True))}


def _bind_varlen(shape: _Shape, inputs: Tensors, dropout_p: float) -> Run:
    qkv = leaf(inputs["qkv"])

    def forward() -> Tensor:
        return cast(
            Tensor, attention_varlen(qkv, shape.cu_seqlens, shape.longest, dropout_p=dropout_p, seed=inputs.get("seed"))
        )

    return Run(forward, (qkv,), inputs["dout"], _named_packed)


def _bind_padded(shape: _Shape, call: Any, inputs: Tensors, dropout_p: float) -> Run:
    """``call(q, k, v, dropout_p)`` on padded tensors [B, H, N, D]."""
    q, k, v = (leaf(shape.pad(x)) for x in inputs["qkv"].unbind(1))

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        unpadded = (shape.unpad(x) for x in (out, *gradients))
        return dict(zip(("out", *GRADIENTS), unpadded, strict=True))

    return Run(lambda: call(q, k, v, dropout_p), (q, k, v), shape.pad(inputs["dout"]), named)


def _bind_ours_padded(shape: _Shape, inputs: Tensors, dropout_p: float) -> Run:
    mask = None if shape.equal else shape.real

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return cast(Tensor, attention(q, k, v, key_padding_mask=mask, dropout_p=p, seed=inputs.get("seed")))

    return _bind_padded(shape, call, inputs, dropout_p)


def _bind_sdpa(shape: _Shape, inputs: Tensors, dropout_p: float) -> Run:
    mask = None if shape.equal else shape.real[:, None, None, :].expand(-1, 1, shape.longest, -1)

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    return _bind_padded(shape, call, inputs, dropout_p)


def _bind_eager(shape: _Shape, inputs: Tensors, dropout_p: float) -> Run:
    mask = None if shape.equal else ~shape.real[:, None, None, :]
    scale = shape.head_dim**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        scores = (q * scale) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        return F.dropout(torch.softmax(scores, dim=-1), p) @ v

    return _bind_padded(shape, call, inputs, dropout_p)


def _bind_flash_attn(shape: _Shape, inputs: Tensors, dropout_p: float) -> Run:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    qkv = leaf(inputs["qkv"])

    def forward() -> Tensor:
        return flash_attn_varlen_qkvpacked_func(qkv, shape.cu_seqlens, shape.longest, dropout_p=dropout_p)

    return Run(forward, (qkv,), inputs["dout"], _named_packed)


def _bind_xformers(shape: _Shape, inputs: Tensors, dropout_p: float) -> Run:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q, k, v = (leaf(x.contiguous()[None]) for x in inputs["qkv"].unbind(1))  # (1, T, H, D)
    bias = BlockDiagonalMask.from_seqlens(shape.lengths)

    def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
        return dict(zip(("out", *GRADIENTS), (x[0] for x in (out, *gradients)), strict=True))

    return Run(lambda: memory_efficient_attention(q, k, v, bias, p=dropout_p), (q, k, v), inputs["dout"][None], named)


def _contestants(shape: _Shape, dtype: torch.dtype) -> tuple[list[Contestant], list[Missing]]:
    def contestant(name: str, bind: Any, **options: Any) -> Contestant:
        return Contestant(name, functools.partial(bind, shape), **options)

    def forced(backend: SDPBackend) -> Any:
        return lambda: sdpa_kernel(backend)

    found = [
        contestant("fusebert attention_varlen", _bind_varlen, role=OURS, replays_dropout=True),
        contestant("fusebert attention", _bind_ours_padded, role=OURS, replays_dropout=True),
    ]
    missing = []
    cuda = shape.device.type == "cuda"
    half = dtype in (torch.float16, torch.bfloat16)
    if not shape.equal:
        missing.append(Missing("sdpa flash", "takes no padding mask"))
    elif cuda and not half:
        missing.append(Missing("sdpa flash", "takes only fp16 and bf16"))
    else:
        found.append(contestant("sdpa flash", _bind_sdpa, context=forced(SDPBackend.FLASH_ATTENTION)))
    if cuda:
        found.append(contestant("sdpa efficient", _bind_sdpa, context=forced(SDPBackend.EFFICIENT_ATTENTION)))
        if half:
            found.append(contestant("sdpa cudnn", _bind_sdpa, context=forced(SDPBackend.CUDNN_ATTENTION)))
        else:
            missing.append(Missing("sdpa cudnn", "takes only fp16 and bf16"))
    else:
        missing += [Missing(f"sdpa {name}", "runs on CUDA only") for name in ("efficient", "cudnn")]
    # What materialises [B, H, N, N] holds about six such tensors through a backward.
    scores_bytes = len(shape.lengths) * shape.heads * shape.longest**2 * dtype.itemsize
    if 6 * scores_bytes < (24 << 30):
        found.append(contestant("sdpa math", _bind_sdpa, context=forced(SDPBackend.MATH)))
        found.append(contestant("torch eager", _bind_eager))
    else:
        gigabytes = 6 * scores_bytes / 1e9
        missing += [Missing(name, f"would hold {gigabytes:.0f} GB of scores") for name in ("sdpa math", "torch eager")]
    for name, package, bind, install in (
        ("flash-attn", "flash_attn", _bind_flash_attn, "pip install flash-attn --no-build-isolation"),
        ("xformers", "xformers", _bind_xformers, "pip install xformers"),
    ):
        if installed(package):
            found.append(contestant(name, bind))
        else:
            missing.append(Missing(name, f"not installed: {install}"))
    return found, missing


def _case(name: str, value: int, shape: _Shape, dtype: torch.dtype, dropout_p: float) -> Case:
    contestants, missing = _contestants(shape, dtype)
    size = dtype.itemsize
    return Case(
        op="attention",
        name=name + (f" dropout={dropout_p}" if dropout_p else ""),
        dtype=dtype,
        device=shape.device,
        shape={
            "tokens": shape.tokens,
            "segments": len(shape.lengths),
            "longest": shape.longest,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "padding": round(1 - shape.tokens / (len(shape.lengths) * shape.longest), 4),
        },
        inputs=functools.partial(_inputs, shape, dtype),
        oracle=functools.partial(_plain, shape, torch.float64),
        yardstick=functools.partial(_plain, shape, dtype),
        passes={
            "forward": shape.cost(True, False, size),
            "forward+backward": shape.cost(True, True, size),
        },
        contestants=tuple(contestants),
        missing=tuple(missing),
        dropout_p=dropout_p,
        value=value,
    )


def cases(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> list[Case]:
    """N = 64 … 8192 at equal lengths, ragged lengths, dropout; BERT-base's heads on a GPU, small shapes on a CPU."""
    heads, tokens = (12, 65536) if device.type == "cuda" else (4, 1024)
    rng = np.random.default_rng(0)

    def equal(n: int) -> _Shape:
        return _Shape([n] * (tokens // n), heads, 64, device)

    def ragged(n: int) -> _Shape:
        return _Shape(draw_lengths(rng, tokens, n, ragged=True), heads, 64, device)

    # (value, longest, ragged, dropout)
    wanted = [(0, 128, False, 0.0)]
    if not quick:
        wanted += [(1, 512, False, 0.0), (2, 512, True, 0.0), (3, 128, False, 0.1), (5, 256, False, 0.0)]
    if not quick and device.type == "cuda":
        wanted += [(4, 512, False, 0.1), (6, 1024, False, 0.0), (7, 128, True, 0.0), (8, 2048, False, 0.0)]
        wanted += [(9, 64, False, 0.0), (10, 4096, False, 0.0), (11, 8192, False, 0.0)]
    return [
        _case(f"N={n}" + (" ragged" if uneven else ""), value, ragged(n) if uneven else equal(n), dtype, p)
        for value, n, uneven, p in wanted
    ]


__all__ = ["cases"]
