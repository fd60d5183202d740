"""Pretraining runs that do not measure the machine for long."""

import pytest

from fusebert.train.step import flops


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denominator of MFU from products of 64³: a float16 one of the usual size takes seconds on a CPU."""
    monkeypatch.setitem(flops.MATMUL_SIZE, "cpu", 64)
