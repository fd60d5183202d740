"""Sentences of words with a tag each, from CoNLL columns, .jsonl and .parquet, or texts to be split into words.

    .conll, .tsv, .txt   a word a line, its columns between tabs or spaces; a blank line ends a sentence
    .jsonl, .parquet     a list of words and a list of tags, as in the data sets of the Hugging Face Hub

Sentences are streamed in bounded memory, and a bad row is named with file and line.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ...errors import UserError
from ..rows import STDIN, jsonl_records, lines_of, parquet_records

COLUMN_FILES = (".conll", ".tsv", ".txt")
RECORD_FILES = (".jsonl", ".parquet")
DOCUMENT = "-DOCSTART-"  # the first word of a line between the documents of CoNLL-2003


@dataclasses.dataclass(frozen=True)
class TagColumns:
    """Which columns to read.

    Attributes:
        words: number of the words' column, from 1, or name of their field. Default: the first, or "tokens".
        tags: of the tags. Default: the last, or "tags".
        tagged: whether tags are read at all.
    """

    words: str | None = None
    tags: str | None = None
    tagged: bool = True


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Words, and their tags if they were read.

    Attributes:
        where: file and line, for messages.
        first_line: of a sentence with a word a line, the first word's; else None.
    """

    where: str
    words: list[str]
    tags: list[str] | None = None
    first_line: int | None = None

    def where_is(self, word: int) -> str:
        """File and line of a word, for messages."""
        if self.first_line is None:
            return f"{self.where}, word {word + 1}"
        return f"{self.where.rpartition(':')[0]}:{self.first_line + word}"


def read_sentences(source: str, columns: TagColumns) -> Iterator[Sentence]:
    """Streams the sentences of a file.

    Raises:
        UserError: the file is missing or of an unknown kind, a column is not there, or a row is bad; the message names
            file and line.
        OSError: the file cannot be read.
    """
    path = Path(source)
    kinds = ", ".join((*COLUMN_FILES, *RECORD_FILES))
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: give one of {kinds}")
    if path.suffix in COLUMN_FILES:
        with open(path, encoding="utf-8-sig") as file:
            try:
                yield from _column_sentences(file, path, columns)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error.reason} in a block of it): convert it") from error
    elif path.suffix in RECORD_FILES:
        yield from _record_sentences(path, columns)
    else:
        raise UserError(f"{path} is of an unknown kind: its name must end in {kinds}")


def read_words(source: str, column: str | None) -> Iterator[Sentence]:
    """The sentences of a file without tags: lines of text, which are split into words, or what `read_sentences` reads.

    Args:
        source: .txt or "-" for lines of text; .conll, .tsv; .jsonl, .parquet with lists of words, or with texts.
        column: as `TagColumns.words`.

    Raises:
        UserError, OSError: as `read_sentences`.
    """
    path = Path(source)
    if source == STDIN:
        yield from _text_sentences(sys.stdin, "standard input")
    elif path.suffix == ".txt" and path.is_file():
        with open(path, encoding="utf-8-sig") as file:
            try:
                yield from _text_sentences(file, str(path))
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error.reason} in a block of it): convert it") from error
    else:
        yield from read_sentences(source, TagColumns(column, tagged=False))


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, and runs of other characters, between white space."""
    from tokenizers.pre_tokenizers import Whitespace

    return [word for word, _ in Whitespace().pre_tokenize_str(text)]


def _text_sentences(file: TextIO, name: str) -> Iterator[Sentence]:
    for number, line in enumerate(lines_of(file, name), 1):
        yield Sentence(f"{name}:{number}", split_words(line))


def _column_sentences(file: TextIO, path: Path, columns: TagColumns) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    first, chosen, width = 0, [0, 0], 0

    def sentence() -> Iterable[Sentence]:
        if not words:
            return ()
        return (Sentence(f"{path}:{first}", list(words), list(tags) if columns.tagged else None, first),)

    for number, line in enumerate(lines_of(file, str(path)), 1):
        where, line = f"{path}:{number}", line.rstrip("\r\n")
        if not line.strip() or line.startswith(DOCUMENT):
            yield from sentence()
            words, tags = [], []
            continue
        cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        if not width:
            width = len(cells)
            chosen = _choose(columns, width, where)
        if len(cells) != width:
            raise UserError(f"{where}: {len(cells)} columns, but the first row has {width}")
        picked = [cells[i].strip() for i in chosen]
        for what, cell in zip(("word", "tag"), picked, strict=False):
            if not cell:
                raise UserError(f"{where}: the {what} is empty")
        first = first if words else number
        words.append(picked[0])
        tags += picked[1:]
    yield from sentence()


def _choose(columns: TagColumns, width: int, where: str) -> list[int]:
    """The numbers, from 0, of the columns of words and, if they are read, of tags."""
    wanted = [("--text", columns.words or "1"), ("--label", columns.tags or str(width))][: 1 + columns.tagged]
    for option, number in wanted:
        if not number.isdecimal() or not 1 <= int(number) <= width:
            raise UserError(
                f"{where}: {option} {number!r} is not the number of one of the {width} columns: words and tags are in "
                "columns between tabs or spaces, a word a line"
            )
    if columns.tagged and wanted[0][1] == wanted[1][1]:
        raise UserError(f"{where}: column {wanted[0][1]} cannot be both word and tag: a line has a word and its tag")
    return [int(number) - 1 for _, number in wanted]


def _record_sentences(path: Path, columns: TagColumns) -> Iterator[Sentence]:
    wanted = {"text": columns.words or "tokens"}
    if columns.tagged:
        wanted["label"] = columns.tags or "tags"
    if path.suffix == ".parquet":
        yield from (_record_sentence(where, parts, columns) for where, parts in parquet_records(path, wanted))
        return
    with open(path, encoding="utf-8-sig") as file:
        try:
            yield from (_record_sentence(where, parts, columns) for where, parts in jsonl_records(file, path, wanted))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason} in a block of it): convert it") from error


def _record_sentence(where: str, parts: dict[str, Any], columns: TagColumns) -> Sentence:
    words = parts["text"]
    if isinstance(words, str) and not columns.tagged:
        return Sentence(where, split_words(words))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: the words are not a list of strings")
    if not columns.tagged:
        return Sentence(where, words)
    tags = parts["label"]
    if isinstance(tags, list) and any(isinstance(tag, int) for tag in tags):
        raise UserError(
            f"{where}: the tags are numbers: write their names (in the library datasets, "
            "dataset.features[...].feature.int2str)"
        )
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise UserError(f"{where}: the tags are not a list of strings")
    if len(tags) != len(words):
        raise UserError(f"{where}: {len(words)} words, but {len(tags)} tags")
    return Sentence(where, words, tags)
