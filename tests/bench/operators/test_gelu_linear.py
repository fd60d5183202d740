"""The product with GELU' in its epilogue, against float64: interpreter or GPU, the same body; and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreter import multiply_bfloat16, round_bfloat16
from oracle import DEVICE, DTYPES, assert_as_good_as_torch
from torch import Tensor

from fusebert.bench.operators.gelu_linear import OPERATOR
from fusebert.bench.operators.gelu_linear_epilogue import gelu_linear
from fusebert.bench.operators.linear_gelu_epilogue import TILINGS
from fusebert.kernels import backend

ON_GPU = DEVICE == "cuda"
# (rows, H, I): as `test_linear_gelu`'s; here the contraction is over H, and I is what ends within a tile.
SHAPES = [(1, 16, 16), (130, 72, 136), (130, 70, 135), (33, 136, 70), (1100, 24, 264)]
if ON_GPU:
    SHAPES += [(4099, 768, 3072), (40000, 770, 3070), (70000, 1000, 4000)]
# (dtype, tiling, architecture): float32 has one tiling for all.
WAYS = [
    (torch.float32, "pair", 80),
    (torch.float16, "pair", 90),
    *((torch.bfloat16, tiling, arch) for tiling in TILINGS for arch in (80, 90)),
]
if ON_GPU:
    WAYS = [(dtype, tiling, backend.architecture()) for dtype in DTYPES for tiling in TILINGS]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, so that an element no program wrote is noticed."""
    if not ON_GPU:
        round_bfloat16(monkeypatch)
        multiply_bfloat16(monkeypatch)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def eager(x: Tensor, bias: Tensor, weight: Tensor, *, approximate: str) -> Tensor:
    return F.linear(F.gelu((x + bias).to(x.dtype), approximate=approximate), weight)


def check(
    dtype: torch.dtype, x: Tensor, bias: Tensor, weight: Tensor, dy: Tensor, approximate: str, **how: str
) -> None:
    """The result and every gradient."""
    found = []
    for compute, call, options in ((dtype, gelu_linear, how), (torch.float64, eager, {}), (dtype, eager, {})):
        leaves = [x.to(compute), bias.to(torch.promote_types(compute, torch.float32)), weight.to(compute)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = call(*leaves, approximate=approximate, **options)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(compute))])
    for name, ours, right, torchs in zip(("y", "dx", "dbias", "dweight"), *found, strict=True):
        assert_as_good_as_torch(ours, right, torchs, name)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "tiling", "arch"), WAYS)
@pytest.mark.parametrize(("rows", "hidden_size", "size"), SHAPES)
def test_gradients(
    rows: int, hidden_size: int, size: int, dtype: torch.dtype, tiling: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By erf and by tanh."""
    monkeypatch.setattr(backend, "architecture", lambda: arch)
    x, bias = make(rows, size, dtype=dtype, scale=2.0), make(size, scale=0.5)
    weight, dy = make(hidden_size, size, dtype=dtype, scale=size**-0.5), make(rows, hidden_size, dtype=dtype)
    check(dtype, x, bias, weight, dy, "tanh" if tiling == "wide" else "none", tiling=tiling)


def test_rows_of_any_stride_and_none_at_all() -> None:
    x, dy = make(2, 20, 150)[..., :136], make(2, 20, 80)[..., :72]
    bias, weight = make(136), make(72, 140, scale=0.1)[:, :136]
    for dtype in (torch.float32, torch.float16):
        check(dtype, x.to(dtype), bias, weight.to(dtype), dy.to(dtype), "none")
    leaves = [tensor.detach().requires_grad_() for tensor in (x[:, :0], bias, weight)]
    gradients = torch.autograd.grad(gelu_linear(*leaves).sum(), leaves)
    assert gradients[0].shape == (2, 0, 136)
    assert not gradients[1].any()


def test_as_an_operator() -> None:
    given = make(20, 48), make(48, 32), make(20, 32), make(32)
    for tiling in TILINGS:
        torch.library.opcheck(torch.ops.fusebert.product_gelu_slope.default, (*given, "none", tiling))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"approximate": "erf"}, ValueError, "approximate must be one of none, tanh"),
        ({"tiling": "tall"}, ValueError, "tiling one of pair, wide"),
        ({"x": torch.zeros(3, 8)}, ValueError, r"got \(3, 8\), \(4,\), \(6, 4\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"got \(3, 4\), \(6,\), \(6, 4\)"),
        ({"weight": torch.zeros(6, 4).half()}, TypeError, "weight of x's dtype"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(3, 4), "bias": torch.zeros(4), "weight": torch.zeros(6, 4)} | change
    with pytest.raises(error, match=message):
        gelu_linear(**given)  # type: ignore[arg-type]


def test_its_costs() -> None:
    (case,) = OPERATOR.cases(torch.device(DEVICE), torch.bfloat16, quick=True, shapes="T=100,H=768,I=3072")
    x, weight, out = 100 * 3072, 768 * 3072, 100 * 768
    assert case.passes["backward"].flops == 4 * 100 * 768 * 3072
    assert case.passes["backward"].bytes == 2 * (out + 2 * x + 2 * weight)
    assert case.passes["forward+backward"].flops == 6 * 100 * 768 * 3072
    assert case.passes["forward+backward"].bytes == 2 * (2 * out + 3 * x + 3 * weight)


COMPILE = """
import json, torch
from fusebert.bench.compiled.aot import LIMITS, compiled_kernels
from fusebert.bench.operators.gelu_linear_epilogue import _TABLE, TILINGS, _launch
rows = []
for arch in (80, 90):
    for tiling in TILINGS:
        dy, weight, x = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((4096, 768), (768, 3072), (4096, 3072)))
        with compiled_kernels(arch) as found:
            _launch(dy, weight, x, torch.empty(3072), "none", tiling)
        (r,) = [kernel for kernel in found if kernel.name == "_product_gelu_slope"]
        chosen = _TABLE[arch][tiling]
        rows.append(
            {
                "arch": arch, "tiling": tiling, "tma": r.constants["TMA"], "spills": r.spill_bytes,
                "product": r.count({80: "HMMA", 90: "HGMMA"}[arch]), "programs": chosen.programs,
                "fits": r.shared_bytes <= LIMITS[arch][2], "blocks": r.blocks_per_multiprocessor,
                "by_descriptor": r.count("UTMALDG"), "stored": r.count("UTMASTG"),
                "loads": r.count_wide("LDG"), "stores": r.count_wide("STG"),
            }
        )
print(json.dumps(rows))
"""


def test_compiled_it_multiplies_on_tensor_cores_without_spills(tmp_path: Path) -> None:
    """And two programs of a pair fit a multiprocessor, tiles come and go by TMA where there is one.

    sm_100, which takes its time, is left to `fusebert.bench.aot`.
    """
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads(ran.stdout)
    assert len(rows) == 4
    for row in rows:
        assert row["spills"] == 0, row
        assert row["fits"], row
        assert row["blocks"] >= row["programs"], row
        assert row["product"] >= 4, row
        assert row["tma"] == (row["arch"] >= 90), row
        if row["tma"]:
            assert row["by_descriptor"] >= 4, row  # of the two factors, and of each slice of x
            assert row["stored"] >= 2, row
        else:
            assert row["loads"] >= 16, row
            assert row["stores"] >= 16, row
