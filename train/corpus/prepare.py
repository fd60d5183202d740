"""From text to a corpus on disk, in two passes over the text.

1. Survey: every document is hashed. The hash decides, whatever the order, which documents are held out (the same text
   always the same way, so a duplicate never leaks from one split into the other), and a second one which of the others
   the tokenizer learns from: those with the smallest, up to `SAMPLE_BYTES`, which is a uniform sample.
2. Encode: worker processes split batches of documents into sentences and encode them; this process writes the results
   in order. The corpus does not depend on the number of workers.

What can be read but once (standard input), or is dear to read (docstrings), is first copied to a file beside the
corpus. That copy, and a corpus not finished, go when this ends in whatever way.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from ..errors import UserError
from ..text import pydocs
from ..text.readers import Progress, TextFile, find_files, read_documents
from ..text.sentences import Splitter, sentence_splitter
from ..text.tokenizer import VOCAB_SIZE, encoder, load_tokenizer, train_tokenizer
from ..text.workers import available_cores, ordered_map
from .corpus import SPLITS, Corpus, CorpusWriter, check_destination, token_dtype

CORPORA = ("pydocs",)
SAMPLE_BYTES = 32 << 20  # plenty for 30,000 pieces, and ten seconds of a core
MIN_HELDOUT = 16  # documents
_BATCH_CHARS = 1 << 19
_SMALL = 4 << 20  # bytes of input below which starting workers takes longer than the work


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

    with contextlib.ExitStack() as stack, _naming(out):
        # Beside the corpus: the system's temporary folder may be small, or memory.
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
        workers = workers or (1 if source.total_bytes < _SMALL else available_cores())

        with _bar("reading", source.total_bytes, show_progress) as bar:
            survey = _survey(source.documents(bar.update), heldout, seed, SAMPLE_BYTES if given is None else 0)
        if not survey.num_documents:
            raise UserError(f"there is no text in {' '.join(inputs) or corpus}")
        if survey.heldout_below is None:
            raise UserError(
                "nothing can be held out, all text being one document: a blank line ends one in .txt, a line in "
                ".jsonl; give at least two different ones"
            )

        if given is None:
            size = VOCAB_SIZE if vocab_size is None else vocab_size
            lowercase = lowercase is not False
            given = _learn_tokenizer(survey.sample, size, lowercase, show_progress)
        tokenizer_file = scratch / "tokenizer.json"
        if tokenizer is not None and Path(tokenizer).suffix == ".json":
            shutil.copyfile(tokenizer, tokenizer_file)  # as it is, so that its hash tells whose it is
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
            _encode_batch,
            _batches(source.documents(bar.update)),
            workers=workers,
            initializer=_start_encoding,
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
    """The documents of some files, as often as wanted."""

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
                # The rest is not read. End with a whole word, so that no character is cut.
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


class _Survey(NamedTuple):
    num_documents: int
    heldout_below: int | None  # documents whose first hash is below are held out; None: there are no two different ones
    sample: list[str]  # of the training documents, for the tokenizer


def _survey(documents: Iterable[str], heldout: float, seed: int, sample_bytes: int) -> _Survey:
    count, largest = 0, -1
    smallest: list[int] = []  # different first hashes, ascending, MIN_HELDOUT of them
    sample: list[tuple[int, int, str]] = []  # heap of (−second hash, first hash, text)
    sampled, rank_below = 0, 1 << 64
    for document in documents:
        text = _normalised(document)
        side, rank = _hashes(text, seed)
        count += 1
        largest = max(largest, side)
        if (len(smallest) < MIN_HELDOUT or side < smallest[-1]) and side not in smallest:
            smallest = sorted([*smallest, side])[:MIN_HELDOUT]
        if rank < rank_below:
            heapq.heappush(sample, (-rank, side, text))
            sampled += len(text)
            while sampled > sample_bytes:
                # What ranks above something left out is left out, or the sample would depend on the order.
                dropped, _, text = heapq.heappop(sample)
                sampled, rank_below = sampled - len(text), -dropped
    if count == 0 or largest == smallest[0]:
        return _Survey(count, None, [])
    least = min(MIN_HELDOUT, max(1, count // 10), len(smallest))
    # At most all but the last, so that there is something to train on.
    below = min(max(int(heldout * 2**64), smallest[least - 1] + 1), largest)
    return _Survey(count, below, [text for _, side, text in sample if side >= below])


def _normalised(document: str) -> str:
    return " ".join(document.split())


def _hashes(text: str, seed: int) -> tuple[int, int]:
    """Two hashes of a normalised document, each uniform in [0, 2⁶⁴)."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if length >= _BATCH_CHARS:
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


class _Encoding(NamedTuple):
    tokenizer: Tokenizer
    split: Splitter
    heldout_below: int
    seed: int
    dtype: np.dtype[Any]


_encoding: _Encoding  # a worker's


def _start_encoding(tokenizer_file: Path, sentences: str, heldout_below: int, seed: int, vocab_size: int) -> None:
    global _encoding
    _encoding = _Encoding(
        encoder(tokenizer_file), sentence_splitter(sentences), heldout_below, seed, token_dtype(vocab_size)
    )


def _encode_batch(documents: list[str]) -> list[tuple[str, np.ndarray, list[int], list[int]]]:
    """The arguments of `CorpusWriter.add_block` for each split that has documents in the batch."""
    chosen: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for document in documents:
        side, _ = _hashes(_normalised(document), _encoding.seed)
        chosen["heldout" if side < _encoding.heldout_below else "train"].append(_encoding.split(document))
    blocks = []
    for split, texts in chosen.items():
        sentences = list(itertools.chain.from_iterable(texts))
        ids = [e.ids for e in _encoding.tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
        tokens = np.fromiter(itertools.chain.from_iterable(ids), _encoding.dtype)
        blocks.append((split, tokens, list(map(len, ids)), list(map(len, texts))))
    return blocks


def _bar(description: str, total: int, show: bool) -> tqdm:
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=not show, smoothing=0.05)


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    """A failed write does not say where ("No space left on device"); this does."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise


__all__ = ["CORPORA", "MIN_HELDOUT", "SAMPLE_BYTES", "prepare"]
