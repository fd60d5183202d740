"""Layers that keep their input alone: the same gradients, and the memory that they were to spare."""

import pytest
import torch
from oracle import DEVICE
from steps import random_batch, small_model

from fusebert.kernels import use_backend

H, INNER, LAYERS = 32, 64, 4


def run(backend: str, dtype: torch.dtype, keep: bool) -> tuple[list[torch.Tensor], int]:
    """The gradients of a batch with dropout, and the bytes that autograd holds when its backward begins."""
    model = small_model(dropout=0.3, layers=LAYERS).to(DEVICE).train()
    model.encoder.checkpoint_activations = not keep
    batch = random_batch(torch.Generator().manual_seed(1), [10, 5, 9], masked=6, pairs=2).to(DEVICE)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    with use_backend(backend):
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32),
        ):
            out = model(batch)
        (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_gradients_are_the_same_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    """Dropout included: by seed on the Triton path, by PyTorch's generator on the other."""
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly")
    if backend == "reference" and DEVICE == "cuda":
        pytest.skip("PyTorch's own operators are not all deterministic there")
    (plain, _), (again, _) = run(backend, dtype, keep=True), run(backend, dtype, keep=False)
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_layer_keeps_its_input_alone() -> None:
    """float32, T = 24: of the 8H + 2I elements and the statistics (`encoder`), all but H go, in every layer but the
    last, which has fewer rows to keep."""
    (_, plain), (_, again) = run("triton", torch.float32, keep=True), run("triton", torch.float32, keep=False)
    tokens, heads = 24, 2
    a_layer = tokens * 4 * (8 * H + 2 * INNER + 2 * heads + 2 * 2)
    spared = (LAYERS - 1) * (a_layer - tokens * 4 * H)
    assert spared < plain - again < spared * LAYERS / (LAYERS - 1)
