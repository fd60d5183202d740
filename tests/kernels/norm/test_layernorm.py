"""LayerNorm, RMSNorm and dropout + add + LayerNorm against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_check import ON_CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DTYPES, relative_error
from row_cases import (
    BACKENDS,
    VIEWS,
    Inputs,
    check_against_oracle,
    check_compiled,
    check_seeds,
    check_wanted_gradients,
    differentiate,
    make,
    meta_or_fake,
    permuted,
    saved_bytes,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusebert.kernels import (
    FusedDropoutAddLayerNorm,
    FusedLayerNorm,
    FusedRMSNorm,
    dropout_add_layernorm,
    dropout_mask,
    layernorm,
    rmsnorm,
    use_backend,
)
from fusebert.kernels.rows import launch_sum_partials

pytestmark = pytest.mark.usefixtures("nan_memory")

# Odd widths; rows that leave a ragged last tile; (600, 7) and (19, 768) make a program of the backward loop.
SHAPES = [(9, 2), (8, 3), (600, 7), (33, 63), (67, 64), (35, 65), (9, 129), (19, 768), (3, 1000), (2, 1024)]
if DEVICE == "cuda" and not ON_CPU:
    SHAPES += [(50000, 64), (5000, 768), (4099, 1024), (2001, 4096), (300, 16384)]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensors(rows: int, hidden_size: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Inputs:
    """Arguments of `dropout_add_layernorm` and dy; half precision activations meet float32 parameters."""
    x, residual, dy = (make(rows, hidden_size, dtype=dtype) for _ in range(3))
    return {"x": x, "residual": residual, "weight": make(hidden_size), "bias": make(hidden_size), "dy": dy} | changes


def run(inputs: Inputs, *, backend: str = "triton", rms: bool = False, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients. Without a residual `layernorm`, with ``rms`` `rmsnorm`; with "ds" s is an output too."""
    arguments = {k: v for k, v in inputs.items() if k not in ("dy", "ds") and (k != "residual" or v is not None)}
    dys = [inputs[k] for k in ("dy", "ds") if inputs.get(k) is not None]
    call: Callable[..., Any] = dropout_add_layernorm
    if rms:
        call, arguments = rmsnorm, {k: arguments[k] for k in ("x", "weight")}
    elif "residual" not in arguments:
        call = layernorm
    elif len(dys) == 2:
        options["return_sum"] = True
    return differentiate(lambda **tensors: call(**tensors, **options), arguments, dys, backend)


def check(draw: Callable[[], Inputs], **options: Any) -> None:
    def run_with_options(inputs: Inputs, backend: str) -> dict[str, Tensor]:
        return run(inputs, backend=backend, **options)

    check_against_oracle(run_with_options, draw, draws=lambda inputs: 64 // inputs["x"].shape[-1])


def stable_eps(hidden_size: int) -> float:
    """For two or three elements x̂ hardly depends on x, and the gradient is rounding error unless eps is large."""
    return 0.1 if hidden_size < 4 else 1e-5


@EVERY_DTYPE
@pytest.mark.parametrize(("rows", "hidden_size"), SHAPES)
def test_layernorm(rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    def draw() -> Inputs:
        weight, bias = make(hidden_size, dtype=dtype), make(hidden_size, dtype=dtype)
        return tensors(rows, hidden_size, dtype, residual=None, weight=weight, bias=bias)

    check(draw, eps=stable_eps(hidden_size))


@EVERY_DTYPE
@pytest.mark.parametrize(("rows", "hidden_size"), SHAPES)
def test_dropout_add_layernorm(rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    check(
        lambda: tensors(rows, hidden_size, dtype, ds=make(rows, hidden_size, dtype=dtype)),
        eps=stable_eps(hidden_size),
        p=0.3,
        seed=rows,
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("absent", [("bias",), ("weight",), ("weight", "bias")], ids=str)
def test_without_weight_or_bias(absent: tuple[str, ...], p: float) -> None:
    check(lambda: tensors(20, 65) | dict.fromkeys(absent), p=p, seed=3)
    check(lambda: tensors(20, 65, residual=None) | dict.fromkeys(absent))


@EVERY_DTYPE
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "hidden_size"), [(600, 7), (33, 63), (19, 768), (3, 1000)])
def test_linear_bias(rows: int, hidden_size: int, p: float, dtype: torch.dtype) -> None:
    """A larger bias than the other inputs: added after the dropout, say, it would show."""

    def draw() -> Inputs:
        found = tensors(rows, hidden_size, dtype, linear_bias=make(hidden_size, scale=3.0, dtype=dtype))
        return found if p else found | {"ds": make(rows, hidden_size, dtype=dtype)}

    check(draw, p=p, seed=rows)


@EVERY_DTYPE
@pytest.mark.parametrize("hidden_size", [1, 2, 65, 768])
def test_rmsnorm(hidden_size: int, dtype: torch.dtype) -> None:
    check(lambda: tensors(40, hidden_size, x=make(40, hidden_size, dtype=dtype, shift=2.0)), rms=True, eps=1e-3)
    if hidden_size == 65:
        check(lambda: tensors(20, hidden_size, dtype, weight=None), rms=True)


def test_one_column() -> None:
    """A single element equals its mean: y is the bias, and x has no gradient."""
    inputs = tensors(70, 1)
    found = run(inputs, p=0.2, seed=1)
    assert torch.equal(found["y"], inputs["bias"].expand(70, 1))
    for name in ("dx", "dresidual", "dweight"):
        assert not found[name].any(), name
    torch.testing.assert_close(found["dbias"], inputs["dy"].double().sum(0).float())


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("hidden_size", "p", "has_linear_bias"),
    [(4104, 0.3, True), (9001, 0.0, False), (16384, 0.3, False)],
)
def test_rows_shared_by_programs(hidden_size: int, p: float, has_linear_bias: bool, dtype: torch.dtype) -> None:
    """Rows in blocks of columns, the last one partly filled. Values differ from block to block: a wrong mean shows."""
    trend = torch.linspace(-1, 2, hidden_size, device=DEVICE)

    def draw() -> Inputs:
        found = tensors(3, hidden_size, dtype, weight=make(hidden_size) + trend)
        found["residual"] = (found["residual"].float() + trend).to(dtype)
        if has_linear_bias:
            found["linear_bias"] = make(hidden_size, scale=3.0, dtype=dtype)
            found["ds"] = make(3, hidden_size, dtype=dtype)
        return found

    check(draw, p=p, seed=hidden_size)


@pytest.mark.parametrize("hidden_size", [16384, 16385])
def test_widest_row_and_beyond(hidden_size: int) -> None:
    check(lambda: tensors(2, hidden_size, weight=None, bias=None))  # beyond 16384 the reference runs


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(scale, dtype) for scale in (1e-3, 1e3) for dtype in DTYPES] + [(1e-25, torch.float32), (1e15, torch.float32)],
)
def test_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check(lambda: tensors(9, 200, dtype, residual=None, x=make(9, 200, dtype=dtype, scale=scale)), eps=1e-12)


@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_no_cancellation(mean: float) -> None:
    """Rows of deviation 1 far from zero: y is as exact as around zero, whatever the rounding of the mean."""
    inputs = tensors(9, 200, residual=None, x=make(9, 200, shift=mean))
    check(lambda: inputs, eps=1e-12)
    y = run(inputs | {"weight": None, "bias": None}, eps=1e-12)["y"]
    assert relative_error(y, F.layer_norm(inputs["x"].double(), (200,), eps=1e-12)) < 1e-6


@pytest.mark.parametrize("hidden_size", [129, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.0, 10000.3, -7654.3])
def test_constant_rows(value: float, hidden_size: int) -> None:
    """Variance 0: y is the bias. A mean wrong in its last digit, divided by √eps = 10⁻⁶, would give ±1."""
    x = torch.full((5, hidden_size), value, device=DEVICE)
    inputs = tensors(5, hidden_size, residual=None, x=x)
    found = run(inputs, eps=1e-12)
    torch.testing.assert_close(found["y"], inputs["bias"].expand(5, hidden_size), atol=5e-3, rtol=0)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("hidden_size", [129, 9001])
def test_finite_where_mean_times_rstd_is_not(hidden_size: int) -> None:
    """The columns between H and the tile's edge must not turn 0 · ∞ into a gradient."""
    x = torch.full((5, hidden_size), 2.0**70, device=DEVICE)
    found = run(tensors(5, hidden_size, residual=None, x=x), eps=2e-38)
    assert all(t.isfinite().all() for t in found.values())


@EVERY_DTYPE
def test_result_is_that_of_the_returned_sum(dtype: torch.dtype) -> None:
    """y is the LayerNorm of s as returned, to the last bit."""
    x, residual, weight, bias = make(9, 65, dtype=dtype), make(9, 65, dtype=dtype), make(65), make(65)
    with use_backend("triton"):
        y, s = dropout_add_layernorm(x, residual, weight, bias, p=0.1, return_sum=True)
        assert torch.equal(y, layernorm(s, weight, bias))


def test_sum_of_many_programs() -> None:
    """More rows of partial sums than the summing kernel reads at once, as on a GPU."""
    partials = [make(300, 20), None, make(300, 20)]
    totals = [torch.empty(20, device=DEVICE) for _ in partials]
    launch_sum_partials(list(zip(partials, totals, strict=True)))
    for partial, total in zip(partials, totals, strict=True):
        if partial is not None:
            torch.testing.assert_close(total, partial.double().sum(0).float())


def test_infinities_and_nan_stay_in_their_row() -> None:
    inputs = tensors(9, 129, residual=None)
    inputs["x"][2, 5], inputs["x"][4, 128] = float("nan"), float("inf")
    assert run(inputs)["y"].isnan().any(-1).nonzero().flatten().tolist() == [2, 4]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 150),
    hidden_size=st.integers(4, 300),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
    has_ds=st.booleans(),
)
def test_any_shape(rows: int, hidden_size: int, dtype: torch.dtype, p: float, seed: int, has_ds: bool) -> None:
    torch.manual_seed(seed)
    ds = make(rows, hidden_size, dtype=dtype) if has_ds else None
    check(lambda: tensors(rows, hidden_size, dtype, ds=ds), p=p, seed=seed)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    hidden_size=st.integers(2, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**63 - 1),
    has_weight=st.booleans(),
)
def test_rmsnorm_of_any_shape(rows: int, hidden_size: int, dtype: torch.dtype, seed: int, has_weight: bool) -> None:
    torch.manual_seed(seed)
    check(
        lambda: tensors(rows, hidden_size, dtype) | ({} if has_weight else {"weight": None}),
        rms=True,
        eps=stable_eps(hidden_size),
    )


@BACKENDS
@pytest.mark.parametrize(("rows", "hidden_size"), [(70, 7), (37, 65), (3, 768)])
def test_dropout_is_dropout_mask(rows: int, hidden_size: int, backend: str) -> None:
    """Forward and backward use the documented mask, element by element, on either path."""
    p, seed = 0.3, -(2**40) - 17
    ones, zeros = torch.ones(rows, hidden_size, device=DEVICE), torch.zeros(rows, hidden_size, device=DEVICE)
    inputs = {"x": ones, "residual": zeros, "weight": None, "bias": None, "dy": zeros, "ds": ones}
    found = run(inputs, p=p, seed=seed, backend=backend)
    kept = dropout_mask(p, seed, rows, hidden_size).to(DEVICE) / (1 - p)
    torch.testing.assert_close(found["s"], kept.float(), atol=0, rtol=1e-6)
    torch.testing.assert_close(found["dx"], kept.float(), atol=0, rtol=1e-6)
    assert torch.equal(found["dresidual"], ones)


@BACKENDS
def test_seeds(backend: str) -> None:
    x, residual = make(12, 64), make(12, 64)
    with use_backend(backend):
        check_seeds(lambda seed: dropout_add_layernorm(x, residual, None, None, p=0.5, seed=seed))


@VIEWS
def test_strides(view: Callable[[Tensor], Tensor]) -> None:
    inputs = {name: view(make(4, 6, 40)) for name in ("x", "residual", "dy", "ds")}
    assert not inputs["x"].is_contiguous()
    inputs |= {"weight": make(80)[::2], "bias": make(80)[::2]}
    strided = run(inputs, p=0.25, seed=5)
    for name, expected in run({k: v.contiguous() for k, v in inputs.items()}, p=0.25, seed=5).items():
        assert torch.equal(strided[name], expected), name
    assert strided["y"].is_contiguous()


def test_offsets_beyond_32_bits() -> None:
    """Three rows 2³⁰ elements apart, a stride of 32 bits (on a CPU the memory between them is never touched)."""
    stride, hidden_size = 2**30 + 16, 40
    torch.use_deterministic_algorithms(False)
    x = torch.empty(2 * stride + hidden_size, dtype=torch.bfloat16, device=DEVICE)
    x = x.as_strided((3, hidden_size), (stride, 1))
    x.copy_(make(3, hidden_size))
    with use_backend("triton"):
        assert torch.equal(layernorm(x, None, None), layernorm(x.contiguous(), None, None))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (4, 0), (64,)])
def test_no_rows_and_no_batch(shape: tuple[int, ...]) -> None:
    dy = make(*shape)
    inputs = {"x": make(*shape), "residual": make(*shape), "weight": make(shape[-1]), "bias": make(shape[-1]), "dy": dy}
    found = run(inputs, p=0.1, seed=1)
    assert found["y"].shape == found["dx"].shape == found["dresidual"].shape == shape
    assert torch.equal(found["dbias"], dy if dy.dim() == 1 else dy.sum(tuple(range(dy.dim() - 1))))
    assert found["dweight"].isfinite().all()


def test_deterministic() -> None:
    inputs = tensors(500, 40, ds=make(500, 40), linear_bias=make(40))
    first, second = (run(inputs, p=0.1, seed=9) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_only_wanted_gradients() -> None:
    inputs = tensors(9, 40, linear_bias=make(40))
    del inputs["dy"]
    subsets = [*((name,) for name in inputs), ("residual", "bias")]
    check_wanted_gradients(lambda **tensors: dropout_add_layernorm(**tensors, p=0.2, seed=1), inputs, subsets)


def test_shared_gradient_is_not_shared_memory() -> None:
    """Without dropout dx and dresidual are one tensor; accumulating into one leaf must leave the other alone."""
    x, residual = make(9, 40).requires_grad_(), make(9, 40).requires_grad_()
    with use_backend("triton"):
        dropout_add_layernorm(x, residual, None, None).backward(make(9, 40))
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_same_tensor_as_x_and_residual() -> None:
    x, dy = make(9, 40).requires_grad_(), make(9, 40)
    with use_backend("triton"):
        (ours,) = torch.autograd.grad(dropout_add_layernorm(x, x, None, None), x, dy)
    doubled = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.layer_norm(2 * doubled, (40,)), doubled, dy.double())
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_saved_for_the_backward(p: float) -> None:
    """s and 8 bytes a row; without a residual no s; for RMSNorm one number a row. README.md promises it."""
    rows, hidden_size = 10, 64
    inputs = {name: make(rows, hidden_size, dtype=torch.bfloat16).requires_grad_() for name in ("x", "residual")}
    inputs |= {name: make(hidden_size).requires_grad_() for name in ("weight", "bias")}
    seed_bytes = 8 if p else 0
    found = saved_bytes(lambda **tensors: dropout_add_layernorm(**tensors, p=p), inputs)
    assert found == rows * (2 * hidden_size + 8) + seed_bytes
    del inputs["residual"]
    assert saved_bytes(layernorm, inputs) == rows * 8
    del inputs["bias"]
    assert saved_bytes(rmsnorm, inputs) == rows * 4


def test_no_gradient_mode_keeps_nothing() -> None:
    """Without gradients s, mean and rstd are not even allocated."""
    results = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if op.namespace == "fusebert":
                results.append(result)
            return result

    x, residual = make(9, 40).requires_grad_(), make(9, 40)
    with use_backend("triton"), Recorder():
        dropout_add_layernorm(x.detach(), residual, None, None, p=0.1)
        with torch.no_grad():
            dropout_add_layernorm(x, residual, None, None, p=0.1)
    assert [[t.numel() for t in result] for result in results] == [[360, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("has_residual", "affine", "p", "keep"),
    [(True, True, 0.2, True), (True, True, 0.0, False), (False, False, 0.0, True)],
)
def test_opcheck(has_residual: bool, affine: bool, p: float, keep: bool) -> None:
    x = permuted(make(3, 4, 24, dtype=torch.float16))
    residual = make(3, 4, 24, dtype=torch.float16) if has_residual else None
    linear_bias, weight, bias = (make(24) if affine else None for _ in range(3))
    seed, centred = torch.tensor([5], device=DEVICE) if p else None, affine
    forward = torch.ops.fusebert.dropout_add_layernorm.default
    inputs = (x, linear_bias, residual, weight, bias, seed, p, 1e-5, centred)
    torch.library.opcheck(forward, (*inputs, keep))
    if keep:
        _, s, mean, rstd = forward(*inputs, True)
        saved = (s if has_residual else x, linear_bias, weight, bias, mean, rstd, seed)
        dy = permuted(torch.randn_like(x))
        backward = torch.ops.fusebert.dropout_add_layernorm_backward.default
        torch.library.opcheck(backward, (dy, None, *saved, p, centred, p > 0, affine, affine, affine))


@BACKENDS
@pytest.mark.parametrize("seed", [11, torch.tensor([11])], ids=["int", "tensor"])
def test_compiles_as_one_graph(seed: int | Tensor, backend: str) -> None:
    seed = seed.to(DEVICE) if isinstance(seed, Tensor) else seed
    norm = FusedLayerNorm(40, device=DEVICE)

    def model(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, s = dropout_add_layernorm(x, residual, weight, bias, p=0.25, seed=seed, return_sum=True)
        return norm(y) * s

    inputs = {"x": make(9, 40), "residual": make(9, 40), "weight": make(40), "bias": make(40)}
    with use_backend(backend):
        check_compiled(model, {k: v.requires_grad_() for k, v in inputs.items()})


@BACKENDS
@pytest.mark.parametrize("seed", [None, 4])
def test_activation_checkpointing(backend: str, seed: int | None) -> None:
    """The repeated forward drops what the first one dropped."""
    module = FusedDropoutAddLayerNorm(40, p=0.5, device=DEVICE)
    x, residual, dy = make(9, 40).requires_grad_(), make(9, 40), make(9, 40)

    def block(x: Tensor) -> Tensor:
        y = dropout_add_layernorm(x, residual, module.weight, module.bias, p=0.5, seed=seed)
        return module(y.tanh(), residual)

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(f(x), x, dy)[0]

    with use_backend(backend):
        assert torch.equal(gradient(block), gradient(lambda x: checkpoint(block, x, use_reentrant=False)))


@BACKENDS
def test_autocast_keeps_the_wider_dtype(backend: str) -> None:
    x, residual = make(9, 40, dtype=torch.bfloat16).requires_grad_(), make(9, 40).requires_grad_()
    module = FusedDropoutAddLayerNorm(40, device=DEVICE)
    with use_backend(backend):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = module(x, residual)
            assert y.dtype == torch.float32
            assert layernorm(residual, module.weight, module.bias).dtype == torch.float32
        y.sum().backward()
        assert residual.grad.dtype == torch.float32
        with pytest.raises(TypeError, match="residual"):
            module(x, residual)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_meta_and_fake_tensors(device: str, backend: str) -> None:
    with meta_or_fake(device, backend), use_backend(backend):
        x, residual = torch.empty(3, 4, 40, requires_grad=True), torch.empty(3, 4, 40)
        module = FusedDropoutAddLayerNorm(40)
        y, s = dropout_add_layernorm(x, residual, module.weight, module.bias, p=0.1, seed=3, return_sum=True)
        assert y.shape == s.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert module.weight.grad.shape == (40,)


def test_reference_is_layer_norm() -> None:
    x, residual, norm = make(9, 40), make(9, 40), nn.LayerNorm(40, eps=1e-3, device=DEVICE)
    with use_backend("reference"):
        assert torch.equal(layernorm(x, norm.weight, norm.bias, eps=1e-3), norm(x))
        assert torch.equal(dropout_add_layernorm(x, residual, norm.weight, norm.bias, eps=1e-3), norm(x + residual))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [(torch.float64, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_any_dtype_without_the_kernels(x_dtype: torch.dtype, weight_dtype: torch.dtype, backend: str) -> None:
    norm = FusedDropoutAddLayerNorm(40, device=DEVICE, dtype=weight_dtype)
    x = make(9, 40, dtype=x_dtype).requires_grad_()
    with use_backend(backend):
        y = norm(x, make(9, 40, dtype=x_dtype))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == x_dtype
    assert norm.weight.grad.dtype == weight_dtype


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.5}], ids=str)
def test_module_is_layer_norm(options: dict[str, Any]) -> None:
    """Same constructor, same state_dict both ways, same numbers; survives deepcopy."""
    theirs = nn.LayerNorm(40, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = FusedLayerNorm(40, **options)
    with_dropout = FusedDropoutAddLayerNorm(40, **options).eval()
    for module in (ours, with_dropout):
        module.load_state_dict(theirs.state_dict())
        nn.LayerNorm(40, **options).load_state_dict(module.state_dict())
    x, residual = torch.randn(9, 40), torch.randn(9, 40)
    expected, expected_sum = theirs(x), theirs(x + residual)
    ours, with_dropout = copy.deepcopy(ours).to(DEVICE), copy.deepcopy(with_dropout).to(DEVICE)
    with use_backend("triton"):
        torch.testing.assert_close(ours(x.to(DEVICE)).cpu(), expected)
        torch.testing.assert_close(with_dropout(x.to(DEVICE), residual.to(DEVICE)).cpu(), expected_sum)
    assert isinstance(ours, nn.LayerNorm)
    assert "p=0.1" in repr(with_dropout)


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_module_is_rms_norm(dtype: torch.dtype, options: dict[str, Any]) -> None:
    theirs, ours = (module(40, **options, device=DEVICE, dtype=dtype) for module in (nn.RMSNorm, FusedRMSNorm))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = make(9, 40, dtype=dtype, scale=1e-3)  # small enough for eps to matter
    with use_backend("triton"):
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


def test_modules_train_under_ddp(tmp_path: Path) -> None:
    """DDP's hooks see every gradient, and the values are the plain module's."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = FusedDropoutAddLayerNorm(40, p=0.0, device=DEVICE)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        x, residual, dy = make(9, 40), make(9, 40), make(9, 40)
        with use_backend("triton"):
            parallel(x, residual).backward(dy)
            module(x, residual).backward(dy)
        for ours, plain in zip(parallel.parameters(), module.parameters(), strict=True):
            assert torch.equal(ours.grad, plain.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_module_drops_in_training_mode_only() -> None:
    module = FusedDropoutAddLayerNorm(64, p=0.5, device=DEVICE)
    x, residual = make(9, 64), make(9, 64)
    with use_backend("triton"):
        assert not torch.equal(module(x, residual), module(x, residual))
        module.eval()
        assert torch.equal(module(x, residual), module(x, residual))


@BACKENDS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.tensor(1.0)), ValueError, "x must have"),
        (dict.fromkeys(("x", "residual"), torch.ones(4, 8, dtype=torch.int32)), TypeError, "x must be"),
        (dict(residual=torch.ones(4, 9)), ValueError, "residual must have x's shape"),
        (dict(residual=torch.ones(8)), ValueError, "residual must have x's shape"),
        (dict(residual=torch.ones(4, 8, dtype=torch.bfloat16)), TypeError, "residual must have x's dtype"),
        (dict(residual=torch.ones(4, 8, device="meta")), ValueError, "residual must be on x's device"),
        (dict(weight=torch.ones(4)), ValueError, "weight must have shape"),
        (dict(linear_bias=torch.ones(4)), ValueError, "linear_bias must have shape"),
        (dict(bias=torch.ones(8, 1)), ValueError, "bias must have shape"),
        (dict(weight=torch.ones(8, dtype=torch.float16)), TypeError, "weight must have x's dtype"),
        (dict(bias=torch.ones(8, device="meta")), ValueError, "bias must be on x's device"),
        (dict(eps=-1e-5), ValueError, "eps"),
        (dict(p=1.0), ValueError, "p, the dropout probability"),
        (dict(p=-0.1), ValueError, "p, the dropout probability"),
        (dict(p=float("nan")), ValueError, "p, the dropout probability"),
        (dict(p=0.5, seed=1.5), TypeError, "seed must be an int"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    changes = {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type != "meta" else v for k, v in changes.items()}
    arguments = {"x": make(4, 8), "residual": make(4, 8), "weight": make(8), "bias": make(8)}
    with use_backend(backend), pytest.raises(error, match=message):
        dropout_add_layernorm(**arguments | changes)


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="normalized_shape must be one axis"):
        FusedLayerNorm((4, 8))
    with pytest.raises(ValueError, match="last axis of the input must be 8"):
        FusedLayerNorm(8, elementwise_affine=False)(torch.ones(4, 9))
    with pytest.raises(ValueError, match="p, the dropout probability"):
        FusedDropoutAddLayerNorm(8, p=1.0)
