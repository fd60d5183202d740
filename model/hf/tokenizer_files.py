"""The tokenizer's files of a Hugging Face folder, from one tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BertConfig
from .format import json_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def tokenizer_files(path: Path, config: BertConfig) -> dict[str, bytes]:
    """File name → content, for all files that AutoTokenizer needs.

    Raises:
        ValueError: ``path`` is not a tokenizer.json, or it has more tokens than ``config.vocab_size``.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ValueError(f"tokenizer must be a tokenizer.json; {path} is not a file")
    content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"{path} has {num_tokens} tokens, but the model's vocab_size is {config.vocab_size}: give the tokenizer "
            "that the model was trained with"
        )
    if _as_trained(tokenizer):
        content = tokenizer.to_str(pretty=True).encode()
    special = {role: token for role, token in BERT_SPECIAL_TOKENS.items() if tokenizer.token_to_id(token) is not None}
    settings = {
        **_tokenizer_class(json.loads(tokenizer.to_str())),
        **special,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": json_bytes(settings),
        "special_tokens_map.json": json_bytes(special),
    }
    vocabulary = _vocabulary(tokenizer)
    if vocabulary is not None:
        files["vocab.txt"] = "".join(f"{token}\n" for token in vocabulary).encode()
    return files


def _as_trained(tokenizer: Tokenizer) -> bool:
    """Makes the tokenizer encode as pretraining does: [CLS] A [SEP] and [CLS] A [SEP] B [SEP] with the types 0 and 1,
    without padding and truncation. Whether that changed it."""
    from tokenizers.processors import TemplateProcessing

    changed = tokenizer.padding is not None or tokenizer.truncation is not None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    cls, sep = (tokenizer.token_to_id(BERT_SPECIAL_TOKENS[role]) for role in ("cls_token", "sep_token"))
    if cls is None or sep is None:
        return changed
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    one, two = tokenizer.encode("a"), tokenizer.encode("a", "b")
    wanted = ([cls, *a, sep], [cls, *a, sep, *b, sep], [0] * (len(a) + 2) + [1] * (len(b) + 1))
    if (one.ids, two.ids, two.type_ids) == wanted:
        return changed
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return True


def _tokenizer_class(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The class, and its settings, with which Transformers does what the tokenizer.json ``pipeline`` describes.

    Transformers' BertTokenizer builds BERT's pipeline from the vocabulary and its settings, so it is used only if
    ``pipeline`` is exactly BERT's. PreTrainedTokenizerFast runs any other pipeline as written.
    """
    model, normalizer, added = pipeline["model"], pipeline["normalizer"] or {}, pipeline["added_tokens"]
    if (
        model["type"] == "WordPiece"
        and model["unk_token"] == "[UNK]"
        and model["continuing_subword_prefix"] == "##"
        and model["max_input_chars_per_word"] == 100
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and pipeline["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and pipeline["post_processor"]
        and {token["content"] for token in added} >= set(BERT_SPECIAL_TOKENS.values())
    ):
        return {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def _vocabulary(tokenizer: Tokenizer) -> list[str] | None:
    """The tokens in the order of their ids if the model is a WordPiece and no id is missing, else None."""
    from tokenizers.models import WordPiece

    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    complete = [ids[token] for token in tokens] == list(range(len(tokens)))
    return tokens if complete and isinstance(tokenizer.model, WordPiece) else None
