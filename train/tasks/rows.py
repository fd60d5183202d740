"""Rows of text, and their labels, from files: .txt .tsv .csv .jsonl .parquet, or lines of standard input.

    .txt, standard input   a line is a text
    .tsv                   cells between tabs, without quoting, as in GLUE
    .csv                   RFC 4180: cells between commas, quoted with "
    .jsonl                 an object a line
    .parquet               columns

Columns are chosen by name. In a .tsv or .csv without a header they are chosen by number, from 1. Rows are streamed in
bounded memory, and a bad row is named with file and line.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError

SUFFIXES = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")
STDIN = "-"
LONGEST_LINE = 32 << 20  # characters


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a file to read: names, or numbers from 1; None: the default.

    Attributes:
        text: default: "text", or the first column of a file without a header.
        pair: the second text of a pair; None: there is none.
        label: default: "label", or the second column of a file without a header.
        labelled: whether labels are read at all.
        empty_labels: a label may be empty.
        negatives: columns of more texts, which may be empty.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    labelled: bool = False
    empty_labels: bool = False
    negatives: tuple[str, ...] = ()

    def wanted(self) -> dict[str, str]:
        """Part of a row → the name or number of its column, with the default names."""
        names = {"text": self.text or "text"}
        if self.pair is not None:
            names["pair"] = self.pair
        if self.labelled:
            names["label"] = self.label or "label"
        return names | {f"negative {i}": name for i, name in enumerate(self.negatives, 1)}

    @property
    def given(self) -> bool:
        """Whether the user chose columns."""
        return any((self.text, self.pair, self.label, self.negatives))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: file and line, for messages.
        text, pair: the texts; pair is None without a second one.
        label: as in the file: a string, or in .jsonl and .parquet any value; None without labels.
        negatives: the texts of `Columns.negatives` that are not empty.
    """

    where: str
    text: str
    pair: str | None = None
    label: Any = None
    negatives: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the row: the first, the second of a pair, the negatives."""
        return (self.text, *([] if self.pair is None else [self.pair]), *self.negatives)


def read_rows(source: str | Path, columns: Columns) -> Iterator[Row]:
    """Streams the rows of ``source``, a file or "-" for standard input.

    Raises:
        UserError: the file is missing or of an unknown kind, a column is not there, or a row is bad; the message names
            file and line.
        OSError: the file cannot be read.
    """
    if str(source) == STDIN:
        yield from _text_rows(sys.stdin, "standard input", columns)
        return
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: give one of {_KINDS}, or -")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is of an unknown kind: its name must end in {_KINDS}")
    if path.suffix == ".parquet":
        for where, parts in parquet_records(path, columns.wanted()):
            yield _row(where, parts, columns)
        return
    # newline="": csv finds the line ends within quotes itself.
    with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        try:
            if path.suffix == ".txt":
                yield from _text_rows(file, str(path), columns)
            elif path.suffix == ".jsonl":
                for where, parts in jsonl_records(file, path, columns.wanted()):
                    yield _row(where, parts, columns)
            else:
                yield from _table_rows(file, path, columns)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason} in a block of it): convert it") from error


_KINDS = ", ".join(SUFFIXES)


def lines_of(file: TextIO, name: str) -> Iterator[str]:
    """The lines of a file.

    Raises:
        UserError: a line is too long or has a NUL character.
    """
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{name}:{number}: the line is over {LONGEST_LINE >> 20} Mi characters long: cut it")
        if "\0" in line:
            raise UserError(f"{name}:{number}: a NUL character: this is not a text file")
        yield line


def _text_rows(file: TextIO, name: str, columns: Columns) -> Iterator[Row]:
    if columns.labelled or columns.given:
        raise UserError(f"{name} has one text a line and no columns: give a .tsv, .csv, .jsonl or .parquet file")
    for number, line in enumerate(lines_of(file, name), 1):
        yield Row(f"{name}:{number}", line.rstrip("\r\n"))


def _table_rows(file: TextIO, path: Path, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    dialect: dict[str, Any] = {"delimiter": ",", "strict": True}
    if path.suffix == ".tsv":
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines_of(file, str(path)), **dialect)
    chosen: dict[str, int] | None = None
    width = 0
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if chosen is None:
                width = len(cells)
                chosen, is_header = _choose(cells, columns, where)
                if is_header:
                    continue
            if len(cells) != width:
                raise UserError(f"{where}: {len(cells)} cells, but the first row has {width}")
            yield _row(where, {part: cells[i] for part, i in chosen.items()}, columns)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a {path.suffix[1:]} row ({error})") from error


def _choose(first: list[str], columns: Columns, where: str) -> tuple[dict[str, int], bool]:
    """(Part of a row → index of its column, whether the ``first`` row is a header)."""
    wanted = columns.wanted()
    if all(name in first for name in wanted.values()):
        return {part: first.index(name) for part, name in wanted.items()}, True
    numbers = wanted | {"text": columns.text or "1", "pair": columns.pair or "", "label": columns.label or "2"}
    chosen = {part: int(numbers[part]) - 1 if numbers[part].isdecimal() else -1 for part in wanted}
    # Without options a file without a header must have just the columns that are read.
    guessed = not columns.given and (len(first) != len(wanted) or any(name in first for name in wanted.values()))
    if not guessed and all(0 <= i < len(first) for i in chosen.values()):
        return chosen, False
    missing = next(name for name in wanted.values() if name not in first)
    options = " and ".join(dict.fromkeys(map(_option, wanted)))
    raise UserError(
        f"{where}: no column {missing!r} (the first row: {', '.join(map(repr, first[:8]))}): name the columns with "
        f"{options}, or give their numbers from 1 if the file has no header"
    )


def _option(part: str) -> str:
    return "--text-pair" if part == "pair" else f"--{part.split()[0]}"


def jsonl_records(file: TextIO, path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(File and line, part → value) of each object.

    Args:
        wanted: part of a row → name of its field.

    Raises:
        UserError: a line is no object, or lacks a field.
    """
    for number, line in enumerate(lines_of(file, str(path)), 1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}): write one JSON object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, not an object")
        for part, name in wanted.items():
            if name not in record:
                fields = ", ".join(map(repr, list(record)[:8])) or "none"
                raise UserError(f"{where}: no field {name!r} (its fields: {fields}); name it with {_option(part)}")
        yield where, {part: record[name] for part, name in wanted.items()}


def parquet_records(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `jsonl_records`, of a file's rows in bounded memory."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading .parquet needs a package: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in wanted.values():
                if name not in names:
                    raise UserError(f"{path}: no column {name!r} (its columns: {', '.join(map(repr, names[:8]))})")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=sorted(set(wanted.values()))):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {part: record[name] for part, name in wanted.items()}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of Arrow
            raise
        raise UserError(f"{path} is damaged or not a .parquet file ({str(error).splitlines()[0]})") from error


def _row(where: str, parts: dict[str, Any], columns: Columns) -> Row:
    for part in ("text", "pair"):
        if part in parts and not isinstance(parts[part], str):
            raise UserError(f"{where}: the {part} is a {type(parts[part]).__name__}, not a string")
    if "label" in parts and parts["label"] in (None, "") and not columns.empty_labels:
        raise UserError(f"{where}: the label is empty")
    negatives = []
    for part in [part for part in parts if part.startswith("negative")]:
        text = parts.pop(part)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: the {part} is a {type(text).__name__}, not a string")
        if text:
            negatives.append(text)
    return Row(where, **parts, negatives=tuple(negatives))
