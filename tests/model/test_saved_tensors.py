"""What autograd keeps for the backward of a layer: no byte more than the encoder's docstring derives."""

import pytest
import torch
from oracle import DEVICE

from fusebert.kernels import use_backend
from fusebert.model import BertConfig
from fusebert.model.encoder import BertLayer

T, H, INNER, HEADS = 48, 64, 256, 2


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_layer_keeps_the_minimum(p):
    config = BertConfig(
        vocab_size=61,
        hidden_size=H,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    )
    layer = BertLayer(config).to(DEVICE, torch.float16)
    x = torch.randn(T, H, device=DEVICE, dtype=torch.float16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 30, T], dtype=torch.int32, device=DEVICE)
    seeds = torch.arange(3, device=DEVICE).split(1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    not_a_tokens = parameters | {seeds[0].untyped_storage().data_ptr(), cu_seqlens.untyped_storage().data_ptr()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_a_tokens:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, cu_seqlens, 30, seeds)
        assert y.requires_grad
    per_token = (8 * H + 2 * INNER) * 2 + 8 * HEADS + 2 * 8
    assert sum(kept.values()) == T * per_token
