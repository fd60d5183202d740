"""The fp8 products against the same rounding with products in float64."""

import pytest
import torch
from oracle import DEVICE
from steps import random_batch, small_model
from torch import Tensor

from fusebert.model.fp8 import BACKWARD, FORWARD, fp8_linear, fp8_obstacle, quantize, use_fp8

# On a CPU PyTorch has a slow and exact fp8 product.
runs = pytest.mark.skipif(
    DEVICE == "cuda" and fp8_obstacle(torch.device(DEVICE)) is not None, reason="this GPU has no fp8"
)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to ``dtype`` at the tensor's scale, in float64: the expected result of `quantize`."""
    scale = x.abs().max().double() / torch.finfo(dtype).max
    return (x.double() / scale).float().to(dtype).double() * scale


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_the_largest_magnitude_is_the_formats(dtype: torch.dtype, size: float) -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * size
    q, scale = quantize(x, dtype)
    assert q.float().abs().max() == torch.finfo(dtype).max
    # Half a unit in the last place of a normal number: 3 or 2 mantissa bits.
    half = 2.0 ** -(4 if dtype == FORWARD else 3)
    normal = q.float().abs() >= torch.finfo(dtype).smallest_normal
    error = (q.double() * scale.double() - x.double()).abs() / x.double().abs()
    assert error[normal].max() <= half * (1 + 1e-6)


def test_zeros_stay_zeros() -> None:
    q, scale = quantize(torch.zeros(3, 5), FORWARD)
    assert torch.equal(q.float(), torch.zeros(3, 5))
    assert torch.isfinite(1 / scale)


@runs
@pytest.mark.parametrize("rows", [32, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_three_products(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, w, b, dy = (
        (torch.randn(*shape, generator=generator) * size).to(DEVICE, dtype).requires_grad_()
        for shape, size in (((rows, 64), 3.0), ((48, 64), 0.02), ((48,), 0.5), ((rows, 48), 1e-3))
    )
    y = fp8_linear(x, w, b)
    y.backward(dy)
    xq, wq, gq = rounded(x.detach(), FORWARD), rounded(w.detach(), FORWARD), rounded(dy.detach(), BACKWARD)
    expected = {
        "y": (y.detach(), xq @ wq.t() + b.detach().double()),
        "dx": (x.grad, gq @ wq),
        "dw": (w.grad, gq.t() @ xq),
        "db": (b.grad, dy.detach().double().sum(0)),
    }
    for name, (found, right) in expected.items():
        assert found is not None
        assert found.dtype == dtype
        # The rest is the rounding of the result to the activations' dtype, twice with a bias.
        error = (found.double() - right).norm() / right.norm()
        assert error <= torch.finfo(dtype).eps, (name, float(error))


@runs
def test_a_model_in_fp8_is_close_to_bf16() -> None:
    """The layers compute in fp8, also on the rows that the last one reads; the losses stay close."""
    batch = random_batch(torch.Generator().manual_seed(0), [9, 4, 10], masked=7, pairs=2, max_seqlen=10).to(DEVICE)
    norms, losses = {}, {}
    for name in ("bf16", "fp8"):
        model = small_model().to(DEVICE)
        if name == "fp8":
            use_fp8(model)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = model(batch)
        (out.mlm_loss_sum + out.nsp_loss_sum).backward()
        losses[name] = float(out.mlm_loss_sum.detach())
        norms[name] = {n: p.grad.norm() for n, p in model.named_parameters()}
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
    for name, norm in norms["fp8"].items():
        assert 0.5 < norm / norms["bf16"][name] < 2.0, name


def test_unsupported_sizes_and_devices() -> None:
    x = torch.randn(16, 24, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"in_features must be a multiple of 16 for fp8; got 24"):
        fp8_linear(x, torch.randn(32, 24, dtype=torch.bfloat16))
    obstacle = fp8_obstacle(torch.device("cpu"))
    assert obstacle is not None
    assert "H100" in obstacle
