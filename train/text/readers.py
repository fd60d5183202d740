"""Documents from text files, one at a time: .txt and .jsonl, each also compressed as .gz or .zst.

In .txt a blank line ends a document. In .jsonl each line is an object with a document in its ``text`` field (or another
field). A document longer than `DOCUMENT_CHARS` is returned in pieces of at most that length, cut at a line end if there
is one, else at a space. So memory stays bounded, and a book is not one unit of shuffling and of the held-out split.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

SUFFIXES = tuple(kind + compression for kind in (".txt", ".jsonl") for compression in ("", ".gz", ".zst"))
DOCUMENT_CHARS = 1 << 16
BLOCK_BYTES = 1 << 20  # read and decoded at once
LONGEST_LINE = 64 << 20  # bytes of a JSON line; a long line of plain text is cut at a space

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of documents, and the name that messages use for it."""

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object."""
        return self.path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")


def find_files(inputs: Sequence[str]) -> list[TextFile]:
    """The files that ``inputs`` name, each once, in the order given and sorted within a folder or glob.

    Args:
        inputs: files, folders and globs. A folder stands for every file in it and below it with a suffix of `SUFFIXES`.

    Raises:
        UserError: an input matches no file, or a file of another kind.
    """
    found: dict[Path, TextFile] = {}
    for given in inputs:
        paths = [Path(given)] if Path(given).exists() else [Path(p) for p in sorted(glob.glob(given, recursive=True))]
        if not paths:
            what = "matches no file" if glob.has_magic(given) else "does not exist"
            raise UserError(f"{given} {what}: give text files ({', '.join(SUFFIXES)}), folders, globs or -")
        for path in paths:
            files = [path]
            if path.is_dir():
                files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
                if not files and len(paths) == 1:
                    raise UserError(f"the folder {path} holds no file named {', '.join('*' + s for s in SUFFIXES)}")
            for file in files:
                if not file.name.endswith(SUFFIXES):
                    raise UserError(f"{file} is of an unknown kind: its name must end in {', '.join(SUFFIXES)}")
                found.setdefault(file.resolve(), TextFile(file, str(file)))
    if inputs and not found:
        raise UserError(f"{' '.join(inputs)}: no file named {', '.join('*' + s for s in SUFFIXES)} in these folders")
    return list(found.values())


def read_documents(file: TextFile, text_field: str = "text", progress: Progress | None = None) -> Iterator[str]:
    """Streams the documents of ``file`` in order. Lines within a document end in "\\n"; no document is blank.

    Args:
        file: the file to read.
        text_field: in .jsonl, the field that holds the text.
        progress: called with the number of bytes read from disk (before decompression) since the last call.

    Raises:
        UserError: the file is not UTF-8 text, is cut short or damaged, or a line is not an object with that field.
        OSError: the file cannot be read.
    """
    with open(file.path, "rb") as raw:
        chunks = _decoded(file, _blocks(file, raw, progress))
        yield from _jsonl_documents(file, chunks, text_field) if file.is_jsonl else _txt_documents(chunks)


def _blocks(file: TextFile, raw: BinaryIO, progress: Progress | None) -> Iterator[bytes]:
    """The decompressed content of the file in blocks of about `BLOCK_BYTES`."""
    before = 0
    suffix = file.path.suffix
    blocks = _gzip_blocks if suffix == ".gz" else _zstd_blocks if suffix == ".zst" else _plain_blocks
    try:
        for block in blocks(raw):
            if progress is not None:
                now = raw.tell()
                progress(now - before)
                before = now
            yield block
    except EOFError as error:
        raise UserError(f"{file.name} is cut short: the compressed data ends too early; copy it again") from error
    except (gzip.BadGzipFile, zlib.error, _DamagedError) as error:
        raise UserError(f"{file.name} is damaged or not {suffix} data ({error})") from error


class _DamagedError(Exception):
    pass


def _plain_blocks(raw: BinaryIO) -> Iterator[bytes]:
    while block := raw.read(BLOCK_BYTES):
        yield block


def _gzip_blocks(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
        while block := unpacked.read(BLOCK_BYTES):
            yield block


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("reading .zst files needs a package: pip install zstandard") from error
    # A file may consist of several frames (pzstd writes such files). The library's streaming reader accepts a truncated
    # last frame, so read frame by frame.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, started = unpacker.decompressobj(), False
    try:
        while data := raw.read(BLOCK_BYTES >> 4):
            while data:
                started = True
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data = frame.unused_data
                    frame, started = unpacker.decompressobj(), False
    except zstandard.ZstdError as error:
        raise _DamagedError(str(error)) from error
    if started:
        raise EOFError


def _decoded(file: TextFile, blocks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
    """Checks and decodes the text: (number of the first line, whole lines) for each block."""
    offset, line, carry = 0, 1, b""

    def decode(data: bytes) -> str:
        where = data.find(b"\0")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            where = error.start if where < 0 else min(where, error.start)
        if where >= 0:
            what = "a NUL byte" if data[where] == 0 else f"byte 0x{data[where]:02x}, not UTF-8,"
            raise UserError(
                f"{file.name} is not a text file: {what} at byte {offset + where} "
                f"(line {line + data.count(10, 0, where)}); convert it to UTF-8 or leave it out"
            )
        return text.removeprefix("\ufeff") if offset == 0 else text

    for block in blocks:
        data = carry + block
        end = data.rfind(b"\n") + 1
        if end == 0 and not file.is_jsonl and len(data) >= BLOCK_BYTES:
            end = data.rfind(b" ") + 1  # a very long line
        if end == 0 and len(data) > LONGEST_LINE:
            raise UserError(
                f"{file.name}: line {line} is over {LONGEST_LINE >> 20} MiB long: write one document per line"
            )
        if end:
            yield line, decode(data[:end])
            offset += end
            line += data.count(10, 0, end)
        carry = data[end:]
    if carry:
        yield line, decode(carry)


def _txt_documents(chunks: Iterator[tuple[int, str]]) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for _, text in chunks:
        for line in text.removesuffix("\n").split("\n"):
            line = line.strip()
            if line:
                lines.append(line)
                length += len(line) + 1
            if lines and (not line or length >= DOCUMENT_CHARS):
                yield from _pieces("\n".join(lines))
                lines, length = [], 0
    if lines:
        yield from _pieces("\n".join(lines))


def _jsonl_documents(file: TextFile, chunks: Iterator[tuple[int, str]], text_field: str) -> Iterator[str]:
    for first, text in chunks:
        for number, line in enumerate(text.split("\n"), first):
            if not line or line.isspace():
                continue
            where = f"{file.name}:{number}"
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}): write one JSON object per line") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with a field {text_field!r}")
            if text_field not in record:
                fields = ", ".join(map(repr, list(record)[:8])) or "none"
                raise UserError(f"{where}: no field {text_field!r} (its fields: {fields}); name it with --text-field")
            value = record[text_field]
            if not isinstance(value, str):
                raise UserError(f"{where}: the field {text_field!r} is a {type(value).__name__}, not a string")
            # JSON can contain characters that text cannot: half of a surrogate pair, and NUL.
            value = _SURROGATE.sub("\ufffd", value).replace("\0", " ")
            if value and not value.isspace():
                yield from _pieces(value)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _pieces(document: str) -> Iterator[str]:
    while len(document) > DOCUMENT_CHARS:
        end = document.rfind("\n", 1, DOCUMENT_CHARS) + 1 or document.rfind(" ", 1, DOCUMENT_CHARS) + 1
        piece, document = document[: end or DOCUMENT_CHARS], document[end or DOCUMENT_CHARS :]
        if not piece.isspace():
            yield piece
    if document and not document.isspace():
        yield document
