"""Values that are not finite reach the places that they reach in PyTorch, and no others."""

from __future__ import annotations

import pytest
import torch
from operator_calls import CALLS, floats
from oracle import DEVICE

from fusebert.kernels import dropout_mask, use_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
# Attention has its own test, against the definition: PyTorch's own attention on a CPU loses some of them.
NAMES = [name for name in CALLS if not name.startswith("attention")]
BAD = [float("nan"), float("inf"), float("-inf")]


def not_finite(name, place, value, backend, dtype):
    """For the output and the gradient of each float input: where it is not finite."""
    torch.manual_seed(5)
    function, arguments = CALLS[name]()
    arguments = {k: x for k, x in arguments.items() if k not in ("p", "seed")}  # dropout: the next test
    tensors = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    with use_backend(backend):
        tensors["dy"] = torch.randn_like(function(**arguments))
        spoiled = tensors[place]
        spoiled.view(-1)[spoiled.numel() // 2] = value
        tensors = {k: x.to(dtype).requires_grad_(k != "dy") for k, x in tensors.items()}
        dy = tensors.pop("dy")
        y = function(**arguments | tensors)
        gradients = torch.autograd.grad(y, list(tensors.values()), dy.to(y.dtype))
    return {k: ~x.detach().isfinite() for k, x in zip(("y", *tensors), (y, *gradients), strict=True)}


def places(name):
    return [k for k, x in CALLS[name]()[1].items() if isinstance(x, torch.Tensor) and x.is_floating_point()] + ["dy"]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("name", "place"), [(name, place) for name in NAMES for place in places(name)])
def test_the_same_places_as_in_pytorch(name, place, value):
    ours = not_finite(name, place, value, "triton", torch.float32)
    theirs = not_finite(name, place, value, "reference", torch.float64)
    for k in theirs:
        assert torch.equal(ours[k], theirs[k]), f"{k}: {ours[k].nonzero().tolist()}, {theirs[k].nonzero().tolist()}"


@pytest.mark.parametrize("value", BAD)
def test_a_dropped_value_reaches_nothing(value):
    """A kept one reaches its row. (PyTorch multiplies by 0 instead, which gives NaN.)"""
    function, arguments = CALLS["dropout_add_layernorm"]()
    arguments |= {"x": floats(64, 8), "residual": floats(64, 8)}
    kept = dropout_mask(0.5, 3, 64, 8).to(DEVICE)
    arguments["x"][:, 2] = value
    with use_backend("triton"):
        y = function(**arguments | {"p": 0.5})
    assert torch.equal(y.isfinite(), ~kept[:, 2:3].expand(64, 8))


@pytest.mark.parametrize("value", BAD)
def test_a_bad_row_without_a_label_costs_nothing(value):
    """The loss does not read it; its gradient is 0."""
    function, arguments = CALLS["cross_entropy"]()
    logits, labels = arguments["logits"], arguments["labels"]
    labels[1] = -100
    logits[1] = value
    with use_backend("triton"):
        loss = function(**arguments | {"logits": logits.requires_grad_()})
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert torch.equal(gradient[1], torch.zeros(logits.shape[1], device=DEVICE))
    assert gradient[0].any()
