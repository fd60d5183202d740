"""Text to a corpus on disk, in two passes over the text.

1. `survey_documents` chooses the held-out documents and a sample of the others, from which the tokenizer is trained.
2. Worker processes split batches of documents into sentences and encode them (`encode_documents`); this process writes
   the results in order. The corpus does not depend on the number of workers.

Input that can be read only once (standard input) or is slow to read (docstrings) is first copied to a file beside the
corpus. That copy and an unfinished corpus are removed however the run ends.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from ..errors import UserError
from ..text import pydocs
from ..text.readers import Progress, TextFile, find_files, read_documents
from ..text.sentences import sentence_splitter
from ..text.tokenizer import VOCAB_SIZE, load_tokenizer, train_tokenizer
from ..text.workers import available_cores, ordered_map
from .encode import encode_documents, start_encoding
from .format import TOKENIZER
from .reader import Corpus
from .survey import survey_documents
from .writer import CorpusWriter, check_destination

CORPORA = ("pydocs",)
SAMPLE_CHARS = 32 << 20  # enough for a vocabulary of 30,000; training on it takes ten seconds of a core
BATCH_CHARS = 1 << 19  # of the documents that a worker encodes at once
_SMALL_INPUT = 4 << 20  # bytes; below this, starting workers takes longer than the work


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    *,
    corpus: str | None = None,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    lowercase: bool | None = None,
    text_field: str = "text",
    sentences: str = "auto",
    max_bytes: int | None = None,
    heldout: float = 0.01,
    workers: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Corpus:
    """Makes a corpus of text. Warns when the text is too small to fill the vocabulary.

    Args:
        inputs: files, folders and globs as `find_files` and `read_documents` take them; "-" is standard input, as .txt.
        out: the corpus's directory. It appears when the corpus is complete.
        corpus: "pydocs", the docstrings of the installed Python packages, instead of inputs.
        vocab_size: tokens of the WordPiece vocabulary to learn; 30522 unless given.
        tokenizer: a tokenizer.json or vocab.txt to use instead of learning one.
        lowercase: fold case and accents. None: yes when learning a vocabulary; for a vocab.txt, unless it has capitals.
        text_field: the field of a .jsonl object that holds the text.
        sentences: "blingfire", "lines" (one a line), or "auto", which is blingfire.
        max_bytes: take no more text than this (UTF-8).
        heldout: fraction of the documents held out, in (0, 1); but at least `MIN_HELDOUT` documents, or a tenth of them
            where that is fewer, and at least one.
        workers: processes; None: one a core, or this one alone for a few MB.
        seed: 0 … 2⁶⁴ − 1; another holds out other documents.
        overwrite: replace a corpus that is at ``out``.
        show_progress: progress bars on standard error.

    Raises:
        UserError, CorpusError, ValueError: an argument, an input or the place is wrong; the message is one line.
        OSError: reading or writing failed (no space left, no permission).
    """
    out = Path(out)
    _check_arguments(inputs, corpus, vocab_size, tokenizer, heldout, max_bytes, workers, seed)
    check_destination(out, overwrite)
    sentence_splitter(sentences)
    given = None if tokenizer is None else load_tokenizer(Path(tokenizer), lowercase)
    files = find_files([name for name in inputs if name != "-"])

    with contextlib.ExitStack() as stack, _name_in_errors(out):
        # Not in the system's temporary folder, which may be small or in memory.
        place = out.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{place.name}.scratch-", dir=place.parent))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)

        described: dict[str, Any] = {"inputs": list(inputs)}
        if corpus == "pydocs":
            copy, found = _copy_docstrings(scratch, workers or available_cores(), max_bytes, show_progress)
            files, described = [copy], {"corpus": corpus, **found._asdict()}
        elif "-" in inputs:
            files.append(_copy_stdin(scratch, max_bytes))
        source = _Source(files, text_field, max_bytes)
        workers = workers or (1 if source.total_bytes < _SMALL_INPUT else available_cores())

        with _bar("reading", source.total_bytes, show_progress) as bar:
            sample_chars = SAMPLE_CHARS if given is None else 0
            survey = survey_documents(source.documents(bar.update), heldout, seed, sample_chars)
        if not survey.num_documents:
            raise UserError(f"there is no text in {' '.join(inputs) or corpus}: give files that are not empty")
        if survey.heldout_below is None:
            raise UserError(
                "no document can be held out, because the text is a single one: a blank line ends a document in .txt, "
                "a line end in .jsonl; give at least two different documents"
            )

        if given is None:
            size = VOCAB_SIZE if vocab_size is None else vocab_size
            lowercase = lowercase is not False
            given = _learn_tokenizer(survey.sample, size, lowercase, show_progress)
        tokenizer_file = scratch / TOKENIZER
        if tokenizer is not None and Path(tokenizer).suffix == ".json":
            shutil.copyfile(tokenizer, tokenizer_file)  # unchanged, so that its hash identifies it
        else:
            given.save(str(tokenizer_file))
        survey.sample.clear()

        described |= {
            "tokenizer": "learned" if tokenizer is None else str(tokenizer),
            "lowercase": lowercase,
            "text_field": text_field,
            "sentences": "blingfire" if sentences == "auto" else sentences,
            "max_bytes": max_bytes,
            "heldout": heldout,
            "seed": seed,
        }
        writer = stack.enter_context(CorpusWriter(out, tokenizer_file, overwrite=overwrite))
        bar = stack.enter_context(_bar("encoding", source.total_bytes, show_progress))
        encoded = ordered_map(
            encode_documents,
            _batches(source.documents(bar.update)),
            workers=workers,
            initializer=start_encoding,
            initargs=(tokenizer_file, sentences, survey.heldout_below, seed, writer.vocab_size),
        )
        for blocks in stack.enter_context(contextlib.closing(encoded)):
            for block in blocks:
                writer.add_block(*block)
        return writer.finish(described)


def _check_arguments(
    inputs: Sequence[str],
    corpus: str | None,
    vocab_size: int | None,
    tokenizer: str | Path | None,
    heldout: float,
    max_bytes: int | None,
    workers: int | None,
    seed: int,
) -> None:
    if corpus is not None and corpus not in CORPORA:
        raise UserError(f"there is no corpus {corpus!r}: choose one of {', '.join(CORPORA)}, or give files")
    if bool(inputs) == (corpus is not None):
        raise UserError(
            "give either inputs (files, folders, globs, -) or --corpus, " + ("not both" if inputs else "one")
        )
    if vocab_size is not None and tokenizer is not None:
        raise UserError("give either --vocab-size, to learn a vocabulary, or --tokenizer, which has one, not both")
    if not 0 < heldout < 1:
        raise UserError(f"--heldout must be a fraction between 0 and 1; got {heldout}")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"--seed must be in [0, 2^64); got {seed}")
    for name, value, least in (("vocab-size", vocab_size, 16), ("max-bytes", max_bytes, 1), ("workers", workers, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}; got {value}")


class _Source:
    """The documents of some files, up to ``max_bytes`` of UTF-8 text; they can be read several times."""

    def __init__(self, files: list[TextFile], text_field: str, max_bytes: int | None) -> None:
        self._files, self._text_field, self._max_bytes = files, text_field, max_bytes
        self.total_bytes = sum(file.path.stat().st_size for file in files)

    def documents(self, progress: Progress) -> Iterator[str]:
        left = self._max_bytes
        for file in self._files:
            for document in read_documents(file, self._text_field, progress):
                if left is not None and (left := left - len(document.encode())) < 0:
                    return
                yield document


def _copy_stdin(scratch: Path, max_bytes: int | None) -> TextFile:
    path, copied = scratch / "stdin.txt", 0
    with open(path, "wb") as out:
        while (max_bytes is None or copied < max_bytes) and (block := sys.stdin.buffer.read(1 << 20)):
            copied += len(block)
            if max_bytes is not None and copied >= max_bytes:
                # Stop reading here. End with a whole word, so that no character is cut.
                block = block[: max(block.rfind(b"\n"), block.rfind(b" ")) + 1] or block
            out.write(block)
    return TextFile(path, "standard input")


def _copy_docstrings(
    scratch: Path, workers: int, max_bytes: int | None, show_progress: bool
) -> tuple[TextFile, pydocs.Collected]:
    path = scratch / "pydocs.jsonl"
    files = pydocs.python_files()
    with _bar("parsing", sum(file.stat().st_size for file in files), show_progress) as bar:
        found = pydocs.collect(path, workers=workers, files=files, max_bytes=max_bytes, progress=bar.update)
    return TextFile(path, "the docstrings"), found


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _learn_tokenizer(sample: list[str], vocab_size: int, lowercase: bool, show_progress: bool) -> Tokenizer:
    if show_progress:
        print(f"learning a vocabulary of {vocab_size:,} pieces ...", file=sys.stderr, flush=True)
    learned = train_tokenizer(sample, vocab_size, lowercase)
    if (reached := learned.get_vocab_size()) < vocab_size:
        warnings.warn(
            f"the text repeats too little to fill a vocabulary of {vocab_size} tokens: it has {reached}", stacklevel=3
        )
    return learned


def _bar(description: str, total: int, show: bool) -> tqdm:
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=not show, smoothing=0.05)


@contextlib.contextmanager
def _name_in_errors(out: Path) -> Iterator[None]:
    """Adds ``out`` to errors that name no file, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
