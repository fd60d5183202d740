"""Memory between forward and backward: a layer saves what the encoder's docstring derives, or its input only."""

import contextlib

import pytest
import torch
from oracle import DEVICE
from steps import random_batch, small_model
from torch import Tensor, nn

from fusebert.kernels import use_backend
from fusebert.model import BertConfig
from fusebert.model.encoder import BertLayer


@contextlib.contextmanager
def saved_bytes(module: nn.Module, *others: Tensor):
    """Yields {address: bytes} of the storages that autograd saves, without those of parameters and ``others``."""
    excluded = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *others)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_layer_saves_the_minimum(p):
    tokens, hidden, inner, heads = 48, 64, 256, 2
    config = BertConfig(61, hidden, 1, heads, inner, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    layer = BertLayer(config).to(DEVICE, torch.float16)
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.float16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 30, tokens], dtype=torch.int32, device=DEVICE)
    seeds = torch.arange(3, device=DEVICE).split(1)
    with use_backend("triton"), saved_bytes(layer, seeds[0], cu_seqlens) as saved:
        y = layer(x, cu_seqlens, 30, seeds)
        assert y.requires_grad
    assert sum(saved.values()) == tokens * ((8 * hidden + 2 * inner) * 2 + 8 * heads + 2 * 8)


HIDDEN, INNER, HEADS, LAYERS = 32, 64, 2, 4  # of small_model


def gradients_and_bytes(backend: str, dtype: torch.dtype, checkpoint: bool) -> tuple[list[Tensor], int]:
    """The gradients of a batch with dropout, and the bytes that autograd holds before the backward."""
    model = small_model(dropout=0.3, layers=LAYERS).to(DEVICE).train()
    model.encoder.checkpoint_activations = checkpoint
    batch = random_batch(torch.Generator().manual_seed(1), [10, 5, 9], masked=6, pairs=2).to(DEVICE)
    torch.manual_seed(5)
    with use_backend(backend):
        with saved_bytes(model) as saved, torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = model(batch)
        (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(saved.values())


# Triton's interpreter multiplies bf16 wrongly, and on a GPU not all of the reference's operators are deterministic.
ON_CPU = [("reference", torch.float32), ("reference", torch.bfloat16), ("triton", torch.float32)]
ON_GPU = [("triton", torch.float32), ("triton", torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), ON_GPU if DEVICE == "cuda" else ON_CPU)
def test_checkpointed_gradients_are_bitwise_the_same(backend, dtype):
    """With dropout: from seeds on the Triton path, from PyTorch's generator on the other."""
    (plain, _), (again, _) = (gradients_and_bytes(backend, dtype, checkpoint) for checkpoint in (False, True))
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_checkpointed_layer_saves_its_input_only():
    """In float32, all layers but the last, which has fewer rows, save H elements a token instead of 8H + 2I + ...."""
    (_, plain), (_, again) = (gradients_and_bytes("triton", torch.float32, checkpoint) for checkpoint in (False, True))
    tokens = 24
    a_layer = tokens * 4 * (8 * HIDDEN + 2 * INNER + 2 * HEADS + 2 * 2)
    spared = (LAYERS - 1) * (a_layer - tokens * 4 * HIDDEN)
    assert spared < plain - again < spared * LAYERS / (LAYERS - 1)
