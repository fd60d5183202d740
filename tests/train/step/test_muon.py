"""Muon against the algorithm of the papers in float64, and what a captured step and an fp16 step need."""

import copy

import numpy as np
import pytest
import torch
from steps import small_model

from fusebert.train.step.muon import Muon, orthogonalize
from fusebert.train.step.optim import make_optimizer

LR, MOMENTUM, SCALE, DECAY = 0.02, 0.9, 3.0, 0.1


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan et al. 2024, on a wide matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def reference(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """Jordan et al. 2024 with Nesterov momentum, scaled and decayed as by Liu et al. 2025, equation 4."""
    m = np.zeros_like(w)
    for g in grads:
        m = MOMENTUM * m + (1 - MOMENTUM) * g
        u = newton_schulz((1 - MOMENTUM) * g + MOMENTUM * m)
        w = w - LR * (SCALE * 0.2 * max(w.shape) ** 0.5 * u + DECAY * w)
    return w


def make(dtype: torch.dtype, rate: object = LR) -> tuple[Muon, list[torch.nn.Parameter], list[list[torch.Tensor]]]:
    """A stack of three 4×4 matrices, a 4×4, a wide and a tall matrix, and two parameters for AdamW."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(12, 4), (4, 4), (4, 10), (10, 4), (7, 4), (5,)]
    draw = lambda: [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]  # noqa: E731
    params = [torch.nn.Parameter(x) for x in draw()]
    groups = [
        {"params": params[:1], "muon": True, "blocks": 3},
        {"params": params[1:4], "muon": True},
        {"params": params[4:5]},
        {"params": params[5:], "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, lr=rate, weight_decay=DECAY, momentum=MOMENTUM, scale=SCALE)
    return optimizer, params, [draw() for _ in range(4)]


def give(params: list[torch.nn.Parameter], grads: list[torch.Tensor], factor: float = 1.0) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = factor * g


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matrices_take_the_papers_step_and_the_rest_adamws(dtype: torch.dtype, error: float) -> None:
    optimizer, params, grads = make(dtype)
    before = [p.detach().double().numpy().copy() for p in params]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params[4:]]
    groups = [{"params": twins[:1], "weight_decay": DECAY}, {"params": twins[1:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-6, fused=True)
    for step in grads:
        give(params, step)
        give(twins, step[4:])
        optimizer.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(params[4:], twins, strict=True))
    for i in range(4):
        count = 3 if i == 0 else 1
        blocks = [np.split(x, count) for x in (before[i], *(step[i].double().numpy() for step in grads))]
        expected = np.concatenate([reference(w, list(each)) for w, *each in zip(*blocks, strict=True)])
        assert np.abs(params[i].detach().numpy() - expected).max() <= error * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype))
    assert 0.3 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(16, 32), (16, 64), (64, 16)])
@pytest.mark.parametrize("decades", [1, 4, 8])  # of the singular values
def test_the_gram_form_is_the_papers_iteration(shape: tuple[int, int], decades: int) -> None:
    """It takes the place of the iteration from an aspect ratio of 2 on; the bound is the one of its docstring."""
    generator = torch.Generator().manual_seed(decades)
    draw = lambda *size: torch.linalg.qr(torch.randn(3, *size, generator=generator, dtype=torch.float64)).Q  # noqa: E731
    small, large = min(shape), max(shape)
    matrices = draw(small, small) * torch.logspace(0, -decades, small, dtype=torch.float64) @ draw(large, small).mT
    matrices = matrices if shape[0] == small else matrices.mT
    expected = torch.from_numpy(np.stack([newton_schulz(m) for m in matrices.numpy()]))
    scale = expected.abs().max()
    for dtype in (torch.float64, torch.float32):
        error = (orthogonalize(matrices.to(dtype)).double() - expected).abs().max()
        assert error <= torch.finfo(dtype).eps * 3.4445**8 * scale


def test_pytorchs_muon_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)  # its iteration, in float64
    generator = torch.Generator().manual_seed(3)
    for shape in ((4, 4), (4, 16), (16, 4), (4, 6)):
        ours = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        theirs = torch.nn.Parameter(ours.detach().clone())
        options = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM}
        one = Muon([{"params": [ours], "muon": True}], **options)
        other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
        for _ in range(3):
            ours.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            theirs.grad = ours.grad.clone()
            one.step()
            other.step()
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-7)  # it divides by max(norm, 1e-7), not norm + 1e-7


def test_a_matrix_of_zeros_and_a_step_that_was_skipped_change_nothing() -> None:
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()
    optimizer, params, (first, second, *_) = make(torch.float32)
    give(params, first)
    optimizer.step()
    before = [[p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())] for p in params]
    give(params, second, float("inf"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for p, kept in zip(params, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, [p, *optimizer.state[p].values()], strict=True))
    optimizer.found_inf.zero_()
    give(params, second, 8.0)
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()

    plain, same, _ = make(torch.float32)
    for step in (first, second):
        give(same, step)
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, same, strict=True))


def test_its_state_survives_a_state_dict() -> None:
    (one, params, grads), (other, params_too, _) = make(torch.float32, torch.tensor(LR)), make(torch.float32)
    give(params, grads[0])
    one.step()
    for p, q in zip(params, params_too, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, each in ((one, params), (other, params_too)):
        give(each, grads[1])
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, params_too, strict=True))


def test_the_matrices_of_the_layers_are_muons() -> None:
    model = small_model()
    optimizer = make_optimizer(model, 1e-3, 0.01, "muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    stacked, single, matrices, vectors = [sorted(names[p] for p in group["params"]) for group in optimizer.param_groups]
    assert all(name.endswith("qkv.weight") for name in stacked)
    assert all(name.startswith("encoder.layers.") and name.endswith(".weight") for name in single)
    assert len(single) == 3 * len(stacked) == 3 * model.config.num_hidden_layers
    assert "encoder.embeddings.word_embeddings.weight" in matrices
    assert "nsp_classifier.weight" in matrices
    assert optimizer.param_groups[3]["weight_decay"] == 0.0
    assert sorted([*stacked, *single, *matrices, *vectors]) == sorted(names.values())


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("momentum", 1.0), ("scale", 0.0), ("weight_decay", -0.1)])
def test_bad_options(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*; got"):
        Muon([torch.nn.Parameter(torch.ones(2))], **{"lr": 1e-3, name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(4, 2\) in a group of 3 matrices"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(4, 2))], "muon": True, "blocks": 3}], lr=1e-3)
