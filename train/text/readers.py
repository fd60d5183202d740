"""Documents from text files, one at a time: .txt and .jsonl, each also compressed as .gz or .zst.

In .txt a blank line ends a document. In .jsonl each line is an object with a document in its ``text`` field (or another
field). A document longer than `DOCUMENT_CHARS` is returned in pieces of at most that length, cut at a line end if there
is one, else at a space. So memory stays bounded, and a book is not one unit of shuffling and of the held-out split.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import glob
import gzip
import json
import os
import re
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

SUFFIXES = tuple(kind + compression for kind in (".txt", ".jsonl") for compression in ("", ".gz", ".zst"))
DOCUMENT_CHARS = 1 << 16
BLOCK_BYTES = 1 << 20  # read and decoded at once
LONGEST_LINE = 32 << 20  # bytes of a JSON line; a line of plain text longer than a block is cut
WINDOW_BYTES = 1 << 27  # of a .zst file, as in the zstd program without --long: the decompressor holds a window

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
        paths = [Path(given)] if os.path.lexists(given) else [Path(path) for path in _expand(given)]
        if not paths:
            what = "matches no file" if glob.has_magic(given) else "does not exist"
            raise UserError(f"{given} {what}: give text files ({', '.join(SUFFIXES)}), folders, globs or -")
        for path in paths:
            files = [path]
            if path.is_dir():
                files = _files_below(path)
                if not files and len(paths) == 1:
                    raise UserError(f"the folder {path} holds no file named {', '.join('*' + s for s in SUFFIXES)}")
            for file in files:
                if not file.name.endswith(SUFFIXES):
                    raise UserError(f"{file} is of an unknown kind: its name must end in {', '.join(SUFFIXES)}")
                _check_regular(file)
                found.setdefault(file.resolve(), TextFile(file, str(file)))
    if inputs and not found:
        raise UserError(f"{' '.join(inputs)}: no file named {', '.join('*' + s for s in SUFFIXES)} in these folders")
    return list(found.values())


def _files_below(folder: Path) -> list[Path]:
    """Every file in ``folder`` and below with a suffix of `SUFFIXES`. Links to folders are not followed."""
    files, folders = [], [str(folder)]
    while folders:
        for entry in _entries(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and _is_folder(entry.path):
                warnings.warn(f"the link {entry.path} to a folder is not followed: name it as an input", stacklevel=3)
            elif entry.name.endswith(SUFFIXES):
                files.append(Path(entry.path))
    return sorted(files)


def _expand(pattern: str) -> list[str]:
    """The paths that ``pattern`` matches, as `glob.glob` with ``recursive=True``, sorted.

    Two differences: ``**`` does not follow links, which may loop, and a folder that cannot be read is an error.
    """
    if not glob.has_magic(pattern):
        return []
    first, *parts = Path(pattern).parts
    found = [first] if os.path.isabs(pattern) else [""]
    for part in parts if os.path.isabs(pattern) else [first, *parts]:
        found = list(dict.fromkeys(path for folder in found for path in _matches(folder, part)))
    return sorted(filter(None, found))


def _matches(folder: str, part: str) -> Iterator[str]:
    """The paths in ``folder`` that match one part of a pattern; ``folder`` and all folders below for ``**``."""
    if not _is_folder(folder or "."):
        return
    if part == "**":
        folders = [folder]
        while folders:
            yield (inner := folders.pop())
            for entry in _entries(inner):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    folders.append(os.path.join(inner, entry.name))
    elif glob.has_magic(part):
        match = re.compile(fnmatch.translate(part)).match
        for entry in _entries(folder):
            if match(entry.name) and (part.startswith(".") or not entry.name.startswith(".")):
                yield os.path.join(folder, entry.name)
    elif os.path.lexists(path := os.path.join(folder, part)):
        yield path


def _is_folder(path: str) -> bool:
    """As os.path.isdir, but what cannot be looked at is an error."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise _unreadable(path, error) from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder or ".", error) from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): make it readable or leave it out")


def _check_regular(file: Path) -> None:
    """Raises UserError for what cannot be read twice, such as a FIFO, or at all."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise _unreadable(file, error) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{file} is not a regular file: leave it out, or pipe its text to standard input and give -")


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
    # Each call gets at most one block, which is at most 128 KiB of text however small it is in the file. (A call with
    # more returns everything at once: gigabytes for a few kilobytes. The library's streaming reader is bounded too, but
    # accepts a last frame that is cut short.)
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    try:
        while magic := raw.read(4):
            if magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5:  # a frame of other data, to be skipped
                _skip(raw, int.from_bytes(_exactly(raw, 4), "little"))
                continue
            descriptor = _exactly(raw, 1)
            header = magic + descriptor + _exactly(raw, zstandard.frame_header_size(magic + descriptor + bytes(14)) - 5)
            if zstandard.get_frame_parameters(header).window_size > WINDOW_BYTES:
                raise UserError(
                    f"{raw.name} needs over {WINDOW_BYTES >> 20} MiB of memory to decompress, because it was made with "
                    "zstd --long: compress it again without that option"
                )
            frame = unpacker.decompressobj()
            block, last = frame.decompress(header), False
            while not last:
                bounds = _exactly(raw, 3)
                number = int.from_bytes(bounds, "little")
                last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
                data = bounds + _exactly(raw, 1 if kind == 1 else size)  # kind 1: a byte to repeat
                if last and descriptor[0] & 4:
                    data += _exactly(raw, 4)  # the checksum
                block += frame.decompress(data)
                if len(block) >= BLOCK_BYTES or last:
                    yield block
                    block = b""
            if not frame.eof:
                raise EOFError
    except zstandard.ZstdError as error:
        raise _DamagedError(str(error)) from error


def _exactly(raw: BinaryIO, size: int) -> bytes:
    data = raw.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _skip(raw: BinaryIO, size: int) -> None:
    while size:
        size -= len(_exactly(raw, min(size, BLOCK_BYTES)))


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
            except RecursionError as error:
                raise UserError(
                    f"{where}: not JSON that can be read (nested too deeply): leave the line out"
                ) from error
            except ValueError as error:  # an integer of more than 4,300 digits is one too
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
