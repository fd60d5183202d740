"""A text that every machine has: the docstrings of the Python packages installed on it.

The files of the standard library and of site-packages are parsed with ``ast``; nothing is imported, run or downloaded.
A document holds the docstrings of a module, its classes and its functions, in source order, each as a paragraph. (Most
docstrings are too short for two neighbouring sentences, and those of a module have one subject, as next-sentence
prediction needs.) A docstring that occurs in several places is used once.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import inspect
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .workers import ordered_map

MIN_CHARS = 80  # shorter docstrings are labels, not prose
_LARGEST_SOURCE = 2 << 20  # bytes; larger files are generated tables, and their syntax trees take gigabytes
_SOURCES_A_TASK = 32
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENT_LISTS = ("body", "handlers", "orelse", "finalbody", "cases")


class Collected(NamedTuple):
    """The result of `collect`.

    Attributes:
        modules: modules with text; each is a document.
        docstrings: distinct docstrings.
        text_bytes: size of the text in UTF-8.
        unparsable: source files that could not be parsed (another version's syntax, templates).
    """

    modules: int
    docstrings: int
    text_bytes: int
    unparsable: int


def python_files() -> list[Path]:
    """Every .py file in the standard library and site-packages of the running interpreter.

    The order is stable and mixes the packages, so that a corpus with a size limit has text of many packages.
    """
    roots = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    found: dict[str, bytes] = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            # The order depends on the path within the root, not on where this machine has the root.
            within = os.path.relpath(folder, root).encode("utf-8", "surrogateescape")
            for name in names:
                if name.endswith(".py"):
                    key = within + b"/" + name.encode("utf-8", "surrogateescape")
                    found[os.path.join(folder, name)] = hashlib.sha256(key).digest()
    return [Path(path) for path in sorted(found, key=lambda path: (found[path], path))]


def docstrings(source: bytes, min_chars: int = MIN_CHARS) -> list[str]:
    """The docstrings longer than ``min_chars`` of a Python source file, without indentation, in source order.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as ``ast.parse``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        stack: list[ast.AST] = [ast.parse(source)]
    found = []
    while stack:
        node = stack.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node, clean=False)
            if text is not None and len(text := inspect.cleandoc(text)) > min_chars:
                found.append(text)
        # Only statement lists contain definitions. Skipping expressions is four times as fast as ast.walk.
        children: list[ast.AST] = []
        for name in _STATEMENT_LISTS:
            listed = getattr(node, name, None)
            if isinstance(listed, list):
                children += listed
        stack += reversed(children)
    return found


def collect(
    destination: Path,
    *,
    workers: int,
    files: list[Path] | None = None,
    max_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """Writes the documents to ``destination``, a .jsonl file with the field ``text``.

    Args:
        destination: the file to write.
        workers: processes that parse.
        files: sources to read; None: `python_files`.
        max_bytes: stop before the text (UTF-8) exceeds this.
        progress: called with the number of bytes of source read since the last call.
    """
    files = python_files() if files is None else files
    tasks = (files[i : i + _SOURCES_A_TASK] for i in range(0, len(files), _SOURCES_A_TASK))
    seen: set[bytes] = set()
    documents = text_bytes = unparsable = 0
    results = ordered_map(_read_sources, tasks, workers=workers)
    with contextlib.closing(results), open(destination, "w", encoding="utf-8") as out:
        for modules, bad, size in results:
            unparsable += bad
            if progress is not None:
                progress(size)
            for module in modules:
                fresh = list(_unseen(module, seen))
                if not fresh:
                    continue
                text = "\n\n".join(fresh)
                text_bytes += len(text.encode())
                if max_bytes is not None and text_bytes > max_bytes:
                    text_bytes -= len(text.encode())
                    return Collected(documents, len(seen) - len(fresh), text_bytes, unparsable)
                out.write(json.dumps({"text": text}) + "\n")
                documents += 1
    return Collected(documents, len(seen), text_bytes, unparsable)


def _unseen(texts: list[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns off garbage collection: syntax trees have no cycles, and the search takes a quarter of the parsing time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_garbage_collection()
def _read_sources(paths: list[Path]) -> tuple[list[list[str]], int, int]:
    """(docstrings of each file that has some, number of files that could not be parsed, bytes read)."""
    modules, unparsable, size = [], 0, 0
    for path in paths:
        try:
            source = path.read_bytes()
        except OSError:
            continue  # removed meanwhile, or not readable
        size += len(source)
        try:
            if len(source) > _LARGEST_SOURCE:
                raise ValueError("too large")
            texts = [text for text in docstrings(source) if _is_text(text)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            unparsable += 1
            continue
        if texts:
            modules.append(texts)
    return modules, unparsable, size


def _is_text(text: str) -> bool:
    """False for a string with half a surrogate pair ("\\ud800"), which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
