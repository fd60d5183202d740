"""The tokenizer's files of a Hugging Face folder, from one tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BertConfig
from .format import json_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# BERT's first, then those of RoBERTa and of vocabularies of SentencePiece.
SPECIAL_TOKENS = {
    "unk_token": ("[UNK]", "<unk>"),
    "sep_token": ("[SEP]", "</s>", "<sep>", "<eos>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>", "<cls>"),
    "mask_token": ("[MASK]", "<mask>"),
}
BERT_SPECIAL_TOKENS = {names[0] for names in SPECIAL_TOKENS.values()}


def tokenizer_files(path: Path, config: BertConfig, model_max_length: int | None = None) -> dict[str, bytes]:
    """File name → content, for all files that AutoTokenizer needs.

    Args:
        model_max_length: where Transformers cuts texts; None: at the model's positions.

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
    special = special_tokens(tokenizer)
    if _as_trained(tokenizer, special):
        content = tokenizer.to_str(pretty=True).encode()
    settings = {
        **_tokenizer_class(json.loads(tokenizer.to_str())),
        **special,
        "model_max_length": model_max_length or config.max_position_embeddings,
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


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's token for each role, such as ``cls_token``, of which it has one."""
    found = {
        role: next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        for role, names in SPECIAL_TOKENS.items()
    }
    return {role: name for role, name in found.items() if name is not None}


def _as_trained(tokenizer: Tokenizer, special: dict[str, str]) -> bool:
    """Makes the tokenizer encode as pretraining does: [CLS] A [SEP] and [CLS] A [SEP] B [SEP] with the types 0 and 1,
    without padding and truncation. Whether that changed it.

    Args:
        special: of `special_tokens`.
    """
    from tokenizers.processors import TemplateProcessing

    changed = tokenizer.padding is not None or tokenizer.truncation is not None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    names = [special.get(role) for role in ("cls_token", "sep_token")]
    cls, sep = (None if name is None else tokenizer.token_to_id(name) for name in names)
    if cls is None or sep is None:
        return changed
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    one, two = tokenizer.encode("a"), tokenizer.encode("a", "b")
    wanted = ([cls, *a, sep], [cls, *a, sep, *b, sep], [0] * (len(a) + 2) + [1] * (len(b) + 1))
    if (one.ids, two.ids, two.type_ids) == wanted:
        return changed
    tokenizer.post_processor = TemplateProcessing(
        single="{}:0 $A:0 {}:0".format(*names),
        pair="{0}:0 $A:0 {1}:0 $B:1 {1}:1".format(*names),
        special_tokens=[(names[0], cls), (names[1], sep)],
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
        and {token["content"] for token in added} >= BERT_SPECIAL_TOKENS
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
