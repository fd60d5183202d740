"""Fused models under autocast, with a wrapped decoder, and in torch.jit.trace."""

import copy

import pytest
import torch
from hf_families import FAMILIES, batch, build, flat, randomised
from oracle import DEVICE, assert_as_good_as_torch
from torch import nn

from fusebert.kernels import use_backend
from fusebert.model import IGNORE, fuse

transformers = pytest.importorskip("transformers", minversion="5")

MLM = ("bert-mlm", "bert-pretraining", "roberta", "distilbert", "modernbert")


def _labelled(family):
    inputs = batch(family)
    ids = inputs["input_ids"]
    inputs["labels"] = ids.masked_fill((ids % 3 > 0) | (inputs["attention_mask"] == 0), IGNORE)
    if family == "bert-pretraining":
        inputs["next_sentence_label"] = torch.tensor([0, 1, 0], device=DEVICE)
    return inputs


def _step(model, inputs):
    loss = model(**inputs).loss
    model.zero_grad()
    loss.backward()
    return loss.detach().double(), flat({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MLM)
def test_the_masked_language_loss_under_autocast(family, dtype):
    model, inputs = build(family).train(), _labelled(family)
    oracle = _step(copy.deepcopy(model).double(), inputs)
    with torch.autocast(DEVICE, dtype=dtype):
        theirs = _step(copy.deepcopy(model), inputs)
        fuse(model, mlm_loss=True)
        ours = _step(model, inputs)
    assert (ours[0] - oracle[0]).abs() <= 2 * torch.finfo(dtype).eps * oracle[0]
    assert_as_good_as_torch(ours[1], oracle[1], theirs[1], "gradients")


class _Saved(nn.Module):
    """As PEFT's modules_to_save: a trained copy beside the original."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    @property
    def weight(self):
        return self.modules_to_save["default"].weight

    def forward(self, x):
        return self.modules_to_save["default"](x)


@pytest.mark.parametrize("first", ["fuse", "wrap"])
@pytest.mark.parametrize("family", MLM)
def test_a_wrapped_decoder_runs(family, first):
    model, inputs = build(family).train(), _labelled(family)
    plain = copy.deepcopy(model)
    path = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())

    def wrap(m):
        m.set_submodule(path, _Saved(m.get_submodule(path)))
        m.get_submodule(path).modules_to_save["default"].weight.data *= 2

    wrap(plain)
    if first == "wrap":
        wrap(model)
    report = fuse(model, mlm_loss=True)
    if first == "fuse":
        wrap(model)
    else:
        assert "its output embedding is of another kind (_Saved)" in str(report)
    for ours, theirs in zip(_step(model, inputs), _step(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_traced(family, unpad):
    model, inputs = build(family).eval(), batch(family)
    other = inputs if family == "vit" else batch(family, (9, 4, 7))
    if family == "modernbert":  # its own code makes constants of lengths
        other = inputs
    plain = copy.deepcopy(model)
    fuse(model, unpad=unpad)
    name = FAMILIES[family][2]
    with torch.no_grad():
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        for x in (inputs, other):
            keep = x["attention_mask"].bool() if "attention_mask" in x else slice(None)
            ours, theirs = (m(**x)[name] for m in (traced, plain))
            keep = keep if theirs.dim() == 3 else slice(None)
            torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:enable_nested")
@pytest.mark.parametrize("training", [False, True])
def test_pytorchs_encoder_traced(training):
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)
    model = randomised(nn.TransformerEncoder(layer, 2)).train(training)
    plain = copy.deepcopy(model)
    fuse(model)
    x, y = torch.randn(2, 5, 32, device=DEVICE), torch.randn(2, 5, 32, device=DEVICE)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(y), plain(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_float32_residual_of_bfloat16_layers(backend):
    """Under autocast linears give bfloat16, and the sum of a sub-layer and its float32 input is float32."""
    model = build("bert").eval()
    plain, layer = copy.deepcopy(model), "encoder.layer.0.output"
    fuse(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 48, generator=generator).bfloat16().to(DEVICE)
    residual = torch.randn(3, 5, 32, generator=generator).to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16), use_backend(backend):
        ours, theirs = (m.get_submodule(layer)(x, residual) for m in (model, plain))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
