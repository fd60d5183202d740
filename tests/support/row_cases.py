"""What the tests of LayerNorm, GELU and the embeddings share. ``inputs`` is a dict of tensors (or None) by argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, assert_as_good_as_torch
from torch import Tensor

from fusebert.kernels import use_backend

Inputs = dict[str, Any]


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale + shift).to(dtype)


def differentiate(call: Callable[..., Any], inputs: Inputs, dys: Iterable[Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs y (and s) of ``call(**inputs)`` and "d" + name for each floating point input."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None and v.is_floating_point()}
    with use_backend(backend):
        outputs = call(**inputs | leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        dys = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), dys)
    found = dict(zip(("y", "s"), (y.detach() for y in outputs), strict=False))
    return found | {"d" + name: gradient for name, gradient in zip(leaves, gradients, strict=True)}


def check_against_oracle(
    run: Callable[..., dict[str, Tensor]],
    draw: Callable[[], Inputs],
    draws: Callable[[Inputs], int] = lambda inputs: 1,
    **oracle_options: Any,
) -> dict[str, Tensor]:
    """Triton against the reference in float64, allowed twice the error of the reference at the inputs' dtypes.

    Small inputs are drawn several times and judged together: the error of two or three numbers is chance.

    Args:
        run: ``run(inputs, backend=..)`` gives results by name.
        draw: makes inputs.
        draws: how many draws of such inputs to judge together.
        oracle_options: more options of ``run`` for float64.

    Returns:
        Triton's results, the draws stacked.
    """
    results: dict[str, list[dict[str, Tensor]]] = {"triton": [], "reference": [], "oracle": []}
    count = 1
    while len(results["triton"]) < count:
        inputs = draw()
        count = max(1, draws(inputs))
        wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
        results["triton"].append(run(inputs, backend="triton"))
        results["reference"].append(run(inputs, backend="reference"))
        results["oracle"].append(run(wide, backend="reference", **oracle_options))
    triton, reference, oracle = (
        {name: torch.stack([result[name] for result in found]) for name in found[0]} for found in results.values()
    )
    assert triton.keys() == oracle.keys()
    for name in oracle:
        assert_as_good_as_torch(triton[name], oracle[name], reference[name], name)
    return triton


def check_wanted_gradients(call: Callable[..., Tensor], inputs: Inputs, subsets: Iterable[tuple[str, ...]]) -> None:
    """Any subset of the inputs may need a gradient, and the values do not depend on the subset."""

    def gradients(wanted: Iterable[str]) -> dict[str, Tensor]:
        tensors = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in inputs.items()}
        with use_backend("triton"):
            y = call(**tensors)
        y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y))
        return {k: v.grad for k, v in tensors.items() if v.grad is not None}

    everything = gradients([k for k, v in inputs.items() if v.is_floating_point()])
    for wanted in subsets:
        found = gradients(wanted)
        assert found.keys() == set(wanted)
        for name in wanted:
            # Not bit for bit: with fewer tables the embeddings' sums by id are cut elsewhere.
            torch.testing.assert_close(found[name], everything[name], atol=1e-5, rtol=1e-5, msg=name)


def check_seeds(call: Callable[[Any], Tensor]) -> None:
    """call(seed): an int and a tensor give one mask, another seed another one, None follows torch.manual_seed."""
    assert torch.equal(call(7), call(torch.tensor([7], device=DEVICE)))
    assert not torch.equal(call(7), call(8))
    torch.manual_seed(0)
    first, second = call(None), call(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(call(None), first)


def check_compiled(model: Callable[..., Tensor], inputs: Inputs) -> None:
    """torch.compile gives one graph with the same output and gradients."""
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    expected, actual = model(**inputs), torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), msg="gradients"
    )


def saved_bytes(call: Callable[..., Any], inputs: Inputs) -> int:
    """Bytes that autograd saves for the backward of call(**inputs), beyond the inputs."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call(**inputs)
    given = [x.data_ptr() for x in inputs.values()]
    found = sum(size for address, size in saved.items() if address not in given)
    del result  # the addresses were unique as long as it lived
    return found


def permuted(x: Tensor) -> Tensor:
    """The same values, first axis innermost in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


VIEWS = pytest.mark.parametrize(
    "view",
    [
        lambda x: F.pad(x, (3, 5))[..., 3:-5],
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        permuted,
        lambda x: x[:, :1].expand_as(x),
    ],
    ids=["rows apart", "columns apart", "permuted", "expanded"],
)
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


def meta_or_fake(device: str, backend: str) -> Any:
    """A context in which new tensors have no data: ``device`` "meta" or "fake"."""
    if DEVICE == "cuda" and backend == "triton":
        pytest.skip("these tensors are not on a CUDA device")
    return torch._subclasses.FakeTensorMode() if device == "fake" else torch.device("meta")
