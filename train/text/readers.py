"""Documents from files, one at a time: text (.txt, .md), records (.jsonl, .json, .csv, .tsv), columns (.parquet,
.arrow).

In text a blank line ends a document, or each line, or the file (`Reading.documents`). A record has its document in a
field. A document longer than `DOCUMENT_CHARS` is returned in pieces of at most that length, cut at a line end if there
is one, else at a space. So memory stays bounded, and a book is not one unit of shuffling and of the held-out split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import UserError
from .compression import BLOCK_BYTES, Progress, read_blocks
from .reading import Reading
from .records import looks_like_json, read_columns, read_records
from .text_file import COLUMNAR, TextFile

DOCUMENT_CHARS = 1 << 16
LONGEST_LINE = 32 << 20  # bytes of a line of JSON or of a table; a line of plain text longer than a block is cut
_HEAD_BYTES = 1 << 16  # that show whether a file without a suffix is JSON


def read_documents(file: TextFile, reading: Reading | None = None, progress: Progress | None = None) -> Iterator[str]:
    """Streams the documents of ``file`` in order. Lines within a document end in "\\n"; no document is blank.

    Args:
        file: the file to read.
        reading: how; None: the defaults.
        progress: called with the number of bytes read from disk (before decompression) since the last call.

    Raises:
        UserError: the file is not UTF-8 text, is cut short or damaged, or a record is bad.
        OSError: the file cannot be read.
    """
    reading = reading or Reading()
    kind = file.kind or kind_of_start(_start(file))
    if kind in COLUMNAR:
        values = read_columns(file, kind, reading, progress)
    elif kind in (".txt", ".md"):
        chunks = _decoded(file, read_blocks(file, progress), cut_lines=True)
        yield from _text_documents(chunks, reading.documents or ("file" if kind == ".md" else "blank"))
        return
    else:
        chunks = _decoded(file, read_blocks(file, progress), cut_lines=kind == ".json")
        values = read_records(file, kind, chunks, reading)
    for value in values:
        # A record can contain characters that text cannot: half of a surrogate pair, and NUL.
        value = _SURROGATE.sub("\ufffd", value).replace("\0", " ")
        if value and not value.isspace():
            yield from _pieces(value)


def kind_of_start(head: bytes) -> str:
    """The kind of a file, if its name does not say it, from its first bytes: JSON is never read as prose."""
    text = head[:_HEAD_BYTES].decode("utf-8", "replace")
    return looks_like_json(text, whole=len(head) < _HEAD_BYTES) or ".txt"


def _start(file: TextFile) -> bytes:
    head = b""
    for block in read_blocks(file):
        head += block
        if len(head) >= _HEAD_BYTES:
            break
    return head


def _decoded(file: TextFile, blocks: Iterator[bytes], cut_lines: bool) -> Iterator[tuple[int, str]]:
    """Checks and decodes the text: (number of the first line, whole lines) for each block.

    Args:
        cut_lines: cut lines longer than a block, at a space if there is one. False: over `LONGEST_LINE` is an error.
    """
    offset, line = 0, 1

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

    carry = b""
    for block in blocks:
        data = carry + block
        end = data.rfind(b"\n") + 1
        if end == 0 and cut_lines and len(data) >= BLOCK_BYTES:
            end = data.rfind(b" ") + 1 or _whole_characters(data)  # a very long line
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


def _whole_characters(data: bytes) -> int:
    """The length of ``data`` without a character that is cut at its end."""
    for end in range(len(data) - 1, max(len(data) - 4, 0), -1):
        if data[end] & 0xC0 != 0x80:  # the first byte of the last character
            return end
    return len(data)


def _text_documents(chunks: Iterator[tuple[int, str]], documents: str) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for _, text in chunks:
        for line in text.removesuffix("\n").split("\n"):
            line = line.strip()
            if line or (documents == "file" and lines):
                lines.append(line)
                length += len(line) + 1
            ended = documents == "line" or (documents == "blank" and not line)
            if lines and (ended or length >= DOCUMENT_CHARS):
                yield from _pieces("\n".join(lines))
                lines, length = [], 0
    if lines:
        yield from _pieces("\n".join(lines).rstrip())


_SURROGATE = re.compile("[\ud800-\udfff]")


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > DOCUMENT_CHARS:
        stop = start + DOCUMENT_CHARS
        end = document.rfind("\n", start + 1, stop) + 1 or document.rfind(" ", start + 1, stop) + 1 or stop
        piece, start = document[start:end], end
        if not piece.isspace():
            yield piece
    piece = document[start:]
    if piece and not piece.isspace():
        yield piece
