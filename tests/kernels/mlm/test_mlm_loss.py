"""`masked_lm_loss` in both modes: the Triton path against float64, labels, options, operators, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlm_cases import IGNORE, REDUCTIONS, compare, gradients, problem, reproducible_triton  # noqa: F401
from oracle import DEVICE, DOT_DTYPES, DTYPES, relative_error

import fusebert.kernels.mlm.api as module
from fusebert.kernels import masked_lm_loss, use_backend

MODES = pytest.mark.parametrize("lean", [False, True], ids=["chunked", "lean"])


def both_modes(dtypes):
    """(lean, dtype): the interpreter cannot multiply bf16; only the lean kernels do that."""
    pairs = [(False, dtype) for dtype in dtypes] + [(True, dtype) for dtype in dtypes if dtype in DOT_DTYPES]
    return pytest.mark.parametrize(
        ("lean", "dtype"), pairs, ids=lambda x: str(x) if isinstance(x, torch.dtype) else ("lean" if x else "chunked")
    )


@both_modes(DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 100, 2049])
def test_matches_float64(vocab_size, lean, dtype):
    *inputs, labels = problem(21, vocab_size, dtype, ignored=(0, 7, 8, 9, 20))
    compare(inputs, labels, "mean", label_smoothing=0.1, z_loss=1e-3, lean=lean)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-2}, {"label_smoothing": 1.0}], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@MODES
def test_options(lean, reduction, options):
    *inputs, labels = problem(19, 130, ignored=(3, 4))
    compare(inputs, labels, reduction, lean=lean, **options)


@both_modes([torch.float16, torch.bfloat16])
def test_rows_with_gradients_of_very_different_size(lean, dtype):
    *inputs, labels = problem(19, 130, dtype)
    compare(inputs, labels, "none", upstream=torch.logspace(-6, 2, 19), lean=lean)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@MODES
def test_without_bias(lean, reduction):
    hidden, weight, _, labels = problem(9, 77)
    compare((hidden, weight, None), labels, reduction, lean=lean)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(
    rows=st.integers(8, 60),
    vocab_size=st.integers(16, 400),
    hidden_size=st.integers(8, 100),
    dtype=st.sampled_from(DOT_DTYPES),
    lean=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    options=st.fixed_dictionaries(
        {}, optional={"label_smoothing": st.floats(0.0, 1.0), "z_loss": st.sampled_from([1e-4, 1e-2])}
    ),
    unlabelled=st.floats(0.0, 0.9),
    seed=st.integers(0, 2**32),
)
def test_any_shape(rows, vocab_size, hidden_size, dtype, lean, reduction, options, unlabelled, seed):
    torch.manual_seed(seed)
    ignored = range(1, 1 + int(unlabelled * rows))
    *inputs, labels = problem(rows, vocab_size, dtype, hidden_size, ignored=ignored, seed=seed)
    compare(inputs, labels, reduction, lean=lean, max_labels=rows - len(ignored), roundings=2, **options)


@MODES
def test_one_row_of_a_single_word_costs_nothing(lean):
    hidden, weight, bias, labels = problem(3, 1)
    ours = gradients(partial(masked_lm_loss, lean=lean), (hidden, weight, bias), labels, 1.0)
    assert all(x.abs().max() == 0 for x in ours)


@pytest.mark.parametrize("shape", [(12, 32), (3, 4, 32), (2, 3, 2, 32)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@MODES
def test_leading_axes(lean, shape, reduction):
    hidden, weight, bias, labels = problem(12, 50)
    loss = masked_lm_loss(
        hidden.reshape(shape), weight, bias, labels.reshape(shape[:-1]), reduction=reduction, lean=lean
    )
    flat = masked_lm_loss(hidden, weight, bias, labels, reduction=reduction, lean=lean)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert torch.equal(loss.flatten(), flat.flatten())


@MODES
def test_strided_inputs(lean):
    hidden, weight, bias, labels = problem(10, 90)
    wide = torch.full((20, 64), float("nan"), device=DEVICE)
    wide[::2, 1::2] = hidden
    strided = (wide[::2, 1::2], weight.t().contiguous().t(), bias.repeat_interleave(3)[::3])
    assert not any(x.is_contiguous() for x in strided)
    compare(strided, labels.repeat_interleave(2)[::2], "mean", lean=lean)


@both_modes([torch.float16, torch.bfloat16])
def test_float32_bias_keeps_its_dtype(lean, dtype):
    hidden, weight, bias, labels = problem(9, 40, dtype)
    ours = gradients(partial(masked_lm_loss, lean=lean), (hidden, weight, bias.float()), labels, 1.0)
    same = gradients(partial(masked_lm_loss, lean=lean), (hidden, weight, bias), labels, 1.0)
    assert ours[3].dtype == torch.float32
    assert torch.equal(ours[3].to(dtype), same[3])
    assert torch.equal(ours[2], same[2])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@MODES
def test_huge_and_tiny_logits_in_float32(lean, scale):
    hidden, weight, bias, labels = problem(9, 300)
    compare((hidden, weight * scale, bias * scale), labels, "none", z_loss=1e-9, lean=lean, roundings=4)


@MODES
def test_float16_logits_near_its_largest_number(lean):
    hidden, weight, bias, labels = problem(9, 64, torch.float16)
    weight = weight * (50000 / F.linear(hidden.float(), weight.float()).abs().max())
    compare((hidden, weight.half(), bias), labels, "mean")


@MODES
def test_float16_weight_gradient_whose_sum_overflows_but_whose_mean_fits(lean):
    hidden, weight, bias, labels = problem(24, 12, torch.float16, ignored=())
    hidden, weight, labels = hidden + 5000, weight * 1e-4, torch.full_like(labels, 3)
    assert hidden.sum(0).isinf().all()
    compare((hidden, weight, bias), labels, "mean", lean=lean)


@MODES
def test_float16_keeps_a_gradient_whose_factor_would_underflow(lean):
    hidden, weight, bias, labels = problem(24, 64, torch.float16, ignored=())
    hidden, weight = hidden * 1000, weight / 1000
    for reduction in REDUCTIONS:
        full, small = (
            gradients(
                lambda *x, r=reduction: masked_lm_loss(*x, reduction=r, lean=lean),
                (hidden, weight, bias),
                labels,
                upstream,
            )
            for upstream in (1.0, 2.0**-14)
        )
        assert relative_error(small[2].float() * 2**14, full[2]) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("max_labels", [None, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@MODES
def test_no_label_at_all(lean, backend, reduction, max_labels):
    *inputs, labels = problem(6, 20)
    labels.fill_(IGNORE)
    with use_backend(backend):
        found = gradients(
            lambda *x: masked_lm_loss(*x, reduction=reduction, max_labels=max_labels, lean=lean), inputs, labels, 1.0
        )
    assert all(x.abs().max() == 0 for x in found)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@MODES
def test_no_rows(lean, backend):
    hidden, weight, bias, labels = problem(3, 20)
    for reduction in REDUCTIONS:
        with use_backend(backend):
            found = gradients(
                lambda *x, r=reduction: masked_lm_loss(*x, reduction=r, lean=lean),
                (hidden[:0], weight, bias),
                labels[:0],
                1.0,
            )
        assert all(x.abs().sum() == 0 for x in found)
        assert [x.shape for x in found[1:]] == [hidden[:0].shape, weight.shape, bias.shape]


@MODES
def test_ignore_index_may_be_a_word(lean):
    hidden, weight, bias, labels = problem(9, 30, ignored=())
    labels[[1, 4]] = 0
    other = torch.where(labels == 0, IGNORE, labels)
    ours = masked_lm_loss(hidden, weight, bias, labels, ignore_index=0, return_accuracy=True, lean=lean)
    assert [x.item() for x in ours] == [
        x.item() for x in masked_lm_loss(hidden, weight, bias, other, return_accuracy=True, lean=lean)
    ]


@pytest.mark.parametrize("wrong", [50, 64, 10**12, -1, -(2**62)])
@MODES
def test_label_out_of_range_is_nan_in_the_kernels(lean, monkeypatch, wrong):
    """As on a GPU, where values are not read: 64 is inside the padded logits of 50 words, 10**12 is outside."""
    hidden, weight, bias, labels = problem(7, 50)
    labels[4] = wrong
    monkeypatch.setattr(module, "check_label_values", lambda *_: None)
    losses = masked_lm_loss(hidden, weight, bias, labels, reduction="none", lean=lean)
    assert losses.isnan().tolist() == [row == 4 for row in range(7)]
    loss, d_hidden, *_ = gradients(partial(masked_lm_loss, lean=lean), (hidden, weight, bias), labels, 1.0)
    assert loss.isnan()
    assert d_hidden.isnan().any(1).tolist() == [row == 4 for row in range(7)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_labels", [7, 10, 12, 20])
@MODES
def test_max_labels_gathers_the_labelled_rows(lean, reduction, max_labels):
    *inputs, labels = problem(12, 40, ignored=(0, 1, 5, 9, 11))
    compare(inputs, labels, reduction, max_labels=max_labels, z_loss=1e-3, lean=lean)


@MODES
def test_max_labels_keeps_unlabelled_rows_from_the_vocabulary(lean):
    hidden, weight, bias, labels = problem(12, 40, ignored=(0, 1, 5, 9))
    spoiled = hidden.clone()
    spoiled[[1, 5, 9]] = float("nan")  # row 0 fills spare slots, and is finite
    found = gradients(lambda *x: masked_lm_loss(*x, max_labels=9, lean=lean), (spoiled, weight, bias), labels, 1.0)
    clean = gradients(partial(masked_lm_loss, lean=lean), (hidden, weight, bias), labels, 1.0)
    for name, x, y in zip(("loss", "hidden", "weight", "bias"), found, clean, strict=True):
        assert relative_error(x, y) < 1e-6, name
    assert found[1][[0, 1, 5, 9]].abs().max() == 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
@MODES
def test_more_labels_than_max_labels(lean, backend, monkeypatch):
    hidden, weight, bias, labels = problem(8, 40, ignored=(3,))
    if backend == "reference" or DEVICE == "cpu":
        with use_backend(backend), pytest.raises(ValueError, match="7 labelled rows, more than max_labels = 6"):
            masked_lm_loss(hidden, weight, bias, labels, max_labels=6, lean=lean)
    if backend == "triton":  # as on a GPU
        monkeypatch.setattr(module, "check_label_values", lambda *_: None)
        loss, *grads = gradients(
            lambda *x: masked_lm_loss(*x, max_labels=6, lean=lean), (hidden, weight, bias), labels, torch.tensor(1.0)
        )
        assert loss.isnan()
        assert all(x.isnan().any() for x in grads)
        losses = masked_lm_loss(hidden, weight, bias, labels, max_labels=6, reduction="none", lean=lean)
        assert losses.isnan().tolist() == (labels != IGNORE).tolist()


@pytest.mark.parametrize("vocab_size", [1, 30, 9001])
@both_modes(DTYPES)
def test_accuracy_counts_the_arg_max_of_the_logits(lean, vocab_size, dtype):
    _, weight, bias, labels = problem(12, vocab_size, dtype, ignored=(0, 5))
    best = torch.randint(0, vocab_size, (12,), device=DEVICE)
    hidden = 10 * weight[best]  # by a margin larger than any rounding error
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    third = (torch.arange(12, device=DEVICE) % 3 == 0) & (labels != IGNORE)
    labels = torch.where(third, logits.argmax(-1), labels)
    expected = ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum()
    for reduction in REDUCTIONS:
        _, correct = masked_lm_loss(
            hidden, weight, bias, labels, reduction=reduction, return_accuracy=True, max_labels=11, lean=lean
        )
        assert correct.dtype == torch.int64
        assert correct.shape == ()
        assert correct.item() == expected.item() >= 3


@pytest.mark.parametrize("backend", ["triton", "reference"])
@MODES
def test_of_equal_logits_the_first_counts(lean, backend):
    """Ties of neighbours, of distant words and of all words; 6000 words need a second block."""
    tied = [(1, 2), (3, 5000), (5001, 5999), tuple(range(6000)), (0, 5999), (4095, 4096)]
    logits = torch.zeros(len(tied), 6000)
    for row, columns in enumerate(tied):
        logits[row, list(columns)] = 7.0
    weight = logits.t().contiguous().to(DEVICE)  # hidden is the identity: the logits are the weight
    hidden = torch.eye(len(tied), device=DEVICE)
    for pick, expected in ((0, len(tied)), (-1, 0)):
        labels = torch.tensor([columns[pick] for columns in tied], device=DEVICE)
        with use_backend(backend):
            assert masked_lm_loss(hidden, weight, None, labels, return_accuracy=True, lean=lean)[1].item() == expected


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("index", [0, 1, 2])
@MODES
def test_only_the_gradients_asked_for(lean, index, reduction):
    *inputs, labels = problem(9, 30)
    full = gradients(lambda *x: masked_lm_loss(*x, reduction=reduction, lean=lean), inputs, labels, 2.0)
    leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
    (2.0 * masked_lm_loss(*leaves, labels, reduction=reduction, lean=lean).sum()).backward()
    assert torch.equal(leaves[index].grad, full[1 + index])
    assert all(x.grad is None for i, x in enumerate(leaves) if i != index)


@both_modes([torch.bfloat16, torch.float16])
def test_same_inputs_same_bits(lean, dtype):
    *inputs, labels = problem(19, 500, dtype)
    for reduction in REDUCTIONS:
        first, second = (
            gradients(
                lambda *x, r=reduction: masked_lm_loss(*x, reduction=r, max_labels=18, lean=lean), inputs, labels, 1.0
            )
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@MODES
def test_compiles_without_a_graph_break(lean, reduction, backend):
    *inputs, labels = problem(9, 20, ignored=(2, 5))

    def call(*x):
        loss, correct = masked_lm_loss(
            *x, reduction=reduction, return_accuracy=True, max_labels=8, label_smoothing=0.1, lean=lean
        )
        return loss + 0 * correct

    torch._dynamo.reset()
    with use_backend(backend):
        eager = gradients(call, inputs, labels, 1.0)
        compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, labels, 1.0)
    for name, a, b in zip(("loss", "hidden", "weight", "bias"), compiled, eager, strict=True):
        assert relative_error(a, b) < 1e-6, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@MODES
def test_second_derivative_is_refused(lean, reduction):
    hidden, weight, bias, labels = problem(5, 20)
    hidden.requires_grad_()
    loss = masked_lm_loss(hidden, weight, bias, labels, reduction=reduction, lean=lean)
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)


@MODES
def test_float64_and_the_reference_agree_with_pytorch(lean):
    hidden, weight, bias, labels = problem(9, 30, torch.float64)
    with use_backend("auto"):
        loss, correct = masked_lm_loss(hidden, weight, bias, labels, return_accuracy=True, lean=lean)
    logits = F.linear(hidden, weight, bias)
    assert loss.dtype == torch.float64
    assert relative_error(loss, F.cross_entropy(logits, labels)) < 1e-14
    assert correct.item() == (logits.argmax(-1) == labels).sum().item()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_loss_is_float32_for_narrow_inputs(backend):
    *inputs, labels = problem(9, 30, torch.bfloat16)
    with use_backend(backend):
        for reduction in REDUCTIONS:
            assert masked_lm_loss(*inputs, labels, reduction=reduction).dtype == torch.float32


def wrong(**changes):
    hidden, weight, bias, labels = problem(5, 20, hidden_size=8)
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 8, dtype=torch.int32)}, TypeError, r"hidden must be .*got torch.int32"),
        (
            {"hidden": torch.zeros(5, 8).half()},
            TypeError,
            r"weight must have hidden's dtype, torch.float16; got torch.float32",
        ),
        ({"labels": torch.zeros(5)}, TypeError, r"labels must be int64; got torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"got labels \(4,\), hidden \(5, 8\)"),
        ({"weight": torch.zeros(20, 9)}, ValueError, r"weight must be \[V, 8\].*got \(20, 9\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"V at least 1; got \(0, 8\)"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias must have shape \(20,\).*got \(19,\)"),
        ({"bias": torch.zeros(20).half()}, TypeError, r"bias must have hidden's dtype.*got torch.float16"),
        ({"weight": torch.zeros(20, 8, device="meta")}, ValueError, r"weight must be on hidden's device.*meta"),
        ({"bias": torch.zeros(20, device="meta")}, ValueError, r"bias must be on hidden's device.*meta"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, r"labels must be on hidden's.*meta"),
        ({"reduction": "max"}, ValueError, r"reduction must be .*got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"z_loss": -1.0}, ValueError, r"z_loss must be .*got -1"),
        ({"skip_tolerance": -0.1, "lean": True}, ValueError, r"skip_tolerance must be 0 or more; got -0.1"),
        ({"skip_tolerance": 0.1}, ValueError, r"skip_tolerance is for lean=True; got 0.1 with lean=False"),
        ({"max_labels": 0}, ValueError, r"max_labels must be an int of at least 1, or None; got 0"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    changes = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for k, x in changes.items()}
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(error, match=message):
            masked_lm_loss(**wrong(**changes))


@pytest.mark.parametrize("label", [20, -1])
@pytest.mark.parametrize("backend", ["reference"] if DEVICE == "cuda" else ["triton", "reference"])
def test_label_out_of_range_is_an_error_where_values_can_be_read(label, backend):
    arguments = wrong()
    arguments["labels"][3] = label
    message = rf"labels must be in 0 … 19 or ignore_index \(-100\); got {label}"
    with use_backend(backend), pytest.raises(ValueError, match=message):
        masked_lm_loss(**arguments)
