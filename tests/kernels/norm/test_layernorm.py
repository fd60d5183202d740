"""LayerNorm and dropout + add + LayerNorm against float64: interpreter or GPU, the same body."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import round_bfloat16
from oracle import DEVICE, DTYPES, assert_as_good_as_torch, relative_error
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

ON_GPU = DEVICE == "cuda"
# Odd widths; rows that leave a ragged last tile; (600, 7) and (19, 768) make a program of the backward loop.
SHAPES = [(9, 2), (8, 3), (600, 7), (33, 63), (67, 64), (35, 65), (9, 129), (19, 768), (3, 1000), (2, 1024)]
if ON_GPU:
    SHAPES += [(50000, 64), (5000, 768), (4099, 1024), (2001, 4096), (300, 16384)]
NAMES = ("y", "s", "dx", "dresidual", "dweight", "dbias")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, so that an element no kernel wrote is noticed."""
    if not ON_GPU:
        round_bfloat16(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale + shift).to(dtype)


def run(
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor | None,
    ds: Tensor | None = None,
    linear_bias: Tensor | None = None,
    *,
    backend: str = "triton",
    rms: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs and the gradient of every input."""
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias, "linear_bias": linear_bias}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}
    with use_backend(backend):
        if rms:
            outputs: tuple[Tensor, ...] = (rmsnorm(leaves["x"], leaves.get("weight"), **options),)
        elif residual is None:
            outputs = (layernorm(leaves["x"], leaves.get("weight"), leaves.get("bias"), **options),)
        else:
            result = dropout_add_layernorm(
                leaves["x"],
                leaves["residual"],
                leaves.get("weight"),
                leaves.get("bias"),
                linear_bias=leaves.get("linear_bias"),
                return_sum=ds is not None,
                **options,
            )
            outputs = result if isinstance(result, tuple) else (result,)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), (dy, ds)[: len(outputs)])
    found = dict(zip(("y", "s"), outputs, strict=False))
    return found | {"d" + k: g for k, g in zip(leaves, gradients, strict=True)}


def check(draw: Callable[[], tuple[Tensor | None, ...]], sum_gradient: bool = False, **options: Any) -> None:
    """Triton against the float64 oracle, with PyTorch's own error at this dtype as the measure.

    ``draw`` makes x, residual, weight, bias and, where there is one, linear_bias. Narrow ones are drawn several times
    and judged together: the error of two or three numbers is chance.
    """
    results: dict[str, list[dict[str, Tensor]]] = {"ours": [], "oracle": [], "torch": []}
    draws = 1
    while len(results["ours"]) < draws:
        x, residual, weight, bias, *linear_bias = draw()
        assert x is not None
        draws = max(1, 64 // x.shape[-1])
        dy = torch.randn(x.shape, device=DEVICE).to(x.dtype)
        ds = torch.randn(x.shape, device=DEVICE).to(x.dtype) if sum_gradient else None
        inputs = [x, residual, weight, bias, dy, ds, *linear_bias]
        results["ours"].append(run(*inputs, **options))
        results["torch"].append(run(*inputs, backend="reference", **options))
        doubles = [None if t is None else t.double() for t in inputs]
        results["oracle"].append(run(*doubles, backend="reference", **options))
    assert results["ours"][0].keys() == results["oracle"][0].keys()
    for name in results["oracle"][0]:
        ours, oracle, torchs = (
            torch.stack([result[name] for result in results[k]]) for k in ("ours", "oracle", "torch")
        )
        assert_as_good_as_torch(ours, oracle, torchs, name)


def stable_eps(hidden_size: int) -> float:
    """Of two or three elements x̂ hardly depends on x, and the gradient is rounding, unless eps is large."""
    return 0.1 if hidden_size < 4 else 1e-5


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden_size"), SHAPES)
def test_layernorm(rows: int, hidden_size: int, dtype: torch.dtype) -> None:

    def draw() -> tuple[Tensor | None, ...]:
        return (
            make(rows, hidden_size, dtype=dtype),
            None,
            make(hidden_size, dtype=dtype),
            make(hidden_size, dtype=dtype),
        )

    check(draw, eps=stable_eps(hidden_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden_size"), SHAPES)
def test_dropout_add_layernorm(rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Half precision activations meet float32 parameters, as in training."""

    def draw() -> tuple[Tensor | None, ...]:
        x, residual = make(rows, hidden_size, dtype=dtype), make(rows, hidden_size, dtype=dtype)
        return x, residual, make(hidden_size), make(hidden_size)

    check(draw, eps=stable_eps(hidden_size), p=0.3, seed=rows, sum_gradient=True)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("has_weight", "has_bias"), [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(has_weight: bool, has_bias: bool, p: float) -> None:
    weight, bias = make(65) if has_weight else None, make(65) if has_bias else None
    check(lambda: (make(20, 65), make(20, 65), weight, bias), p=p, seed=3)
    check(lambda: (make(20, 65), None, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "hidden_size"), [(600, 7), (33, 63), (19, 768), (3, 1000)])
def test_linear_bias(rows: int, hidden_size: int, p: float, dtype: torch.dtype) -> None:
    """The bias of the linear before: its value in y and in the mask's scaling, and the sum that is its gradient."""

    def draw() -> tuple[Tensor | None, ...]:
        x, residual = make(rows, hidden_size, dtype=dtype), make(rows, hidden_size, dtype=dtype)
        # A bias of another size than the rest: in the wrong place (after the dropout, say) it would show.
        return x, residual, make(hidden_size), make(hidden_size), make(hidden_size, scale=3.0, dtype=dtype)

    check(draw, p=p, seed=rows, sum_gradient=p > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 2, 65, 768])
def test_rmsnorm(hidden_size: int, dtype: torch.dtype) -> None:
    check(lambda: (make(40, hidden_size, dtype=dtype, shift=2.0), None, make(hidden_size), None), rms=True, eps=1e-3)


def test_rmsnorm_without_weight_keeps_one_number_a_row() -> None:
    check(lambda: (make(20, 65), None, None, None), rms=True)
    x = make(20, 65).requires_grad_()
    with use_backend("triton"), Recorder() as recorder:
        rmsnorm(x, None)
    (_, s, mean, rstd), *_ = recorder.results
    assert (s.numel(), mean.numel(), rstd.numel()) == (0, 0, 20)


def test_no_dropout_sum_returned() -> None:
    check(lambda: (make(21, 48), make(21, 48), make(48), make(48)), sum_gradient=True)


def test_one_column() -> None:
    """A single element equals its mean: y is the bias, and nothing reaches x."""
    x, residual, weight, bias, dy = make(70, 1), make(70, 1), make(1), make(1), make(70, 1)
    found = run(x, residual, weight, bias, dy, p=0.2, seed=1)
    assert torch.equal(found["y"], bias.expand(70, 1))
    for name in ("dx", "dresidual", "dweight"):
        assert not found[name].any(), name
    torch.testing.assert_close(found["dbias"], dy.double().sum(0).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "p", "has_linear_bias"),
    [(4104, 0.3, True), (9001, 0.0, False), (16384, 0.3, False)],
)
def test_rows_shared_by_programs(hidden_size: int, p: float, has_linear_bias: bool, dtype: torch.dtype) -> None:
    """In blocks of columns, of which the last may hold a few; several rows a program, and no sum without all blocks."""

    def draw() -> tuple[Tensor | None, ...]:
        x, residual = make(3, hidden_size, dtype=dtype), make(3, hidden_size, dtype=dtype)
        # Values and weights that differ from block to block: a mean over the wrong ones would show.
        trend = torch.linspace(-1, 2, hidden_size, device=DEVICE)
        weight = make(hidden_size) + trend
        linear_bias = make(hidden_size, scale=3.0, dtype=dtype) if has_linear_bias else None
        return x, (residual.float() + trend).to(dtype), weight, make(hidden_size), linear_bias

    check(draw, p=p, seed=hidden_size, sum_gradient=has_linear_bias)


def test_widest_row_and_beyond() -> None:
    check(lambda: (make(2, 16384), make(2, 16384), None, None))
    check(lambda: (make(2, 16385), make(2, 16385), None, None))  # runs the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check(lambda: (make(9, 200, dtype=dtype, scale=scale), None, make(200), make(200)), eps=1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_extreme_magnitudes(scale: float) -> None:
    check(lambda: (make(9, 200, scale=scale), None, make(200), make(200)), eps=1e-12)


@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_no_cancellation(mean: float) -> None:
    """Rows of deviation 1 far from zero: y as exact as around zero, whatever the rounding of the mean."""
    x = make(9, 200, shift=mean)
    check(lambda: (x, None, make(200), make(200)), eps=1e-12)
    y = run(x, None, None, None, torch.ones_like(x), eps=1e-12)["y"]
    assert relative_error(y, F.layer_norm(x.double(), (200,), eps=1e-12)) < 1e-6


@pytest.mark.parametrize("hidden_size", [129, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.0, 10000.3, -7654.3])
def test_constant_rows(value: float, hidden_size: int) -> None:
    """Variance 0: y is the bias. A mean wrong in its last digit, over √eps = 10⁻⁶, would be ±1."""
    x, weight, bias = torch.full((5, hidden_size), value, device=DEVICE), make(hidden_size), make(hidden_size)
    found = run(x, None, weight, bias, make(5, hidden_size), eps=1e-12)
    torch.testing.assert_close(found["y"], bias.expand(5, hidden_size), atol=5e-3, rtol=0)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("hidden_size", [129, 9001])
def test_finite_where_mean_times_rstd_is_not(hidden_size: int) -> None:
    """The columns between H and the tile's edge must not turn 0 · ∞ into a gradient."""
    x = torch.full((5, hidden_size), 2.0**70, device=DEVICE)
    found = run(x, None, make(hidden_size), make(hidden_size), make(5, hidden_size), eps=2e-38)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_is_that_of_the_returned_sum(dtype: torch.dtype) -> None:
    """y is the LayerNorm of s as returned, to the last bit: a pre-LN model may normalise s again."""
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
    x = make(9, 129)
    x[2, 5], x[4, 128] = float("nan"), float("inf")
    y = run(x, None, make(129), make(129), make(9, 129))["y"]
    assert y.isnan().any(-1).nonzero().flatten().tolist() == [2, 4]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 150),
    hidden_size=st.integers(4, 300),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
    sum_gradient=st.booleans(),
)
def test_any_shape(rows: int, hidden_size: int, dtype: torch.dtype, p: float, seed: int, sum_gradient: bool) -> None:
    torch.manual_seed(seed)

    def draw() -> tuple[Tensor | None, ...]:
        x, residual = make(rows, hidden_size, dtype=dtype), make(rows, hidden_size, dtype=dtype)
        return x, residual, make(hidden_size), make(hidden_size)

    check(draw, sum_gradient, p=p, seed=seed)


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("rows", "hidden_size"), [(70, 7), (37, 65), (3, 768)])
def test_dropout_is_dropout_mask(rows: int, hidden_size: int, backend: str) -> None:
    """Forward and backward draw the documented mask, element by element, on either path."""
    p, seed = 0.3, -(2**40) - 17
    ones, zeros = torch.ones(rows, hidden_size, device=DEVICE), torch.zeros(rows, hidden_size, device=DEVICE)
    found = run(ones, zeros, None, None, zeros, ones, p=p, seed=seed, backend=backend)
    kept = dropout_mask(p, seed, rows, hidden_size).to(DEVICE) / (1 - p)
    torch.testing.assert_close(found["s"], kept.float(), atol=0, rtol=1e-6)
    torch.testing.assert_close(found["dx"], kept.float(), atol=0, rtol=1e-6)
    assert torch.equal(found["dresidual"], ones)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_seeds(backend: str) -> None:
    x, residual = make(12, 64), make(12, 64)

    def y(seed: int | Tensor | None) -> Tensor:
        with use_backend(backend):
            return dropout_add_layernorm(x, residual, None, None, p=0.5, seed=seed)

    assert torch.equal(y(7), y(torch.tensor([7], device=DEVICE)))
    assert not torch.equal(y(7), y(8))
    torch.manual_seed(0)
    first, second = y(None), y(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(y(None), first)


# -------------------------------------------------------------------------------------------------------------- strides


def permuted(x: Tensor) -> Tensor:
    """The same values, first axis innermost in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: F.pad(x, (3, 5))[..., 3:-5],  # rows apart
        lambda x: x.repeat_interleave(2, -1)[..., ::2],  # columns apart
        permuted,
        lambda x: x[:, :1].expand_as(x),  # repeated rows
    ],
    ids=["rows apart", "columns apart", "permuted", "expanded"],
)
def test_strides(view: Callable[[Tensor], Tensor]) -> None:
    x, residual, dy, ds = (view(make(4, 6, 40)) for _ in range(4))
    assert not x.is_contiguous()
    weight, bias = make(80)[::2], make(80)[::2]
    strided = run(x, residual, weight, bias, dy, ds, p=0.25, seed=5)
    plain = (t.contiguous() for t in (x, residual, weight, bias, dy, ds))
    for name, expected in run(*plain, p=0.25, seed=5).items():
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
    weight, bias, dy = make(shape[-1]), make(shape[-1]), make(*shape)
    found = run(make(*shape), make(*shape), weight, bias, dy, p=0.1, seed=1)
    assert found["y"].shape == found["dx"].shape == found["dresidual"].shape == shape
    assert torch.equal(found["dbias"], dy if dy.dim() == 1 else dy.sum(tuple(range(dy.dim() - 1))))
    assert found["dweight"].isfinite().all()


# ---------------------------------------------------------------------------------------------------- as PyTorch's own


def test_deterministic() -> None:
    inputs = [make(500, 40) for _ in range(2)] + [make(40), make(40)] + [make(500, 40) for _ in range(2)]
    first, second = (run(*inputs, p=0.1, seed=9) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_only_wanted_gradients() -> None:
    """Any subset of the inputs may need a gradient, and the values do not depend on which do."""
    tensors = {"x": make(9, 40), "residual": make(9, 40), "weight": make(40), "bias": make(40), "linear_bias": make(40)}
    x, residual, weight, bias, linear_bias = tensors.values()
    dy = make(9, 40)
    everything = run(x, residual, weight, bias, dy, None, linear_bias, p=0.2, seed=1)
    for wanted in (("x",), ("residual",), ("weight",), ("bias",), ("linear_bias",), ("residual", "bias")):
        tensors = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in tensors.items()}
        with use_backend("triton"):
            dropout_add_layernorm(**tensors, p=0.2, seed=1).backward(dy)
        for name, tensor in tensors.items():
            if name in wanted:
                assert torch.equal(tensor.grad, everything["d" + name]), name
            else:
                assert tensor.grad is None


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
def test_bytes_kept_for_the_backward(p: float) -> None:
    """s and 8 bytes a row (and, without a residual, not even a new s): what the module's docstring promises."""
    rows, hidden_size = 10, 64
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    x, residual = (make(rows, hidden_size, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight, bias = make(hidden_size).requires_grad_(), make(hidden_size).requires_grad_()
    ours = [t.data_ptr() for t in (x, residual, weight, bias)]
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        a = dropout_add_layernorm(x, residual, weight, bias, p=p)
        assert sum(n for at, n in kept.items() if at not in ours) == rows * (2 * hidden_size + 8) + (8 if p else 0)
        kept.clear()
        b = layernorm(x, weight, bias)
        assert sum(n for at, n in kept.items() if at not in ours) == rows * 8
    del a, b
    gc.collect()


class Recorder(TorchDispatchMode):
    """The results of every fusebert operator called within."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.namespace == "fusebert":
            self.results.append(result)
        return result


def test_no_gradient_mode_keeps_nothing() -> None:
    """Without gradients s, mean and rstd are not even allocated."""
    x, residual = make(9, 40).requires_grad_(), make(9, 40)
    with use_backend("triton"), Recorder() as recorder:
        dropout_add_layernorm(x.detach(), residual, None, None, p=0.1)
        with torch.no_grad():
            dropout_add_layernorm(x, residual, None, None, p=0.1)
    for y, s, mean, rstd in recorder.results:
        assert y.shape == (9, 40)
        assert s.numel() == mean.numel() == rstd.numel() == 0
    assert len(recorder.results) == 2


def test_second_derivative_is_refused() -> None:
    x, residual = make(9, 40).requires_grad_(), make(9, 40).requires_grad_()
    with use_backend("triton"):
        y = dropout_add_layernorm(x, residual, None, None)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()


FORWARD_SAMPLES = [
    dict(residual=True, affine=True, p=0.2, keep=True),
    dict(residual=True, affine=True, p=0.0, keep=False),
    dict(residual=False, affine=False, p=0.0, keep=True),
]


@pytest.mark.parametrize("sample", FORWARD_SAMPLES, ids=str)
def test_opcheck(sample: dict[str, Any]) -> None:
    x = permuted(make(3, 4, 24, dtype=torch.float16))
    residual = make(3, 4, 24, dtype=torch.float16) if sample["residual"] else None
    weight, bias = (make(24), make(24)) if sample["affine"] else (None, None)
    seed = torch.tensor([5], device=DEVICE) if sample["p"] else None
    forward = torch.ops.fusebert.dropout_add_layernorm.default
    linear_bias, centred = weight, sample["affine"]
    inputs = (x, linear_bias, residual, weight, bias, seed, sample["p"], 1e-5, centred)
    torch.library.opcheck(forward, (*inputs, sample["keep"]))
    if sample["keep"]:
        _, s, mean, rstd = forward(*inputs, True)
        s = s if sample["residual"] else x
        dropped, affine = sample["p"] > 0, sample["affine"]
        torch.library.opcheck(
            torch.ops.fusebert.dropout_add_layernorm_backward.default,
            (
                permuted(torch.randn_like(x)),
                None,
                s,
                linear_bias,
                weight,
                bias,
                mean,
                rstd,
                seed,
                sample["p"],
                centred,
                dropped,
                affine,
                affine,
                affine,
            ),
        )


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("seed", [11, torch.tensor([11])], ids=["int", "tensor"])
def test_compiles_as_one_graph(seed: int | Tensor, backend: str) -> None:
    seed = seed.to(DEVICE) if isinstance(seed, Tensor) else seed
    norm = FusedLayerNorm(40, device=DEVICE)

    def model(x: Tensor, residual: Tensor) -> Tensor:
        y, s = dropout_add_layernorm(x, residual, norm.weight, norm.bias, p=0.25, seed=seed, return_sum=True)
        return norm(y) * s

    x, residual = make(9, 40).requires_grad_(), make(9, 40).requires_grad_()
    inputs = [x, residual, norm.weight, norm.bias]
    with use_backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, actual = model(x, residual), compiled(x, residual)
        torch.testing.assert_close(actual, expected)
        gradients = zip(
            torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
        )
        for a, e in gradients:
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_activation_checkpointing(backend: str, seed: int | None) -> None:
    """The forward that is run again drops what the first one dropped."""
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


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_keeps_the_dtype_of_x(backend: str) -> None:
    x, residual = make(9, 40, dtype=torch.bfloat16).requires_grad_(), make(9, 40).requires_grad_()
    module = FusedDropoutAddLayerNorm(40, device=DEVICE)
    with use_backend(backend):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = module(x, residual)
            assert y.dtype == torch.bfloat16
            assert layernorm(residual, module.weight, module.bias).dtype == torch.float32
        y.sum().backward()
        assert residual.grad.dtype == torch.float32
        with pytest.raises(TypeError, match="residual"):
            module(x, residual)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_meta_and_fake_tensors(device: str, backend: str) -> None:
    mode = torch._subclasses.FakeTensorMode()
    with mode if device == "fake" else torch.device("meta"), use_backend(backend):
        if device == "meta" and ON_GPU and backend == "triton":
            pytest.skip("a meta tensor has no CUDA kernel to stand for")
        x, residual = torch.empty(3, 4, 40, requires_grad=True), torch.empty(3, 4, 40)
        module = FusedDropoutAddLayerNorm(40)
        y, s = dropout_add_layernorm(x, residual, module.weight, module.bias, p=0.1, seed=3, return_sum=True)
        assert y.shape == s.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert module.weight.grad.shape == (40,)


# -------------------------------------------------------------------------------------------------------------- modules


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
def test_any_dtype_off_the_kernels(x_dtype: torch.dtype, weight_dtype: torch.dtype, backend: str) -> None:
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
    x = make(9, 40, dtype=dtype, scale=1e-3)  # where eps matters
    with use_backend("triton"):
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


def test_modules_train_under_ddp(tmp_path: Path) -> None:
    """Alone in its group: the hooks of DDP see every gradient, and the values are the plain module's."""
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


def test_module_drops_while_training_only() -> None:
    module = FusedDropoutAddLayerNorm(64, p=0.5, device=DEVICE)
    x, residual = make(9, 64), make(9, 64)
    with use_backend("triton"):
        assert not torch.equal(module(x, residual), module(x, residual))
        module.eval()
        assert torch.equal(module(x, residual), module(x, residual))


# --------------------------------------------------------------------------------------------------------------- errors


def call(**changes: Any) -> Tensor:
    return dropout_add_layernorm(**dict(x=make(4, 8), residual=make(4, 8), weight=make(8), bias=make(8)) | changes)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.tensor(1.0)), ValueError, "x must have"),
        (
            dict(x=torch.ones(4, 8, dtype=torch.int32), residual=torch.ones(4, 8, dtype=torch.int32)),
            TypeError,
            "x must be",
        ),
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
        (dict(p=0.5, seed=2**64), ValueError, "seed must fit"),
        (dict(p=0.5, seed=torch.tensor([1.0])), TypeError, "seed must be an int64"),
        (dict(p=0.5, seed=torch.tensor([1, 2])), ValueError, "seed must be one element"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    changes = {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type != "meta" else v for k, v in changes.items()}
    with use_backend(backend), pytest.raises(error, match=message):
        call(**changes)


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="normalized_shape must be one axis"):
        FusedLayerNorm((4, 8))
    with pytest.raises(ValueError, match="last axis of the input must be 8"):
        FusedLayerNorm(8, elementwise_affine=False)(torch.ones(4, 9))
    with pytest.raises(ValueError, match="p, the dropout probability"):
        FusedDropoutAddLayerNorm(8, p=1.0)
