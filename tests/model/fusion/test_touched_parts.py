"""A part that is not what its class says runs as it is: at fuse time the report says so, and each call checks again."""

import copy

import pytest
import torch
from hf_families import FAMILIES, LinearInputs, batch, build, output_of, randomised
from oracle import DEVICE
from torch import nn
from torch.nn.utils import parametrize, prune

from fusebert.model import fuse, unfuse
from fusebert.model.fusion.norms import FusedPostNorm
from fusebert.model.fusion.unpad import PackedEncoder

transformers = pytest.importorskip("transformers", minversion="5")


class _Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class _Adapter(nn.Module):
    """As PEFT's wrappers: another module around the part."""

    def __init__(self, part):
        super().__init__()
        self.base_layer = part

    def forward(self, *args):
        return 2 * self.base_layer(*args)


def _forward(model, path):
    part = model.get_submodule(path)
    original = part.forward
    part.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)


def _hook(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, out: 2 * out)


def _pre_hook(model, path):
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0].square(), *args[1:]))


def _wrapper(model, path):
    model.set_submodule(path, _Adapter(model.get_submodule(path)))


def _subclass(model, path):
    """As FSDP2 and accelerate's hooks: a class derived from the class at that time."""
    part = model.get_submodule(path)
    cls = type(part)
    part.__class__ = type(f"Other{cls.__name__}", (cls,), {"forward": lambda self, *args: 2 * cls.forward(self, *args)})


def _identity(model, path):
    model.set_submodule(path, nn.Identity())


def _parametrization(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", _Doubled())


def _pruning(model, path):
    prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)


ANY = (_forward, _hook, _pre_hook, _wrapper, _subclass)
WEIGHTED = (_parametrization, _pruning)
PARTS = [
    *[("bert", f"encoder.layer.0.output.{part}", how) for part in ("LayerNorm", "dropout") for how in ANY],
    *[("bert", "encoder.layer.0.output.LayerNorm", how) for how in WEIGHTED],
    ("bert", "encoder.layer.1.attention.output.dropout", _identity),
    ("bert", "encoder.layer.1.attention.output", _forward),
    *[("modernbert", "model.layers.1.attn_norm", how) for how in (*ANY, *WEIGHTED)],
    ("distilbert", "distilbert.transformer.layer.0.sa_layer_norm", _wrapper),
    *[("torch", f"layers.0.{part}", how) for part in ("norm1", "dropout2", "linear1", "dropout") for how in ANY],
    *[("torch", f"layers.0.{part}", how) for part in ("norm2", "linear2") for how in WEIGHTED],
    ("torch", "layers.0.dropout1", _identity),
    ("torch", "layers.0", _forward),
    ("torch-pre", "layers.1.norm1", _hook),
]


def _build(family):
    if not family.startswith("torch"):
        return build(family).train()
    settings = {"dropout": 0.0, "dim_feedforward": 48, "batch_first": True, "norm_first": family == "torch-pre"}
    torch.manual_seed(0)
    return randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, **settings), 2)).train()


def _run(family, model):
    if family in FAMILIES:
        return output_of(family, model, batch(family))
    x = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    padding = torch.arange(11, device=DEVICE) >= torch.tensor([11, 4, 7], device=DEVICE)[:, None]
    return model(x, src_key_padding_mask=padding)[~padding]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("first", ["fuse", "touch"])
@pytest.mark.parametrize(("family", "path", "touch"), PARTS, ids=lambda x: getattr(x, "__name__", x).strip("_"))
def test_a_touched_part_runs(family, path, touch, first):
    model = _build(family)
    plain = copy.deepcopy(model)
    before = _run(family, plain)
    touch(plain, path)
    expected = _run(family, plain)
    if touch is not _identity:
        assert (expected - before).norm() > 1e-3 * before.norm(), "the touch changes nothing: the test shows nothing"
    unpad = family in FAMILIES
    if first == "touch":
        touch(model, path)
    fuse(model, unpad=unpad)
    _run(family, model)
    if first == "fuse":
        touch(model, path)
    for _ in range(2):  # pruning: the second step
        out = _run(family, model)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.sum().backward()
    unfuse(model)
    torch.testing.assert_close(_run(family, model), expected, rtol=1e-4, atol=1e-5)


def test_the_report_names_touched_parts():
    model = build("bert")
    layers = model.encoder.layer
    layers[0].output.LayerNorm.register_full_backward_hook(lambda *args: None)
    layers[0].attention.output.dropout.forward = lambda x: x
    layers[1].output.LayerNorm.register_full_backward_pre_hook(lambda *args: None)
    layers[1].attention.output.dropout.register_state_dict_pre_hook(lambda *args: None)
    left = {entry.name: entry.reason for entry in fuse(model).left}
    assert left == {
        "encoder.layer.0.output": "its LayerNorm has hooks",
        "encoder.layer.0.attention.output": "the forward of its dropout was replaced on the instance",
        "encoder.layer.1.output": "its LayerNorm has hooks",
        "encoder.layer.1.attention.output": "its dropout has hooks",
    }


@pytest.mark.parametrize("method", ["_sa_block", "_ff_block"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_replaced_block_of_pytorchs_layer_runs(method):
    model = _build("torch")
    fuse(model)
    for m in (model, plain := _build("torch")):
        setattr(m.layers[0], method, lambda x, *args, **kwargs: 3 * x)
    torch.testing.assert_close(_run("torch", model), _run("torch", plain), rtol=1e-4, atol=1e-5)
    report = fuse(plain)
    assert f"its {method} was replaced on the instance" in str(report)


@pytest.mark.parametrize("kind", ["forward", "hook"])
def test_a_packed_encoder_stays_padded_where_a_layer_is_touched(kind):
    model, inputs = build("bert").eval(), batch("bert")
    plain = copy.deepcopy(model)
    fuse(model, unpad=True)
    shapes = []
    for m in (model, plain):
        layer = m.encoder.layer[1]
        if kind == "hook":
            layer.intermediate.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        else:
            layer.forward = lambda x, *args, **kwargs: x.flip(1)
    with torch.no_grad(), LinearInputs() as linears:
        ours = model(**inputs).last_hidden_state
    torch.testing.assert_close(ours, plain(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert not any(size[0] == 1 for size in linears.sizes)
    assert "unpad" not in str(fuse(model, unpad=True))
    assert set(shapes) <= {(3, 17, 32)}


def test_offloaded_parts():
    """As accelerate's cpu_offload: weights on the meta device, brought back by a replaced forward."""
    model, inputs = build("bert").eval(), batch("bert")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        for order in ("fuse", "offload"):
            one = copy.deepcopy(model)
            if order == "fuse":
                fuse(one, unpad=True)
            for part in one.modules():
                if part._parameters:
                    _offload(part)
            if order == "offload":
                fuse(one, unpad=True)
            out = one(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
            torch.testing.assert_close(out, expected[inputs["attention_mask"].bool()], rtol=1e-4, atol=1e-5)


def _offload(part):
    values = dict(part._parameters)
    meta = {name: None if x is None else nn.Parameter(x.to("meta")) for name, x in values.items()}
    original = part.forward

    def forward(*args, **kwargs):
        part._parameters.update(values)
        try:
            return original(*args, **kwargs)
        finally:
            part._parameters.update(meta)

    part._parameters.update(meta)
    part.forward = forward


def test_unfuse_keeps_what_others_put_on_top():
    model = build("bert").eval()
    fuse(model)
    norm, output = model.embeddings.LayerNorm, model.encoder.layer[0].output
    other = type("OnTop", (type(norm),), {"extra": 1})
    norm.__class__ = other
    bound = output.forward
    unfuse(model)
    assert type(norm).__name__ == "OnTop"
    assert type(norm).__mro__[1] is nn.LayerNorm
    assert norm.extra == 1
    x = torch.randn(2, 3, 48, device=DEVICE), torch.randn(2, 3, 32, device=DEVICE)
    assert torch.equal(bound(*x), output(*x))  # as a wrapper keeps it
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch("bert")).last_hidden_state, build("bert").eval()(**batch("bert")).last_hidden_state
        )


def test_a_parametrized_norm_is_copied_whole():
    model = build("bert").eval()
    fuse(model)
    parametrize.register_parametrization(model.embeddings.LayerNorm, "weight", _Doubled())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(output_of("bert", copied, batch("bert")), output_of("bert", model, batch("bert")))
    parametrize.remove_parametrizations(model.embeddings.LayerNorm, "weight", leave_parametrized=False)
    unfuse(model)
    assert type(model.embeddings.LayerNorm) is nn.LayerNorm


def test_parts_are_checked_again_only_after_a_change(monkeypatch):
    model, inputs, calls = build("bert").eval(), batch("bert"), []
    fuse(model, unpad=True)
    for template in (PackedEncoder, FusedPostNorm):
        touched = template.touched
        monkeypatch.setattr(template, "touched", lambda module, touched=touched: calls.append(1) or touched(module))
    with torch.no_grad():
        model(**inputs)
        assert len(calls) == 1 + 4
        model(**inputs)
        assert len(calls) == 1 + 4
        handle = model.pooler.register_forward_hook(lambda module, args, out: None)
        model(**inputs)
    assert len(calls) == 2 * (1 + 4)
    handle.remove()


def test_another_attention_after_a_packed_batch():
    model, inputs = build("bert").eval(), batch("bert")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        fuse(model, unpad=True)
        model(**inputs)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
