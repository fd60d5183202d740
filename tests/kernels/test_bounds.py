"""No content of a tensor makes a kernel read or write outside the tensors of its launch.

Triton's interpreter checks each address exactly; on a GPU compute-sanitizer does (bench/compiled/sanitize.py).
"""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import SEED, use_long_route
from bounds import Outside, check_every_access
from oracle import DEVICE

from fusebert.kernels import (
    attention,
    attention_varlen,
    attention_varlen_separate,
    bias_gelu,
    checks,
    cross_entropy,
    dropout_add_layernorm,
    embed_layernorm,
    layernorm,
    masked_lm_loss,
    rmsnorm,
    use_backend,
)
from fusebert.kernels.attn.schedule import BLOCK_S, attn_schedule_tiles
from fusebert.kernels.backend import tl, triton
from fusebert.kernels.embedding import api as embedding_api
from fusebert.kernels.mlm import api as mlm_api

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="addresses are seen in the interpreter only")

ROWS = 23
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels run as on a GPU, where values are not read before a launch; every access is checked."""
    for module in (checks, mlm_api, embedding_api):
        monkeypatch.setattr(module, "values_are_readable", lambda *_: False)
    count = check_every_access(monkeypatch)
    with use_backend("triton"):
        yield count
    assert count[0] > 0


def backward(out, *leaves):
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert gradient is not None


def leaf(*shape, dtype=torch.float16):
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


def hostile(count: int, limits: torch.iinfo, *near: int) -> list[int]:
    """Any integers: the extremes, those around ``near``, and anything between."""
    edges = [limits.min, limits.min + 1, -1, 0, 1, limits.max - 1, limits.max]
    edges += [n + offset for n in near for offset in (-1, 0, 1)]
    return [random.choice([*edges, random.randint(limits.min, limits.max)]) for _ in range(count)]


NAMED = [
    [0, 10, INT32.min],
    [0, 10, INT32.max],
    [INT32.min, 10, ROWS],
    [INT32.max, INT32.min, 5, ROWS],
    [ROWS, 0, ROWS, 0],
    [0, ROWS, 0, ROWS, 0, ROWS],
    [-5, -1, -7],
]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("longest", [8, 16, 40])  # several heads in a tile, as many, one
@pytest.mark.parametrize("route", ["short", "long"])
def test_cu_seqlens(route, longest, window, monkeypatch):
    if route == "long":
        use_long_route(monkeypatch)
    drawn = [hostile(random.randint(2, 9), INT32, ROWS) for _ in range(4)]
    for ends in [*NAMED, *drawn]:
        cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        qkv = leaf(ROWS, 3, 2, 16)
        backward(attention_varlen(qkv, cu, longest, dropout_p=0.1, seed=SEED, window=window), qkv)
        if window is None:
            q, kv = leaf(ROWS, 2, 16), leaf(ROWS - 4, 2, 2, 16)
            other = torch.tensor(hostile(len(ends), INT32, ROWS - 4), dtype=torch.int32, device=DEVICE)
            backward(attention_varlen_separate(q, *kv.unbind(1), cu, longest, other, longest), q, kv)


@pytest.mark.parametrize("segments", [1, 63, 64, 130])
def test_more_tiles_than_int32_counts(segments):
    """Segments that all claim the 2^30 rows of the packed axis have 2^26 tiles each; there are few slots."""
    rows, block, num_slots = 2**30, 16, 200
    cu = torch.tensor([0, rows] * segments, dtype=torch.int32, device=DEVICE)[: segments + 1]
    slots = torch.full((2, num_slots), -7, dtype=torch.int32, device=DEVICE)
    grid = (triton.cdiv(segments + 1, BLOCK_S),)
    attn_schedule_tiles[grid](cu, slots, segments, rows, num_slots, BLOCK=block, BLOCK_S=BLOCK_S)
    assert set(slots[0].tolist()) == {0}  # the first of the longest fills them all
    assert set(slots[1].tolist()) == {0}


@pytest.mark.parametrize("lean", [False, True])
def test_labels_of_the_loss(lean):
    hidden, weight, bias = leaf(ROWS, 16), leaf(37, 16), leaf(37)
    labels = torch.tensor(hostile(ROWS, INT64, 0, 37, -100), device=DEVICE)
    for options in ({}, {"max_labels": 5}, {"label_smoothing": 0.1}):
        backward(masked_lm_loss(hidden, weight, bias, labels, lean=lean, **options), hidden, weight, bias)


def test_labels_of_cross_entropy():
    logits = leaf(ROWS, 37)
    labels = torch.tensor(hostile(ROWS, INT64, 0, 37, -100), device=DEVICE)
    backward(cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_the_embedding(dtype):
    limits = torch.iinfo(dtype)
    for _ in range(3):
        tables = [leaf(rows, 24) for rows in (19, 2, 12)]
        ids = [torch.tensor(hostile(ROWS, limits, len(t)), dtype=dtype, device=DEVICE) for t in tables]
        norm = [leaf(24), leaf(24)]
        backward(embed_layernorm(*ids, *tables, *norm, eps=1e-5, p=0.1, seed=SEED, padding_idx=0), *tables, *norm)
        cu = torch.tensor(hostile(4, limits, ROWS), dtype=dtype, device=DEVICE)
        out = embed_layernorm(ids[0], ids[1], None, *tables, *norm, eps=1e-5, cu_seqlens=cu)
        backward(out, *tables, *norm)


@pytest.mark.parametrize("seed", [0, -1, 2**31, INT64.min, INT64.max])
def test_seeds(seed):
    x, residual, weight, bias = leaf(5, 24), leaf(5, 24), leaf(24), leaf(24)
    backward(dropout_add_layernorm(x, residual, weight, bias, p=0.5, seed=seed), x, residual, weight, bias)
    qkv = [leaf(1, 2, 9, 16) for _ in range(3)]
    backward(attention(*qkv, dropout_p=0.5, seed=seed), *qkv)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 1000), (2, 3, 24)])
def test_shapes_of_the_row_operators(shape):
    x, weight, bias = leaf(*shape), leaf(shape[-1]), leaf(shape[-1])
    backward(layernorm(x, weight, bias), x, weight, bias)
    backward(rmsnorm(x, weight), x, weight)
    backward(bias_gelu(x, bias), x, bias)


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (5, 33), (130, 7)])
def test_padding_masks(n_q, n_k):
    q, k, v = leaf(2, 3, n_q, 24), leaf(2, 3, n_k, 24), leaf(2, 3, n_k, 24)
    mask = torch.rand(2, n_k, device=DEVICE) < 0.5
    backward(attention(q, k, v, key_padding_mask=mask), q, k, v)


@triton.jit
def read_one_too_many(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """The mask of the load is wrong by one."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i <= n), mask=i < n)


@triton.jit
def write_one_too_many(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """The mask of the store is wrong by one."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i <= n)


@pytest.mark.parametrize("kernel", [read_one_too_many, write_one_too_many])
def test_one_element_outside_is_noticed(kernel):
    x, y = torch.zeros(2, 9)
    with pytest.raises(Exception, match="outside the tensors") as caught:
        kernel[(1,)](x[:7], y[:7], 7, BLOCK=16)
    assert Outside.__name__ in str(caught.value)
