"""BERT's WordPiece tokenizer (Devlin et al. 2018): trained on text, or read from a file.

Text is cleaned, lower-cased and stripped of accents (unless cased), and split at spaces, punctuation and ideographs.
Each word becomes, from left to right, the longest pieces in the vocabulary; pieces that continue a word start with
"##". Training merges the most frequent pair of pieces repeatedly.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..errors import UserError
from .special_tokens import MAX_VOCAB_SIZE, SPECIAL_TOKENS

VOCAB_SIZE = 30522
_MIN_FREQUENCY = 2  # of a pair of pieces that is merged
_ALPHABET = 1000  # BERT's limit on single characters; others are [UNK]
_LONGEST_WORD = 100  # characters; BERT's limit too
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")
_MOST_BYTES = 128 << 20  # of a tokenizer.json or vocab.txt


def train_tokenizer(texts: Sequence[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Trains a WordPiece tokenizer on ``texts``. The vocabulary does not depend on their order.

    Args:
        texts: read twice.
        vocab_size: size of the vocabulary, with the special tokens as ids 0 … 4. A text with too few repeated pieces
            gives a smaller one.
        lowercase: fold case and strip accents.

    Raises:
        ValueError: vocab_size is below 16 or above `MAX_VOCAB_SIZE`.
    """
    if not 16 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be in [16, {MAX_VOCAB_SIZE}]; got {vocab_size}")
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    texts = [_without_long_words(text, normalizer) for text in texts]
    letters: collections.Counter[str] = collections.Counter()
    words: set[str] = set()
    for text in texts:
        letters.update(text)
        words.update(text.split())
    folded: collections.Counter[str] = collections.Counter()
    for letter, count in letters.items():
        for character in normalizer.normalize_str(letter).split():
            folded.update(dict.fromkeys(character, count))
    # Letters and "##" letters together are at most two thirds of a small vocabulary.
    alphabet = sorted(folded, key=lambda c: (-folded[c], c))[: min(_ALPHABET, vocab_size // 3)]

    # The trainer numbers "##a", "##b", … in the order of a hash table and breaks ties between pairs by them, so two
    # runs differ. Passing the "##" letters as special tokens fixes the numbers. A first training, for a vocabulary of
    # single characters, finds these letters.
    def train(texts: Iterable[str], size: int, first: list[str]) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    special = list(SPECIAL_TOKENS)
    characters = train(sorted(words), 0, special)
    continuing = sorted(token for token in characters if token.startswith("##") and len(token) > 2)
    return bert_tokenizer(train(texts, vocab_size, special + continuing), lowercase)


def _without_long_words(text: str, normalizer: normalizers.Normalizer) -> str:
    """``text`` without the words that become [UNK] for their length.

    They are no words (encoded data, tables), and the time of the training grows with the square of their length.
    """

    def short_words(run: re.Match[str]) -> str:
        words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalizer.normalize_str(run[0]))
        return " ".join(word for word, _ in words if len(word) <= _LONGEST_WORD)

    return _LONG_RUN.sub(short_words, text)


def bert_tokenizer(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer with ``vocab`` (token → id, special tokens too), equal to Transformers' BertTokenizerFast."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def load_tokenizer(path: Path, lowercase: bool | None = None) -> Tokenizer:
    """Reads a WordPiece tokenizer.

    Args:
        path: a tokenizer.json, or a vocab.txt with one token per line.
        lowercase: for a vocab.txt, whether to lower-case text; None: unless the vocabulary has capitals. Must be None
            for a tokenizer.json, which states it.

    Raises:
        UserError: the file is missing, of another kind, not a WordPiece tokenizer, lacks special tokens, or has an id
            from `MAX_VOCAB_SIZE` on.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        if path.is_dir():
            what = "is a folder: name the tokenizer.json or vocab.txt in it"
        raise UserError(f"--tokenizer {path} {what}")
    if path.suffix == ".json":
        if lowercase is not None:
            raise UserError(f"{path} states how text is normalised: leave out --lowercase/--cased")
        tokenizer = _load_json(path)
    elif path.suffix == ".txt":
        tokenizer = _load_vocab(path, lowercase)
    else:
        raise UserError(f"--tokenizer {path}: the name must end in .json (tokenizer.json) or .txt (vocab.txt)")
    return tokenizer


def encoder(tokenizer_file: Path) -> Tokenizer:
    """The tokenizer in ``tokenizer_file``, set to encode a corpus.

    It does not truncate or pad, and encodes "[MASK]" in a text as characters, not as the special token.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _load_json(path: Path) -> Tokenizer:
    from ...model.json_file import read_json  # loads PyTorch, which the workers that encode do without

    try:
        kind = read_json(path, _MOST_BYTES)["model"].get("type", "WordPiece")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("a", "b")  # a post-processor that does not fit panics only now
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception; a Rust panic is a BaseException
        raise UserError(f"{path} is not a tokenizer.json ({' '.join(str(error).split())})") from error
    if kind != "WordPiece":
        raise UserError(f"{path} is a {kind} tokenizer: give a WordPiece tokenizer, as BERT has")
    _check_special(path, tokenizer.get_vocab())
    return tokenizer


def _load_vocab(path: Path, lowercase: bool | None) -> Tokenizer:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is not a vocab.txt: it is longer than {_MOST_BYTES >> 20} MiB")
        tokens = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a vocab.txt: not UTF-8 at byte {error.start}") from error
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not token or vocab.setdefault(token, index) != index:
            what = f"{token!r} a second time" if token else "an empty line"
            raise UserError(f"{path}:{index + 1}: {what}; a vocab.txt has one token per line, each once")
    _check_special(path, vocab)
    if lowercase is None:
        lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
    return bert_tokenizer(vocab, lowercase)


def _check_special(path: Path, vocab: dict[str, int]) -> None:
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"the tokenizer {path} lacks the special tokens {', '.join(missing)}")
    token = max(vocab, key=lambda token: vocab[token])
    if vocab[token] >= MAX_VOCAB_SIZE:
        raise UserError(
            f"the tokenizer {path} gives {token!r} the id {vocab[token]}: ids must be below {MAX_VOCAB_SIZE}, because "
            "tables have a row for every id"
        )
