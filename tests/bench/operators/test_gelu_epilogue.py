"""GELU and its derivative in a product's epilogue, against float64 on the interpreter or a GPU; and as compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_kernels
from interpreter import multiply_bfloat16, round_bfloat16
from oracle import DEVICE, DTYPES, assert_as_good_as_torch
from torch import Tensor

from fusebert.bench.compiled.aot import LIMITS, MATRIX
from fusebert.bench.measure.case import OURS
from fusebert.bench.operators.gelu_epilogue import GELU_LINEAR, LINEAR_GELU
from fusebert.bench.operators.gelu_epilogue_kernels import TILINGS, gelu_linear, linear_gelu
from fusebert.kernels import backend, use_backend
from fusebert.kernels.gelu import APPROXIMATIONS

ON_GPU = DEVICE == "cuda"
# (rows, H, I): one tile and less; ragged in every direction, through descriptors (multiples of 8) and through pointers;
# more tiles than programs, so that a program takes a second one, and more rows of tiles than a group.
SHAPES = [(1, 16, 16), (130, 72, 136), (130, 70, 135), (33, 70, 136), (33, 136, 70), (37, 200, 600), (1200, 24, 264)]
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
CALLS = pytest.mark.parametrize("call", [linear_gelu, gelu_linear], ids=lambda call: call.__name__)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no program wrote is found."""
    if not ON_GPU:
        round_bfloat16(monkeypatch)
        multiply_bfloat16(monkeypatch)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def inputs(
    call: Callable[..., Tensor], rows: int, hidden_size: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the result's gradient."""
    width, out_width = (hidden_size, size) if call is linear_gelu else (size, hidden_size)
    weight = make(out_width, width, dtype=dtype, scale=2 * width**-0.5)
    return make(rows, width, dtype=dtype), weight, make(size, scale=0.5), make(rows, out_width, dtype=dtype)


def eager(call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    if call is linear_gelu:
        return F.gelu(F.linear(x, weight, bias.to(x.dtype)), approximate=approximate)
    return F.linear(F.gelu((x + bias).to(x.dtype), approximate=approximate), weight)


def check(
    call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, approximate: str, **how: str
) -> None:
    """The result and every gradient."""

    def results(dtype: torch.dtype, forward: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.to(dtype), weight.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = forward(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    ours = results(x.dtype, lambda *leaves: call(*leaves, approximate=approximate, **how))
    oracle, torchs = (
        results(dtype, lambda *leaves: eager(call, *leaves, approximate)) for dtype in (torch.float64, x.dtype)
    )
    for name, *three in zip(("y", "dx", "dweight", "dbias"), ours, oracle, torchs, strict=True):
        assert_as_good_as_torch(*three, name)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "tiling", "arch"), WAYS)
@pytest.mark.parametrize(("rows", "hidden_size", "size"), SHAPES)
@CALLS
def test_result_and_gradients(
    call: Callable[..., Tensor],
    rows: int,
    hidden_size: int,
    size: int,
    dtype: torch.dtype,
    tiling: str,
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By erf and by tanh."""
    monkeypatch.setattr(backend, "architecture", lambda: arch)
    approximate = APPROXIMATIONS[tiling == "wide"]
    check(call, *inputs(call, rows, hidden_size, size, dtype), approximate, tiling=tiling)


@CALLS
def test_rows_of_any_stride_and_none_at_all(call: Callable[..., Tensor]) -> None:
    for dtype in (torch.float32, torch.float16):
        x, weight, bias, dy = inputs(call, 40, 72, 136, dtype)
        apart = [torch.zeros(*y.shape[:-1], y.shape[-1] + 14, dtype=dtype, device=DEVICE) for y in (x, dy)]
        strided = [wide[..., : y.shape[-1]].copy_(y).view(2, 20, -1) for wide, y in zip(apart, (x, dy), strict=True)]
        padded = torch.zeros(weight.shape[0], weight.shape[1] + 16, dtype=dtype, device=DEVICE)
        check(call, strided[0], padded[:, : weight.shape[1]].copy_(weight), bias, strided[1], "none")
    leaves = [tensor.detach().requires_grad_() for tensor in (x.view(2, 20, -1)[:, :0], weight, bias)]
    y = call(*leaves)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (2, 0, weight.shape[0])
    assert gradients[0].shape == (2, 0, weight.shape[1])
    assert not gradients[2].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"approximate": "erf"}, ValueError, "approximate must be one of none, tanh"),
        ({"tiling": "tall"}, ValueError, "tiling must be one of pair, wide"),
        ({"x": torch.zeros(3, 8)}, ValueError, r"got \(6, 4\) for \(3, 8\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape .*got \(5,\)"),
        ({"weight": torch.zeros(6, 4).half()}, TypeError, "weight must have x's dtype"),
        ({"x": torch.zeros(3, 4).double()}, TypeError, "got torch.float64"),
    ],
)
@CALLS
def test_bad_input(
    call: Callable[..., Tensor], change: dict[str, object], error: type[Exception], message: str
) -> None:
    bias = torch.zeros(6 if call is linear_gelu else 4)
    given = {"x": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "bias": bias} | change
    with pytest.raises(error, match=message):
        call(**given)


@pytest.mark.parametrize("operator", [LINEAR_GELU, GELU_LINEAR], ids=lambda operator: operator.name)
def test_costs_and_contestants(operator) -> None:
    """BERT-base's products and bytes; where Triton does not run, the kernels are missing with a reason."""
    here = torch.device(DEVICE)
    for chosen, there in (("reference", set()), ("triton", {f"fusebert, epilogue, {tiling}" for tiling in TILINGS})):
        with use_backend(chosen):
            (case,) = operator.cases(here, torch.bfloat16, quick=True, shapes="T=100,H=768,I=3072")
        assert {c.name for c in case.contestants if c.role == OURS} == {"fusebert"} | there
        assert case.contestants[0].name == "fusebert"
        assert any("epilogue" in gap.name for gap in case.missing) == (not there)
    flops, (x, out) = 2 * 100 * 768 * 3072, (100 * 768, 100 * 3072)
    x, out = (x, out) if operator is LINEAR_GELU else (out, x)
    weight, both = 768 * 3072, case.passes["forward+backward"]
    assert both.flops == 3 * flops
    assert both.bytes == 2 * (3 * x + 3 * weight + 2 * out)
    alone = case.passes["forward" if operator is LINEAR_GELU else "backward"]
    assert alone.flops == flops * (1 if operator is LINEAR_GELU else 2)
    assert alone.bytes == 2 * (x + weight + out + (0 if operator is LINEAR_GELU else x + weight))


def test_addmm_activation_takes_part_where_it_computes_the_same_gelu() -> None:
    for gelu, computed in (("erf", "cpu"), ("tanh", "cuda")):
        (case,) = LINEAR_GELU.cases(
            torch.device(DEVICE), torch.float32, quick=True, shapes=f"T=9,H=16,I=16,gelu={gelu}"
        )
        assert ("torch _addmm_activation" in {c.name for c in case.contestants}) == (computed == DEVICE)


CALL = """
import torch
from fusebert.bench.operators.gelu_epilogue_kernels import gelu_linear, linear_gelu

def call(op, tiling):
    width, out_width = (768, 3072) if op == "linear_gelu" else (3072, 768)
    x, weight = (torch.empty(n, width, dtype=torch.bfloat16, requires_grad=True) for n in (4096, out_width))
    bias = torch.empty(3072, requires_grad=True)
    if op == "linear_gelu":
        linear_gelu(x, weight, bias, tiling=tiling)
    else:
        y = gelu_linear(x, weight, bias, tiling=tiling)
        y.backward(torch.empty_like(y))
"""


def test_compiled_they_multiply_on_tensor_cores_without_spills() -> None:
    """Two programs of a pair fit a multiprocessor; TMA moves tiles where it exists.

    gelu_linear on sm_100 compiles slowly and is left to `fusebert.bench.aot`.
    """
    pytest.importorskip("triton")
    cases = [
        {"arch": arch, "op": op, "tiling": tiling}
        for arch in LIMITS
        for tiling in TILINGS
        for op in ("linear_gelu", "gelu_linear")
        if (arch, op) != (100, "gelu_linear")
    ]
    for case, kernels in zip(cases, compile_kernels(CALL, *cases), strict=True):
        arch = case["arch"]
        (r,) = [k for k in kernels if k.name in ("linear_gelu_forward", "gelu_linear_backward")]
        assert r.spill_bytes == 0, r
        assert r.shared_bytes <= LIMITS[arch].shared_bytes, r
        assert r.blocks_per_multiprocessor >= {"pair": 2, "wide": 1}[case["tiling"]], r
        assert r.count(MATRIX[arch]) >= 4, r
        assert r.constants["TMA"] == (arch in (90, 100)), r
        if arch in (90, 100):  # gelu_linear also loads each slice of x by descriptor
            assert r.count("UTMALDG") >= (4 if case["op"] == "gelu_linear" else 2), r
            assert r.count("UTMASTG") >= 2, r
        else:
            assert r.count_wide("LDG") >= 16, r
            assert r.count_wide("STG") >= 16, r
