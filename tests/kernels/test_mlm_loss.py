"""`masked_lm_loss` and `cross_entropy`: values and gradients of the Triton path against float64, and every promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, assert_as_good_as_torch, relative_error

import fusebert.kernels.mlm_loss as module
from fusebert.kernels import reference, use_backend
from fusebert.kernels._triton import interpreting
from fusebert.kernels.mlm_loss import cross_entropy, masked_lm_loss

IGNORE = -100
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is NaN, so that an element no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def hardware_rounding(monkeypatch):
    if interpreting():
        from interpreter import round_bfloat16

        round_bfloat16(monkeypatch)


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
    """What a PyTorch user writes, in the inputs' dtype: the error to stay within twice of."""
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


def assert_matches(ours, oracle, native, names=("loss", "hidden", "weight", "bias")):
    for name, a, o, n in zip(names, ours, oracle, native, strict=False):
        assert_as_good_as_torch(a, o, n.to(a.dtype), name)


def compare(inputs, labels, reduction, *, upstream=None, max_labels=None, **options):
    """Our loss and gradients against the reference in float64, by the error PyTorch makes in the inputs' dtype."""
    if upstream is None:
        upstream = torch.randn(labels.shape, device=DEVICE) if reduction == "none" else 3.0
    wide = [None if x is None else x.double() for x in inputs]

    def ours(*x, reduction=reduction):
        return masked_lm_loss(*x, reduction=reduction, max_labels=max_labels, **options)

    def oracle(*x, reduction=reduction):
        return reference.masked_lm_loss(*x, reduction=reduction, **options)[0]

    def native(*x, reduction=reduction):
        return native_loss(*x, reduction=reduction, **options)

    found, exact, theirs = (
        gradients(f, x, labels, upstream) for f, x in ((ours, inputs), (oracle, wide), (native, inputs))
    )
    assert_matches(found[1:], exact[1:], theirs[1:], ("hidden", "weight", "bias"))
    # PyTorch's scalar may be exact by luck: what is compared is the rows it sums, and then that they were summed.
    rows = ours(*inputs, labels, reduction="none")
    assert_matches([rows], [oracle(*wide, labels, reduction="none")], [native(*inputs, labels, reduction="none")])
    total = rows.double() if reduction == "none" else rows.double().sum()
    total = total / max((labels != IGNORE).sum().item(), 1) if reduction == "mean" else total
    assert found[0].dtype == torch.float32
    assert relative_error(found[0], total) <= torch.finfo(torch.float32).eps * labels.numel() ** 0.5


# ---------------------------------------------------------------------------------------------------- values, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 100, 1000, 4099])
def test_matches_float64(vocab_size, dtype):
    *inputs, labels = problem(21, vocab_size, dtype, ignored=(0, 7, 8, 9, 20))
    compare(inputs, labels, "mean", label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-2}, {"label_smoothing": 1.0}], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(reduction, options):
    *inputs, labels = problem(19, 130, ignored=(3, 4))
    compare(inputs, labels, reduction, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_with_gradients_of_very_different_size(dtype):
    *inputs, labels = problem(19, 130, dtype)
    compare(inputs, labels, "none", upstream=torch.logspace(-6, 2, 19))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_bias(reduction):
    hidden, weight, _, labels = problem(9, 77)
    compare((hidden, weight, None), labels, reduction)


def test_one_row_of_a_single_word_costs_nothing():
    hidden, weight, bias, labels = problem(3, 1)
    ours = gradients(masked_lm_loss, (hidden, weight, bias), labels, 1.0)
    assert all(x.abs().max() == 0 for x in ours)


@pytest.mark.parametrize("shape", [(12, 32), (3, 4, 32), (2, 3, 2, 32)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_axes(shape, reduction):
    hidden, weight, bias, labels = problem(12, 50)
    loss = masked_lm_loss(hidden.reshape(shape), weight, bias, labels.reshape(shape[:-1]), reduction=reduction)
    flat = masked_lm_loss(hidden, weight, bias, labels, reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert torch.equal(loss.flatten(), flat.flatten())


def test_strided_inputs():
    hidden, weight, bias, labels = problem(10, 90)
    wide = torch.full((20, 64), float("nan"), device=DEVICE)
    wide[::2, 1::2] = hidden
    strided = (wide[::2, 1::2], weight.t().contiguous().t(), bias.repeat_interleave(3)[::3])
    assert not any(x.is_contiguous() for x in strided)
    compare(strided, labels.repeat_interleave(2)[::2], "mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_keeps_its_dtype(dtype):
    hidden, weight, bias, labels = problem(9, 40, dtype)
    ours = gradients(masked_lm_loss, (hidden, weight, bias.float()), labels, 1.0)
    same = gradients(masked_lm_loss, (hidden, weight, bias), labels, 1.0)
    assert ours[3].dtype == torch.float32
    assert torch.equal(ours[3].to(dtype), same[3])
    assert torch.equal(ours[2], same[2])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_huge_and_tiny_logits_in_float32(scale):
    hidden, weight, bias, labels = problem(9, 300)
    compare((hidden, weight * scale, bias * scale), labels, "none", z_loss=1e-9)


def test_float16_logits_near_its_largest_number():
    hidden, weight, bias, labels = problem(9, 64, torch.float16)
    weight = weight * (50000 / F.linear(hidden.float(), weight.float()).abs().max())
    compare((hidden, weight.half(), bias), labels, "mean")


def test_float16_weight_gradient_whose_sum_overflows_but_whose_mean_fits():
    hidden, weight, bias, labels = problem(24, 12, torch.float16, ignored=())
    hidden, weight, labels = hidden + 5000, weight * 1e-4, torch.full_like(labels, 3)
    assert hidden.sum(0).isinf().all()
    compare((hidden, weight, bias), labels, "mean")


def test_float16_keeps_a_gradient_whose_factor_would_underflow():
    hidden, weight, bias, labels = problem(24, 64, torch.float16, ignored=())
    hidden, weight = hidden * 1000, weight / 1000
    for reduction in REDUCTIONS:
        full, small = (
            gradients(lambda *x, r=reduction: masked_lm_loss(*x, reduction=r), (hidden, weight, bias), labels, upstream)
            for upstream in (1.0, 2.0**-14)
        )
        assert relative_error(small[2].float() * 2**14, full[2]) < torch.finfo(torch.float16).eps


# ------------------------------------------------------------------------------------------------- labels that are none


@pytest.mark.parametrize("max_labels", [None, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_label_at_all(backend, reduction, max_labels):
    *inputs, labels = problem(6, 20)
    labels.fill_(IGNORE)
    with use_backend(backend):
        found = gradients(
            lambda *x: masked_lm_loss(*x, reduction=reduction, max_labels=max_labels), inputs, labels, 1.0
        )
    assert all(x.abs().max() == 0 for x in found)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_rows(backend):
    hidden, weight, bias, labels = problem(3, 20)
    for reduction in REDUCTIONS:
        with use_backend(backend):
            found = gradients(
                lambda *x, r=reduction: masked_lm_loss(*x, reduction=r),
                (hidden[:0], weight, bias),
                labels[:0],
                1.0,
            )
        assert all(x.abs().sum() == 0 for x in found)
        assert [x.shape for x in found[1:]] == [hidden[:0].shape, weight.shape, bias.shape]


def test_ignore_index_may_be_a_word():
    hidden, weight, bias, labels = problem(9, 30, ignored=())
    labels[[1, 4]] = 0
    other = torch.where(labels == 0, IGNORE, labels)
    ours = masked_lm_loss(hidden, weight, bias, labels, ignore_index=0, return_accuracy=True)
    assert [x.item() for x in ours] == [
        x.item() for x in masked_lm_loss(hidden, weight, bias, other, return_accuracy=True)
    ]


@pytest.mark.parametrize("wrong", [50, 64, 10**12, -1, -(2**62)])
def test_label_out_of_range_is_nan_in_the_kernels(monkeypatch, wrong):
    """What a GPU does, where values are not read back: 64 lies inside the padded logits of 50 words, 10**12 nowhere."""
    hidden, weight, bias, labels = problem(7, 50)
    labels[4] = wrong
    monkeypatch.setattr(module, "_check_labels", lambda *_: None)
    losses = masked_lm_loss(hidden, weight, bias, labels, reduction="none")
    assert losses.isnan().tolist() == [row == 4 for row in range(7)]
    loss, d_hidden, *_ = gradients(masked_lm_loss, (hidden, weight, bias), labels, 1.0)
    assert loss.isnan()
    assert d_hidden.isnan().any(1).tolist() == [row == 4 for row in range(7)]
    logits = F.linear(hidden, weight, bias).requires_grad_()
    losses = cross_entropy(logits, labels, reduction="none")
    losses.nansum().backward()
    assert losses.isnan().tolist() == [row == 4 for row in range(7)]


# --------------------------------------------------------------------------------------------------------- max_labels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_labels", [7, 10, 12, 20])
def test_max_labels_gathers_the_labelled_rows(reduction, max_labels):
    *inputs, labels = problem(12, 40, ignored=(0, 1, 5, 9, 11))
    compare(inputs, labels, reduction, max_labels=max_labels, z_loss=1e-3)


def test_max_labels_keeps_unlabelled_rows_from_the_vocabulary():
    hidden, weight, bias, labels = problem(12, 40, ignored=(0, 1, 5, 9))
    spoiled = hidden.clone()
    spoiled[[1, 5, 9]] = float("nan")  # row 0 fills spare slots, and is finite
    found = gradients(lambda *x: masked_lm_loss(*x, max_labels=9), (spoiled, weight, bias), labels, 1.0)
    clean = gradients(masked_lm_loss, (hidden, weight, bias), labels, 1.0)
    for name, x, y in zip(("loss", "hidden", "weight", "bias"), found, clean, strict=True):
        assert relative_error(x, y) < 1e-6, name
    assert found[1][[0, 1, 5, 9]].abs().max() == 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_more_labels_than_max_labels(backend, monkeypatch):
    hidden, weight, bias, labels = problem(8, 40, ignored=(3,))
    if backend == "reference" or DEVICE == "cpu":
        with use_backend(backend), pytest.raises(ValueError, match="7 labelled rows, more than max_labels = 6"):
            masked_lm_loss(hidden, weight, bias, labels, max_labels=6)
    if backend == "triton":  # as on a GPU
        monkeypatch.setattr(module, "_check_labels", lambda *_: None)
        loss, *grads = gradients(
            lambda *x: masked_lm_loss(*x, max_labels=6), (hidden, weight, bias), labels, torch.tensor(1.0)
        )
        assert loss.isnan()
        assert all(x.isnan().any() for x in grads)
        losses = masked_lm_loss(hidden, weight, bias, labels, max_labels=6, reduction="none")
        assert losses.isnan().tolist() == (labels != IGNORE).tolist()


# ----------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 30, 9001])
def test_accuracy_counts_the_arg_max_of_the_logits(vocab_size, dtype):
    _, weight, bias, labels = problem(12, vocab_size, dtype, ignored=(0, 5))
    best = torch.randint(0, vocab_size, (12,), device=DEVICE)
    hidden = 10 * weight[best]  # by a margin that no rounding bridges
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    third = (torch.arange(12, device=DEVICE) % 3 == 0) & (labels != IGNORE)
    labels = torch.where(third, logits.argmax(-1), labels)
    expected = ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum()
    for reduction in REDUCTIONS:
        _, correct = masked_lm_loss(
            hidden, weight, bias, labels, reduction=reduction, return_accuracy=True, max_labels=11
        )
        assert correct.dtype == torch.int64
        assert correct.shape == ()
        assert correct.item() == expected.item() >= 3


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_of_equal_logits_the_first_counts(backend):
    """Ties next to each other, far apart, and of everything; 6000 words need a second block."""
    tied = [(1, 2), (3, 5000), (5001, 5999), tuple(range(6000)), (0, 5999), (4095, 4096)]
    logits = torch.zeros(len(tied), 6000)
    for row, columns in enumerate(tied):
        logits[row, list(columns)] = 7.0
    weight = logits.t().contiguous().to(DEVICE)  # hidden is the identity: the logits are the weight
    hidden = torch.eye(len(tied), device=DEVICE)
    for pick, expected in ((0, len(tied)), (-1, 0)):
        labels = torch.tensor([columns[pick] for columns in tied], device=DEVICE)
        with use_backend(backend):
            assert masked_lm_loss(hidden, weight, None, labels, return_accuracy=True)[1].item() == expected


# ------------------------------------------------------------------------------------------------------ memory, chunks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks_change_nothing(reduction, dtype, monkeypatch):
    *inputs, labels = problem(19, 40, dtype, ignored=(2, 7, 8, 9))
    whole = masked_lm_loss(*inputs, labels, reduction=reduction, return_accuracy=True)
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    monkeypatch.setattr(module, "CHUNK_TILE", 8)
    launched = []
    launch = module._launch_statistics
    monkeypatch.setattr(module, "_launch_statistics", lambda *a: launched.append(a[0].shape) or launch(*a))
    chunked = masked_lm_loss(*inputs, labels, reduction=reduction, return_accuracy=True)
    assert launched == [(8, 40), (8, 40), (3, 40)]
    assert relative_error(chunked[0], whole[0]) < 1e-6
    assert chunked[1].item() == whole[1].item()
    compare(inputs, labels, reduction)


def test_chunks_are_equal_parts_in_tiles_within_the_budget():
    for rows, width, size in (
        (9830, 30528, 2),
        (9830, 131072, 2),
        (9830, 262144, 2),
        (100_000, 30528, 4),
        (5, 10**8, 4),
    ):
        chunk = module._chunk_rows(rows, width, size)
        assert chunk * width * size <= module.LOGITS_BYTES or chunk <= 128
        assert chunk == rows or chunk % 128 == 0
        assert -(-rows // chunk) * chunk - rows < 128 * -(-rows // chunk)
    assert module._chunk_rows(9830, 30528, 2) == 9830


def allocations(function):
    """Bytes of each allocation that function makes on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sorted(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_exist_in_their_own_dtype_only(reduction):
    """Forward and backward together make one [rows, vocab] tensor, in bf16; for "none" one in each."""
    rows, vocab_size = 40, 2048
    *inputs, labels = problem(rows, vocab_size, torch.bfloat16, hidden_size=4)

    def call():
        gradients(lambda *x: masked_lm_loss(*x, reduction=reduction), inputs, labels, 1.0)

    logits = 2 * rows * vocab_size
    if DEVICE == "cpu":
        *small, largest = allocations(call)
        assert largest == logits
        assert (small[-1] == logits) == (reduction == "none")
    else:
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert logits <= torch.cuda.max_memory_allocated() - before < 2 * logits


def test_no_gradient_work_without_a_gradient(monkeypatch):
    *inputs, labels = problem(5, 30)
    monkeypatch.setattr(module, "_launch_gradient", lambda *_, **__: pytest.fail("a gradient was computed"))
    masked_lm_loss(*inputs, labels)
    with torch.no_grad():
        masked_lm_loss(*(x.detach().requires_grad_() for x in inputs), labels)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_gradients_asked_for(index, reduction):
    *inputs, labels = problem(9, 30)
    full = gradients(lambda *x: masked_lm_loss(*x, reduction=reduction), inputs, labels, 2.0)
    leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
    (2.0 * masked_lm_loss(*leaves, labels, reduction=reduction).sum()).backward()
    assert torch.equal(leaves[index].grad, full[1 + index])
    assert all(x.grad is None for i, x in enumerate(leaves) if i != index)


def test_offsets_beyond_two_to_the_31():
    """Row 2 lies 2**31 + 16 elements in; memory nobody touches costs nothing on a CPU."""
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


def test_same_inputs_same_bits():
    *inputs, labels = problem(19, 500, torch.bfloat16)
    for reduction in REDUCTIONS:
        first, second = (
            gradients(lambda *x, r=reduction: masked_lm_loss(*x, reduction=r, max_labels=18), inputs, labels, 1.0)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------- cross_entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 4099])
def test_cross_entropy_matches_float64(vocab_size, dtype):
    logits = (torch.randn(11, vocab_size, device=DEVICE) * 3).to(dtype)
    labels = torch.randint(0, vocab_size, (11,), device=DEVICE)
    labels[4] = IGNORE
    kept = logits.clone()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    upstream = torch.randn(11, device=DEVICE)

    def native(x, y):
        losses = F.cross_entropy(x, y, reduction="none", label_smoothing=0.1)
        return losses + 1e-3 * torch.logsumexp(x, -1).square() * (y != IGNORE)

    assert_matches(
        gradients(lambda x, y: cross_entropy(x, y, reduction="none", **options), [logits], labels, upstream),
        gradients(lambda x, y: reference.cross_entropy_rows(x, y, **options), [logits.double()], labels, upstream),
        gradients(native, [logits], labels, upstream),
    )
    assert torch.equal(logits, kept)


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


# ---------------------------------------------------------------------------------------------- operators and compiling


def operator_arguments(reduction="mean"):
    hidden, weight, bias, labels = problem(6, 20)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    per_row = reduction == "none"
    return (*leaves, labels, None, IGNORE, 0.1, 1e-3, per_row, *[not per_row] * 3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_linear_cross_entropy(reduction):
    torch.library.opcheck(module._linear_cross_entropy, operator_arguments(reduction))


def test_opcheck_the_others():
    logits = torch.randn(6, 20, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 20, (6,), device=DEVICE)
    torch.library.opcheck(module._cross_entropy, (logits, labels, IGNORE, 0.1, 1e-3))
    x = logits.detach()
    _, row_max, row_sum = module._cross_entropy(x, labels, IGNORE, 0.1, 1e-3)
    torch.library.opcheck(
        module._cross_entropy_backward, (torch.ones(6, device=DEVICE), x, labels, row_max, row_sum, IGNORE, 0.1, 1e-3)
    )
    torch.library.opcheck(module._scaled, (x, torch.tensor(2.0, device=DEVICE), 0.5))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_a_graph_break(reduction, backend):
    *inputs, labels = problem(9, 20, ignored=(2, 5))

    def call(hidden, weight, bias, labels):
        loss, correct = masked_lm_loss(
            hidden, weight, bias, labels, reduction=reduction, return_accuracy=True, max_labels=8, label_smoothing=0.1
        )
        logits = F.linear(hidden, weight, bias)
        return loss + cross_entropy(logits, labels, reduction=reduction, z_loss=0.1) + 0 * correct

    torch._dynamo.reset()
    with use_backend(backend):
        eager = gradients(call, inputs, labels, 1.0)
        compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, labels, 1.0)
    for name, a, b in zip(("loss", "hidden", "weight", "bias"), compiled, eager, strict=True):
        assert relative_error(a, b) < 1e-6, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction):
    hidden, weight, bias, labels = problem(5, 20)
    hidden.requires_grad_()
    for losses in (
        masked_lm_loss(hidden, weight, bias, labels, reduction=reduction),
        cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction),
    ):
        with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
            torch.autograd.grad(losses.sum(), hidden, create_graph=True)


# ------------------------------------------------------------------------------------------------------ float64, errors


def test_float64_and_the_reference_agree_with_pytorch():
    hidden, weight, bias, labels = problem(9, 30, torch.float64)
    with use_backend("auto"):
        loss, correct = masked_lm_loss(hidden, weight, bias, labels, return_accuracy=True)
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
        assert cross_entropy(inputs[0], labels.clamp(max=31)).dtype == torch.float32


def wrong(**changes):
    hidden, weight, bias, labels = problem(5, 20, hidden_size=8)
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 8, dtype=torch.int32)}, TypeError, r"hidden must be .*got torch.int32"),
        ({"hidden": torch.zeros(5, 8).half()}, TypeError, r"hidden torch.float16, weight torch.float32"),
        ({"labels": torch.zeros(5)}, TypeError, r"labels must be int64; got torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"got labels \(4,\), hidden \(5, 8\)"),
        ({"weight": torch.zeros(20, 9)}, ValueError, r"weight must be \[V, 8\].*got \(20, 9\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"V at least 1; got \(0, 8\)"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias must be \[20\].*got \(19,\)"),
        ({"bias": torch.zeros(20).half()}, TypeError, r"bias must be torch.float32.*got torch.float16"),
        ({"weight": torch.zeros(20, 8, device="meta")}, ValueError, r"weight must be on hidden's device.*meta"),
        ({"bias": torch.zeros(20, device="meta")}, ValueError, r"bias must be on hidden's device.*meta"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, r"labels must be on hidden's.*meta"),
        ({"reduction": "max"}, ValueError, r"reduction must be .*got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"z_loss": -1.0}, ValueError, r"z_loss must be .*got -1"),
        ({"max_labels": 0}, ValueError, r"max_labels must be at least 1, or None; got 0"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    changes = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for k, x in changes.items()}
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(error, match=message):
            masked_lm_loss(**wrong(**changes))


@pytest.mark.parametrize("label", [20, -1])
def test_label_out_of_range_is_an_error_where_values_can_be_read(label):
    arguments = wrong()
    arguments["labels"][3] = label
    logits, labels = F.linear(arguments["hidden"], arguments["weight"]), arguments["labels"]
    for backend in ("triton", "reference") if DEVICE == "cpu" else ("reference",):
        with use_backend(backend):
            for call in (lambda: masked_lm_loss(**arguments), lambda: cross_entropy(logits, labels)):
                with pytest.raises(
                    ValueError, match=rf"labels must be in 0 … 19 or ignore_index \(-100\); got {label}"
                ):
                    call()


def test_cross_entropy_errors():
    labels = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"labels must have one entry for each row of logits"):
        cross_entropy(torch.zeros(4, 8, device=DEVICE), labels)
    with pytest.raises(ValueError, match=r"logits must have at least one column"):
        cross_entropy(torch.zeros(5, 0, device=DEVICE), labels)
    with pytest.raises(ValueError, match=r"reduction must be"):
        cross_entropy(torch.zeros(5, 8, device=DEVICE), labels, reduction="avg")
