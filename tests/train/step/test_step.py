"""The step gives the same result on static buffers, with low-precision copies, scaled, and captured as CUDA graphs."""

import copy
import warnings

import pytest
import torch
from steps import random_batch, small_model

from fusebert.model.batch import PackedBatch
from fusebert.train.step.master_weights import LowPrecisionCopy
from fusebert.train.step.optim import make_optimizer
from fusebert.train.step.step import TrainingStep

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = ([9, 4, 3], [5, 10, 1], [8, 8])  # 16 tokens each


def windows(steps: int, micro_batches: int = 2) -> list[list[PackedBatch]]:
    """Batches of one shape, as a run's: three segment slots, other lengths and counts in each."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(steps * micro_batches):
        lengths = [*LENGTHS[i % 3], 0][:3]
        found.append(random_batch(generator, lengths, masked=3 + i % 4, pairs=i % 3, slots=7, max_seqlen=10))
    return [found[i : i + micro_batches] for i in range(0, len(found), micro_batches)]


def train(step: TrainingStep, given: list[list[PackedBatch]]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The weights after a step on each window, at rates that change, and every result."""
    torch.manual_seed(3)
    results = []
    for i, window in enumerate(given):
        results += step(window, lr=1e-2 / (1 + i))
    return {name: p.detach().clone() for name, p in step.model.named_parameters()}, results


def make(dtype: torch.dtype, optimizer: str = "adamw", **options: object) -> TrainingStep:
    model = small_model(dropout=0.1).train()
    step = TrainingStep(model, make_optimizer(model, 1e-3, 0.01, optimizer), clip=0.5, compute_dtype=dtype, **options)
    return step


def assert_same(one: TrainingStep, other: TrainingStep, steps: int = 5) -> None:
    given = windows(steps)
    (weights, results), (weights_too, results_too) = train(one, given), train(other, given)
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(results, results_too, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_static_buffers_it_is_the_same_step_to_the_bit(dtype: torch.dtype, optimizer: str) -> None:
    assert_same(make(dtype, optimizer), make(dtype, optimizer, graph=True))


def test_a_static_batch_takes_no_other_shape() -> None:
    step = make(torch.float32, graph=True)
    (window,) = windows(1)
    step(window, 1e-3)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"one shape: input_ids has shape \(17,\), in the first batch \(16,\)"):
        step([random_batch(generator, [9, 5, 3], masked=3, pairs=1, slots=7, max_seqlen=10)], 1e-3)
    with pytest.raises(ValueError, match=r"one max_seqlen: got 12, .* 10"):
        step([random_batch(generator, [9, 4, 3], masked=3, pairs=1, slots=7, max_seqlen=12)], 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_copy_gives_autocasts_gradients_to_the_bit(dtype: torch.dtype) -> None:
    """Over two micro-batches, accumulated in the master weights."""
    ours, theirs = small_model(dropout=0.1).train(), small_model(dropout=0.1).train()
    copied = LowPrecisionCopy(ours, dtype)
    for seed, (window,) in enumerate(windows(2, micro_batches=1)):
        for model in (copied.model, theirs):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=dtype):
                out = model(window)
            (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad), name
    assert all(p.grad is None for p in copied.model.parameters() if p.dtype == dtype)


def test_a_low_precision_copy_shares_all_but_the_matrices_and_follows_them() -> None:
    model = small_model()
    copied = LowPrecisionCopy(model, torch.bfloat16)
    masters, copies = dict(model.named_parameters()), dict(copied.model.named_parameters())
    matrices = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, p in copies.items():
        assert (p is masters[name]) == (name not in matrices), name
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.eval()
    copied.refresh()
    assert not copied.model.encoder.training
    assert all(torch.equal(copies[n], p.to(copies[n].dtype)) for n, p in masters.items())


def test_a_step_uses_the_weights_as_it_finds_them() -> None:
    """Weights that change after the step was made, as when a checkpoint is loaded."""
    step = make(torch.bfloat16)
    with torch.no_grad():
        for p in step.model.parameters():
            p.mul_(1.5)
    model = copy.deepcopy(step.model)
    fresh = TrainingStep(model, make_optimizer(model, 1e-3, 0.01), clip=0.5, compute_dtype=torch.bfloat16)
    assert_same(step, fresh, steps=3)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale(optimizer: str) -> None:
    step = make(torch.float16, optimizer)
    ordinary, poisoned, after = windows(3)
    step(ordinary, 1e-3)
    assert step.scaler is not None
    scale = step.scaler.get_scale()
    before = copy.deepcopy([step.model.state_dict(), [*map(dict, step.optimizer.state.values())]])
    bias = step.model.nsp_classifier.bias.data
    kept = bias.clone()
    bias.copy_(torch.tensor([float("inf"), 0.0]))  # the pair loss is NaN
    result = step(poisoned, 1e-3)
    assert torch.isinf(bias).any()
    bias.copy_(kept)
    assert step.scaler.get_scale() == scale / 2
    assert result.grad_norm == 0.0
    for name, value in before[0].items():
        assert torch.equal(value, step.model.state_dict()[name]), name
    for old, new in zip(before[1], step.optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert torch.isfinite(step(after, 1e-3).sums).all()
    assert not torch.equal(before[0]["mlm_bias"], step.model.mlm_bias)


def test_fp16_gradients_are_those_of_the_unscaled_loss() -> None:
    """Against bf16's masters in float32: the scale cancels. The first step's norm, before anything has moved."""
    (window,) = windows(1)
    norms = {}
    for dtype in (torch.float32, torch.float16):
        model = small_model(dropout=0.0)
        step = TrainingStep(model, make_optimizer(model, 1e-3, 0.01), clip=0.5, compute_dtype=dtype)
        norms[dtype] = float(step(window, 1e-3).grad_norm)
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=5e-3)


@gpu
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replayed_it_is_the_same_step(dtype: torch.dtype, optimizer: str, micro_batches: int) -> None:
    """Without dropout every operator is deterministic: captured or not, the weights are the same."""
    given = [[b.map(torch.Tensor.pin_memory) for b in window] for window in windows(8, micro_batches)]
    found = []
    for graph in (False, True):
        model = small_model(dropout=0.0).cuda()
        step = TrainingStep(
            model, make_optimizer(model, 1e-3, 0.01, optimizer), clip=0.5, compute_dtype=dtype, graph=graph
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a capture that fails
            found.append(train(step, given))
    (weights, results), (weights_too, results_too) = found
    for name in weights:
        torch.testing.assert_close(weights[name], weights_too[name], rtol=1e-5, atol=1e-7)
    for a, b in zip(results, results_too, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@gpu
def test_a_replay_draws_new_masks() -> None:
    """The rate is 0, the batch the same: only dropout can change the loss."""
    (window,) = windows(1, micro_batches=1)
    model = small_model(dropout=0.3).cuda().train()
    step = TrainingStep(model, make_optimizer(model, 0.0, 0.0), clip=1.0, compute_dtype=torch.bfloat16, graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a capture that fails
        losses = [float(step(window, 0.0).sums[0]) for _ in range(12)]
    assert len(set(losses[4:])) == 8


@gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_waits_for_nothing_on_a_gpu(dtype: torch.dtype, graph: bool) -> None:
    model = small_model(dropout=0.1).cuda().train()
    step = TrainingStep(model, make_optimizer(model, 1e-3, 0.01), clip=1.0, compute_dtype=dtype, graph=graph)
    given = [[b.map(torch.Tensor.pin_memory) for b in window] for window in windows(8)]
    for window in given[:6]:  # compiles the kernels, captures
        step(window, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for window in given[6:]:
            result = step(window, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.sums).all()


@gpu
def test_a_capture_that_fails_warns_once_and_the_run_goes_on() -> None:
    """A step that reads a value on the host cannot be captured."""
    steps = []
    for graph in (True, False):
        model = small_model(dropout=0.0).cuda()
        optimizer = make_optimizer(model, 1e-3, 0.01)
        steps.append(TrainingStep(model, optimizer, clip=0.5, compute_dtype=torch.float32, graph=graph))
    step, plain = steps
    update = step.update

    def reading() -> None:
        float(step.sums.sum())
        update()

    step.update = reading  # type: ignore[method-assign]
    given = windows(6)
    with pytest.warns(RuntimeWarning, match="could not be captured .* --no-graph") as warned:
        weights, _ = train(step, given)
    assert len(warned) == 1
    expected, _ = train(plain, given)
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-7)
