"""What attention's tests share: inputs, the comparison with float64, a long route in small tiles."""

from __future__ import annotations

import torch
from oracle import DEVICE, assert_as_good_as_torch

from fusebert.kernels.attn import config as attention_config

SMALL_LONG = attention_config.Config(block_m=16, block_n=32, num_warps=4, num_stages=1)


def use_long_route(monkeypatch, config=SMALL_LONG):
    monkeypatch.setattr(attention_config, "short_forward", lambda *_: None)
    monkeypatch.setattr(attention_config, "short_backward", lambda *_: None)
    for name in ("long_forward", "long_backward_dq", "long_backward_dk_dv"):
        monkeypatch.setattr(attention_config, name, lambda *_: config)


def lengths_to_cu(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32).to(DEVICE)


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def compare(function, definition, inputs, pytorch=None, roundings=1):
    """function(*inputs) against definition in float64, out and all gradients.

    pytorch makes the error that ours is measured by; definition itself where PyTorch has no operator for the case.
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
    # A row with one key has dS = 0, where PyTorch's P∘dP − Pδ cancels to the last bit: the terms are as large as dO.
    names = ["out", *(f"grad of input {i}" for i in range(len(inputs)))]
    for name, a, o, t in zip(names, ours, oracle, torchs, strict=True):
        assert_as_good_as_torch(a, o, t, name, cancelled=grad_out.double().norm().item(), roundings=roundings)
