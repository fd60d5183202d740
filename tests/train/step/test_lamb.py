"""LAMB against the paper's algorithm in float64, and what a captured step and an fp16 step need."""

import copy
import math

import numpy as np
import pytest
import torch

from fusebert.train.step.lamb import LAMB

SHAPES = [(5, 3), (4,), (2, 2)]


def reference(
    w: np.ndarray, grads: list[np.ndarray], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> np.ndarray:
    """You et al. 2019, algorithm 2, one tensor."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        r = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * w
        norms = math.sqrt((w * w).sum()), math.sqrt((r * r).sum())
        ratio = norms[0] / norms[1] if decay and all(norms) else 1.0
        w = w - lr * ratio * r
    return w


def make(dtype: torch.dtype, rate: object = 0.02) -> tuple[LAMB, list[torch.nn.Parameter], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]  # noqa: E731
    params = [torch.nn.Parameter(x) for x in draw()]
    params[2].data.zero_()  # a matrix of norm 0 takes Adam's step
    groups = [{"params": [params[0], params[2]], "weight_decay": 0.1}, {"params": [params[1]], "weight_decay": 0.0}]
    return LAMB(groups, lr=rate, betas=(0.8, 0.95), eps=1e-6), params, [draw() for _ in range(5)]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_it_is_the_papers_algorithm(dtype: torch.dtype, error: float, tensor_rate: bool) -> None:
    optimizer, params, grads = make(dtype, torch.tensor(0.02, dtype=dtype) if tensor_rate else 0.02)
    before = [p.detach().double().numpy().copy() for p in params]
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for i, p in enumerate(params):
        given = [step[i].double().numpy() for step in grads]
        expected = reference(before[i], given, 0.02, (0.8, 0.95), 1e-6, 0.0 if i == 1 else 0.1)
        assert np.abs(p.detach().numpy() - expected).max() <= error * np.abs(expected).max()


def test_an_overflow_found_on_the_device_changes_nothing() -> None:
    optimizer, params, (first, second, *_) = make(torch.float32)
    for p, g in zip(params, first, strict=True):
        p.grad = g.clone()
    optimizer.step()
    before = [[p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())] for p in params]
    for p, g in zip(params, second, strict=True):
        p.grad = g * float("inf")
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for p, kept in zip(params, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, [p, *optimizer.state[p].values()], strict=True))
    optimizer.found_inf.zero_()
    for p, g in zip(params, second, strict=True):
        p.grad = 8.0 * g
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()

    plain, same, _ = make(torch.float32)
    for step in (first, second):
        for p, g in zip(same, step, strict=True):
            p.grad = g.clone()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, same, strict=True))


def test_its_state_survives_a_state_dict() -> None:
    (one, params, grads), (other, params_too, _) = make(torch.float32), make(torch.float32)
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g.clone()
    one.step()
    for p, q in zip(params, params_too, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))  # load_state_dict does not copy
    for optimizer, each in ((one, params), (other, params_too)):
        for p, g in zip(each, grads[1], strict=True):
            p.grad = g.clone()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, params_too, strict=True))


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -0.1)])
def test_bad_options(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*; got"):
        LAMB([torch.nn.Parameter(torch.ones(2))], **{"lr": 1e-3, name: value})  # type: ignore[arg-type]
