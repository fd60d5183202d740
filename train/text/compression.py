"""The decompressed content of a file, in blocks: memory stays bounded however small the file packs its text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from ..errors import UserError
from .text_file import TextFile

BLOCK_BYTES = 1 << 20  # read at once
WINDOW_BYTES = 1 << 27  # of a .zst or .xz file, as in the zstd program without --long: the decompressor holds a window

Progress = Callable[[int], None]


def read_blocks(file: TextFile, progress: Progress | None = None) -> Iterator[bytes]:
    """The decompressed content of the file in blocks of about `BLOCK_BYTES`.

    Args:
        file: the file to read.
        progress: called with the number of bytes read from disk (before decompression) since the last call.

    Raises:
        UserError: the file is cut short or damaged.
        OSError: the file cannot be read.
    """
    before = 0
    kinds = {".gz": _gzip_blocks, ".zst": _zstd_blocks, ".bz2": _bzip2_blocks, ".xz": _xz_blocks}
    blocks = kinds.get(file.compression, _plain_blocks)
    with file.open() as raw:
        try:
            for block in blocks(raw):
                if progress is not None:
                    now = raw.tell()
                    progress(now - before)
                    before = now
                yield block
        except EOFError as error:
            raise UserError(f"{file.name} is cut short: the compressed data ends too early; copy it again") from error
        except _WindowError as error:
            raise UserError(
                f"{file.name} needs over {WINDOW_BYTES >> 20} MiB of memory to decompress{error}"
            ) from error
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, _DamagedError) as error:
            raise UserError(f"{file.name} is damaged or not {file.compression} data ({error})") from error


class _DamagedError(Exception):
    pass


class _WindowError(Exception):
    """The decompressor would hold more than `WINDOW_BYTES`."""


def _plain_blocks(raw: BinaryIO) -> Iterator[bytes]:
    while block := raw.read(BLOCK_BYTES):
        yield block


def _gzip_blocks(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
        while block := unpacked.read(BLOCK_BYTES):
            yield block


def _bzip2_blocks(raw: BinaryIO) -> Iterator[bytes]:
    try:
        yield from _stream_blocks(raw, bz2.BZ2Decompressor)
    except OSError as error:
        if error.errno is not None:  # of the system
            raise
        raise _DamagedError(str(error)) from error


def _xz_blocks(raw: BinaryIO) -> Iterator[bytes]:
    def start() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=WINDOW_BYTES)

    try:
        yield from _stream_blocks(raw, start)
    except lzma.LZMAError as error:
        if "Memory usage limit" in str(error):
            raise _WindowError(": compress it again with a smaller dictionary (xz -9 or less)") from error
        raise


def _stream_blocks(raw: BinaryIO, start: Callable[[], Any]) -> Iterator[bytes]:
    """The content of streams end to end, by one decompressor each, which returns at most `BLOCK_BYTES` at once."""
    unpacker, data = start(), raw.read(BLOCK_BYTES)
    while data or not unpacker.needs_input:
        block = unpacker.decompress(data, BLOCK_BYTES)
        if block:
            yield block
        data = b""
        if unpacker.eof:
            data = unpacker.unused_data.lstrip(b"\0") or raw.read(BLOCK_BYTES).lstrip(b"\0")  # .xz may be padded
            if not data:
                return
            unpacker = start()
        elif unpacker.needs_input and not (data := raw.read(BLOCK_BYTES)):
            raise EOFError


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
                raise _WindowError(", because it was made with zstd --long: compress it again without that option")
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
