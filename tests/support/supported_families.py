"""Every model family that docs/drop-in.md lists: a tiny random model, its inputs, and what `fuse` does with it.

    PYTHONPATH=tests/support python tests/support/supported_families.py

writes the table of docs/drop-in.md anew. `tests/model/fusion/test_families.py` tests each family and the table.
"""

import copy
import functools
import warnings
from pathlib import Path

import torch
from hf_families import DISTIL, MODERN, NO_DROPOUT, SIZES, TEXT, VIT, batch, randomised
from oracle import DEVICE
from torch import nn

from fusebert.model import fuse
from fusebert.model.fusion import attention_interface

DOCS = Path(__file__).resolve().parents[2] / "docs" / "drop-in.md"
BEGIN, END = "<!-- families: written by tests/support/supported_families.py -->\n", "<!-- end of families -->\n"

BERT = {**TEXT, **NO_DROPOUT, "pad_token_id": 0}
ROPE = {**SIZES, "vocab_size": 61, "max_position_embeddings": 40, "num_key_value_heads": 1, "pad_token_id": 0}
ROPE |= {"bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "dropout": 0.0}
SEQ2SEQ |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "vocab_size": 61}
SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# The table's first column → the class, its configuration and, of an encoder-decoder, the part.
FAMILIES = {
    "BERT": ("BertForMaskedLM", BERT, ""),
    "RoBERTa": ("RobertaForMaskedLM", BERT, ""),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", BERT, ""),
    "CamemBERT": ("CamembertForMaskedLM", BERT, ""),
    "ELECTRA": ("ElectraForMaskedLM", {**BERT, "embedding_size": 16}, ""),
    "DistilBERT": ("DistilBertForMaskedLM", {**DISTIL, "dropout": 0.0, "attention_dropout": 0.0}, ""),
    "ModernBERT": ("ModernBertForMaskedLM", {**TEXT, **MODERN}, ""),
    "ALBERT": ("AlbertForMaskedLM", {**BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0}, ""),
    "ERNIE": ("ErnieForMaskedLM", BERT, ""),
    "data2vec-text": ("Data2VecTextForMaskedLM", BERT, ""),
    "RoCBert": ("RoCBertForMaskedLM", {**BERT, "enable_pronunciation": False, "enable_shape": False}, ""),
    "LayoutLM": ("LayoutLMForMaskedLM", BERT, ""),
    "XLM-R-XL": ("XLMRobertaXLForMaskedLM", BERT, ""),
    "RoBERTa-PreLayerNorm": ("RobertaPreLayerNormForMaskedLM", BERT, ""),
    "ESM-2": (
        "EsmForMaskedLM",
        {**BERT, "position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4},
        "",
    ),
    "NomicBERT": ("NomicBertForMaskedLM", BERT, ""),
    "EuroBERT": ("EuroBertForMaskedLM", {**ROPE, "mask_token_id": 4}, ""),
    "UltraBERT": ("UltrabertForMaskedLM", {**ROPE, "sliding_window": 3, "prediction_head_size": 24}, ""),
    "BertGeneration (encoder)": ("BertGenerationEncoder", BERT, ""),
    "Llama with `is_causal=False` in its config": ("LlamaModel", {**ROPE, "is_causal": False}, ""),
    "MegatronBERT": ("MegatronBertForMaskedLM", BERT, ""),
    "MPNet": ("MPNetForMaskedLM", BERT, ""),
    "DeBERTa v2, v3": (
        "DebertaV2ForMaskedLM",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "",
    ),
    "DeBERTa v1": ("DebertaModel", BERT, ""),
    "BART (encoder)": ("BartModel", {**SEQ2SEQ, "max_position_embeddings": 40}, "encoder"),
    "Whisper (encoder)": (
        "WhisperModel",
        {**SEQ2SEQ, "max_source_positions": 8, "max_target_positions": 8, "num_mel_bins": 8},
        "encoder",
    ),
    "wav2vec 2.0": (
        "Wav2Vec2Model",
        {
            **SIZES,
            **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
            **{"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0},
            **{"mask_time_prob": 0.0},
        },
        "",
    ),
    "ViT": ("ViTModel", {**SIZES, **VIT, **NO_DROPOUT}, ""),
    "DeiT": ("DeiTModel", {**SIZES, **VIT, **NO_DROPOUT}, ""),
    "DINOv2": ("Dinov2Model", {**SIZES, **VIT, **NO_DROPOUT}, ""),
}


@functools.cache
def family_model(family: str) -> nn.Module:
    """The unfused float32 model in training mode, without dropout: copy it."""
    import transformers

    name, fields, part = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return randomised(cls(cls.config_class(**fields)).get_submodule(part)).train()


def family_inputs(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "Whisper (encoder)":
        return {"input_features": torch.randn(3, 8, 16, generator=generator).to(DEVICE)}
    if family == "wav2vec 2.0":
        mask = torch.arange(60) < torch.tensor([60, 33, 47])[:, None]
        values = torch.randn(3, 60, generator=generator) * mask
        return {"input_values": values.to(DEVICE), "attention_mask": mask.long().to(DEVICE)}
    return batch("vit" if "image_size" in FAMILIES[family][1] else "bert")


def falls_back(model: nn.Module, family: str) -> bool:
    """Whether a fused ``model`` warns that some attention does not run on the kernel."""
    attention_interface.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(**family_inputs(family))
    return any("SDPA attention runs instead of fusebert's" in str(warning.message) for warning in caught)


@functools.cache
def fused_kinds(family: str) -> tuple[str, str, str, str]:
    """The cells of the table, from what `fuse` reports: attention, norms, ``unpad``, ``mlm_loss``."""
    model = copy.deepcopy(family_model(family))
    first, alone = fuse(model), not falls_back(model, family)
    by = [entry.by for entry in (*first.replaced, *fuse(model, unpad=True, mlm_loss=True).replaced)]
    norms = [
        "LayerNorm with dropout and residual" if "dropout_add_layernorm" in by else "LayerNorm" * ("layernorm" in by),
        "RMSNorm" * ("rmsnorm" in by),
    ]
    padded = "attention_mask" in family_inputs(family)
    return (
        ("yes" if alone else "in packed batches") if any("attn_implementation" in each for each in by) else "no",
        ", ".join(filter(None, norms)) or "no",
        "yes" if any("packed" in each for each in by) else "no" if padded else "no padding",
        "yes" if any("masked_lm_loss" in each for each in by) else "no" if "MaskedLM" in FAMILIES[family][0] else "–",
    )


def table() -> str:
    """Families with equal cells share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        rows.setdefault(fused_kinds(family), []).append(family)
    lines = ["| model | attention | norms | `unpad=True` | `mlm_loss=True` |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {', '.join(families)} | {' | '.join(cells)} |" for cells, families in rows.items()]
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(before + BEGIN + "\n" + table() + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
