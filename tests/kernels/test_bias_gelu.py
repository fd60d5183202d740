"""GELU(x + bias) against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_check import AUTOCAST, ON_CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DTYPES
from row_cases import (
    BACKENDS,
    VIEWS,
    Inputs,
    check_against_oracle,
    check_wanted_gradients,
    differentiate,
    make,
    meta_or_fake,
    permuted,
    saved_bytes,
)
from torch import Tensor, nn

from fusebert.kernels import FusedLinearGELU, bias_gelu, use_backend
from fusebert.kernels.gelu import APPROXIMATIONS

# Odd widths; rows that leave a ragged last tile; several column tiles, the last one ragged; (600, 129) and (170, 1030)
# make a program of the backward loop. Narrow ones have few rows: the interpreter adds a tile's rows one by one, a GPU
# pairwise.
SHAPES = [(9, 1), (33, 7), (33, 63), (35, 65), (600, 129), (19, 768), (170, 1030), (3, 3072)]
if DEVICE == "cuda" and not ON_CPU:
    SHAPES += [(600, 7), (50000, 64), (16384, 3072), (4099, 4096), (300, 16400)]

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    # Far from zero the tail of "tanh" is 1 / (1 + ∞).
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]
APPROXIMATION = pytest.mark.parametrize("approximate", APPROXIMATIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(
    x: Tensor, bias: Tensor | None, dy: Tensor, approximate: str = "none", backend: str = "triton"
) -> dict[str, Tensor]:
    """The output and the gradient of every input."""
    call = lambda **tensors: bias_gelu(**tensors, approximate=approximate)  # noqa: E731
    return differentiate(call, {"x": x, "bias": bias}, [dy], backend)


def check(draw: Callable[[], tuple[Tensor, Tensor | None]], approximate: str = "none") -> None:
    def draw_inputs() -> Inputs:
        x, bias = draw()
        return {"x": x, "bias": bias, "dy": torch.randn(x.shape, device=DEVICE).to(x.dtype)}

    def run_approximation(inputs: Inputs, backend: str) -> dict[str, Tensor]:
        return run(**inputs, approximate=approximate, backend=backend)

    check_against_oracle(run_approximation, draw_inputs, draws=lambda inputs: 64 // inputs["x"].shape[-1])


@APPROXIMATION
@EVERY_DTYPE
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_bias_gelu(rows: int, width: int, dtype: torch.dtype, approximate: str) -> None:
    check(lambda: (make(rows, width, dtype=dtype), make(width, dtype=dtype)), approximate)


@APPROXIMATION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias(dtype: torch.dtype, approximate: str) -> None:
    """Half precision activations meet float32 parameters, as under autocast; the gradient has the parameter's dtype."""
    check(lambda: (make(70, 200, dtype=dtype), make(200)), approximate)


@APPROXIMATION
@EVERY_DTYPE
def test_without_bias(dtype: torch.dtype, approximate: str) -> None:
    check(lambda: (make(20, 65, dtype=dtype), None), approximate)


@APPROXIMATION
@EVERY_DTYPE
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0, 5e3])
def test_magnitudes(scale: float, dtype: torch.dtype, approximate: str) -> None:
    check(lambda: (make(40, 200, dtype=dtype, scale=scale), make(200, scale=scale)), approximate)


@APPROXIMATION
@EVERY_DTYPE
def test_far_from_zero(dtype: torch.dtype, approximate: str) -> None:
    """The identity on one side and zero on the other, up to the largest number."""
    far = torch.tensor([20.0, 100.0, 1e4, torch.finfo(dtype).max], dtype=dtype, device=DEVICE)
    ones = torch.ones_like(far)
    found = run(far, None, ones, approximate)
    assert torch.equal(found["y"], far)
    assert torch.equal(found["dx"], ones)
    found = run(-far, None, ones, approximate)
    assert not found["y"].any()
    assert not found["dx"].any()


@APPROXIMATION
@EVERY_DTYPE
def test_not_finite(dtype: torch.dtype, approximate: str) -> None:
    """As PyTorch in float64: a limit instead would hide an overflow."""
    x = torch.tensor([1.0, float("nan"), float("inf"), float("-inf"), 2.0], dtype=dtype, device=DEVICE)
    found = run(x, None, torch.ones_like(x), approximate)
    doubles = run(x.double(), None, torch.ones_like(x).double(), approximate, "reference")
    for name in ("y", "dx"):
        assert found[name].isnan().tolist() == doubles[name].isnan().tolist(), name
    assert found["y"][2] == doubles["y"][2] == float("inf")


@APPROXIMATION
def test_every_point(approximate: str) -> None:
    """Φ to 2e-7 everywhere, GPUs' exp2 at its worst (2⁻²²) included, and to 2e-4 of itself where it is tiny.

    ½ (1 + erf) in float32, which PyTorch computes, has no correct digit left at z = −5.5.
    """
    z = torch.linspace(-20.0, 20.0, 20001, device=DEVICE)
    found = run(z, None, torch.ones_like(z), approximate)
    doubles = run(z.double(), None, torch.ones_like(z).double(), approximate, "reference")
    unit = z.abs().double().clamp_min(1.0)
    assert ((found["y"] - doubles["y"]).abs() <= 2e-7 * unit).all()
    assert ((found["dx"] - doubles["dx"]).abs() <= 4e-7).all()
    tail = (z >= -6.0) & (z <= -1.0)
    exact = doubles["y"][tail] if approximate == "tanh" else z[tail].double() * torch.special.ndtr(z[tail].double())
    assert ((found["y"][tail] - exact) / exact).abs().max() < 2e-4
    beyond = found["y"][z < -6.0]
    assert beyond.abs().max() < 1e-8
    assert not found["y"][z < -15.0].any()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    approximate=st.sampled_from(APPROXIMATIONS),
    bias=st.sampled_from(["none", "same", "float32"]),
    seed=st.integers(0, 2**32),
)
def test_any_shape(rows: int, width: int, dtype: torch.dtype, approximate: str, bias: str, seed: int) -> None:
    torch.manual_seed(seed)
    bias_dtype = dtype if bias == "same" else torch.float32
    check(
        lambda: (make(rows, width, dtype=dtype), None if bias == "none" else make(width, dtype=bias_dtype)), approximate
    )


@VIEWS
def test_strides(view: Callable[[Tensor], Tensor]) -> None:
    x, dy = view(make(4, 6, 40)), view(make(4, 6, 40))
    assert not x.is_contiguous()
    bias = make(80)[::2]
    plain = run(x.contiguous(), bias.contiguous(), dy.contiguous())
    for strided in (run(x, bias, dy), run(x, bias, dy.contiguous()), run(x.contiguous(), bias, dy)):
        for name, expected in plain.items():
            assert torch.equal(strided[name], expected), name
        assert strided["y"].is_contiguous()


def test_offsets_beyond_32_bits() -> None:
    """Three rows 2³⁰ elements apart, a stride of 32 bits (on a CPU the memory between them is never touched)."""
    stride, width = 2**30 + 16, 40
    torch.use_deterministic_algorithms(False)
    x = torch.empty(2 * stride + width, dtype=torch.bfloat16, device=DEVICE).as_strided((3, width), (stride, 1))
    x.copy_(make(3, width))
    far, near = run(x, None, x), run(x.contiguous(), None, x.contiguous())
    assert torch.equal(far["y"], near["y"])
    assert torch.equal(far["dx"], near["dx"])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (4, 0), (64,)])
def test_no_rows_and_no_batch(shape: tuple[int, ...]) -> None:
    bias, dy = make(shape[-1]), make(*shape)
    found = run(make(*shape), bias, dy)
    assert found["y"].shape == found["dx"].shape == shape
    assert torch.equal(found["dbias"], found["dx"] if dy.dim() == 1 else torch.zeros_like(bias))


def test_deterministic() -> None:
    inputs = make(900, 40), make(40), make(900, 40)
    first, second = run(*inputs), run(*inputs)
    for name in ("y", "dx", "dbias"):
        assert torch.equal(first[name], second[name]), name


def test_only_wanted_gradients() -> None:
    check_wanted_gradients(bias_gelu, {"x": make(9, 40), "bias": make(40)}, [("x",), ("bias",)])


def test_nothing_but_the_inputs_is_saved() -> None:
    inputs = {"x": make(10, 64, dtype=torch.bfloat16).requires_grad_(), "bias": make(64).requires_grad_()}
    assert saved_bytes(bias_gelu, inputs) == 0


@pytest.mark.parametrize(("has_bias", "approximate"), [(True, "none"), (False, "tanh")])
def test_opcheck(has_bias: bool, approximate: str) -> None:
    x = permuted(make(3, 4, 24, dtype=torch.float16))
    bias = make(24) if has_bias else None
    torch.library.opcheck(torch.ops.fusebert.bias_gelu.default, (x, bias, approximate))
    for bias_grad in {False, has_bias}:
        arguments = (permuted(torch.randn_like(x)), x, bias, approximate, bias_grad)
        torch.library.opcheck(torch.ops.fusebert.bias_gelu_backward.default, arguments)


@BACKENDS
def test_autocast(backend: str) -> None:
    """The product is bfloat16; the kernel adds the float32 bias in float32."""
    module, x = FusedLinearGELU(24, 40, device=DEVICE), make(9, 24)
    with use_backend(backend):
        with torch.autocast(AUTOCAST, dtype=torch.bfloat16):
            y = module(x)
            assert y.dtype == torch.bfloat16
            assert bias_gelu(make(9, 40), module.bias).dtype == torch.float32
            product = F.linear(x, module.weight)
            fused = F.gelu(F.linear(x, module.weight, module.bias))
        y.sum().backward()
    assert module.weight.grad.dtype == module.bias.grad.dtype == torch.float32
    expected = fused if backend == "reference" else F.gelu(product.float() + module.bias).bfloat16()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_meta_and_fake_tensors(device: str, backend: str) -> None:
    with meta_or_fake(device, backend), use_backend(backend):
        x = torch.empty(3, 4, 24, requires_grad=True)
        module = FusedLinearGELU(24, 40)
        y = module(x)
        assert y.shape == (3, 4, 40)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert module.bias.grad.shape == (40,)


@APPROXIMATION
def test_reference_is_gelu(approximate: str) -> None:
    x, bias = make(9, 40), make(40)
    with use_backend("reference"):
        assert torch.equal(bias_gelu(x, bias, approximate=approximate), F.gelu(x + bias, approximate=approximate))
        assert torch.equal(bias_gelu(x, None, approximate=approximate), F.gelu(x, approximate=approximate))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("x_dtype", "bias_dtype"),
    [(torch.float64, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_any_dtype_off_the_kernels(x_dtype: torch.dtype, bias_dtype: torch.dtype, backend: str) -> None:
    x, bias = make(9, 40, dtype=x_dtype).requires_grad_(), make(40, dtype=bias_dtype).requires_grad_()
    with use_backend(backend):
        y = bias_gelu(x, bias)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == x_dtype
    assert bias.grad.dtype == bias_dtype


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"approximate": "tanh"}], ids=str)
def test_module_is_linear_and_gelu(options: dict[str, Any]) -> None:
    """Same state_dict as `nn.Linear` both ways, same numbers; survives deepcopy."""
    linear = nn.Linear(24, 40, bias=options.get("bias", True))
    theirs = nn.Sequential(linear, nn.GELU(options.get("approximate", "none")))
    ours = FusedLinearGELU(24, 40, **options)
    ours.load_state_dict(linear.state_dict())
    nn.Linear(24, 40, bias=options.get("bias", True)).load_state_dict(ours.state_dict())
    x = torch.randn(9, 24)
    ours = copy.deepcopy(ours).to(DEVICE)
    with use_backend("triton"):
        torch.testing.assert_close(ours(x.to(DEVICE)).cpu(), theirs(x))
    assert isinstance(ours, nn.Linear)
    assert f"approximate='{options.get('approximate', 'none')}'" in repr(ours)


@BACKENDS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.tensor(1.0)), ValueError, "x must have"),
        (dict(x=torch.ones(4, 8, dtype=torch.int32)), TypeError, "x must be"),
        (dict(bias=torch.ones(4)), ValueError, "bias must have shape"),
        (dict(bias=torch.ones(8, 1)), ValueError, "bias must have shape"),
        (dict(bias=torch.ones(8, dtype=torch.float16)), TypeError, "bias must have x's dtype"),
        (dict(bias=torch.ones(8, device="meta")), ValueError, "bias must be on x's device"),
        (dict(approximate="erf"), ValueError, "approximate must be one of none, tanh; got 'erf'"),
        (dict(approximate=True), ValueError, "approximate must be one of none, tanh; got True"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    changes = {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type != "meta" else v for k, v in changes.items()}
    with use_backend(backend), pytest.raises(error, match=message):
        bias_gelu(**dict(x=make(4, 8), bias=make(8)) | changes)


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="approximate must be"):
        FusedLinearGELU(8, 8, approximate="relu")
