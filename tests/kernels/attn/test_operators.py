"""Attention with PyTorch's machinery: torch.library, torch.compile, autograd, autocast, TF32, the generator."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED, lengths_to_cu, randn
from oracle import DEVICE

from fusebert.kernels import attention, attention_varlen
from fusebert.kernels.attn.config import Config
from fusebert.kernels.attn.launch import NO_WINDOW, Problem


def operator_inputs():
    q, k, v = (randn(1, 2, 20, 16) for _ in range(3))
    qkv = randn(20, 3, 2, 16)
    cu = lengths_to_cu([12, 8])
    seed = torch.tensor([SEED], device=DEVICE)
    padded = (q, k, v, None, None, None, seed, 20, 20, 0.25, 0.1, -1)
    return padded, (qkv, cu, seed, 12, 0.25, 0.1, -1)


def test_opcheck(route):
    padded, packed = operator_inputs()
    ops = torch.ops.fusebert
    out, stats = ops.attention(*padded)
    torch.library.opcheck(ops.attention, padded)
    torch.library.opcheck(ops.attention_backward, (*padded, out, stats, torch.ones_like(out)))
    out, stats = ops.attention_qkv(*packed)
    torch.library.opcheck(ops.attention_qkv, packed)
    torch.library.opcheck(ops.attention_qkv_backward, (*packed, out, stats, torch.ones_like(out)))


def test_compiles_without_a_graph_break(route):
    qkv = randn(20, 3, 2, 16).requires_grad_()
    cu = lengths_to_cu([12, 8])

    def step(x):
        return attention_varlen(x, cu, 12, dropout_p=0.1, seed=SEED).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(qkv), qkv)[0] for f in (compiled, step))
    assert torch.equal(ours, eager)


def test_the_second_derivative_is_an_error_not_a_number():
    qkv = randn(8, 3, 1, 16).requires_grad_()
    out = attention_varlen(qkv, lengths_to_cu([8]), 8)
    (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_seed_none_is_drawn_from_torchs_generator():
    qkv, cu = randn(20, 3, 2, 16), lengths_to_cu([20])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(attention_varlen(qkv, cu, 20, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_autocast_computes_in_its_dtype():
    q, k, v = (randn(1, 1, 16, 16) for _ in range(3))
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert attention(q, k, v).dtype == torch.float16


@pytest.mark.parametrize(
    ("dtype", "setting", "expected"),
    [
        (torch.float32, None, "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "ieee", "ieee"),
        (torch.float16, "tf32", "ieee"),
    ],
)
def test_float32_products_are_float32_unless_torch_allows_tf32(dtype, setting, expected):
    q = randn(4, 1, 16, dtype=dtype)
    cu = lengths_to_cu([4])
    problem = Problem(q, q, q, cu, cu, None, None, 4, 4, 0.25, 0.0, NO_WINDOW)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if setting is not None:
            matmul.fp32_precision = setting
        arguments = problem.arguments(Config(16, 16, 4, 1))
    finally:
        matmul.fp32_precision = before
    assert arguments["PRECISION"] == expected
