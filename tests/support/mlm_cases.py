"""Shared by the tests of the masked-LM loss: inputs, PyTorch's own loss, comparisons, allocated bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, assert_as_good_as_torch, relative_error

from fusebert.kernels import masked_lm_loss, reference, use_backend
from fusebert.kernels.backend import interpreting
from fusebert.model import IGNORE

REDUCTIONS = ["mean", "sum", "none"]


def sum_products_in_any_order(monkeypatch):
    """Products sum in float64 and round once, so that a logit has the same bits in a tile and in its transpose.

    A GPU sums each element over H in ascending order for every tile; numpy's BLAS chooses an order by shape. Logits of
    1e4 that differ in the last bit have probabilities that differ by a thousandth.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def reproducible_triton(monkeypatch):
    """Triton on any device, a fixed seed, hardware rounding; torch.empty gives NaN, to find unwritten elements."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if interpreting():
        from interpreter import round_bfloat16

        round_bfloat16(monkeypatch)
        sum_products_in_any_order(monkeypatch)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def problem(rows, vocab_size, dtype=torch.float32, hidden_size=32, ignored=(2,), seed=0):
    """(hidden, weight, bias, labels): logits of a few units, some rows without a label."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * 0.3
    bias = torch.randn(vocab_size, generator=generator)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[list(ignored)] = IGNORE
    return *(x.to(DEVICE, dtype) for x in (hidden, weight, bias)), labels.to(DEVICE)


def native_loss(hidden, weight, bias, labels, *, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """What a PyTorch user writes, in the inputs' dtype. Ours may have at most twice its error."""
    logits = F.linear(hidden, weight, bias)
    loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    if z_loss:
        penalty = z_loss * torch.logsumexp(logits, -1).square() * (labels != IGNORE)
        count = (labels != IGNORE).sum() if reduction == "mean" else 1
        loss = loss + (penalty if reduction == "none" else penalty.sum() / count)
    return loss


def gradients(loss_of, inputs, labels, upstream):
    """[loss, gradient of (upstream · loss).sum() for each input that is not None]."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    loss = loss_of(*leaves, labels)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=DEVICE).expand(loss.shape))
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


def assert_matches(ours, oracle, native, names=("loss", "hidden", "weight", "bias"), *, roundings=1):
    for name, a, o, n in zip(names, ours, oracle, native, strict=False):
        assert_as_good_as_torch(a, o, n.to(a.dtype), name, roundings=roundings)


def compare(
    inputs, labels, reduction, *, upstream=None, max_labels=None, lean=False, skip_tolerance=0.0, roundings=1, **options
):
    """Our loss and gradients against the reference in float64, by PyTorch's own error in the inputs' dtype."""
    if upstream is None:
        upstream = torch.randn(labels.shape, device=DEVICE) if reduction == "none" else 3.0
    wide = [None if x is None else x.double() for x in inputs]
    modes = {"max_labels": max_labels, "lean": lean, "skip_tolerance": skip_tolerance}

    def ours(*x, reduction=reduction):
        return masked_lm_loss(*x, reduction=reduction, **modes, **options)

    def oracle(*x, reduction=reduction):
        return reference.masked_lm_loss(*x, reduction=reduction, **options)[0]

    def native(*x, reduction=reduction):
        return native_loss(*x, reduction=reduction, **options)

    found, exact, theirs = (
        gradients(f, x, labels, upstream) for f, x in ((ours, inputs), (oracle, wide), (native, inputs))
    )
    assert_matches(found[1:], exact[1:], theirs[1:], ("hidden", "weight", "bias"), roundings=roundings)
    # PyTorch's scalar may be exact by chance, so compare the rows, and then their sum.
    rows = ours(*inputs, labels, reduction="none")
    assert_matches([rows], [oracle(*wide, labels, reduction="none")], [native(*inputs, labels, reduction="none")])
    total = rows.double() if reduction == "none" else rows.double().sum()
    total = total / max((labels != IGNORE).sum().item(), 1) if reduction == "mean" else total
    assert found[0].dtype == torch.float32
    assert relative_error(found[0], total) <= torch.finfo(torch.float32).eps * labels.numel() ** 0.5


def allocations(function):
    """Bytes of each allocation (positive) and release (negative) that function makes on the CPU, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def peak_bytes(function):
    """The most bytes allocated at once, beyond those before. Calls ``function`` twice: the first call warms up."""
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    alive = highest = 0
    for nbytes in allocations(function):
        alive += nbytes
        highest = max(highest, alive)
    return highest
