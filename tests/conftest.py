"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported."""

import contextlib
import os
import random
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `make test` does; more threads would be more processes of `pretrain`

import numpy as np
import pytest
import torch
from gpu_check import ON_CPU, adapt

with contextlib.suppress(ImportError):  # without it the tests that draw examples are left out, and no others
    import hypothesis

    # The same examples everywhere, and none remembered from one run to the next.
    hypothesis.settings.register_profile("reproducible", derandomize=True, database=None)
    hypothesis.settings.load_profile("reproducible")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# `python -m pytest` puts the working directory there: transformers would import our kernels/ as Hugging Face's package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_CPU:
        adapt(items)


@pytest.fixture(autouse=True)
def _seed_of_the_test(request: pytest.FixtureRequest) -> None:
    """Random inputs are the test's own: not what the tests before it, which differ by worker, left of a generator."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
