"""Shared by attention's tests: inputs, the comparison with float64, the long route with small tiles."""

from __future__ import annotations

import torch
from oracle import DEVICE, assert_as_good_as_torch

from fusebert.kernels.attn import config as attention_config

SEED = 20231


def use_long_route(monkeypatch):
    """Every call takes the long route, in small tiles."""
    small = attention_config.Config(block_m=16, block_n=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(attention_config, "short_config", lambda *_: None)
    monkeypatch.setattr(attention_config, "long_config", lambda *_: small)


def lengths_to_cu(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32).to(DEVICE)


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def compare(function, definition, inputs, pytorch=None, roundings=1):
    """Compares function(*inputs) and its gradients with the definition in float64.

    The allowed error is that of ``pytorch`` at the inputs' dtype; of the definition, where PyTorch has no operator.
    """

    def run(f, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = f(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
        return [
            out.detach(),
            *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
        ]

    grad_out = torch.randn_like(function(*inputs))
    ours = run(function, inputs)
    oracle = run(definition, [x.double() for x in inputs])
    torchs = run(pytorch or definition, inputs)
    # A row with one key has dS = 0. There P∘dP − Pδ cancels to the last bit in PyTorch, with terms as large as dO.
    names = ["out", *(f"grad of input {i}" for i in range(len(inputs)))]
    for name, a, o, t in zip(names, ours, oracle, torchs, strict=True):
        assert_as_good_as_torch(a, o, t, name, cancelled=grad_out.double().norm().item(), roundings=roundings)
