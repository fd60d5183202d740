"""Files behind URLs, by fsspec: ``s3://bucket/*.jsonl.zst``, ``hf://datasets/name/*.parquet``, ``https://…``, ``file://…``.

A file is read from start to end, in blocks, each time its text is needed; it is never copied whole. The package of the
store (s3fs, gcsfs, huggingface_hub, aiohttp) must be installed.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from ..errors import UserError
from .text_file import ALLOWED, COLUMNAR, SUFFIXES, TextFile, is_text_file

# What stores call the version of a file. Where they say none, a change is seen by the size alone.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "sha", "blob_id")


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", name) is not None


@dataclasses.dataclass(frozen=True)
class RemoteFile(TextFile):
    """A file behind a URL. ``path`` is its place in the store, ``name`` the URL.

    Attributes:
        place: the same place as the store wants it.
        store: an fsspec file system.
    """

    place: str = ""
    store: Any = dataclasses.field(default=None, compare=False)

    @property
    def key(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        opened = _reached(self.name, lambda: self.store.open(self.place, "rb"))
        return io.BufferedReader(_Reader(self.name, opened))

    def version(self) -> tuple[Any, ...]:
        def look() -> dict[str, Any]:
            self.store.invalidate_cache()  # a listing from before a change
            return self.store.info(self.place)

        info = _reached(self.name, look)
        if not isinstance(info.get("size"), int):
            raise UserError(f"{self.name}: its store does not say how long it is: download it, and give the file")
        return info["size"], *(str(info[name]) for name in _VERSIONS if info.get(name) is not None)

    def shared_version(self, version: tuple[Any, ...]) -> tuple[Any, ...]:
        return version

    def absolute(self) -> RemoteFile:
        return self


class _Reader(io.RawIOBase):
    """A file of a store that names its URL in errors."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(_reached(self._url, lambda: self._file.seek(offset, whence)))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        data = _reached(self._url, lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def remote_files(url: str, given_format: str | None = None) -> list[RemoteFile]:
    """The files that ``url`` names, sorted: one, those of a glob, or all of text below a folder.

    Raises:
        UserError: there is none, one is of an unknown kind, or the store cannot be reached.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(f"reading {url} needs a package: pip install 'fusebert[remote]'") from error
    store, place = _reached(url, lambda: url_to_fs(url))
    if glob.has_magic(place):
        places = _reached(url, lambda: store.glob(place))
        if not places:
            raise UserError(f"{url} matches no file")
    else:
        places = [place] if _reached(url, lambda: store.exists(place)) else []
        if not places:
            raise UserError(f"{url} does not exist")
    files: list[str] = []
    for each in places:
        if not _reached(url, lambda place=each: store.isdir(place)):
            if not is_text_file(PurePosixPath(each).name):
                raise UserError(f"{_name(store, each)} is of an unknown kind: its name must end in {ALLOWED}")
            files.append(each)
            continue
        below = _text_below(each, _reached(url, lambda place=each: store.find(place)))
        if not below and len(places) == 1:
            raise UserError(f"the folder {url} holds no file of text: {ALLOWED}")
        files += below
    return [RemoteFile(PurePosixPath(each), _name(store, each), given_format, each, store) for each in sorted(files)]


def _text_below(folder: str, places: Sequence[str]) -> list[str]:
    """The files that a folder stands for, as in `files.find_files`."""
    inner = [(place, PurePosixPath(place.removeprefix(folder))) for place in places]
    found = [
        place
        for place, path in inner
        if path.name.endswith(SUFFIXES)
        or (is_text_file(path.name) and not any(part.startswith(".") for part in path.parts))
    ]
    return [place for place in found if place.endswith(COLUMNAR)] or found


def _name(store: Any, place: str) -> str:
    return str(store.unstrip_protocol(place))


def _reached(url: str, call: Any) -> Any:
    """The result of ``call``. What goes wrong in a store's package becomes one line with the URL."""
    try:
        return call()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {url} needs a package: {error}") from error
    except Exception as error:  # each store has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url} cannot be read ({reason})") from error
