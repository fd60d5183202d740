"""The texts of records: JSON objects, rows of tables, columns of Parquet and Arrow files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from .compression import Progress
from .reading import BadRecordError, Reading
from .text_file import TextFile

LONGEST_RECORD = 32 << 20  # characters
_BATCH_ROWS = 256  # of a Parquet file, read at once


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text in a record.

    Args:
        record: a JSON value.
        text_field: the name of a field, or names separated by dots, from the outside inwards.
        where: file and line, for messages.

    Raises:
        BadRecordError: the record is no object with that field, or its value is no string.
    """
    value, left = record, text_field
    while left:
        if not isinstance(value, dict):
            raise BadRecordError(f"{where}: a JSON {type(value).__name__}, not an object with a field {left!r}")
        name = left if left in value else left.split(".")[0]
        if name not in value:
            fields = ", ".join(map(repr, list(value)[:8])) or "none"
            raise BadRecordError(f"{where}: no field {left!r} (its fields: {fields}); name it with --text-field")
        value, left = value[name], left[len(name) + 1 :]
    if not isinstance(value, str):
        raise BadRecordError(f"{where}: the field {text_field!r} is a {type(value).__name__}, not a string")
    return value


def looks_like_json(head: str, whole: bool) -> str | None:
    """ ".jsonl" if the first line of a text is a JSON object, ".json" if the text begins as other JSON, else None.

    Args:
        head: the first characters.
        whole: they are the whole text.
    """
    head = head.removeprefix("\ufeff").lstrip()
    if not head.startswith(("{", "[")):
        return None
    line, end, _ = head.partition("\n")
    try:
        value = json.loads(line) if end or whole else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return ".jsonl"
    # An object, or an array of objects or strings. "[1] A footnote" and "{{template}}" are prose.
    following = head[1:].lstrip()[:1]
    return ".json" if following in ('"', "]}"["[{".index(head[0])]) or head[0] + following == "[{" else None


def read_records(file: TextFile, kind: str, chunks: Iterator[tuple[int, str]], reading: Reading) -> Iterator[str]:
    """The texts of a file of kind ".jsonl", ".json", ".csv" or ".tsv".

    Args:
        chunks: (number of the first line, text) of each part of the file; whole lines, except in .json.
        reading: which field holds the text, and what becomes of bad records.

    Raises:
        UserError: the file or a record cannot be read.
    """
    if kind == ".jsonl":
        yield from _json_lines(file, chunks, reading)
    elif kind == ".json":
        yield from _json_values(file, chunks, reading)
    else:
        yield from _table_rows(file, kind, chunks, reading)


def _json_lines(file: TextFile, chunks: Iterator[tuple[int, str]], reading: Reading) -> Iterator[str]:
    for first, text in chunks:
        for number, line in enumerate(text.split("\n"), first):
            if not line or line.isspace():
                continue
            try:
                yield text_of(_parsed(line, f"{file.name}:{number}"), reading.text_field, f"{file.name}:{number}")
            except BadRecordError as error:
                reading.bad(error)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise BadRecordError(f"{where}: not JSON that can be read (nested too deeply): leave the line out") from error
    except ValueError as error:  # an integer of more than 4,300 digits is one too
        raise BadRecordError(f"{where}: not JSON ({error}): write one JSON object per line") from error


def _json_values(file: TextFile, chunks: Iterator[tuple[int, str]], reading: Reading) -> Iterator[str]:
    """The texts of an array of objects or strings, or of objects one after another."""
    buffer = _Buffer(file, chunks)
    in_array = buffer.take("[")
    number = 0
    while not (buffer.at_end() or (in_array and buffer.take("]"))):
        number += 1
        value = buffer.value(number)
        try:
            yield (
                value
                if in_array and isinstance(value, str)
                else text_of(value, reading.text_field, f"{file.name}, record {number}")
            )
        except BadRecordError as error:
            reading.bad(error)
        if in_array and not buffer.take(","):
            if not buffer.take("]"):
                raise UserError(f"{file.name}: not JSON, or cut short (no comma or ] after record {number})")
            break
    if not buffer.at_end():
        raise UserError(f"{file.name}: not JSON (more text after record {number})")


class _Buffer:
    """Decodes one JSON value after another from a text that is read in parts."""

    def __init__(self, file: TextFile, chunks: Iterator[tuple[int, str]]) -> None:
        self._name, self._chunks = file.name, chunks
        self._hint = "" if file.kind else "; --format txt reads it as text"
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def _fill(self, least: int = 1) -> bool:
        """Reads at least ``least`` more characters; False if there are none."""
        parts, length = [self._text[self._at :]], 0
        for _, text in self._chunks:
            parts.append(text)
            length += len(text)
            if length >= least:
                break
        self._text, self._at = "".join(parts), 0
        return length > 0

    def at_end(self) -> bool:
        """Skips white space; whether nothing follows."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return False
            if not self._fill():
                return True

    def take(self, character: str) -> bool:
        """Skips white space, and ``character`` if it follows; whether it did."""
        if self.at_end() or self._text[self._at] != character:
            return False
        self._at += 1
        return True

    def value(self, number: int) -> Any:
        """The value that follows, the ``number``-th."""
        where = f"{self._name}, record {number}"
        self.at_end()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise UserError(f"{where}: not JSON that can be read (nested too deeply)") from error
            except ValueError as error:
                # Perhaps cut. Twice as much text each time, so that the time is linear in its length.
                if len(self._text) - self._at > LONGEST_RECORD:
                    raise UserError(f"{where}: not JSON ({error}), or over {LONGEST_RECORD >> 20} Mi long") from error
                if not self._fill(len(self._text) - self._at):
                    raise UserError(f"{where}: not JSON ({error}){self._hint}") from error
                continue
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._fill():
                continue  # a number may go on
            self._at = end
            return value


def _table_rows(file: TextFile, kind: str, chunks: Iterator[tuple[int, str]], reading: Reading) -> Iterator[str]:
    """The texts of a column, which the first row names, or which is given by its number from 1."""
    csv.field_size_limit(LONGEST_RECORD)
    dialect: dict[str, Any] = {"delimiter": ",", "strict": True}
    if kind == ".tsv":
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    lines = (line + "\n" for _, text in chunks for line in text.removesuffix("\n").split("\n"))
    rows = csv.reader(lines, **dialect)
    name, column, width = reading.text_field, -1, 0
    while True:
        try:
            cells = next(rows, None)
            where = f"{file.name}:{rows.line_num}"
            if cells is None:
                return
            if not cells:
                continue
            if column < 0:
                width = len(cells)
                if name in cells:
                    column = cells.index(name)
                    continue
                if not (name.isdecimal() and 1 <= int(name[:9]) <= width):
                    raise UserError(
                        f"{where}: no column {name!r} (the first row: {', '.join(map(repr, cells[:8]))}); name it with "
                        "--text-field, or give its number from 1 if the file has no header"
                    )
                column = int(name) - 1
            if len(cells) != width:
                raise BadRecordError(f"{where}: {len(cells)} cells, but the first row has {width}")
            yield cells[column]
        except csv.Error as error:
            reading.bad(BadRecordError(f"{file.name}:{rows.line_num}: not a {kind[1:]} row ({error})"))
        except BadRecordError as error:
            reading.bad(error)


def read_columns(file: TextFile, kind: str, reading: Reading, progress: Progress | None) -> Iterator[str]:
    """The texts of a .parquet or .arrow file.

    Raises:
        UserError: pyarrow is not installed, the file is damaged or has no such column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file.name}: reading {kind} files needs a package: pip install pyarrow") from error
    field, number = reading.text_field, 0
    try:
        for batch in _batches(file, kind, field):
            for record in batch.to_pylist():
                number += 1
                try:
                    yield text_of(record, field, f"{file.name}, row {number}")
                except BadRecordError as error:
                    reading.bad(error)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of Arrow
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{file.name} is damaged or not a {kind} file ({reason})") from error
    if progress is not None:
        progress(file.version()[0])


def _batches(file: TextFile, kind: str, field: str) -> Iterator[Any]:
    """Record batches with the column of the text."""
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        with file.open() as raw, pyarrow.parquet.ParquetFile(raw) as table:
            column = _column(file, table.schema_arrow.names, field)
            yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=[column])
        return
    with file.open() as raw, pyarrow.PythonFile(raw, mode="r") as source:
        try:
            batches: Any = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            names = opened.schema.names
        else:
            names = batches.schema.names
        column = _column(file, names, field)
        for batch in batches:
            chosen = batch.select([column])
            for start in range(0, chosen.num_rows, _BATCH_ROWS):
                yield chosen.slice(start, _BATCH_ROWS)


def _column(file: TextFile, names: list[str], field: str) -> str:
    name = field if field in names else field.split(".")[0]
    if name not in names:
        listed = ", ".join(map(repr, names[:8])) or "none"
        raise UserError(f"{file.name}: no column {field!r} (its columns: {listed}); name it with --text-field")
    return name
