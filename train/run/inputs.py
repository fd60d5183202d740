"""What a run keeps of its corpus from the start, and a watch on the corpus's files.

    out/inputs/tokenizer.json, manifest.json    copies from the corpus, with checked hashes

The corpus's arrays are mapped before the first step. A file that is deleted, or replaced by another, stays readable
through its map, so the run goes on with the text that it started with. A file that is overwritten in place changes
under the run, which therefore stops.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...model.atomic import replace_file
from ..corpus.format import ARRAYS, MANIFEST, SPLITS, TOKENIZER, CorpusError, file_sha256
from ..corpus.reader import Corpus, read_manifest
from ..errors import UserError


class RunInputs:
    """The corpus of a run, as it was when the run started.

    Args:
        corpus: all its arrays are mapped here.

    Attributes:
        tokenizer: the content of tokenizer.json.

    Raises:
        CorpusError: the corpus changed since it was opened.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._sha256: dict[Path, str | None] = {corpus.directory / MANIFEST: None}
        for name in SPLITS:
            entries = corpus.manifest["splits"][name]["shards"]
            for shard, entry in zip(corpus.split(name).shards, entries, strict=True):
                for array in ARRAYS:
                    getattr(shard, array)
                    self._sha256[shard.paths[array]] = entry["files"][array]["sha256"]
        changed = f"{corpus.directory} changed while the run started: start again"
        try:
            self.tokenizer = (corpus.directory / TOKENIZER).read_bytes()
            self._manifest = (corpus.directory / MANIFEST).read_bytes()
            self._seen = {path: _identity(path) for path in self._sha256}
            # A corpus is replaced as a whole folder, so this manifest is that of the files mapped above.
            same = read_manifest(corpus.directory) == corpus.manifest
        except OSError as error:
            raise CorpusError(changed) from error
        if not same or hashlib.sha256(self.tokenizer).hexdigest() != corpus.manifest["tokenizer"]["sha256"]:
            raise CorpusError(changed)

    def keep(self, out: Path) -> Path:
        """Writes the copies to ``out``/inputs, if they are not there, and returns the tokenizer's path."""
        folder = out / "inputs"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((MANIFEST, self._manifest), (TOKENIZER, self.tokenizer)):
            path = folder / name
            if not path.is_file() or path.read_bytes() != content:
                with replace_file(path) as partial:
                    partial.write_bytes(content)
        return folder / TOKENIZER

    def changes(self) -> list[str]:
        """Which files of the corpus were deleted or replaced since the last call, in words.

        Raises:
            UserError: a file was overwritten in place with other content.
        """
        found = []
        for path, before in list(self._seen.items()):
            try:
                now = _identity(path)
            except OSError:
                found.append(f"{path} was deleted")
                del self._seen[path]
                continue
            if now == before:
                continue
            self._seen[path] = now
            if now[:2] != before[:2]:
                found.append(f"{path} was replaced")
            elif not self._as_recorded(path):
                raise UserError(
                    f"{path} was overwritten during the run, which may have read the new content: restore that file"
                )
        return found

    def _as_recorded(self, path: Path) -> bool:
        recorded = self._sha256[path]
        return path.read_bytes() == self._manifest if recorded is None else file_sha256(path) == recorded


def _identity(path: Path) -> tuple[int, ...]:
    """Device and inode, then size and time of the last change."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
