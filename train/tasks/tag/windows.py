"""Sentences of words to windows of tokens. The first token of a word carries its label (Devlin et al. 2018).

A sentence of more than ``seqlen`` tokens becomes several windows that overlap. Each word is read in the window in which
it has the most tokens on its nearer side, so that no word is left out and none counts twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ....model.hf.encoders import EncoderFolder
from ....model.hf.format import json_bytes
from ....model.hf.save_classifier import TOKENIZER_CONFIG, copied_tokenizer
from ...errors import UserError
from ..embed import blocks
from ..tokens import EncodedText, TextTokenizer

OVERLAP = 128  # tokens, or half of a window that is shorter than twice that


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a sentence.

    Attributes:
        text: its tokens.
        sentence: number of the sentence.
        words: int64 [k], the words that are read here, by number in the sentence.
        rows: int64 [k], the first token of each.
    """

    text: EncodedText
    sentence: int
    words: np.ndarray
    rows: np.ndarray


class WordTokenizer:
    """The tokenizer of ``folder`` for texts that are split into words.

    Args:
        seqlen: the most tokens of a window; None: what the folder says, or the model's positions.
        overlap: tokens that a window shares with the one before; None: `OVERLAP`.

    Attributes:
        seqlen: the most tokens of a window.
        without_token: number of words so far that have no token, such as control characters.

    Raises:
        UserError: as `TextTokenizer`, or ``overlap`` is not below what a window holds.
    """

    def __init__(self, folder: EncoderFolder, seqlen: int | None = None, overlap: int | None = None) -> None:
        from tokenizers import Tokenizer

        plain = TextTokenizer(folder, seqlen)
        self.seqlen = plain.seqlen
        self.without_token = 0
        self._folder, self._types = folder, folder.family.token_types
        pipeline = json.loads(plain.tokenizer.to_str())
        self._tokenizer = Tokenizer.from_str(json.dumps(pipeline)) if _separate_words(pipeline) else plain.tokenizer
        self._content = self.seqlen - self._tokenizer.num_special_tokens_to_add(is_pair=False)
        overlap = min(OVERLAP, self._content // 2) if overlap is None else overlap
        if not 0 <= overlap < self._content:
            raise UserError(
                f"--stride must be from 0 to {self._content - 1}, as a window has {self._content} tokens of text; got "
                f"{overlap}"
            )
        self._step = self._content - overlap
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.seqlen, stride=overlap)

    def __call__(self, sentences: Sequence[Sequence[str]]) -> list[Window]:
        """The windows of all sentences, in their order."""
        windows: list[Window] = []
        with tqdm(
            total=len(sentences), unit=" sentences", desc="tokens", dynamic_ncols=True, disable=None, leave=False
        ) as bar:
            for block in blocks(enumerate(sentences)):
                for number, encoding in zip(
                    (number for number, _ in block),
                    self._tokenizer.encode_batch([list(words) for _, words in block], is_pretokenized=True),
                    strict=True,
                ):
                    windows += self._windows(number, [encoding, *encoding.overflowing], len(sentences[number]))
                bar.update(len(block))
        return windows

    def _windows(self, sentence: int, encodings: Sequence[Any], num_words: int) -> list[Window]:
        """The windows of one sentence. The words that are read fit together to all words that have a token."""
        spans = []  # of each window: the place of its first token of text in it, and its tokens' words
        for encoding in encodings:
            owners = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
            places = np.flatnonzero(owners >= 0)
            before = int(places[0]) if len(places) else 0
            spans.append((before, owners[before : int(places[-1]) + 1] if len(places) else owners[:0]))
        total = self._step * (len(spans) - 1) + len(spans[-1][1])
        owner = np.empty(total, dtype=np.int64)  # [tokens of the sentence]
        for i, (_, owners) in enumerate(spans):
            owner[i * self._step : i * self._step + len(owners)] = owners
        first = np.flatnonzero(np.diff(owner, prepend=-1))  # the first token of each word
        self.without_token += num_words - len(first)
        reach = np.full((len(spans), len(first)), -1)  # tokens on the nearer side, within the window
        for i, (_, owners) in enumerate(spans):
            left = first - i * self._step
            inside = (left >= 0) & (left < len(owners))
            right = len(owners) - 1 - left
            whole_left, whole_right = i == 0, i == len(spans) - 1  # the sentence ends there, not only the window
            near = np.minimum(total if whole_left else left, total if whole_right else right)
            reach[i, inside] = near[inside] if near.ndim else near
        best = reach.argmax(0)
        windows = []
        for i, (encoding, (before, _)) in enumerate(zip(encodings, spans, strict=True)):
            chosen = first[best == i]
            ids = np.array(encoding.ids, dtype=np.int64)
            types = np.array(encoding.type_ids, dtype=np.int64) if self._types else np.zeros_like(ids)
            rows = chosen - i * self._step + before
            windows.append(Window(EncodedText(ids, types), sentence, owner[chosen], rows))
        return windows

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files for a folder, as `copied_tokenizer`."""
        files = copied_tokenizer(self._folder.directory, self.seqlen)
        pipeline = json.loads(files.get("tokenizer.json", b"{}"))
        if _separate_words(pipeline):
            settings = json.loads(files[TOKENIZER_CONFIG])
            files["tokenizer.json"] = json.dumps(pipeline, ensure_ascii=False).encode()
            files[TOKENIZER_CONFIG] = json_bytes({**settings, "add_prefix_space": True})
        return files

    def warning(self) -> str | None:
        """What to tell the user about words without a token."""
        if not self.without_token:
            return None
        return f"{self.without_token:,} words have no token (such as control characters): nothing is predicted there"


def _separate_words(pipeline: dict[str, Any]) -> bool:
    """Makes a byte-level tokenizer.json set a space before each word, as within a text; whether that is a change."""
    step = pipeline.get("pre_tokenizer") or {}
    changed = False
    for each in step.get("pretokenizers", [step]):
        if each.get("type") == "ByteLevel" and not each["add_prefix_space"]:
            each["add_prefix_space"] = changed = True
    return changed
