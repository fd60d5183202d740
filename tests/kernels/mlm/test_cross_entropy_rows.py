"""`cross_entropy` of logits in memory: values and gradients against float64, labels, operators, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mlm_cases import IGNORE, REDUCTIONS, assert_matches, gradients, reproducible_triton  # noqa: F401
from oracle import DEVICE, DTYPES, relative_error

import fusebert.kernels.mlm.api as module
from fusebert.kernels import cross_entropy, reference, use_backend


def check(rows, vocab_size, dtype, ignored, label_smoothing, z_loss):
    logits = (torch.randn(rows, vocab_size, device=DEVICE) * 3).to(dtype)
    labels = torch.randint(0, vocab_size, (rows,), device=DEVICE)
    labels[list(ignored)] = IGNORE
    kept = logits.clone()
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    upstream = torch.randn(rows, device=DEVICE)

    def native(x, y):
        losses = F.cross_entropy(x, y, reduction="none", label_smoothing=label_smoothing)
        return losses + z_loss * torch.logsumexp(x, -1).square() * (y != IGNORE)

    assert_matches(
        gradients(lambda x, y: cross_entropy(x, y, reduction="none", **options), [logits], labels, upstream),
        gradients(lambda x, y: reference.cross_entropy_rows(x, y, **options), [logits.double()], labels, upstream),
        gradients(native, [logits], labels, upstream),
        roundings=2,  # PyTorch's error over one word is chance
    )
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 4099])
def test_cross_entropy_matches_float64(vocab_size, dtype):
    check(11, vocab_size, dtype, ignored=[4], label_smoothing=0.1, z_loss=1e-3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    vocab_size=st.integers(1, 2000),
    dtype=st.sampled_from(DTYPES),
    unlabelled=st.floats(0.0, 1.0),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 2**32),
)
def test_any_shape(rows, vocab_size, dtype, unlabelled, label_smoothing, z_loss, seed):
    torch.manual_seed(seed)
    check(rows, vocab_size, dtype, range(int(unlabelled * rows)), label_smoothing, z_loss)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_is_pytorchs(reduction, backend):
    logits = torch.randn(3, 4, 50, device=DEVICE).transpose(0, 1)
    labels = torch.randint(0, 50, (4, 3), device=DEVICE)
    labels[1] = IGNORE
    with use_backend(backend):
        ours = gradients(lambda x, y: cross_entropy(x, y, reduction=reduction), [logits], labels, 0.5)
        none = gradients(cross_entropy, [logits], torch.full_like(labels, IGNORE), 1.0)
    theirs = gradients(lambda x, y: F.cross_entropy(x.movedim(-1, 1), y, reduction=reduction), [logits], labels, 0.5)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))
    assert ours[0].shape == theirs[0].shape
    assert all(x.abs().max() == 0 for x in none)


def test_offsets_beyond_two_to_the_31():
    """Row 2 starts at element 2**31 + 16. On a CPU untouched memory is not allocated."""
    stride, vocab_size = 2**30 + 8, 40
    torch.use_deterministic_algorithms(False)  # no fill
    memory = torch.empty(2 * stride + vocab_size, dtype=torch.float16, device=DEVICE)
    logits = memory.as_strided((3, vocab_size), (stride, 1))
    logits.copy_(torch.randn(3, vocab_size))
    labels = torch.tensor([3, 1, 39], device=DEVICE)
    ours = gradients(lambda x, y: cross_entropy(x, y, reduction="none"), [logits], labels, torch.ones(3, device=DEVICE))
    close = gradients(
        lambda x, y: cross_entropy(x, y, reduction="none"), [logits.contiguous()], labels, torch.ones(3, device=DEVICE)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, close, strict=True))


def test_opcheck():
    logits, labels = torch.randn(6, 20, device=DEVICE), torch.randint(0, 20, (6,), device=DEVICE)
    options = (IGNORE, 0.1, 1e-3)
    torch.library.opcheck(torch.ops.fusebert.cross_entropy.default, (logits, labels, *options))
    _, row_max, row_sum = torch.ops.fusebert.cross_entropy(logits, labels, *options)
    arguments = (torch.ones(6, device=DEVICE), logits, labels, row_max, row_sum, *options)
    torch.library.opcheck(torch.ops.fusebert.cross_entropy_backward.default, arguments)


def test_cross_entropy_errors():
    labels = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"labels must have one entry for each row of logits"):
        cross_entropy(torch.zeros(4, 8, device=DEVICE), labels)
    with pytest.raises(ValueError, match=r"logits must have at least one column"):
        cross_entropy(torch.zeros(5, 0, device=DEVICE), labels)
    with pytest.raises(ValueError, match=r"reduction must be"):
        cross_entropy(torch.zeros(5, 8, device=DEVICE), labels, reduction="avg")


@pytest.mark.parametrize("label", [20, -1])
# On a GPU the loss is NaN instead: the next test.
@pytest.mark.parametrize("backend", ["reference"] if DEVICE == "cuda" else ["triton", "reference"])
def test_label_out_of_range_is_an_error_where_values_can_be_read(label, backend):
    logits, labels = torch.zeros(3, 20, device=DEVICE), torch.tensor([0, label, 1], device=DEVICE)
    with use_backend(backend), pytest.raises(ValueError, match=rf"labels must be in 0 … 19 or .*; got {label}"):
        cross_entropy(logits, labels)


@pytest.mark.parametrize("wrong", [50, 10**12, -1, -(2**62)])
def test_label_out_of_range_is_nan_in_the_kernel(monkeypatch, wrong):
    logits, labels = torch.randn(7, 50, device=DEVICE, requires_grad=True), torch.arange(7, device=DEVICE)
    labels[4] = wrong
    monkeypatch.setattr(module, "check_label_values", lambda *_: None)
    losses = cross_entropy(logits, labels, reduction="none")
    losses.nansum().backward()
    assert losses.isnan().tolist() == [row == 4 for row in range(7)]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_a_graph_break(reduction, backend):
    logits, labels = torch.randn(9, 20, device=DEVICE), torch.arange(9, device=DEVICE)
    labels[3] = IGNORE

    def call(x, y):
        return cross_entropy(x, y, reduction=reduction, z_loss=0.1, label_smoothing=0.1)

    torch._dynamo.reset()
    with use_backend(backend):
        eager = gradients(call, [logits], labels, 1.0)
        compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), [logits], labels, 1.0)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(compiled, eager, strict=True))


def test_second_derivative_is_refused():
    logits, labels = torch.randn(5, 20, device=DEVICE, requires_grad=True), torch.arange(5, device=DEVICE)
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
        torch.autograd.grad(cross_entropy(logits, labels), logits, create_graph=True)


def test_loss_is_float32_for_narrow_logits():
    logits, labels = torch.randn(5, 20, device=DEVICE, dtype=torch.bfloat16), torch.arange(5, device=DEVICE)
    for backend in ("triton", "reference"):
        with use_backend(backend):
            assert cross_entropy(logits, labels).dtype == torch.float32
