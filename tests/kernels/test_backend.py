"""Which implementation runs: the automatic choice, the override, and its errors."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import DEVICE

from fusebert.kernels import backend, use_backend
from fusebert.kernels.attn import config
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


@pytest.fixture
def versions() -> Iterator[None]:
    backend.triton_version.cache_clear()
    yield
    backend.triton_version.cache_clear()


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(("installed", "taken"), [("3.5.1", (3, 6)), ("3.10.0", (3, 9)), ("4.0.0+git1a2b", (3, 9))])
def test_an_unverified_triton_is_named_once(
    installed: str, taken: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.triton, "__version__", installed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            config.table(torch.bfloat16)
        assert backend.triton_version() == taken
    assert [f"verified with triton 3.6 to 3.9, not with {installed}" in str(warning.message) for warning in caught] == [
        True
    ]


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("installed", ["3.6.0", "3.7.1", "3.9.0"])
def test_a_verified_triton_warns_of_nothing(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.triton, "__version__", installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.triton_version() == tuple(map(int, installed.split(".")[:2]))


def test_setup_allows_the_verified_tritons_only() -> None:
    (oldest, newest) = backend.VERIFIED_TRITON[0], backend.VERIFIED_TRITON[-1]
    allowed = f"triton>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1};"
    assert allowed in (Path(__file__).parents[2] / "setup.py").read_text()


def test_a_version_of_triton_has_entries_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = config.table_key(torch.bfloat16), config.Config(16, 16, 4, 1)
    for masked in (False, True):
        monkeypatch.setattr(config, "BY_TRITON", {})
        before = config.table(torch.bfloat16, masked)
        entries = {backend.triton_version(): {key: config.NO_ENTRIES._replace(long_forward={64: other})}}
        monkeypatch.setattr(config, "BY_TRITON", entries)
        after = config.table(torch.bfloat16, masked)
        assert after == before._replace(long_forward=before.long_forward | {64: other})


@pytest.mark.parametrize(
    ("here", "taken"),
    [(75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 120), (121, 120)],
)
def test_the_architecture_of_a_table(here: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "architecture", lambda: here)
    assert config.table_key(torch.bfloat16) == (taken, 2)
    assert config.table_key(torch.float32) == (80 if taken == 90 else taken, 4)
    assert backend.tile_architecture() == (
        80 if taken == 120 else here
    )  # newer than sm_100, with a smaller chip's means


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "warps"),
    [
        (16, 64, torch.bfloat16, 1),
        (32, 64, torch.float16, 1),
        (33, 64, torch.bfloat16, 4),
        (64, 64, torch.bfloat16, 4),
        (65, 64, torch.bfloat16, 8),
        (32, 65, torch.bfloat16, 4),  # spills with one warp
        (32, 64, torch.float32, 4),
    ],
)
def test_warps_of_a_short_tile(rows: int, head_dim: int, dtype: torch.dtype, warps: int) -> None:
    for kernel in ("short_forward", "short_backward"):
        for max_q, max_k in ((rows, 7), (7, rows)):
            found = config.short_config(kernel, head_dim, max_q, max_k, 1, dtype, False)
            assert found is not None
            assert found.num_warps == warps


def test_every_launch_says_whether_products_and_sums_are_fused() -> None:
    """Triton's default is an environment variable that a later version turns."""
    folder = Path(backend.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.rglob("*.py")]
    launches = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func).count("[") == 1
        and any(word.arg in ("num_warps", "BLOCK_S", None) for word in node.keywords)
    ]
    assert len(launches) > 15
    for launch in launches:
        shared = any("problem.arguments" in ast.unparse(word.value) for word in launch.keywords if word.arg is None)
        assert shared or "enable_fp_fusion" in {word.arg for word in launch.keywords}, ast.unparse(launch.func)
