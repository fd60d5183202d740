"""Dropout masks on a CPU, from the generator of torch, with few random numbers.

PyTorch makes a random number for each element, which takes 6 ns on a CPU of AMD, where it does not use MKL's
generator. Here 64 bits make four elements: 16 bits each, as in the kernels (`dropout`), in 1 ns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import keep_threshold


def draws_here(x: Tensor, p: float) -> bool:
    """Whether `keep_scale` may draw. PyTorch's own dropout must on another device, in a traced or compiled call, in a
    ``torch.func`` transform, for a tensor of another class, and for p = 1."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    return p < 1.0 and torch._C._functorch.peek_interpreter_stack() is None


def keep_scale(x: Tensor, p: float) -> Tensor:
    """A random tensor of x's shape and dtype: 0 with probability p, else 1 / (1 − p). p is exact to 2⁻¹⁷."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # type: ignore[call-overload]
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in −2¹⁵ … 2¹⁵ − 1
    keep = torch.empty(x.shape, dtype=x.dtype)
    return torch.ge(draws, (keep_threshold(p) >> 16) - 2**15, out=keep).mul_(1.0 / (1.0 - p))
