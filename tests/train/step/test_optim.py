"""Parameter groups, schedule, and the step's gradient: that of the mean over all labels."""

import math

import pytest
import torch
from steps import random_batch, small_model

from fusebert.train.step.optim import learning_rate, make_optimizer, parameter_groups
from fusebert.train.step.step import TrainingStep


def test_biases_and_layernorms_do_not_decay() -> None:
    model = small_model()
    decay, vectors = parameter_groups(model, 0.01)
    assert decay["weight_decay"] == 0.01
    assert vectors["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)] for p in decay["params"]}
    others = {names[id(p)] for p in vectors["params"]}
    assert decays | others == set(names.values())
    assert not decays & others
    assert others == {n for n in names.values() if n.endswith("bias") or "norm" in n}


def test_a_step_of_the_optimizer_is_adamw() -> None:
    layer = torch.nn.Linear(3, 2).double()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    optimizer = make_optimizer(layer, lr=0.01, weight_decay=0.1)
    gradients = {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    for name, p in layer.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    for name, p in layer.named_parameters():
        # After one step m̂ = g and v̂ = g².
        g, w = gradients[name], before[name]
        decay = 0.1 if name == "weight" else 0.0
        expected = w - 0.01 * (g / (g.abs() + 1e-6) + decay * w)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=0)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(2.0, x, 0.1) for x in (0.0, 0.05, 0.1, 0.55, 1.0, 1.01)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0, 0.0])
    assert learning_rate(2.0, 0.0, 0.0) == 2.0


@pytest.mark.parametrize(
    ("schedule", "at_half", "at_nine_tenths", "at_end"),
    [
        ("linear", 0.5 / 0.9, 0.1 / 0.9, 0.0),
        ("cosine", 0.5 * (1 + math.cos(math.pi * 0.4 / 0.9)), 0.5 * (1 + math.cos(math.pi * 0.8 / 0.9)), 0.0),
        ("wsd", 1.0, 0.5, 0.0),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_schedules(schedule: str, at_half: float, at_nine_tenths: float, at_end: float) -> None:
    rates = [learning_rate(2.0, x, 0.1, schedule) for x in (0.0, 0.05, 0.1, 0.5, 0.9, 1.0, 1.01)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 2 * at_half, 2 * at_nine_tenths, 2 * at_end, 2 * at_end])


def test_a_warm_up_longer_than_wsds_plateau_leaves_none() -> None:
    assert learning_rate(1.0, 0.95, 0.9, "wsd") == pytest.approx(0.5)


def test_micro_batches_give_the_gradient_of_the_mean_over_all_labels() -> None:
    generator = torch.Generator().manual_seed(1)
    window = [
        random_batch(generator, [9, 4], masked=7, pairs=2),
        random_batch(generator, [3, 10], masked=1, pairs=0),
        random_batch(generator, [13], masked=3, pairs=1),
    ]
    model = small_model().double()
    losses = [model(batch) for batch in window]
    mean = sum(x.mlm_loss_sum for x in losses) / 11 + sum(x.nsp_loss_sum for x in losses) / 3
    expected = torch.autograd.grad(mean, list(model.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))

    # With plain gradient descent at rate 1, the weights change by minus the gradient.
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.0), clip=10 * norm, compute_dtype=torch.float32)
    result = step(window, lr=1.0)
    for p, old, g in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(old - p.detach(), g, rtol=1e-6, atol=1e-12)
    assert float(result.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert result.sums[0].item() == pytest.approx(sum(x.mlm_loss_sum.item() for x in losses))
    assert result.sums[2].item() == sum(int(x.mlm_correct) for x in losses)


def test_a_long_gradient_is_clipped() -> None:
    window = [random_batch(torch.Generator().manual_seed(2), [9, 4], masked=7, pairs=2)]
    model = small_model()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.0), clip=0.01, compute_dtype=torch.float32)
    assert float(step(window, lr=1.0).grad_norm) > 0.1
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
