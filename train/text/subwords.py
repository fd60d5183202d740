"""Vocabularies without [UNK], beside BERT's WordPiece: byte-level BPE and unigram with bytes, trained on text.

bpe       a word is UTF-8 bytes, and the most frequent pair of pieces is merged again and again (Radford et al. 2019, as
          in RoBERTa)
unigram   of the segmentations of a word the likeliest, pieces independent of each other (Kudo 2018, as in XLM-R); a
          character without a piece becomes its bytes

Both keep spaces: a piece that begins a word begins with one, so decoding gives the text back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .special_tokens import MAX_VOCAB_SIZE, SMALLEST_SUBWORDS, SPECIAL_TOKENS, UNKNOWN
from .tokenizer import as_in_pretraining, cut_long_runs, without_long_words

_MIN_FREQUENCY = 2  # of a pair of pieces that is merged
_LONGEST_PIECE = 16  # characters of a unigram piece, SentencePiece's limit
# Words for byte-level BPE, each with the space before it. GPT-2's pattern cuts a word at every combining mark, so that
# Indic scripts fall into single letters.
_WORD = Regex(r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+")
_SPACES_FIRST = Regex(r"\A +")
_NEVER = -1e6  # log probability of a special token's own name, so that it is not read in a text
_BYTE = -30.0  # log probability of a byte: below any piece's, so that bytes are the last resort


def train_bpe(
    texts: Sequence[str], vocab_size: int, lowercase: bool, *, strip_accents: bool | None = None, cut_runs: bool = False
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on ``texts``. The vocabulary does not depend on their order.

    Args:
        texts, vocab_size, lowercase, strip_accents: as in `tokenizer.train_tokenizer`.
        cut_runs: learn from words of over 100 characters too, in pieces of 50; they are encoded whole.

    Raises:
        ValueError: vocab_size is below `SMALLEST_SUBWORDS` or above `MAX_VOCAB_SIZE`.
    """
    normalizer = _normalizer(vocab_size, lowercase, strip_accents)
    tokenizer = Tokenizer(models.BPE())
    # The first word gets its space. After a special token in a text it has one.
    space = [normalizers.Prepend(" "), normalizers.Replace(_SPACES_FIRST, " ")]
    tokenizer.normalizer = normalizers.Sequence([*space, normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORD, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_to_learn(texts, normalizer, cut_runs), trainer)
    return as_in_pretraining(tokenizer)


def train_unigram(
    texts: Sequence[str], vocab_size: int, lowercase: bool, *, strip_accents: bool | None = None, cut_runs: bool = False
) -> Tokenizer:
    """Trains a unigram tokenizer on ``texts``. The ids do not depend on their order; the probabilities of two trainings
    on the same texts may differ in the fourth digit.

    Args:
        texts, vocab_size, lowercase, strip_accents, cut_runs: as in `train_bpe`.

    Raises:
        ValueError: as in `train_bpe`.
    """
    normalizer = _normalizer(vocab_size, lowercase, strip_accents)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(bytes_),
        special_tokens=list(SPECIAL_TOKENS),
        unk_token=UNKNOWN,
        # A character without a piece would make the special token the likelier reading of its own name.
        initial_alphabet=sorted(set("".join(SPECIAL_TOKENS))),
        max_piece_length=_LONGEST_PIECE,
        show_progress=False,
    )
    learner.train_from_iterator(_to_learn(texts, normalizer, cut_runs), trainer)
    # In alphabetical order, because the order of pieces that are as likely changes from training to training.
    pieces = sorted((piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"])
    learned = [(piece, score) for piece, score in pieces if piece not in SPECIAL_TOKENS]
    special = [(token, _NEVER) for token in SPECIAL_TOKENS]
    vocab = [*special, *((byte, _BYTE) for byte in bytes_), *learned]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL_TOKENS.index(UNKNOWN), byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return as_in_pretraining(tokenizer)


LEARNERS: dict[str, Callable[..., Tokenizer]] = {"bpe": train_bpe, "unigram": train_unigram}


def _normalizer(vocab_size: int, lowercase: bool, strip_accents: bool | None) -> normalizers.Normalizer:
    """BERT's, without spaces around ideographs, which decoding would keep."""
    if not SMALLEST_SUBWORDS <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be in [{SMALLEST_SUBWORDS}, {MAX_VOCAB_SIZE}]; got {vocab_size}")
    return normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=False)


def _to_learn(texts: Sequence[str], normalizer: normalizers.Normalizer, cut_runs: bool) -> list[str]:
    """``texts`` without words of over 100 characters, or with these cut: they would take most of the time."""
    return [cut_long_runs(text) if cut_runs else without_long_words(text, normalizer) for text in texts]
