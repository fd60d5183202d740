"""The product with GELU in its epilogue, against float64: interpreter or GPU, the same body; and as the compiler sees
it."""

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

from fusebert.bench.measure.case import OURS
from fusebert.bench.operators.linear_gelu import OPERATOR
from fusebert.bench.operators.linear_gelu_epilogue import TILINGS, _launch, linear_gelu
from fusebert.kernels import backend, use_backend
from fusebert.kernels.gelu import APPROXIMATIONS

ON_GPU = DEVICE == "cuda"
# (rows, H, I): one tile and less; ragged in every direction, through descriptors (multiples of 8) and through pointers;
# more tiles than programs, so that one walks on, and more rows of tiles than a group, the last group not full.
SHAPES = [(1, 16, 16), (130, 72, 136), (130, 70, 135), (33, 70, 136), (37, 200, 600), (1200, 24, 264)]
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


def inputs(rows: int, hidden_size: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = make(size, hidden_size, dtype=dtype, scale=2 * hidden_size**-0.5)
    return make(rows, hidden_size, dtype=dtype), weight, make(size, scale=0.5)


def plain(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight)
    return F.gelu(pre + bias.to(pre.dtype), approximate=approximate), pre


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "tiling", "arch"), WAYS)
@pytest.mark.parametrize(("rows", "hidden_size", "size"), SHAPES)
def test_both_results(
    rows: int, hidden_size: int, size: int, dtype: torch.dtype, tiling: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activation and the sum before it, by erf and by tanh."""
    monkeypatch.setattr(backend, "architecture", lambda: arch)
    approximate = "tanh" if tiling == "wide" else "none"
    given = inputs(rows, hidden_size, size, dtype)
    oracle = plain(*(tensor.double() for tensor in given), approximate)
    for name, ours, right, torchs in zip(
        ("y", "pre"), _launch(*given, approximate, tiling), oracle, plain(*given, approximate), strict=True
    ):
        assert_as_good_as_torch(ours, right, torchs, name)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients(dtype: torch.dtype, approximate: str, tiling: str) -> None:
    """Of [.., H] whose rows are not end to end, against float64."""
    x, weight, bias = make(2, 20, 120, dtype=dtype)[..., :72], *inputs(1, 72, 136, dtype)[1:]
    dy = make(2, 20, 136, dtype=dtype)
    found = []
    for compute, call in ((dtype, linear_gelu), (torch.float64, eager), (dtype, eager)):
        leaves = [x.to(compute), weight.to(compute), bias.to(torch.promote_types(compute, torch.float32))]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = call(*leaves, approximate=approximate, **({"tiling": tiling} if call is linear_gelu else {}))
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(compute))])
    for name, ours, right, torchs in zip(("y", "dx", "dweight", "dbias"), *found, strict=True):
        assert_as_good_as_torch(ours, right, torchs, name)


def eager(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(F.linear(x, weight, bias.to(x.dtype)), approximate=approximate)


def test_rows_of_any_stride_and_none_at_all() -> None:
    x, weight, bias = inputs(40, 72, 136, torch.float16)
    wide = torch.zeros(40, 99, dtype=x.dtype, device=DEVICE)
    wide[:, :72] = x  # rows 198 bytes apart: not a descriptor's
    padded = torch.zeros(136, 88, dtype=x.dtype, device=DEVICE)
    padded[:, :72] = weight  # and 176: a descriptor's
    expected = linear_gelu(x, weight, bias)
    assert torch.equal(linear_gelu(x, padded[:, :72], bias), expected)
    assert_as_good_as_torch(linear_gelu(wide[:, :72], weight, bias), expected.double(), expected)
    assert linear_gelu(x[:0], weight, bias).shape == (0, 136)


def test_as_an_operator() -> None:
    x, weight, bias = inputs(20, 32, 48, torch.float16)
    for tiling in TILINGS:
        torch.library.opcheck(torch.ops.fusebert.linear_gelu.default, (x, weight, bias, "none", tiling))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"approximate": "erf"}, ValueError, "approximate must be one of none, tanh"),
        ({"tiling": "tall"}, ValueError, "tiling one of pair, wide"),
        ({"x": torch.zeros(3, 8)}, ValueError, r"got \(3, 8\), \(6, 4\), \(6,\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"got \(3, 4\), \(6, 4\), \(4,\)"),
        ({"weight": torch.zeros(6, 4).half()}, TypeError, "weight of x's dtype"),
        ({"x": torch.zeros(3, 4).double(), "weight": torch.zeros(6, 4).double()}, TypeError, "got torch.float64"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "bias": torch.zeros(6)} | change
    with pytest.raises(error, match=message):
        linear_gelu(**given)  # type: ignore[arg-type]


def test_its_costs_and_contestants() -> None:
    """BERT-base's products and bytes; on a CPU's own path the kernel is a gap with a reason."""
    here = torch.device(DEVICE)
    for chosen, there in (("reference", set()), ("triton", {f"fusebert, epilogue, {tiling}" for tiling in TILINGS})):
        with use_backend(chosen):
            (case,) = OPERATOR.cases(here, torch.bfloat16, quick=True, shapes="T=100,H=768,I=3072")
        assert {c.name for c in case.contestants if c.role == OURS} == {"fusebert"} | there
        assert case.contestants[0].name == "fusebert"
        assert any("epilogue" in gap.name for gap in case.missing) == (not there)
    assert case.passes["forward"].flops == 2 * 100 * 768 * 3072
    assert case.passes["forward"].bytes == 2 * (100 * 768 + 768 * 3072 + 100 * 3072)
    assert case.passes["forward+backward"].flops == 6 * 100 * 768 * 3072
    assert case.passes["forward+backward"].bytes == 2 * (3 * 100 * 768 + 3 * 768 * 3072 + 2 * 100 * 3072)
    for gelu, computed in (("erf", "none"), ("tanh", "tanh")):
        (case,) = OPERATOR.cases(here, torch.float32, quick=True, shapes=f"T=9,H=16,I=16,gelu={gelu}")
        names = {c.name for c in case.contestants}
        assert ("torch _addmm_activation" in names) == (computed == ("tanh" if ON_GPU else "none"))


COMPILE = """
import json, torch
from fusebert.bench.compiled.aot import LIMITS, compiled_kernels
from fusebert.bench.operators.linear_gelu_epilogue import _TABLE, TILINGS, linear_gelu
rows = []
for arch in (80, 90, 100):
    for tiling in TILINGS:
        x, weight = (torch.empty(n, 768, dtype=torch.bfloat16) for n in (4096, 3072))
        with compiled_kernels(arch) as found:
            linear_gelu(x, weight, torch.empty(3072), tiling=tiling)
        (r,) = found
        product = r.count({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch])
        chosen = _TABLE[min(arch, 90)][tiling]
        rows.append(
            {
                "arch": arch, "tiling": tiling, "tma": r.constants["TMA"], "spills": r.spill_bytes, "product": product,
                "fits": r.shared_bytes <= LIMITS[arch][2], "blocks": r.blocks_per_multiprocessor,
                "programs": chosen.programs, "by_descriptor": r.count("UTMALDG"), "stored": r.count("UTMASTG"),
                "loads": r.count_wide("LDG"), "stores": r.count_wide("STG"),
            }
        )
print(json.dumps(rows))
"""


def test_compiled_it_multiplies_on_tensor_cores_without_spills(tmp_path: Path) -> None:
    """And two programs of a pair fit a multiprocessor, tiles come and go by TMA where there is one."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads(ran.stdout)
    assert len(rows) == 6
    for row in rows:
        assert row["spills"] == 0, row
        assert row["fits"], row
        assert row["blocks"] >= row["programs"], row
        assert row["product"] >= 4, row
        assert row["tma"] == (row["arch"] >= 90), row
        if row["tma"]:
            assert row["by_descriptor"] >= 2, row
            assert row["stored"] >= 2, row
        else:
            assert row["loads"] >= 16, row
            assert row["stores"] >= 16, row
