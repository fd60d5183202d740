"""Transformers 4.56 and 4.57: BERT and RoBERTa through their attention classes, ViT through the interface."""

import copy

import pytest
import torch
from hf_families import DISTIL, FAMILIES, NO_DROPOUT, SIZES, TEXT, VIT, batch, flat, output_and_gradients, randomised
from hf_families import build as build_family
from oracle import DEVICE, assert_as_good_as_torch

from fusebert.kernels import use_backend
from fusebert.model import IGNORE, fuse, register_attention, unfuse

transformers = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) > 4:
    pytest.skip("needs transformers 4.56 or 4.57", allow_module_level=True)

BERT = {**TEXT, **NO_DROPOUT, "pad_token_id": 0}
CLASSES = ["BertModel", "BertForSequenceClassification", "RobertaForMaskedLM", "XLMRobertaModel", "CamembertModel"]


def build(name, **fields):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return randomised(cls(cls.config_class(**{**BERT, **fields})))


def run(model, **other):
    inputs = batch("bert") | other
    mask = inputs["attention_mask"]
    out = model(**inputs)[0]
    if out.shape[:2] == (3, 17) and mask is not None and mask.dim() == 2:
        out = out[mask.bool()]
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
    return out.detach(), flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parity(name, backend):
    model = build(name).train()
    theirs, oracle = run(model), run(copy.deepcopy(model).double())
    report = fuse(model)
    assert sum("SdpaSelfAttention" in entry.kind for entry in report.replaced) == 2
    assert not report.left
    calls = []
    with use_backend(backend):
        hook = model.base_model.encoder.layer[0].attention.self.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["attention_mask"]), with_kwargs=True
        )
        ours = run(model)
        hook.remove()
    assert [(mask.shape, mask.dtype) for mask in calls] == [((3, 17), torch.bool)]
    assert_as_good_as_torch(ours[0], oracle[0], theirs[0])
    assert_as_good_as_torch(ours[1], oracle[1], theirs[1], "gradients")
    again = fuse(model)
    assert not again.replaced
    assert torch.equal(run(copy.deepcopy(model))[0], run(model)[0])
    unfuse(model)
    assert torch.equal(run(model)[0], theirs[0])


@pytest.mark.parametrize("other", ["none", "3-D", "head_mask", "output_attentions"])
def test_what_the_kernel_does_not_take_is_transformers(other):
    model = build("BertModel")
    plain = copy.deepcopy(model)
    fuse(model)
    allowed = (torch.rand(3, 17, 17, generator=torch.Generator().manual_seed(2)) < 0.7).long()
    allowed |= torch.eye(17, dtype=torch.long)
    call = {
        "none": {"attention_mask": None},
        "3-D": {"attention_mask": allowed.to(DEVICE)},
        "head_mask": {"head_mask": torch.tensor([1.0, 0.0], device=DEVICE)},
        "output_attentions": {"output_attentions": True},
    }[other]
    for x, y in zip(run(model, **call), run(plain, **call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    if other == "output_attentions":
        ours, theirs = (m(**batch("bert"), output_attentions=True).attentions for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_dropout():
    model = build("BertModel", attention_probs_dropout_prob=0.2).train()
    fuse(model)
    without, gradients = run(model.eval())[1], []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        gradients.append(run(model)[1])
    assert torch.equal(*gradients)
    assert (gradients[0] - without).norm() > 0.01 * without.norm()


@pytest.mark.parametrize(
    ("name", "fields"),
    [("ElectraModel", {}), ("DistilBertModel", DISTIL), ("BertModel", {"is_decoder": True})],
)
def test_attention_that_is_left(name, fields):
    cls = getattr(transformers, name)
    model = randomised(cls(cls.config_class(**({} if name == "DistilBertModel" else BERT) | fields))).eval()
    plain = copy.deepcopy(model)
    report = fuse(model, unpad=True)
    assert report.left
    assert any(entry.by == "layernorm" for entry in report.replaced)
    torch.testing.assert_close(run(model)[0], run(plain)[0], rtol=1e-4, atol=1e-5)


def test_vit_by_the_interface(recwarn):
    register_attention()
    fields = {**SIZES, **VIT, **NO_DROPOUT}
    model = randomised(transformers.ViTModel(transformers.ViTConfig(**fields))).eval()
    inputs = batch("vit")
    with torch.no_grad():
        theirs = model(**inputs)[0]
        assert "attn_implementation 'fusebert'" in str(fuse(model))
        torch.testing.assert_close(model(**inputs)[0], theirs, rtol=1e-4, atol=1e-5)
    assert not [str(w.message) for w in recwarn if "fusebert" in str(w.message)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float64(family):
    """Results, every gradient and the masked-language loss stay the same, whether attention is fused or not."""
    model, inputs = build_family(family).double().train(), batch(family)
    labelled = FAMILIES[family][0].endswith("ForMaskedLM")
    if labelled:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] % 3 > 0, IGNORE)
    plain = copy.deepcopy(model)
    fuse(model, mlm_loss=True)
    if labelled:
        losses = [m(**inputs).loss for m in (model, plain)]
        torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-6, atol=0)
        del inputs["labels"]
    (ours, our_grads), (theirs, their_grads) = (output_and_gradients(family, m, inputs) for m in (model, plain))
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
    assert (flat(our_grads) - flat(their_grads)).norm() <= 1e-12 * flat(their_grads).norm()
