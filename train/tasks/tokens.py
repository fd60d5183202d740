"""Texts to token ids with the tokenizer of a model's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.hf.encoders import EncoderFolder
from ...model.hf.folder import read_settings
from ..errors import UserError
from ..text.tokenizer import bert_tokenizer

CONFIG = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Token ids and token types of a text or a pair, special tokens included: int64 [n] both."""

    ids: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class TextTokenizer:
    """The tokenizer of ``folder``, which cuts long texts.

    Args:
        seqlen: the most tokens of a text or a pair; None: what the folder says, or the model's positions.

    Attributes:
        seqlen: the most tokens.
        tokenizer: of the library tokenizers.
        cut: number of texts cut so far.

    Raises:
        UserError: there is no tokenizer in the folder, it does not fit the model, or ``seqlen`` does not.
    """

    def __init__(self, folder: EncoderFolder, seqlen: int | None = None) -> None:
        positions = folder.config.max_position_embeddings
        self.tokenizer = load_tokenizer(folder)
        special = self.tokenizer.num_special_tokens_to_add(is_pair=True)
        if seqlen is not None and not special < seqlen <= positions:
            raise UserError(f"--seqlen must be from {special + 1} to {positions}, the model's positions; got {seqlen}")
        self.seqlen = min(seqlen or _stated_length(folder.directory) or positions, positions)
        self.cut = 0
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.seqlen)
        self._types = folder.family.token_types

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[EncodedText]:
        """Encodes the texts, or the pairs of texts."""
        given: Any = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = []
        for each in self.tokenizer.encode_batch(given):
            self.cut += bool(each.overflowing)
            ids = np.array(each.ids, dtype=np.int64)
            types = np.array(each.type_ids, dtype=np.int64) if self._types else np.zeros_like(ids)
            encoded.append(EncodedText(ids, types))
        return encoded

    def warning(self) -> str | None:
        """What to tell the user about texts that were cut."""
        if not self.cut:
            return None
        return f"{self.cut:,} texts have more than {self.seqlen} tokens: their ends were left out (--seqlen)"


def load_tokenizer(folder: EncoderFolder) -> Any:
    """The folder's tokenizer.json; else BERT's tokenizer from its vocab.txt.

    Raises:
        UserError: there is neither, or it does not fit the model.
    """
    from tokenizers import Tokenizer

    directory = folder.directory
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except (OSError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception; a Rust panic is a BaseException
            raise UserError(f"{path} is not a tokenizer.json ({' '.join(str(error).split())})") from error
    elif (directory / "vocab.txt").is_file() and folder.family.class_name != "Roberta":
        tokens = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
        vocabulary = {token: i for i, token in enumerate(tokens)}
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in vocabulary]
        if missing:
            raise UserError(f"{directory / 'vocab.txt'} lacks the special tokens {', '.join(missing)}")
        settings = read_settings(directory / CONFIG) if (directory / CONFIG).is_file() else {}
        tokenizer = bert_tokenizer(vocabulary, bool(settings.get("do_lower_case", True)))
    else:
        raise UserError(
            f"{directory} has no tokenizer.json: make one with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= folder.config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has the id {largest}, but the model's vocab_size is "
            f"{folder.config.vocab_size}: give the tokenizer that the model was trained with"
        )
    return tokenizer


def _stated_length(directory: Path) -> int | None:
    """The length that the folder states: as sentence-transformers wrote it, else as Transformers did."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), (CONFIG, "model_max_length")):
        length = read_settings(directory / name).get(key) if (directory / name).is_file() else None
        if isinstance(length, int) and length > 0:  # Transformers writes 10³⁰ for "no limit"
            return length
    return None
