"""Fused Transformers models: other heads and families, masks, autocast, checkpointing, DDP, compile and export."""

import copy

import pytest
import torch
from hf_families import DISTIL, FAMILIES, MODERN, NO_DROPOUT, SIZES, TEXT, VIT, batch, build, flat, randomised
from hf_families import output_and_gradients as run
from oracle import DEVICE, assert_as_good_as_torch
from torch import nn

from fusebert.kernels import use_backend
from fusebert.model import fuse
from fusebert.model.fusion import attention_interface

transformers = pytest.importorskip("transformers", minversion="5")

DISTIL_DROPOUTS = ("dropout", "attention_dropout", "seq_classif_dropout")
BERT = {**TEXT, **NO_DROPOUT}
# class, configuration, whether attention is fused too
OTHERS = [
    ("BertForNextSentencePrediction", BERT, True),
    ("BertForTokenClassification", BERT, True),
    ("BertForQuestionAnswering", BERT, True),
    ("RobertaForSequenceClassification", {**BERT, "pad_token_id": 0}, True),
    ("XLMRobertaModel", {**BERT, "pad_token_id": 0}, True),
    ("CamembertForMaskedLM", {**BERT, "pad_token_id": 0}, True),
    ("ElectraForPreTraining", {**BERT, "embedding_size": 16}, True),
    (
        "DistilBertForSequenceClassification",
        {**DISTIL, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        True,
    ),
    ("ModernBertForSequenceClassification", {**TEXT, **MODERN, "classifier_pooling": "mean"}, True),
    ("DebertaModel", BERT, False),
    ("DebertaV2ForSequenceClassification", BERT, False),
    ("DebertaV2Model", {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, False),
    ("ViTForImageClassification", {**SIZES, **VIT, **NO_DROPOUT}, True),
    ("DeiTModel", {**SIZES, **VIT, **NO_DROPOUT}, True),
    ("Dinov2Model", {**SIZES, **VIT, **NO_DROPOUT}, True),
]


def _rows(out, mask):
    """The first output without its padding."""
    out = out.to_tuple()[0]
    return out[mask.bool()] if mask is not None and out.shape[:2] == mask.shape else out


@pytest.mark.parametrize(("name", "fields", "attention"), OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_other_heads_and_families(name, fields, attention):
    """Equal in float64; the report names modules that are not fused."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = randomised(cls(cls.config_class(**fields))).double().train()
    inputs = batch("vit" if "image_size" in fields else "bert")
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    plain = copy.deepcopy(model)
    report = fuse(model)
    entries = report.replaced if attention else report.left
    assert [entry.name for entry in entries if entry.kind == name] == [""]
    assert name == "DebertaModel" or any("layernorm" in entry.by for entry in report.replaced)  # it has its own norms
    gradients = []
    for m in (plain, model):
        out = _rows(m(**inputs), inputs.get("attention_mask"))
        (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
        gradients.append(flat({key: p.grad for key, p in m.named_parameters() if p.grad is not None}))
    assert (gradients[1] - gradients[0]).norm() <= 1e-12 * gradients[0].norm()
    with torch.no_grad():
        ours, theirs = (_rows(m.eval()(**inputs), inputs.get("attention_mask")) for m in (model, plain))
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def _mask(kind):
    real = torch.arange(17, device=DEVICE) < torch.tensor([17, 3, 11], device=DEVICE)[:, None]
    pairs = (torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(2)) < 0.7).to(DEVICE)
    pairs |= torch.eye(17, dtype=torch.bool, device=DEVICE)
    return {
        "none": None,
        "int": real.long(),
        "bool": real,
        "float": real.float(),
        "4-D bool": pairs,
        "4-D additive": torch.zeros_like(pairs, dtype=torch.float32).masked_fill(~pairs, -1e9),
        "causal": torch.ones(17, 17, dtype=torch.bool, device=DEVICE).tril().expand(3, 1, -1, -1),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "int", "bool", "float", "4-D bool", "4-D additive", "causal"])
@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_masks(family, unpad, kind):
    """Each gives the original model's result, from the kernel or, with a warning, from SDPA."""
    model, mask = build(family).eval(), _mask(kind)
    ids = torch.randint(3, 61, (3, 17), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plain = copy.deepcopy(model)
    fuse(model, unpad=unpad)
    attention_interface.warn_once.cache_clear()
    keep = mask.bool() if mask is not None and mask.dim() == 2 else torch.ones(3, 17, dtype=torch.bool)
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=mask).to_tuple()[0][keep]
        if mask is not None and mask.dim() == 4:
            with pytest.warns(UserWarning, match="SDPA attention runs"):
                ours = model(input_ids=ids, attention_mask=mask).to_tuple()[0][keep]
        else:
            ours = model(input_ids=ids, attention_mask=mask).to_tuple()[0][keep]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unpad", [False, True])
def test_a_head_mask_is_an_error(unpad):
    """Transformers 5 ignores it without a warning."""
    model = build("bert").eval()
    fuse(model, unpad=unpad)
    with pytest.raises(ValueError, match="does not support head_mask, which BertSelfAttention passes"):
        model(**batch("bert"), head_mask=torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert", "modernbert", "vit"])
def test_attention_weights_are_the_models_own(family):
    model, inputs = build(family).eval(), batch(family)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    fuse(model, unpad=family != "vit")
    attention_interface.warn_once.cache_clear()
    with torch.no_grad():
        theirs = plain(**inputs, output_attentions=True)
        with pytest.warns(UserWarning, match="the model's eager attention runs"):
            ours = model(**inputs, output_attentions=True)
    assert len(ours.attentions) == len(theirs.attentions) == 2
    mask = inputs.get("attention_mask", torch.ones(3, ours.attentions[0].shape[2])).bool()
    torch.testing.assert_close(ours[0][mask], theirs[0][mask], rtol=1e-4, atol=1e-5)
    for x, y in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(x.transpose(1, 2)[mask], y.transpose(1, 2)[mask], rtol=1e-4, atol=1e-5)


def test_packed_modernbert_takes_positions_and_embeddings():
    model = build("modernbert").eval()
    inputs = batch("modernbert")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    plain = copy.deepcopy(model)
    fuse(model, unpad=True)
    places = torch.arange(17, device=DEVICE).flip(0)[None]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        calls = {"position_ids": places}, {"position_ids": places.expand(3, -1)}, {"return_dict": False}
        for call in calls:
            ours, theirs = (m(inputs_embeds=embeds, attention_mask=mask, **call)[0] for m in (model, plain))
            torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-5)
    assert type(model.base_model(ids, mask, return_dict=False)) is tuple
    with torch.no_grad():
        ours, theirs = (m(ids, mask, output_hidden_states=True).hidden_states for m in (model, plain))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x[mask.bool()], y[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit"])
def test_under_autocast(family):
    """Parameters and gradients stay float32. Unlike PyTorch's, the residual stream is bfloat16 under autocast, so the
    results are compared with those of the model in bfloat16."""
    model, inputs = build(family).train(), batch(family)
    oracle, oracle_grads = run(family, copy.deepcopy(model).double(), inputs)
    theirs, their_grads = run(family, copy.deepcopy(model).bfloat16(), inputs)
    fuse(model)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, our_grads = run(family, model, inputs)
    assert {p.dtype for p in our_grads.values()} == {torch.float32}
    assert_as_good_as_torch(ours.float(), oracle, theirs.float())
    assert_as_good_as_torch(flat(our_grads), flat(oracle_grads), flat(their_grads).float(), "gradients")


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing_draws_the_same_dropout(family, unpad):
    model, inputs = build(family, **dict.fromkeys(NO_DROPOUT, 0.2)).train(), batch(family)
    fuse(model, unpad=unpad)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        gradients.append(flat(run(family, model, inputs)[1]))
    assert torch.equal(*gradients)


def test_distributed_data_parallel(tmp_path):
    """DDP gives the gradients of the model that was fused."""
    model, inputs = build("bert-mlm").train(), batch("bert")
    expected = run("bert-mlm", copy.deepcopy(model), inputs)
    fuse(model, unpad=True)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        out, gradients = run("bert-mlm", parallel, inputs)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    theirs = {f"module.{name}": gradient for name, gradient in expected[1].items()}
    assert gradients.keys() == theirs.keys()
    torch.testing.assert_close(flat(gradients), flat(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "backend", "unpad"),
    [("bert", "triton", False), ("modernbert", "reference", False), ("bert-pretraining", "reference", True)],
)
def test_compiled_once_for_every_length(family, backend, unpad):
    """No graph break, and two graphs: one for the first length, one for all others. A compiled batch stays padded."""
    model, graphs = build(family).eval(), []
    fuse(model, unpad=unpad)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad(), use_backend(backend):
        for length in (9, 12, 7):
            inputs = batch(family, (length, 3, 5))
            mask = inputs["attention_mask"].bool()
            ours, theirs = (m(**inputs).to_tuple()[0][mask] for m in (compiled, model))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_exported(family, backend, dynamic):
    model, inputs = build(family).eval(), batch(family)
    fuse(model)
    sizes = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("N", min=2, max=40)}
    shapes = {name: sizes if x.dim() == 2 else {0: sizes[0]} for name, x in inputs.items()} if dynamic else None
    other = batch(family, (9, 4)) if dynamic and family == "bert" else inputs
    with torch.no_grad(), use_backend(backend):
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        ours, theirs = (m(**other).to_tuple()[0] for m in (program.module(), model))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    fused = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("fusebert.")}
    expected = {"fusebert.attention.default", "fusebert.dropout_add_layernorm.default"}
    assert fused == (expected if backend == "triton" else set())


def test_weights_move_between_fused_and_not():
    model, other = build("bert-pretraining"), build("bert-pretraining", seed=1)
    expected = run("bert-pretraining", model.eval(), batch("bert"))[0]
    fuse(other, unpad=True, mlm_loss=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(run("bert-pretraining", other.eval(), batch("bert"))[0], expected, rtol=1e-4, atol=1e-5)
    assert list(other.state_dict()) == list(model.state_dict())
    assert FAMILIES["bert-pretraining"][0] == type(other).__name__
