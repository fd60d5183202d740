"""Cautious weight decay against its formula in float64, and what a captured step and an fp16 step need."""

import copy

import numpy as np
import pytest
import torch
from steps import small_model

from fusebert.train.step.cautious import KEY
from fusebert.train.step.muon import orthogonalize
from fusebert.train.step.optim import BETAS, EPS, make_optimizer

LR, DECAY = 0.02, 0.3


def draw(model: torch.nn.Module, steps: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)]


def give(model: torch.nn.Module, grads: list[torch.Tensor], factor: float = 1.0) -> None:
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g * factor


def adamw(w: np.ndarray, grads: list[np.ndarray], decay: float) -> np.ndarray:
    """Chen et al. 2025, algorithm 1, with AdamW's update."""
    m, v, (beta1, beta2) = np.zeros_like(w), np.zeros_like(w), BETAS
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        u = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + EPS)
        w = w - LR * (u + decay * w * (u * w >= 0))
    return w


def muon(w: np.ndarray, grads: list[np.ndarray], blocks: int, scale: float) -> np.ndarray:
    m = np.zeros_like(w)
    for g in grads:
        m = 0.95 * m + 0.05 * g
        nesterov = torch.from_numpy(0.05 * g + 0.95 * m).view(blocks, -1, w.shape[1])
        u = orthogonalize(nesterov).reshape(w.shape).numpy()
        rows = w.shape[0] // blocks
        w = w - LR * (scale * 0.2 * max(rows, w.shape[1]) ** 0.5 * u + DECAY * w * (u * w >= 0))
    return w


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_formula(name: str) -> None:
    model = small_model()
    before = [p.detach().double().numpy().copy() for p in model.parameters()]
    optimizer = make_optimizer(model, LR, DECAY, name, muon_scale=2.0, cautious_decay=True)
    plain = copy.deepcopy(model)
    other = make_optimizer(plain, LR, DECAY, name, muon_scale=2.0)
    grads = draw(model, 3)
    for step in grads:
        for each, one in ((model, optimizer), (plain, other)):
            give(each, step)
            one.step()
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    differ = 0
    for i, (p, q) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
        own = [step[i].double().numpy() for step in grads]
        group = groups[p]
        if group.get("muon"):
            expected = muon(before[i], own, group["blocks"], 2.0)
        else:
            expected = adamw(before[i], own, group[KEY])
        error = np.abs(p.detach().double().numpy() - expected).max()
        assert error <= 2e-5 * max(1.0, np.abs(expected).max()), (i, p.shape)
        differ += int(not torch.equal(p, q))
        assert torch.equal(p, q) == (p.ndim == 1)  # vectors do not decay
    assert differ


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_skipped_and_a_scaled_gradient(name: str) -> None:
    model, twin = small_model(), small_model()
    one, two = (make_optimizer(each, LR, DECAY, name, cautious_decay=True) for each in (model, twin))
    first, second = draw(model, 2)
    give(model, first)
    one.step()
    give(twin, first)
    two.step()
    before = [p.detach().clone() for p in model.parameters()]
    give(model, second, float("nan"))
    one.found_inf = torch.ones(())
    one.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    one.found_inf = torch.zeros(())
    one.grad_scale = torch.tensor(8.0)
    give(model, second, 8.0)
    one.step()
    give(twin, second)
    two.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_not_with_lamb() -> None:
    with pytest.raises(ValueError, match="cautious_decay is not possible with lamb"):
        make_optimizer(small_model(), LR, DECAY, "lamb", cautious_decay=True)
