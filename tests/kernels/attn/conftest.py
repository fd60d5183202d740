"""Attention's tests run the kernels, on memory that is NaN until it is written."""

from __future__ import annotations

import pytest
import torch
from attention_cases import use_long_route

from fusebert.kernels import use_backend


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised outputs are NaN, so that an element that no program writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["short", "long"])
def route(request, monkeypatch):
    """Which kernels run, at any shape. The long route uses small tiles, so that small shapes have several."""
    if request.param == "long":
        use_long_route(monkeypatch)
    return request.param
