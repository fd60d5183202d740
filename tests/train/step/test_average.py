"""The average of the weights against its formula in float64, and what it leaves alone."""

import pytest
import torch
from steps import small_model

from fusebert.train.step.average import KEY, WeightAverage
from fusebert.train.step.optim import make_optimizer


def train(name: str, steps: int, decay: float):
    """A model, its optimiser, its average, and the weights after each step."""
    model = small_model()
    optimizer = make_optimizer(model, 0.01, 0.1, name)
    average = WeightAverage(optimizer, decay)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        average.update(step)
        seen.append([p.detach().double().clone() for p in model.parameters()])
    return model, optimizer, average, seen


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
@pytest.mark.parametrize("decay", [0.3, 0.999])  # the first is below its rise from step 3 on
def test_the_formula(name: str, decay: float) -> None:
    model, optimizer, _, seen = train(name, 8, decay)
    expected = seen[0]
    for n, weights in enumerate(seen[1:], 2):
        d = min(decay, (1 + n) / (10 + n))
        expected = [d * a + (1 - d) * w for a, w in zip(expected, weights, strict=True)]
    for p, a in zip(model.parameters(), expected, strict=True):
        error = (optimizer.state[p][KEY].double() - a).abs().max()
        assert error <= 8 * torch.finfo(torch.float32).eps * a.abs().max()
        assert p.ndim <= 1 or not torch.equal(optimizer.state[p][KEY], p)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_training_does_not_notice_it(name: str) -> None:
    with_average, _, average, _ = train(name, 3, 0.9)
    trained = [p.detach().clone() for p in with_average.parameters()]
    plain = small_model()
    optimizer = make_optimizer(plain, 0.01, 0.1, name)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in plain.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(with_average.parameters(), plain.parameters(), strict=True))
    with average.applied():
        assert any(not torch.equal(p, q) for p, q in zip(with_average.parameters(), trained, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(with_average.parameters(), trained, strict=True))


def test_before_the_first_step() -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    average = WeightAverage(make_optimizer(model, 0.01, 0.1), 0.9)
    average.update(1)  # GradScaler skips the optimiser's step when a gradient overflows
    with average.applied():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
