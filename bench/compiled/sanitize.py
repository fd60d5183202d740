"""Small cases of every kernel, forward and backward, to run under compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m fusebert.bench.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m fusebert.bench.sanitize
    compute-sanitizer --tool initcheck --error-exitcode 9 python -m fusebert.bench.sanitize

Lengths that end within a tile, segments of length 1, rows that end within a block, every dtype, with and without
dropout. The driver allocates each tensor separately (``PYTORCH_NO_CUDA_MEMORY_CACHING``): in PyTorch's pools an access
beyond a tensor hits its neighbour and is not reported. Without a GPU the same calls run on the CPU path.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import cast

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when the first tensor is allocated

import torch
from torch import Tensor

from ...kernels import (
    attention,
    attention_varlen,
    bias_gelu,
    cross_entropy,
    dropout_add_layernorm,
    embed_layernorm,
    layernorm,
    masked_lm_loss,
)
from ...model import IGNORE
from ..operators.gelu_epilogue_kernels import TILINGS, gelu_linear, linear_gelu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHORT, LONG = (9, 1, 33, 0, 17), (130, 1, 257, 64)  # one tile a segment; a loop over tiles


def _leaf(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=dtype).requires_grad_()


def calls(dtype: torch.dtype, p: float) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, the forward) of every operator at ``dtype`` with dropout ``p``."""
    seed = torch.tensor([7], device=DEVICE)
    for lengths, head_dim in itertools.product((SHORT, LONG), (64, 128)):
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
        tokens, longest = sum(lengths) + 3, max(lengths)  # three rows after the last segment
        name = f"N≤{longest} D={head_dim}"
        qkv = _leaf(tokens, 3, 2, head_dim, dtype=dtype)
        yield (
            f"attention_varlen {name}",
            lambda x=qkv, b=bounds, n=longest: attention_varlen(x, b, n, dropout_p=p, seed=seed),
        )
        real = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
        q, k, v = (_leaf(len(lengths), 2, longest, head_dim, dtype=dtype) for _ in range(3))
        yield (
            f"attention {name}",
            lambda q=q, k=k, v=v, m=real: attention(q, k, v, key_padding_mask=m, dropout_p=p, seed=seed),
        )
    for hidden_size in (48, 768):
        x, residual = (_leaf(37, hidden_size, dtype=dtype) for _ in range(2))
        weight, bias = (_leaf(hidden_size, dtype=torch.float32) for _ in range(2))
        yield (
            f"dropout_add_layernorm H={hidden_size}",
            lambda x=x, r=residual, w=weight, b=bias: dropout_add_layernorm(x, r, w, b, eps=1e-12, p=p, seed=seed),
        )
        yield (
            f"layernorm H={hidden_size}",
            lambda x=x, w=weight, b=bias: layernorm(x, w, b, eps=1e-12),
        )
    words, types, positions = (_leaf(rows, 48, dtype=torch.float32) for rows in (50, 2, 40))
    ids, type_ids, position_ids = (torch.randint(rows, (131,), device=DEVICE) for rows in (50, 2, 40))
    weight, bias = (_leaf(48, dtype=torch.float32) for _ in range(2))
    yield (
        "embed_layernorm",
        lambda: embed_layernorm(
            ids,
            type_ids,
            position_ids,
            words,
            types,
            positions,
            weight,
            bias,
            eps=1e-12,
            p=p,
            seed=seed,
            out_dtype=dtype,
        ),
    )
    x, gelu_bias = _leaf(37, 200, dtype=dtype), _leaf(200, dtype=torch.float32)
    yield "bias_gelu", lambda: bias_gelu(x, gelu_bias)
    if DEVICE.type == "cuda":
        for tiling, width in itertools.product(TILINGS, (200, 203)):  # through descriptors and through pointers
            x, matrix = _leaf(150, width, dtype=dtype), _leaf(301 if width == 203 else 304, width, dtype=dtype)
            bias = _leaf(matrix.shape[0], dtype=torch.float32)
            yield (
                f"linear_gelu {tiling} H={width}",
                lambda x=x, w=matrix, b=bias, t=tiling: linear_gelu(x, w, b, tiling=t),
            )
            y, down = _leaf(150, matrix.shape[0], dtype=dtype), _leaf(width, matrix.shape[0], dtype=dtype)
            yield (
                f"gelu_linear {tiling} H={width}",
                lambda y=y, w=down, b=bias, t=tiling: gelu_linear(y, w, b, tiling=t),
            )
    hidden, decoder, decoder_bias = _leaf(37, 64, dtype=dtype), _leaf(1003, 64, dtype=dtype), _leaf(1003, dtype=dtype)
    labels = torch.randint(1003, (37,), device=DEVICE)
    labels[::5] = IGNORE
    yield "masked_lm_loss", lambda: cast(Tensor, masked_lm_loss(hidden, decoder, decoder_bias, labels))
    logits = _leaf(37, 1003, dtype=dtype)
    yield "cross_entropy", lambda: cross_entropy(logits, labels)


def main() -> None:
    """Runs all calls. Prints the name before each, so that the sanitizer's reports follow their operator's name."""
    torch.manual_seed(0)
    for dtype, p in itertools.product(DTYPES, (0.0, 0.1)):
        for name, forward in calls(dtype, p):
            print(f"{name} {str(dtype).removeprefix('torch.')} dropout={p}", flush=True)
            out = forward()
            out.backward(torch.ones_like(out))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
    print("every kernel has run" if DEVICE.type == "cuda" else "the CPU path has run: no kernel of a GPU was checked")
