"""Arguments of every kind in every place of every public operator: one clear error, the same on both paths."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from operator_calls import CALLS
from oracle import DEVICE

from fusebert.kernels import use_backend


def wrong(value: Any) -> Iterator[Any]:
    """Values of other kinds than ``value``. Some are allowed in some places."""
    if isinstance(value, torch.Tensor):
        yield from (value.tolist(), value.cpu().numpy(), None, "x", 3)
        yield from (value.to(dtype) for dtype in (torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8))
        yield from (value.flatten()[0], value[None], value.to_sparse(), value[..., :0], value[:0], value.to("meta"))
        if value.dim() > 2:
            yield value[..., :0, :]
    elif isinstance(value, int):
        yield from (2**31, 2**63, 2**70, -(2**63) - 1, 4.0, "4", True, [4], np.float32(4))
    else:
        yield from (float("nan"), float("inf"), -1.0, 1.0, "x", [0.1], None)


def outcome(function: Any, arguments: dict[str, Any], backend: str) -> str:
    with use_backend(backend):
        try:
            function(**arguments)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, call in CALLS.items() for place in call()[1]])
def test_an_argument_of_another_kind(name, place):
    function, arguments = CALLS[name]()
    assert {outcome(function, arguments, backend) for backend in ("reference", "triton")} == {"accepted"}
    refused = 0
    for value in wrong(arguments[place]):
        outcomes = {outcome(function, arguments | {place: value}, backend) for backend in ("reference", "triton")}
        assert len(outcomes) == 1, f"{value!r}: {outcomes}"
        message = outcomes.pop()
        if message != "accepted":
            refused += 1
            assert " must " in message or "position_ids and cu_seqlens" in message, f"{value!r}: {message}"
    assert refused >= 3


def value_and_gradients(function: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    tensors = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}
    y = function(**arguments | leaves)
    return y.detach(), *torch.autograd.grad(y.sum(), list(leaves.values()))


def test_threads_get_what_one_thread_gets():
    """All operators in eight threads at once, each thread in another order.

    On a CPU the reference: Triton's interpreter itself is not safe between threads.
    """
    backend = "triton" if DEVICE == "cuda" else "reference"
    calls = [call() for call in CALLS.values()]
    with use_backend(backend):
        expected = [value_and_gradients(*call) for call in calls]
    start = threading.Barrier(8)

    def work(first: int) -> list[bool]:
        order = [(first + i) % len(calls) for i in range(len(calls))]
        start.wait()
        found = {i: value_and_gradients(*calls[i]) for _ in range(5) for i in order}
        return [torch.equal(a, b) for i in order for a, b in zip(found[i], expected[i], strict=True)]

    with use_backend(backend), concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(all(same) for same in pool.map(work, range(8)))
