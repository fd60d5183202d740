"""On a CPU, where no kernel runs, fused modules run the code that they had, to the bit."""

import copy

import pytest
import torch
from hf_families import batch, build
from oracle import DEVICE
from torch import nn

from fusebert.kernels import reference, use_backend
from fusebert.model import fuse

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernels run")


@pytest.mark.parametrize("autocast", [False, True])
def test_transformers(as_on_this_device, autocast):
    plain = build("bert").train()
    fused = copy.deepcopy(plain)
    fuse(fused)
    inputs = {name: x for name, x in batch("bert").items() if name != "attention_mask"}
    results = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(0)
            hidden = model(**inputs).last_hidden_state
        hidden.float().square().sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_pytorch(as_on_this_device, training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).train(training)
    fused = copy.deepcopy(plain)
    fuse(fused)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    results = []
    for model in (plain, fused):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(model(x, src_key_padding_mask=padding))
    assert torch.equal(*results)


def test_the_kernels_run_where_they_are_chosen(as_on_this_device):
    norm = nn.Sequential(nn.LayerNorm(8))
    fuse(norm)
    norm[0].eps = -1e-3  # an error for the kernels, and none for PyTorch
    x = torch.randn(2, 8)
    norm(x)
    with use_backend("triton"), pytest.raises(ValueError, match="eps"):
        norm(x)


def test_post_norms_drop_in_training(as_on_this_device):
    """LayerNorm(residual + dropout(dense(x))): half the elements are dropped, in training only."""
    model = build("bert").train()
    fuse(model)
    output = model.encoder.layer[0].output
    output.dropout.p = 0.5
    x, residual = torch.randn(64, 48), torch.zeros(64, 32)
    output.LayerNorm.register_forward_hook(lambda module, args, out: seen.append(args[0]))  # runs the original
    seen: list[torch.Tensor] = []
    output(x, residual)
    output.LayerNorm._forward_hooks.clear()
    dense = output.dense(x)
    torch.manual_seed(0)
    found = output(x, residual)
    torch.manual_seed(0)
    dropped = reference.dropout(dense, 0.5)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert torch.equal(found, output.LayerNorm(dropped + residual))
    model.eval()
    assert torch.equal(output(x, residual), output.LayerNorm(dense + residual))
