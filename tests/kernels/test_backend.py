"""Which implementation runs: the automatic choice, the override, and its errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import DEVICE

from fusebert.kernels import backend, use_backend
from fusebert.kernels.backend import choose_backend


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    """Whatever FUSEBERT_BACKEND is set to."""
    with use_backend("auto"):
        yield


def test_automatic_choice() -> None:
    assert choose_backend(torch.ones(1)) == "reference"
    assert choose_backend(torch.ones(1, dtype=torch.float64, device=DEVICE)) == "reference"
    if DEVICE == "cuda":
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert choose_backend(torch.ones(1, dtype=dtype, device=DEVICE)) == "triton"


def test_override_nests_and_ends() -> None:
    x = torch.ones(1, device=DEVICE)
    before = choose_backend(x)
    with use_backend("triton"):
        assert choose_backend(x) == "triton"
        with use_backend("reference"):
            assert choose_backend(x) == "reference"
        assert choose_backend(x) == "triton"
    assert choose_backend(x) == before


def test_override_ends_with_an_error() -> None:
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert choose_backend(torch.ones(1)) == "reference"


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="one of auto, triton, reference; got 'cuda'"), use_backend("cuda"):
        pass


def test_triton_with_an_unsupported_dtype() -> None:
    with use_backend("triton"), pytest.raises(TypeError, match=r"got torch\.float64"):
        choose_backend(torch.ones(1, dtype=torch.float64, device=DEVICE))


def test_triton_on_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"on cpu: move them .* TRITON_INTERPRET=1"):
        choose_backend(torch.ones(1))


def test_triton_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAVE_TRITON", False)
    assert choose_backend(torch.ones(1, device=DEVICE)) == "reference"
    with use_backend("triton"), pytest.raises(RuntimeError, match="pip install triton"):
        choose_backend(torch.ones(1, device=DEVICE))


@pytest.mark.parametrize(
    ("value", "shown"), [("triton", "triton\n"), ("fast", "FUSEBERT_BACKEND must be one of .* 'fast'")]
)
def test_environment_variable(value: str, shown: str, tmp_path: Path) -> None:
    code = "import torch; from fusebert.kernels.backend import choose_backend; print(choose_backend(torch.ones(1)))"
    environment = {**os.environ, "FUSEBERT_BACKEND": value, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert re.search(shown, ran.stdout + ran.stderr)
