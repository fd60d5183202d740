"""Predictions for masked words in held-out sentences."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...model.batch import IGNORE, PackedBatch
from ...model.pretraining import BertForPreTraining
from ..corpus.reader import Corpus

TOP = 5


@dataclasses.dataclass(frozen=True)
class Guess:
    """A held-out sentence with one word masked.

    Attributes:
        sentence: the text with [MASK] in place of the word.
        truth: the masked word.
        guesses: the model's five likeliest tokens, each with its probability.
    """

    sentence: str
    truth: str
    guesses: list[tuple[str, float]]


@torch.no_grad()
def guess_masked_words(model: BertForPreTraining, corpus: Corpus, seqlen: int, count: int = 5) -> list[Guess]:
    """The model's guesses for one masked word in each of ``count`` held-out sentences, always the same sentences.

    Fewer if the held-out text has too few sentences of prose.

    Args:
        seqlen: longest segment in tokens.
    """
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(corpus.tokenizer_path))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    guesses = []
    for ids, masked in _sentences(corpus, tokenizer, seqlen, count):
        truth = ids[masked]
        tokens = [corpus.special.cls, *ids, corpus.special.sep]
        tokens[masked + 1] = corpus.special.mask
        hidden = model.encode(_one_segment(tokens).to(device))  # (T, H)
        # Rows that pad the vocabulary to a multiple have no token.
        probabilities = model.predict_tokens(hidden[masked + 1]).float().softmax(-1)[: corpus.vocab_size]  # (V,)
        best = torch.topk(probabilities, TOP)
        # Decode in two parts, because the tokenizer skips [MASK].
        text = f"{tokenizer.decode(ids[:masked])} [MASK] {tokenizer.decode(ids[masked + 1 :])}"
        names = [_shown(tokenizer, i) for i in best.indices.tolist()]
        likeliest = list(zip(names, best.values.tolist(), strict=True))
        guesses.append(Guess(text.strip(), _shown(tokenizer, truth), likeliest))
    model.train(was_training)
    return guesses


def _sentences(corpus: Corpus, tokenizer: Any, seqlen: int, count: int) -> list[tuple[list[int], int]]:
    """(token ids of a held-out sentence, index of the word to mask), at most ``count``, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    shards = corpus.split("heldout").shards
    found: list[tuple[list[int], int]] = []
    for _ in range(400 * count):
        shard = shards[rng.integers(len(shards))]
        at = int(rng.integers(shard.num_sentences))
        ids = shard.tokens[shard.sentences[at] : shard.sentences[at + 1]].tolist()
        if not 8 <= len(ids) <= min(32, seqlen - 2):
            continue
        pieces = [_shown(tokenizer, i).removeprefix("##") for i in ids]
        # Prose, not code or tables: at least 80 % of the tokens are words or pieces of words.
        if sum(map(_is_word, pieces)) < 0.8 * len(pieces):
            continue
        continues = corpus.continues_word[[*ids, corpus.special.sep]]
        words = [
            i
            for i, piece in enumerate(pieces)
            if i > 0 and _is_word(piece, least=3) and not continues[i] and not continues[i + 1]
        ]
        if words and all(ids != other for other, _ in found):
            found.append((ids, int(rng.choice(words))))
        if len(found) == count:
            break
    return found


def _shown(tokenizer: Any, token: int) -> str:
    """The text of a token, or its name if it is no whole character."""
    text: str = tokenizer.decode([token]).strip()
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else tokenizer.id_to_token(token)


def _is_word(piece: str, least: int = 1) -> bool:
    """Whether ``piece`` is letters with their marks. In a script with capitals they are ``least`` or more."""
    letters = bool(piece) and all(unicodedata.category(character)[0] in "LM" for character in piece)
    return letters and (len(piece) >= least or piece.lower() == piece.upper())


def _one_segment(tokens: Sequence[int]) -> PackedBatch:
    """A batch of a single segment without labels."""
    length = len(tokens)
    return PackedBatch(
        input_ids=torch.tensor(tokens),
        token_type_ids=torch.zeros(length, dtype=torch.int64),
        position_ids=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        masked_positions=torch.zeros(1, dtype=torch.int64),
        masked_labels=torch.full((1,), IGNORE),
        nsp_labels=torch.full((1,), IGNORE),
        max_seqlen=length,
        num_tokens=length,
        num_masked=0,
        num_pairs=0,
    )
