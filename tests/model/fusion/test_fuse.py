"""fuse: models compute the same as before, keep their names and parameters, and unfuse restores them exactly."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from hf_families import (
    FAMILIES,
    NO_DROPOUT,
    TEXT,
    LinearInputs,
    batch,
    build,
    flat,
    output_and_gradients,
    output_of,
    randomised,
)
from oracle import DEVICE, assert_as_good_as_torch
from torch import nn

from fusebert.kernels import use_backend
from fusebert.model import IGNORE, fuse, unfuse

transformers = pytest.importorskip("transformers", minversion="5")

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def assert_parity(family, backend, dtype, training):
    """The fused model is as near to the float64 model as the unfused one at ``dtype``."""
    model, inputs = build(family).to(dtype).train(training), batch(family)
    theirs, their_grads = output_and_gradients(family, model, inputs)
    oracle, oracle_grads = output_and_gradients(family, copy.deepcopy(model).double(), inputs)
    report = fuse(model)
    assert len(report.replaced) == FAMILIES[family][3], str(report)
    with use_backend(backend):
        ours, our_grads = output_and_gradients(family, model, inputs)
    assert our_grads.keys() == their_grads.keys()
    assert_as_good_as_torch(ours, oracle, theirs)
    assert_as_good_as_torch(flat(our_grads), flat(oracle_grads), flat(their_grads), "gradients")


@FAMILY
def test_every_gradient_in_float64(family):
    """In training (dropout 0) and eval, without the noise of rounding."""
    model, inputs = build(family).double().train(), batch(family)
    theirs, their_grads = output_and_gradients(family, model, inputs)
    fuse(model)
    ours, our_grads = output_and_gradients(family, model, inputs)
    scale = flat(their_grads).norm()
    assert (ours - theirs).norm() <= 1e-13 * theirs.norm()
    assert our_grads.keys() == their_grads.keys()
    for name, gradient in our_grads.items():
        assert (gradient - their_grads[name]).norm() <= 1e-13 * scale, name
    with torch.no_grad():
        assert (output_of(family, model.eval(), inputs) - theirs).norm() <= 1e-13 * theirs.norm()


@FAMILY
def test_on_the_kernels(family):
    """float32 through Triton (its interpreter on a CPU), padded batches, forward and backward."""
    assert_parity(family, "triton", torch.float32, training=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="bfloat16 products need a GPU: the interpreter's are wrong")
@FAMILY
def test_on_the_kernels_in_bfloat16(family):
    assert_parity(family, "auto", torch.bfloat16, training=True)


def test_the_warnings_of_a_fallback_do_not_occur(recwarn):
    """Every family's attention runs on the kernel, with window and padding: no test above compares SDPA with itself."""
    for family in FAMILIES:
        model = build(family).eval()
        fuse(model)
        with torch.no_grad():
            output_of(family, model, batch(family))
    assert not [str(w.message) for w in recwarn if "fusebert" in str(w.message)]


@pytest.mark.parametrize("dropout", NO_DROPOUT)
def test_dropout_in_training_alone(dropout):
    """Each dropout alone: of the attention weights, and before the residual of the fused sub-layers."""
    family, model = "bert", build("bert", **{dropout: 0.3})
    model.embeddings.dropout.p = 0.0  # PyTorch's own
    plain = copy.deepcopy(model).eval()
    fuse(model)
    inputs = batch(family)
    with torch.no_grad():
        expected = output_of(family, plain, inputs)
        torch.testing.assert_close(output_of(family, model.eval(), inputs), expected, rtol=1e-4, atol=1e-5)
        torch.manual_seed(3)
        first = output_of(family, model.train(), inputs)
        second = output_of(family, model, inputs)
        torch.manual_seed(3)
        assert torch.equal(output_of(family, model, inputs), first)
    assert (first - second).norm() > 0.05 * first.norm()
    assert (first - expected).norm() > 0.05 * first.norm()


def test_a_dropout_of_one_is_pytorchs():
    model = build("bert", hidden_dropout_prob=1.0).train()
    plain, inputs = copy.deepcopy(model), batch("bert")
    fuse(model)
    torch.testing.assert_close(output_of("bert", model, inputs), output_of("bert", plain, inputs))


@pytest.mark.parametrize("family", ["bert-pretraining", "roberta", "electra", "distilbert", "modernbert"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_padding_taken_out(family, backend):
    """The layers run on the packed rows; real rows and all gradients stay the same, padding becomes zeros."""
    model, inputs = build(family).train(), batch(family)
    if family != "modernbert":
        inputs["attention_mask"][0, 4:6] = 0  # a hole
    theirs, their_grads = output_and_gradients(family, model, inputs)
    oracle, oracle_grads = output_and_gradients(family, copy.deepcopy(model).double(), inputs)
    report = fuse(model, unpad=True)
    assert any("packed" in entry.by for entry in report.replaced)
    with use_backend(backend), LinearInputs() as linears:
        ours, our_grads = output_and_gradients(family, model, inputs)
    assert linears.sizes.count((1, int(inputs["attention_mask"].sum()))) >= 2 * 4
    assert_as_good_as_torch(ours, oracle, theirs)
    assert_as_good_as_torch(flat(our_grads), flat(oracle_grads), flat(their_grads), "gradients")


def test_padding_stays_where_a_layer_is_recorded():
    model, inputs = build("bert").eval(), batch("bert")
    plain = copy.deepcopy(model)
    fuse(model, unpad=True)
    with torch.no_grad():
        padded = model(**inputs).last_hidden_state[~inputs["attention_mask"].bool()]
        ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states for m in (model, plain))
        model.config.output_hidden_states = True
        by_config = model(**inputs).hidden_states
    assert padded.norm() == 0
    for x, also, y in zip(ours, by_config, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert torch.equal(x, also)


def test_an_encoder_that_cannot_be_packed_says_so():
    report = fuse(build("vit"), unpad=True)
    assert "unpad does not support its encoder" in str(report)


def labelled(family):
    inputs = batch(family)
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 61, inputs["input_ids"].shape, generator=generator)
    chosen = torch.rand(labels.shape, generator=generator) < 0.3
    inputs["labels"] = torch.where(chosen, labels, IGNORE).to(DEVICE)
    if family == "bert-pretraining":
        inputs["next_sentence_label"] = torch.tensor([0, 1, 0], device=DEVICE)
    return inputs


def loss_and_gradients(model, inputs):
    out = model(**inputs)
    model.zero_grad()
    out["loss"].backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["bert-mlm", "bert-pretraining", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_masked_language_loss(family, backend):
    model, inputs = build(family).train(), labelled(family)
    theirs, their_grads = loss_and_gradients(model, inputs)
    oracle, oracle_grads = loss_and_gradients(copy.deepcopy(model).double(), inputs)
    fuse(model, mlm_loss=True)
    with use_backend(backend):
        ours, our_grads = loss_and_gradients(model, inputs)
    logits = FAMILIES[family][2]
    assert logits not in ours
    # The error of a single number is chance: allow for the rounding of logit, logsumexp, their difference and the mean.
    assert_as_good_as_torch(ours["loss"], oracle["loss"], theirs["loss"], "loss", roundings=4)
    assert_as_good_as_torch(flat(our_grads), flat(oracle_grads), flat(their_grads), "gradients")
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], ours["loss"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # eval, and training without labels, have their logits
        expected = output_of(family, model.eval(), batch(family))
        torch.testing.assert_close(output_of(family, model.train(), batch(family)), expected)
        assert logits in model.eval()(**inputs)


def test_modernberts_loss_uses_the_trainers_count():
    model, inputs = build("modernbert").train(), labelled("modernbert")
    theirs = model(**inputs, num_items_in_batch=torch.tensor(7.0, device=DEVICE)).loss
    fuse(model, mlm_loss=True)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(7.0, device=DEVICE)).loss, theirs)


def test_logits_stay_unless_told_otherwise():
    model, inputs = build("bert-mlm").train(), labelled("bert-mlm")
    fuse(model)
    assert model(**inputs).logits.shape == (3, 17, 61)


def torch_encoder(**settings):
    settings = {"batch_first": True, "dropout": 0.0, "dim_feedforward": 48, "activation": "gelu", **settings}
    norm = nn.LayerNorm(32)
    return randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, **settings), 2, norm))


@pytest.mark.parametrize("settings", [{}, {"batch_first": False}, {"norm_first": True}, {"bias": False}])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pytorchs_own_encoder(settings, backend):
    model = torch_encoder(**settings).train()
    x = torch.randn(3, 11, 32, device=DEVICE)
    padding = torch.arange(11, device=DEVICE) >= torch.tensor([11, 4, 7], device=DEVICE)[:, None]

    def run(model):
        y = x.to(next(model.parameters()).dtype)
        y = model(y if settings.get("batch_first", True) else y.transpose(0, 1), src_key_padding_mask=padding)
        y = (y if settings.get("batch_first", True) else y.transpose(0, 1))[~padding]
        model.zero_grad()
        y.square().sum().backward()
        return y.detach(), flat({name: p.grad for name, p in model.named_parameters()})

    theirs, their_grads = run(model)
    oracle, oracle_grads = run(copy.deepcopy(model).double())
    assert len(fuse(model).replaced) == 2 + 2 * 2 + 1 + 2 + 1
    with use_backend(backend):
        ours, our_grads = run(model)
    assert_as_good_as_torch(ours, oracle, theirs)
    assert_as_good_as_torch(our_grads, oracle_grads, their_grads, "gradients")
    with torch.no_grad(), use_backend("reference"):
        again = model.eval()(
            x if settings.get("batch_first", True) else x.transpose(0, 1), src_key_padding_mask=padding
        )
    again = again if settings.get("batch_first", True) else again.transpose(0, 1)
    torch.testing.assert_close(again[~padding], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pytorchs_encoder_with_what_the_kernels_do_not_take():
    """PyTorch's code runs with a causal mask, a float padding mask, attention weights or other keys."""
    model = torch_encoder().train()
    plain = copy.deepcopy(model)
    fuse(model)
    x = torch.randn(2, 7, 32, device=DEVICE)
    causal = nn.Transformer.generate_square_subsequent_mask(7, device=DEVICE)
    bias = torch.randn(2, 7, device=DEVICE)
    torch.testing.assert_close(model(x, causal), plain(x, causal))
    torch.testing.assert_close(model(x, src_key_padding_mask=bias), plain(x, src_key_padding_mask=bias))
    ours, theirs = (m.layers[0].self_attn(x, x, x) for m in (model, plain))
    torch.testing.assert_close(ours, theirs)
    other = torch.randn(2, 5, 32, device=DEVICE)
    ours, theirs = (m.layers[0].self_attn(x, other, other, need_weights=False)[0] for m in (model, plain))
    torch.testing.assert_close(ours, theirs)


@FAMILY
def test_unfuse_restores_exactly(family):
    model, inputs = build(family).eval(), batch(family)
    before = [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    config, keys = model.config.to_dict(), list(model.state_dict())
    with torch.no_grad():
        expected = output_of(family, model, inputs)
        fuse(model, mlm_loss=True, unpad=True)
        assert list(model.state_dict()) == keys
        unfuse(model)
        assert [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()] == before
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(output_of(family, model, inputs), expected)
    unfuse(model)


def test_fusing_again_changes_nothing():
    model = build("bert-mlm")
    first = fuse(model, mlm_loss=True, unpad=True)
    classes = [type(module) for module in model.modules()]
    second = fuse(model, mlm_loss=True, unpad=True)
    assert not second.replaced
    assert len(second.left) == len(first.replaced)
    assert [type(module) for module in model.modules()] == classes
    unfuse(model)
    assert model.config._attn_implementation == "sdpa"


def test_fusing_in_two_steps_is_fusing_at_once():
    model = build("bert")
    fuse(model, attention=False)
    assert model.config._attn_implementation == "sdpa"
    report = fuse(model, layernorm=False)
    assert [entry.kind for entry in report.replaced] == ["BertModel"]
    assert not report.left


def test_copies_stay_fused_and_apart():
    model, inputs = build("bert-mlm").train(), labelled("bert-mlm")
    fuse(model, mlm_loss=True, unpad=True)
    copied = copy.deepcopy(model)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(copied(**inputs).loss, model(**inputs).loss)
    assert copied(**inputs).logits is None
    unfuse(model)
    assert copied.config._attn_implementation == "fusebert"
    assert type(copied.bert.encoder.layer[0].output) is not type(model.bert.encoder.layer[0].output)


def test_pickled_whole_and_read_by_another_process(tmp_path):
    model, inputs = build("bert").eval().cpu(), {name: x.cpu() for name, x in batch("bert").items()}
    fuse(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    torch.save({"model": model, "inputs": inputs, "expected": expected}, tmp_path / "all.pt")
    script = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "out = saved['model'](**saved['inputs']).last_hidden_state\n"
        "torch.testing.assert_close(out, saved['expected'])\n"
        "print(saved['model'].config._attn_implementation)\n"
    )
    command = [sys.executable, "-P", "-c", script] if sys.version_info >= (3, 11) else [sys.executable, "-c", script]
    run = subprocess.run([*command, tmp_path / "all.pt"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stdout.strip() == "fusebert", run.stderr


def test_saved_as_if_it_were_not_fused(tmp_path):
    """A fused model's folder is the unfused model's, byte for byte."""
    model = build("bert-mlm")
    model.save_pretrained(tmp_path / "before")
    fuse(model, mlm_loss=True, unpad=True)
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "after")
    assert type(again) is transformers.BertForMaskedLM
    assert again.config._attn_implementation == "sdpa"


def test_another_model_of_the_same_config_keeps_its_attention():
    config = transformers.BertConfig(**TEXT)
    one, other = transformers.BertModel(config), transformers.BertModel(config)
    fuse(one)
    assert one.config._attn_implementation == one.encoder.layer[0].attention.self.config._attn_implementation
    assert one.config._attn_implementation == "fusebert"
    assert one.config is one.encoder.config
    assert other.config._attn_implementation == config._attn_implementation == "sdpa"


def test_names_and_signatures_that_others_look_at():
    model, plain = build("bert-mlm"), build("bert-mlm")
    fuse(model, mlm_loss=True, unpad=True)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert [str(type(m)) for m in model.modules()] == [str(type(m)) for m in plain.modules()]
    assert isinstance(model.bert.embeddings.LayerNorm, nn.LayerNorm)
    assert "eps=1e-12" in repr(model.bert.embeddings.LayerNorm)
    assert "fused" in repr(model.bert.embeddings.LayerNorm)


def test_hooks_inside_a_fused_sub_layer_are_called():
    model, inputs = build("bert").eval(), batch("bert")
    fuse(model)
    calls = []
    norm = model.encoder.layer[0].output.LayerNorm
    norm.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    with torch.no_grad():
        model(**inputs)
    assert calls == [(3, 17, 32)]


def test_the_report_says_what_was_done():
    text = str(fuse(build("bert-mlm")))
    assert text.splitlines() == [
        "fusebert: 7 modules fused, 0 left as they were",
        "  fused    1 × BertForMaskedLM: attn_implementation 'fusebert', was 'sdpa' (the model itself)",
        "  fused    2 × BertSelfOutput: dropout_add_layernorm (first: bert.encoder.layer.0.attention.output)",
        "  fused    2 × BertOutput: dropout_add_layernorm (first: bert.encoder.layer.0.output)",
        "  fused    2 × LayerNorm: layernorm (first: bert.embeddings.LayerNorm)",
    ]


class _OtherNorm(nn.LayerNorm):
    pass


class _PreNorm(nn.Module):
    """The names of a post-LN sub-layer in another order."""

    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = nn.Linear(8, 8), nn.Dropout(0.0), nn.LayerNorm(8)

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.dense(self.LayerNorm(hidden_states)))
        return hidden_states + input_tensor


def test_a_sub_layer_is_known_by_its_code():
    model = randomised(_PreNorm())
    x, y = torch.randn(2, 3, 8, device=DEVICE)
    expected = model(x, y)
    assert [entry.name for entry in fuse(model).replaced] == ["LayerNorm"]
    torch.testing.assert_close(model(x, y), expected)


def test_what_is_left_and_why():
    model = nn.ModuleDict(
        {
            "two_axes": nn.LayerNorm((4, 8)),
            "subclass": _OtherNorm(8),
            "replaced": nn.LayerNorm(8),
            "wide": nn.MultiheadAttention(520, 1),
            "biased": nn.MultiheadAttention(8, 1, add_bias_kv=True),
            "fine": nn.LayerNorm(8),
        }
    )
    model["replaced"].forward = model["replaced"].forward
    report = fuse(model)
    assert [entry.name for entry in report.replaced] == ["fine"]
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons["two_axes"] == "normalises 2 axes"
    assert "subclass" in reasons["subclass"]
    assert "on the instance" in reasons["replaced"]
    assert "size 520" in reasons["wide"]
    assert "bias_k" in reasons["biased"]
    assert "left    1 × LayerNorm: normalises 2 axes (two_axes)" in str(report)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("BertModel", {**TEXT, "is_decoder": True}, "causal"),
        ("DebertaV2Model", TEXT, "does not go through"),
        ("BertModel", {**TEXT, "attn_implementation": "eager", "output_attentions": True}, "output_attentions"),
    ],
)
def test_attention_that_is_left_and_why(name, fields, reason):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**fields)).eval().to(DEVICE)
    inputs = batch("bert")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        report = fuse(model)
        assert reason in next(entry.reason for entry in report.left if entry.kind == name)
        assert report.replaced
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_fuse_does_not_know():
    report = fuse(build("bert-classification"), mlm_loss=True)
    assert "mlm_loss does not support its class" in str(report)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got str"):
        fuse("bert-base-uncased")
