"""Which files of text an input names, and of which kind each is."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .remote import is_url, remote_files
from .text_file import ALLOWED, COLUMNAR, SUFFIXES, TextFile, is_text_file


def find_files(inputs: Sequence[str], given_format: str | None = None) -> list[TextFile]:
    """The files that ``inputs`` name, each once, in the order given and sorted within a folder or glob.

    Args:
        inputs: files, folders, globs, and URLs of these, see `remote`. A folder stands for every file in it and below
            it that `is_text_file`; one with .parquet or .arrow files, as data sets of Hugging Face are, for these
            alone. Files without a suffix are left out of hidden folders.
        given_format: see `TextFile`.

    Raises:
        UserError: an input matches no file, or a file of another kind.
    """
    found: dict[str, TextFile] = {}
    for given in inputs:
        if is_url(given):
            for remote in remote_files(given, given_format):
                found.setdefault(remote.key, remote)
            continue
        paths = [Path(given)] if os.path.lexists(given) else [Path(path) for path in _expand(given)]
        if not paths:
            what = "matches no file" if glob.has_magic(given) else "does not exist"
            raise UserError(f"{given} {what}: give text files ({ALLOWED}), folders, globs or -")
        for path in paths:
            files = [path]
            if path.is_dir():
                files = _files_below(path)
                if not files and len(paths) == 1:
                    raise UserError(f"the folder {path} holds no file of text: {ALLOWED}")
            for file in files:
                if not is_text_file(file.name):
                    raise UserError(f"{file} is of an unknown kind: its name must end in {ALLOWED}")
                _check_regular(file)
                local = TextFile(file, str(file), given_format)
                found.setdefault(local.key, local)
    if inputs and not found:
        raise UserError(f"{' '.join(inputs)}: no file of text in these folders: {ALLOWED}")
    return list(found.values())


def _files_below(folder: Path) -> list[Path]:
    """The files that ``folder`` stands for, see `find_files`. Links to folders are not followed."""
    files: list[Path] = []
    folders = [str(folder)]
    while folders:
        here = folders.pop()
        hidden = any(part.startswith(".") for part in Path(here).relative_to(folder).parts)
        for entry in _entries(here):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and _is_folder(entry.path):
                warnings.warn(f"the link {entry.path} to a folder is not followed: name it as an input", stacklevel=3)
            elif entry.name.endswith(SUFFIXES) or (
                not hidden and is_text_file(entry.name) and os.path.isfile(entry.path)
            ):
                files.append(Path(entry.path))
    columnar = [path for path in files if path.name.endswith(COLUMNAR)]
    if columnar and len(columnar) < len(files):
        warnings.warn(
            f"{folder} is a data set: its {len(columnar)} files {' and '.join('*' + kind for kind in COLUMNAR)} are "
            f"read, and {len(files) - len(columnar)} other files left out: name them as inputs to read them too",
            stacklevel=3,
        )
    return sorted(columnar or files)


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
