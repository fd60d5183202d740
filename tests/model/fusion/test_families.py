"""Every family of docs/drop-in.md: the fused model computes what the unfused one does; the table says what is fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hf_families import LinearInputs, flat
from oracle import DEVICE, assert_as_good_as_torch
from supported_families import BEGIN, DOCS, END, FAMILIES, falls_back, family_inputs, family_model, fused_kinds, table
from torch import nn

from fusebert.model import fuse, register_attention, register_family, unfuse

transformers = pytest.importorskip("transformers", minversion="5")

FAMILY = pytest.mark.parametrize("family", FAMILIES)
WITH_ATTENTION = [family for family in FAMILIES if family not in ("MegatronBERT", "MPNet") and "DeBERTa" not in family]
MASKED = [family for family, (name, *_) in FAMILIES.items() if "MaskedLM" in name]


def _exact(model):
    """The model in float64, with RMSNorms that do not round to float32."""
    model = copy.deepcopy(model).double()
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = lambda x, part=part: F.rms_norm(x, x.shape[-1:], part.weight, part.variance_epsilon)
    return model


def _run(model, inputs):
    """(the rows of the first output that are not padding, {parameter: gradient} of a random functional of them)."""
    dtype = next(model.parameters()).dtype
    out = model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})[0]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == out.shape[:2]:
        out = out[mask.bool()]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad()
    (out * weights.to(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _compare(ours, model, inputs):
    theirs, their_grads = _run(copy.deepcopy(model), inputs)
    oracle, oracle_grads = _run(_exact(model), inputs)
    out, grads = ours
    assert grads.keys() == their_grads.keys()
    assert_as_good_as_torch(out, oracle, theirs)
    assert_as_good_as_torch(flat(grads), flat(oracle_grads), flat(their_grads), "gradients")


@FAMILY
def test_fused(family):
    """With padding masks, packed where the table says so; no attention falls back to SDPA."""
    model, inputs = copy.deepcopy(family_model(family)), family_inputs(family)
    fuse(model, unpad=True)
    assert not falls_back(model, family)
    with LinearInputs() as linears:
        ours = _run(model, inputs)
    rows = (1, int(inputs["attention_mask"].sum())) if "attention_mask" in inputs else None
    assert (rows in linears.sizes) == (fused_kinds(family)[2] == "yes")
    _compare(ours, family_model(family), inputs)
    unfuse(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in family_model(family).modules()]


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_attention_by_its_name(family):
    """``attn_implementation="fusebert"``, without `fuse`."""
    assert fused_kinds(family)[0] == ("in packed batches" if family == "LayoutLM" else "yes")
    register_attention()
    model, inputs = copy.deepcopy(family_model(family)), family_inputs(family)
    model.set_attn_implementation("fusebert")
    _compare(_run(model, inputs), family_model(family), inputs)


@pytest.mark.parametrize("family", MASKED)
def test_masked_language_loss(family):
    assert fused_kinds(family)[3] == "yes"
    model, inputs = family_model(family), family_inputs(family)
    ids = inputs["input_ids"]
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.4
    labels = torch.where(chosen & inputs["attention_mask"].bool(), ids, -100)

    def run(model):
        out = model(**inputs, labels=labels)
        model.zero_grad()
        out.loss.backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (theirs, their_grads), (oracle, oracle_grads) = run(copy.deepcopy(model)), run(_exact(model))
    model = copy.deepcopy(model)
    fuse(model, unpad=True, mlm_loss=True)
    ours, grads = run(model)
    assert ours.logits is None
    assert grads.keys() == their_grads.keys()
    assert_as_good_as_torch(ours.loss, oracle.loss, theirs.loss, "loss", roundings=4)
    assert_as_good_as_torch(flat(grads), flat(oracle_grads), flat(their_grads), "gradients")
    assert model.eval()(**inputs, labels=labels).logits is not None


def test_the_table_of_the_docs_is_what_fuse_does():
    text = DOCS.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table().strip(), "run: PYTHONPATH=tests/support python tests/support/supported_families.py"


class _Unknown(transformers.Qwen3Model):
    """Of a name that nothing has registered."""


def test_a_registered_model_is_packed():
    """Before that, the report names it."""
    torch.manual_seed(0)
    fields = {**FAMILIES["EuroBERT"][1], "is_causal": False, "head_dim": 16}
    model, inputs = _Unknown(transformers.Qwen3Config(**fields)).to(DEVICE).eval(), family_inputs("BERT")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        report = str(fuse(model, unpad=True))
        assert "unpad does not know it: register_family(model=_Unknown) may make it packed" in report
        register_family(model=_Unknown)
        assert "packed: padding is removed" in str(fuse(model, unpad=True))
        with LinearInputs() as linears:
            out = model(**inputs).last_hidden_state
    assert (1, 31) in linears.sizes
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-5)


def test_a_pooler_inside_a_packed_model_reads_each_sequence():
    name = transformers.NomicBertModel
    torch.manual_seed(0)
    model = name(name.config_class(**FAMILIES["NomicBERT"][1]), add_pooling_layer=True).to(DEVICE).eval()
    plain, inputs = copy.deepcopy(model), family_inputs("NomicBERT")
    fuse(model, unpad=True)
    with torch.no_grad(), LinearInputs() as linears:
        ours, theirs = (m(**inputs).pooler_output for m in (model, plain))
    assert (1, 31) in linears.sizes
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_without_an_output_embedding_is_refused():
    """DeBERTa's newer head multiplies with the word embeddings itself."""
    fields = {**FAMILIES["DeBERTa v2, v3"][1], "legacy": False}
    model = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**fields))
    assert "its output embedding does not make the logits" in str(fuse(model, mlm_loss=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "register_family needs a class: encoder=, model= or masked_lm="),
        ({"encoder": "BertEncoder"}, TypeError, "encoder must be a subclass of nn.Module; got 'BertEncoder'"),
        ({"model": nn.Linear}, ValueError, "model must take position_ids, .* Linear.forward takes input"),
    ],
)
def test_what_register_family_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        register_family(**arguments)
