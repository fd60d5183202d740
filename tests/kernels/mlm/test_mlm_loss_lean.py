"""The lean mode of `masked_lm_loss`: its tiles, its memory, and the bound on what skipping leaves out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mlm_cases import IGNORE, allocations, compare, gradients, peak_bytes, problem, reproducible_triton  # noqa: F401
from oracle import DEVICE, DOT_DTYPES, relative_error

import fusebert.kernels.mlm.api as public
import fusebert.kernels.mlm.lean as module
from fusebert.kernels import backend, masked_lm_loss

lean_loss = partial(masked_lm_loss, lean=True)


@pytest.mark.parametrize("dtype", [dtype for dtype in DOT_DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 40, 300, 1030])
def test_several_tiles_of_rows_words_and_hidden(hidden_size, dtype):
    """1030: two programs share a vector's sums, and no matrix fits in shared memory."""
    hidden, weight, bias, labels = problem(140, 270, dtype, hidden_size=hidden_size, ignored=(0, 1, 130))
    weight = weight * hidden_size**-0.5
    compare((hidden, weight, bias), labels, "mean", lean=True, label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_the_tiling_of_every_architecture(monkeypatch, arch, dtype):
    monkeypatch.setattr(backend, "architecture", lambda: arch)
    *inputs, labels = problem(70, 130, dtype, hidden_size=70, ignored=(3,))
    compare(inputs, labels, "none", lean=True)


def test_shares_of_the_vocabulary_change_nothing(monkeypatch):
    *inputs, labels = problem(21, 700, ignored=(3, 4))
    options = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-3, "return_accuracy": True}
    shared, right = lean_loss(*inputs, labels, **options)
    monkeypatch.setattr(module, "MOST_PROGRAMS", 1)
    whole, also_right = lean_loss(*inputs, labels, **options)
    assert relative_error(shared, whole) < 1e-6
    assert right.item() == also_right.item()


def test_an_ignored_row_may_hold_anything():
    """Its gradient is zero and it changes no other row's loss."""
    hidden, weight, bias, labels = problem(9, 40, ignored=(2, 5))
    huge = hidden.clone()
    huge[[2, 5]] = 1e30
    found, clean = (gradients(lean_loss, (x, weight, bias), labels, 1.0) for x in (huge, hidden))
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_memory_beside_the_gradients_is_a_few_bytes_a_row():
    """Everything that forward and backward allocate, released or not, is less than a tenth of the logits."""
    rows, vocab_size, hidden_size = 300, 6000, 16
    *inputs, labels = problem(rows, vocab_size, torch.float16, hidden_size=hidden_size)

    def call():
        gradients(lean_loss, inputs, labels, 1.0)

    results = 2 * hidden_size * (rows + vocab_size) + (4 + 2) * vocab_size
    shares = -(-vocab_size // 128)
    beside = rows * (16 * shares + 100)
    assert beside + results < 2 * rows * vocab_size / 6
    if DEVICE == "cpu":
        assert sum(nbytes for nbytes in allocations(call) if nbytes > 0) <= results + beside
    else:
        assert peak_bytes(call) <= results + beside + 40 * 512  # the allocator rounds up to 512


def sharp_problem(dtype=torch.float32):
    """Most of the softmax on a few words, mostly on the label: tiles with gradients of every size."""
    hidden, weight, bias, labels = problem(80, 600, dtype, hidden_size=32, ignored=(7,))
    weight = weight * 3
    hidden = (hidden + 2 * weight[labels.clamp(min=0)]).to(dtype)
    return (hidden, weight, bias), labels


@pytest.mark.parametrize("tolerance", [1e-5, 1e-3, 0.1, 1.0])
def test_skipping_stays_within_the_bound(tolerance):
    inputs, labels = sharp_problem()
    hidden, weight, _ = inputs
    upstream = torch.randn(labels.shape, device=DEVICE)
    full, skipped = (
        gradients(partial(lean_loss, reduction="none", skip_tolerance=t), inputs, labels, upstream)
        for t in (0.0, tolerance)
    )
    of_row = upstream.abs() * (labels != IGNORE)
    rounding = 1 + 1e-4
    d_hidden, d_weight = full[1] - skipped[1], full[2] - skipped[2]
    assert (d_hidden.norm(dim=1) <= rounding * tolerance * of_row * weight.norm(dim=1).max()).all()
    assert d_weight.norm(dim=1).sum() <= rounding * tolerance * (of_row * hidden.norm(dim=1)).sum()
    assert d_hidden.norm() > 0  # something was skipped
    assert d_weight.norm() > 0
    assert torch.equal(full[0], skipped[0])
    assert relative_error(skipped[3], full[3]) < 1e-6  # the bias's gradient is complete


@pytest.mark.parametrize("tolerance", [0.5, 1.5])
def test_the_bound_holds_where_it_is_tight(tolerance):
    """All words have one vector: dhidden's error is the skipped Σ|G|, of which each tile has a tenth."""
    hidden, weight, bias, labels = problem(9, 640, ignored=())
    weight, bias, labels = torch.ones_like(weight), torch.zeros_like(bias), torch.zeros_like(labels)
    full, skipped = (
        gradients(partial(lean_loss, reduction="sum", skip_tolerance=t), (hidden, weight, bias), labels, 1.0)[1]
        for t in (0.0, tolerance)
    )
    left_out = (full - skipped).norm(dim=1) / weight[0].norm()
    assert (left_out <= tolerance).all()
    assert (left_out > 0.8).all() == (tolerance > 1)  # nine tiles of 0.1, or none


def test_a_tile_is_skipped_only_if_every_row_allows_it():
    """Tolerance 3 exceeds Σ|G| ≤ 2, but a tile is skipped only up to tolerance / (number of tiles), about 3 / 10."""
    inputs, labels = sharp_problem()
    nearly_all = gradients(partial(lean_loss, skip_tolerance=3.0), inputs, labels, 1.0)
    everything = gradients(partial(lean_loss, skip_tolerance=1e6), inputs, labels, 1.0)
    assert everything[1].abs().max() == everything[2].abs().max() == 0
    assert nearly_all[2].abs().max() > 0


def test_at_the_dtypes_roundoff_the_result_is_as_good_as_without():
    inputs, labels = sharp_problem(torch.float16)
    compare(inputs, labels, "mean", lean=True, skip_tolerance=torch.finfo(torch.float16).eps / 2)


def test_a_row_that_is_nan_is_not_skipped(monkeypatch):
    inputs, labels = sharp_problem()
    labels[4] = 600
    monkeypatch.setattr(public, "check_label_values", lambda *_: None)
    _, d_hidden, *_ = gradients(partial(lean_loss, skip_tolerance=1e6), inputs, labels, 1.0)
    assert d_hidden[4].isnan().any()


def test_opcheck():
    *inputs, labels = problem(6, 20)
    options = (IGNORE, 0.1, 1e-3, 0.0)
    torch.library.opcheck(torch.ops.fusebert.lean_linear_cross_entropy.default, (*inputs, labels, *options))
    _, _, row_max, row_sum = torch.ops.fusebert.lean_linear_cross_entropy(*inputs, labels, *options)
    arguments = (torch.ones(6, device=DEVICE), *inputs, labels, row_max, row_sum, *options, True, True, True)
    torch.library.opcheck(torch.ops.fusebert.lean_linear_cross_entropy_backward.default, arguments)
