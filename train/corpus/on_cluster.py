"""Both passes over the text on the workers of a Dask cluster, which read the files themselves.

This process sends the names of files, and gets digests, samples and token ids, in the order of the text. Workers import
this module and not the writer, which would load PyTorch in each of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..text.cluster import Cluster
from ..text.compression import Progress
from ..text.reading import Reading
from ..text.remote import RemoteFile
from .encode import Block, Encoding, Text, encode_documents
from .inputs import Document, Inputs, Source
from .parts import Part, Piece, batches
from .survey import Surveyor, SurveyPart, survey_part

FILES_BYTES = 64 << 20  # on disk, of the files that a worker surveys at once


def survey_on_cluster(cluster: Cluster, inputs: Inputs, surveyor: Surveyor, seed: int, progress: Progress) -> None:
    """The first pass: gives all documents of ``inputs`` to ``surveyor``.

    Args:
        seed: that of ``surveyor``.
        progress: called with the number of bytes read from disk (before decompression) since the last call.

    Raises:
        UserError: a worker does not see a file, a file has changed or cannot be read, or the cluster failed.
    """
    inputs.counts, skipped = [], inputs.reading.fresh()

    def tasks() -> Iterator[_SurveyTask]:
        for sources in _groups(inputs.sources):
            shared = [source.for_workers() for source in sources]
            # Results that have come bound the sample that later workers send.
            yield _SurveyTask(shared, inputs.reading.fresh(), seed, surveyor.sample_chars, surveyor.rank_below)

    with contextlib.closing(cluster.map(_survey_files, tasks())) as results:
        for found in results:
            surveyor.add_part(found.part)
            inputs.counts += found.counts
            skipped.add_skipped(found.skipped, found.reasons)
            progress(found.disk_bytes)
    inputs.skipped, inputs.reasons = skipped.skipped, skipped.reasons
    _check_versions(inputs)


def encode_on_cluster(
    cluster: Cluster, inputs: Inputs, places: np.ndarray, parts: list[Part], encoding: Encoding, progress: Progress
) -> Generator[list[Block], None, None]:
    """The second pass: the blocks of all documents, a list for each batch, in the order of the text.

    Args:
        places: `Survey.places`.
        parts: of the text, see `cut_parts`.
        encoding: its file must be in a folder that the workers see.
        progress: as for `survey_on_cluster`.

    Raises:
        UserError: as `survey_on_cluster`.
    """
    disk_bytes = _Share(inputs)

    def tasks() -> Iterator[_EncodeTask]:
        for part in parts:
            part_places = places[part.first : part.first + part.length]
            pieces = [(inputs.sources[piece.file], piece) for piece in part.pieces]
            if part.too_large:
                documents = _documents(pieces, inputs.reading, progress)
                yield from (_EncodeTask(batch, 0) for batch in batches(documents, part_places))
            else:
                shared = [(source.for_workers(), piece) for source, piece in pieces]
                yield _EncodeTask(_WorkersPart(shared, part_places, inputs.reading.fresh()), disk_bytes(part))

    encode = functools.partial(_encode, encoding=encoding)
    with contextlib.closing(cluster.map(encode, tasks())) as results:
        for blocks, size in results:
            yield from blocks
            progress(size)
    _check_versions(inputs)


def _check_versions(inputs: Inputs) -> None:
    """Looks at the files from this machine too, which sees more of their versions than others; stores show all."""
    for source in inputs.sources:
        if not isinstance(source.file, RemoteFile):
            source.check_version()


def _groups(sources: list[Source]) -> Iterator[list[Source]]:
    """Files one after another of about `FILES_BYTES`."""
    group: list[Source] = []
    size = 0
    for source in sources:
        if group and size + source.version[0] > FILES_BYTES:
            yield group
            group, size = [], 0
        group.append(source)
        size += source.version[0]
    if group:
        yield group


class _Share:
    """The bytes on disk of a part, for the progress bar: a file's bytes are shared among its documents."""

    def __init__(self, inputs: Inputs) -> None:
        self._sizes = [source.version[0] for source in inputs.sources]
        self._counts = inputs.counts

    def __call__(self, part: Part) -> int:
        return sum(self._upto(piece.file, piece.first + piece.length) - self._upto(*piece[:2]) for piece in part.pieces)

    def _upto(self, file: int, document: int) -> int:
        return int(self._sizes[file] * document // self._counts[file])


class _SurveyTask(NamedTuple):
    sources: list[Source]
    reading: Reading
    seed: int
    sample_chars: int
    rank_below: int


class _Surveyed(NamedTuple):
    part: SurveyPart
    counts: list[int]  # documents of each file
    skipped: int
    reasons: list[str]
    disk_bytes: int


class _WorkersPart(NamedTuple):
    pieces: list[tuple[Source, Piece]]
    places: np.ndarray
    reading: Reading


class _EncodeTask(NamedTuple):
    text: list[Text] | _WorkersPart
    disk_bytes: int


def _survey_files(task: _SurveyTask) -> _Surveyed:
    """Runs on a worker."""
    counts: list[int] = []

    def documents() -> Iterator[tuple[str, bool]]:
        for source in task.sources:
            counts.append(0)
            for text in _read(source, task.reading):
                counts[-1] += 1
                yield text, source.heldout

    part = survey_part(documents(), task.seed, task.sample_chars, task.rank_below)
    disk_bytes = sum(source.version[0] for source in task.sources)
    return _Surveyed(part, counts, task.reading.skipped, task.reading.reasons, disk_bytes)


def _encode(task: _EncodeTask, encoding: Encoding) -> tuple[list[list[Block]], int]:
    """Runs on a worker: the blocks of each batch, and the bytes on disk for the progress bar."""
    if isinstance(task.text, _WorkersPart):
        pieces, places, reading = task.text
        found = batches(_documents(pieces, reading), places)
    else:
        found = iter([task.text])
    return [encode_documents(batch, encoding) for batch in found], task.disk_bytes


def _documents(
    pieces: list[tuple[Source, Piece]], reading: Reading, progress: Progress | None = None
) -> Iterator[Document]:
    """The documents of a part, on a worker or, if it is too large for one, in this process."""
    for source, (_, first, length) in pieces:
        texts = _read(source, reading.fresh(), progress)
        for text in itertools.islice(texts, first, first + length):
            yield Document(text, source.heldout, source.weight)
        source.check_version()


def _read(source: Source, reading: Reading, progress: Progress | None = None) -> Iterator[str]:
    """The documents of a file. On a worker, errors of the system say that the worker must see the file."""
    if not source.shared:
        yield from source.documents(reading, progress)
        return
    try:
        source.file.version()
    except (OSError, UserError) as error:
        raise _unseen(source, error) from error
    try:
        yield from source.documents(reading, progress)
    except OSError as error:
        raise _unseen(source, error) from error


def _unseen(source: Source, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"{source.file.name} cannot be read on the worker {socket.gethostname()} ({reason}): every worker must see the "
        "inputs, in a folder that all share under the same path, or at URLs with the store's package installed"
    )
