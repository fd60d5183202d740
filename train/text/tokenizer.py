"""BERT's WordPiece tokenizer (Devlin et al. 2018), trained on text; and tokenizers of any kind, read from a file.

Text is cleaned, lower-cased and stripped of accents (unless cased, or in a script that spells with them), and split at
spaces, punctuation and ideographs. Each word becomes, from left to right, the longest pieces in the vocabulary; pieces
that continue a word start with "##". Training merges the most frequent pair of pieces repeatedly.

A word of over 100 characters is [UNK]. In a text where this loses something (Thai, Khmer, DNA, which have no spaces),
longer runs are first cut into words of 50 characters, for the learner and the encoder alike.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..errors import UserError
from .characters import count_characters, is_ideograph, loses_marks
from .special_tokens import MAX_VOCAB_SIZE, SPECIAL_TOKENS, special_ids, special_names

KINDS = ("WordPiece", "BPE", "Unigram")
VOCAB_SIZE = 30522
COVERAGE = 0.9999  # share of the words of which every character gets a token, if the vocabulary has room
LOST_TO_LENGTH = 5e-4  # share of the characters in words of over 100 characters from which on words are cut
_MIN_FREQUENCY = 2  # of a pair of pieces that is merged
_ALPHABET = 1000  # BERT's number of single characters; more only where `COVERAGE` needs them
_LONGEST_WORD = 100  # characters; BERT's limit too
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")
# While over 100 characters are left: 50 of them, and the marks that belong to the last one.
_CUT = Regex(rf"(?=.{{{_LONGEST_WORD + 1}}})(?>.{{50}}\p{{M}}{{0,8}})")
_MOST_BYTES = 128 << 20  # of a tokenizer.json or vocab.txt


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, lowercase: bool, *, strip_accents: bool | None = None, cut_runs: bool = False
) -> Tokenizer:
    """Trains a WordPiece tokenizer on ``texts``. The vocabulary does not depend on their order.

    Args:
        texts: read twice.
        vocab_size: size of the vocabulary, with the special tokens as ids 0 … 4. A text with too few repeated pieces
            gives a smaller one.
        lowercase: fold case.
        strip_accents: remove accents and other marks; None: as ``lowercase``.
        cut_runs: cut words of over 100 characters. Otherwise they are [UNK], and nothing is learned from them.

    Raises:
        ValueError: vocab_size is below 16 or above `MAX_VOCAB_SIZE`.
    """
    if not 16 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be in [16, {MAX_VOCAB_SIZE}]; got {vocab_size}")
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    if not cut_runs:
        texts = [without_long_words(text, normalizer) for text in texts]
    words: set[str] = set()
    num_words = 0
    for text in texts:
        found = text.split()
        num_words += len(found)
        words.update(found)
    folded: collections.Counter[str] = collections.Counter()
    for letter, count in count_characters(texts).items():
        for character in normalizer.normalize_str(letter).split():
            folded.update(dict.fromkeys(character, count))
    alphabet = _choose_alphabet(folded, num_words, vocab_size)

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
        tokenizer.pre_tokenizer = _pre_tokenizer(cut_runs)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    special = list(SPECIAL_TOKENS)
    characters = train(sorted(words), 0, special)
    continuing = sorted(token for token in characters if token.startswith("##") and len(token) > 2)
    vocab = train(texts, vocab_size, special + continuing)
    return bert_tokenizer(vocab, lowercase, strip_accents=strip_accents, cut_runs=cut_runs)


def _choose_alphabet(counts: Mapping[str, int], num_words: int, vocab_size: int) -> list[str]:
    """The characters that get tokens: the most frequent ones, in two thirds of the vocabulary at most.

    They are `_ALPHABET`, or more until the words with another character are at most 1 − `COVERAGE` of all words.
    """
    by_count = sorted(counts, key=lambda character: (-counts[character], character))
    lost = sum(counts.values())  # at most so many words have a character that is not chosen yet
    allowed = (1 - COVERAGE) * (num_words + sum(n for character, n in counts.items() if is_ideograph(character)))
    room = 2 * (vocab_size // 3)
    alphabet: list[str] = []
    for character in by_count:
        room -= 1 if is_ideograph(character) else 2  # "##a" beside "a"; an ideograph is always a word of its own
        if room < 0 or (len(alphabet) >= _ALPHABET and lost <= allowed):
            break
        alphabet.append(character)
        lost -= counts[character]
    return alphabet


def cut_long_runs(text: str) -> str:
    """``text`` with spaces in words of over 100 characters, after every 50."""

    def cut(run: re.Match[str]) -> str:
        return " ".join(piece for piece, _ in pre_tokenizers.Split(_CUT, "isolated").pre_tokenize_str(run[0]))

    return _LONG_RUN.sub(cut, text)


def share_in_long_words(texts: Iterable[str]) -> float:
    """The share of the characters, spaces left out, in words of over 100 characters, which are [UNK] unless cut."""
    pre_tokenizer, total, lost = pre_tokenizers.BertPreTokenizer(), 0, 0
    for text in texts:
        total += len(text) - text.count(" ")
        for run in _LONG_RUN.findall(text):
            words = pre_tokenizer.pre_tokenize_str(_SET_APART.normalize_str(run))
            lost += sum(len(word) for word, _ in words if len(word) > _LONGEST_WORD)
    return lost / total if total else 0.0


def words_too_long(text: str, tokenizer: Tokenizer) -> int:
    """How many words of ``text`` are [UNK] because they have over 100 characters, which is WordPiece's limit."""
    if not isinstance(tokenizer.model, models.WordPiece):
        return 0
    count = 0
    for run in _LONG_RUN.findall(text):
        run = tokenizer.normalizer.normalize_str(run) if tokenizer.normalizer is not None else run
        words = tokenizer.pre_tokenizer.pre_tokenize_str(run) if tokenizer.pre_tokenizer is not None else [(run, None)]
        count += sum(len(word) > _LONGEST_WORD for word, _ in words)
    return count


def has_token(character: str, tokenizer: Tokenizer) -> bool:
    """Whether a word with ``character`` can be made of tokens."""
    if not isinstance(tokenizer.model, models.WordPiece):
        unk = special_ids(tokenizer.get_vocab()).unk
        return unk not in tokenizer.encode(character, add_special_tokens=False).ids
    text = tokenizer.normalizer.normalize_str(character) if tokenizer.normalizer is not None else character
    prefix = tokenizer.model.continuing_subword_prefix
    return all(
        tokenizer.token_to_id(part) is not None or tokenizer.token_to_id(prefix + part) is not None
        for part in text
        if not part.isspace()
    )


_SET_APART = normalizers.BertNormalizer(lowercase=False, strip_accents=False)  # spaces around ideographs, nothing else


def without_long_words(text: str, normalizer: normalizers.Normalizer) -> str:
    """``text`` without the words that become [UNK] for their length.

    They are no words (encoded data, tables), and the time of the training grows with the square of their length.
    """

    def short_words(run: re.Match[str]) -> str:
        words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalizer.normalize_str(run[0]))
        return " ".join(word for word, _ in words if len(word) <= _LONGEST_WORD)

    return _LONG_RUN.sub(short_words, text)


def _pre_tokenizer(cut_runs: bool) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.BertPreTokenizer()
    return pre_tokenizers.Sequence([words, pre_tokenizers.Split(_CUT, "isolated")]) if cut_runs else words


def bert_tokenizer(
    vocab: dict[str, int],
    lowercase: bool,
    *,
    strip_accents: bool | None = None,
    ideographs_apart: bool = True,
    cut_runs: bool = False,
) -> Tokenizer:
    """BERT's tokenizer with ``vocab`` (token → id, special tokens too), equal to Transformers' BertTokenizerFast.

    Args:
        lowercase, strip_accents, cut_runs: as in `train_tokenizer`; with ``cut_runs`` it is no longer BERT's own.
        ideographs_apart: each CJK ideograph is a word.
    """
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=ideographs_apart
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(cut_runs)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return as_in_pretraining(tokenizer)


def as_in_pretraining(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer``, which has `SPECIAL_TOKENS`, set to make [CLS] A [SEP] and [CLS] A [SEP] B [SEP]."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def load_tokenizer(path: Path, lowercase: bool | None = None, strip_accents: bool | None = None) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        path: a tokenizer.json of a WordPiece, BPE or unigram model, or a vocab.txt with one WordPiece token per line. A
            tokenizer_config.json beside a vocab.txt says how text is normalised.
        lowercase: for a vocab.txt, whether to lower-case text; None: as tokenizer_config.json says, else unless the
            vocabulary has capitals. Must be None for a tokenizer.json, which states it.
        strip_accents: for a vocab.txt, whether to remove accents; None: as tokenizer_config.json says, else as
            ``lowercase``, unless the vocabulary has tokens that lose a mark. Must be None for a tokenizer.json.

    Raises:
        UserError: the file is missing, of another kind, lacks special tokens, or has an id from `MAX_VOCAB_SIZE` on.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        if path.is_dir():
            what = "is a folder: name the tokenizer.json or vocab.txt in it"
        raise UserError(f"--tokenizer {path} {what}")
    if path.suffix == ".json":
        for given, options in ((lowercase, "--lowercase/--cased"), (strip_accents, "--accents")):
            if given is not None:
                raise UserError(f"{path} states how text is normalised: leave out {options}")
        tokenizer = _load_json(path)
    elif path.suffix == ".txt":
        tokenizer = _load_vocab(path, lowercase, strip_accents)
    else:
        raise UserError(f"--tokenizer {path}: the name must end in .json (tokenizer.json) or .txt (vocab.txt)")
    return tokenizer


def normalisation(tokenizer: Tokenizer) -> dict[str, bool | str | None]:
    """What the tokenizer does with case and accents: ``lowercase`` and ``accents`` ("keep" or "strip").

    Both are None for a normaliser that is not BERT's.
    """
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    if normalizer.get("type") == "Sequence" and normalizer["normalizers"]:
        normalizer = normalizer["normalizers"][-1]  # of a BPE made here: those before add a space
    if normalizer.get("type") != "BertNormalizer":
        return {"lowercase": None, "accents": None}
    strip = normalizer["lowercase"] if normalizer["strip_accents"] is None else normalizer["strip_accents"]
    return {"lowercase": normalizer["lowercase"], "accents": "strip" if strip else "keep"}


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
    if kind not in KINDS:
        raise UserError(f"{path} is a {kind} tokenizer: give one of {', '.join(KINDS)}")
    _check_special(path, tokenizer.get_vocab())
    return tokenizer


def _load_vocab(path: Path, lowercase: bool | None, strip_accents: bool | None) -> Tokenizer:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is not a vocab.txt: it is longer than {_MOST_BYTES >> 20} MiB")
        tokens = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a vocab.txt: not UTF-8 at byte {error.start}") from error
    while tokens and not tokens[-1]:
        tokens.pop()
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not token or vocab.setdefault(token, index) != index:
            what = f"{token!r} a second time" if token else "an empty line"
            raise UserError(f"{path}:{index + 1}: {what}; a vocab.txt has one token per line, each once")
    _check_special(path, vocab)
    settings = _settings_beside(path)
    if lowercase is None:
        lowercase = settings.get("do_lower_case")
    if lowercase is None:
        lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
    if strip_accents is None:
        strip_accents = settings.get("strip_accents")
        if strip_accents is not False and any(any(map(loses_marks, token)) for token in tokens):
            strip_accents = False  # text without marks never gives such a token
    apart = settings.get("tokenize_chinese_chars")
    return bert_tokenizer(vocab, lowercase, strip_accents=strip_accents, ideographs_apart=apart is not False)


def _settings_beside(vocab: Path) -> dict[str, bool]:
    """The true and false values in the tokenizer_config.json beside ``vocab``; empty if there is none."""
    from ...model.json_file import read_json

    path = vocab.with_name("tokenizer_config.json")
    if not path.is_file():
        return {}
    try:
        content = read_json(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): repair it, or move {vocab.name} away from it") from error
    settings = content if isinstance(content, dict) else {}
    return {name: value for name, value in settings.items() if isinstance(value, bool)}


def _check_special(path: Path, vocab: dict[str, int]) -> None:
    try:
        special_names(vocab)
    except ValueError as error:
        raise UserError(f"the tokenizer {path} {error}") from error
    token = max(vocab, key=lambda token: vocab[token])
    if vocab[token] >= MAX_VOCAB_SIZE:
        raise UserError(
            f"the tokenizer {path} gives {token!r} the id {vocab[token]}: ids must be below {MAX_VOCAB_SIZE}, because "
            "tables have a row for every id"
        )
