"""Models made of models: the attention's name is set where the layers read it, and no mask can be misread."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hf_families import DISTIL, NO_DROPOUT, SIZES, TEXT, VIT, batch, build, randomised
from oracle import DEVICE

from fusebert.model import fuse, unfuse
from fusebert.model.fusion import register_attention
from fusebert.model.fusion.masks import build_mask

transformers = pytest.importorskip("transformers", minversion="5")

BERT = {**TEXT, **NO_DROPOUT}
ROWS = 17  # as many rows as columns: a mask [B, N] could be read as [N, N]


def _square():
    """B = N, each row with its own length."""
    return batch("bert", tuple(range(ROWS, 0, -1)))


def _text_config(kind):
    return {
        "bert": lambda: transformers.BertConfig(**BERT),
        "distilbert": lambda: transformers.DistilBertConfig(**DISTIL, dropout=0.0, attention_dropout=0.0),
        "electra": lambda: transformers.ElectraConfig(**BERT, embedding_size=32),
    }[kind]()


def _encoder_decoder(kind="bert"):
    decoder = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(_text_config(kind), decoder)
    return randomised(transformers.EncoderDecoderModel(config)).eval()


def _names(model):
    """The attention that each module reads."""
    held = [vars(module).get("config") for module in model.modules()]
    return {config._attn_implementation for config in held if hasattr(config, "_attn_implementation")}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
def test_encoder_decoder(kind, whole):
    torch.manual_seed(0)
    model, inputs = _encoder_decoder(kind), _square()
    inputs = {**inputs, "decoder_input_ids": inputs["input_ids"][:, :5]}
    plain = copy.deepcopy(model)
    report = fuse(model if whole else model.encoder)
    assert any("attn_implementation" in entry.by for entry in report.replaced)
    assert _names(model.encoder) == {"fusebert"}
    assert _names(model.decoder) == {"sdpa"}
    if whole:
        assert "its attention is causal" in str(report)
    with torch.no_grad():
        ours, theirs = (m(**inputs).logits for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    unfuse(model)
    assert _names(model) == {"sdpa"}


def test_vision_encoder_decoder():
    decoder = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    vit = transformers.ViTConfig(**SIZES, **VIT, **NO_DROPOUT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder)
    model = randomised(transformers.VisionEncoderDecoderModel(config)).eval()
    plain = copy.deepcopy(model)
    fuse(model)
    assert (_names(model.encoder), _names(model.decoder)) == ({"fusebert"}, {"sdpa"})
    inputs = {**batch("vit"), "decoder_input_ids": batch("bert")["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_dual_encoder():
    vit, bert = transformers.ViTConfig(**SIZES, **VIT, **NO_DROPOUT), transformers.BertConfig(**BERT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vit, bert, projection_dim=16)
    model = randomised(transformers.VisionTextDualEncoderModel(config)).eval()
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert _names(model) == {"fusebert"}, report
    inputs = {**_square(), **batch("vit")}
    with torch.no_grad():
        ours, theirs = (m(**inputs).logits_per_text for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_a_model_with_another_config(family, unpad):
    """The layers keep the config of the constructor."""
    model, inputs = build(family).eval(), _square()
    plain = copy.deepcopy(model)
    for m in (model, model.base_model):
        m.config = copy.deepcopy(m.config)
    fuse(model, unpad=unpad)
    assert _names(model) == {"fusebert"}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (m(**inputs).to_tuple()[0][real] for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "BartModel"])
def test_an_encoder_beside_its_decoder(name):
    """They share one config object, of which the encoder gets a copy."""
    fields = {"d_model": 32, "vocab_size": 61, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1}
    for side in ("encoder", "decoder"):
        fields |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    config = transformers.BartConfig(**fields, dropout=0.0, eos_token_id=2, decoder_start_token_id=2)
    model = randomised(getattr(transformers, name)(config)).eval()
    plain = copy.deepcopy(model)
    fuse(model)
    base = getattr(model, "model", model)
    assert (_names(base.encoder), _names(base.decoder)) == ({"fusebert"}, {"sdpa"})
    inputs = {**_square(), "decoder_input_ids": _square()["input_ids"][:, :4]}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 2])
def test_sdpa_cannot_misread_a_mask(window):
    """It reads padding rightly, and raises for a window."""
    from transformers.masking_utils import bidirectional_mask_function

    register_attention()
    real = _square()["attention_mask"].bool()
    q, k, v = torch.randn(3, ROWS, 2, ROWS, 16, device=DEVICE)
    mask = build_mask(
        ROWS, ROWS, 0, bidirectional_mask_function, real, window, device=DEVICE, allow_is_bidirectional_skip=True
    )
    if window is not None:
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None].expand(-1, 1, ROWS, -1))
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_a_mask_of_one_row_for_three_sequences_is_an_error(family, unpad):
    model, inputs = build(family).eval(), batch(family)
    fuse(model, unpad=unpad)
    with pytest.raises(ValueError, match=r"one row for each of the 3 sequences; got \[1, 17\]"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"][:1])


def test_a_replaced_attention_keeps_its_model_unfused():
    model = build("bert").eval()
    attention = model.encoder.layer[0].attention.self
    attention.forward = attention.forward
    report = fuse(model)
    assert "the forward of an attention layer was replaced on the instance" in str(report)
    assert _names(model) == {"sdpa"}
