"""Text to a corpus on disk, in two passes over the text.

1. A `Surveyor` chooses the held-out documents and a sample of the others, from which the tokenizer is trained.
2. Worker processes split batches of documents into sentences and encode them (`encode_documents`); this process writes
   the results in order. The corpus does not depend on the number of workers.

With ``--executor dask:ADDRESS`` the workers of a cluster read the text in both passes (`on_cluster`), and the corpus is
the same.

Input that can be read only once (standard input) or is slow to read (docstrings) is first copied to a file beside the
corpus. That copy and an unfinished corpus are removed however the run ends; those of a killed run by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from ..errors import UserError
from ..text import pydocs
from ..text.characters import count_characters, needs_marks, scripts
from ..text.cluster import Cluster
from ..text.compression import BLOCK_BYTES
from ..text.files import find_files
from ..text.readers import kind_of_start
from ..text.reading import Reading
from ..text.sentences import sentence_splitter
from ..text.subwords import LEARNERS
from ..text.text_file import TextFile
from ..text.tokenizer import (
    LOST_TO_LENGTH,
    VOCAB_SIZE,
    encoder,
    load_tokenizer,
    normalisation,
    share_in_long_words,
    train_tokenizer,
)
from ..text.workers import available_cores, ordered_map
from .encode import Encoding, encode_documents
from .format import TOKENIZER
from .inputs import Inputs
from .on_cluster import encode_on_cluster, survey_on_cluster
from .parts import batches_of_parts, cut_parts
from .reader import Corpus
from .report import check_heldout, check_skipped, check_unknown, heldout_share, next_command
from .settings import DASK, PrepareSettings, parse_weight
from .survey import HELDOUT, TRAIN, Survey, Surveyor
from .tally import tallies
from .work_folder import WorkFolder, remove_leftovers
from .writer import CorpusWriter, check_destination

SAMPLE_CHARS = 32 << 20  # enough for a vocabulary of 30,000; training on it takes ten seconds of a core
_SCRIPT_CHARS = 1 << 20  # enough to name the scripts of the text
_SMALL_INPUT = 4 << 20  # bytes; below this, starting workers takes longer than the work


def prepare(settings: PrepareSettings, *, show_progress: bool = False) -> Corpus:
    """Makes a corpus of text. Warns when the text is too small to fill the vocabulary.

    Args:
        settings: the options of ``fusebert prepare``.
        show_progress: show progress bars on standard error.

    Raises:
        UserError, CorpusError: an option, an input or the destination is wrong; the message is one line.
        OSError: reading or writing failed, for example because the disk is full.
    """
    inputs, out, max_bytes = settings.inputs or [], settings.out, settings.max_bytes
    place = out.resolve()
    remove_leftovers(place)
    check_destination(out, settings.overwrite)
    sentence_splitter(settings.sentences)
    strip = {"auto": None, "keep": False, "strip": True}[settings.accents]
    tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer, settings.lowercase, strip)
    heldout_files = find_files(settings.heldout_files or [], settings.format)
    own = {file.key for file in heldout_files}
    files = find_files([name for name in inputs if name != "-"], settings.format)
    files = [file for file in files if file.key not in own]
    weights = _weights(settings, files)

    with contextlib.ExitStack() as stack, _name_in_errors(out):
        # Not in the system's temporary folder, which may be small or in memory.
        folder = WorkFolder.make(place, "scratch")
        stack.callback(folder.remove)
        scratch = folder.path

        cluster = None
        if settings.executor != "local":
            cluster = stack.enter_context(Cluster(settings.executor.removeprefix(DASK), scratch))

        source: dict[str, Any] = {"inputs": inputs}
        if settings.corpus == "pydocs":
            copy, found = _copy_docstrings(scratch, settings.workers or available_cores(), max_bytes, show_progress)
            files, source = [copy], {"corpus": settings.corpus, **found._asdict()}
        elif "-" in inputs:
            files.append(_copy_stdin(scratch, settings.format, max_bytes))
        reading = Reading(settings.text_field, settings.documents, settings.skip_bad_records)
        text = Inputs(heldout_files, files, reading, max_bytes, weights)
        workers = settings.workers or (1 if text.total_bytes < _SMALL_INPUT else available_cores())

        with _bar("reading", text.total_bytes, show_progress) as bar:
            surveyor = Surveyor(scratch, settings.seed, SAMPLE_CHARS if tokenizer is None else _SCRIPT_CHARS)
            if cluster is None or max_bytes is not None:  # where the limit lies is found by reading up to there
                surveyor.add(document[:2] for document in text.documents(bar.update))
            else:
                survey_on_cluster(cluster, text, surveyor, settings.seed, bar.update)
            survey = surveyor.finish(settings.heldout, settings.dedup)
        parts = cut_parts(text.counts, survey.sizes)
        skipped = {"count": text.skipped, "first": text.reasons}
        _check_survey(survey, text, settings)

        characters = count_characters(survey.sample)
        if tokenizer is None:
            tokenizer = _learn_tokenizer(survey.sample, characters, settings, show_progress)
        tokenizer_file = scratch / TOKENIZER
        if settings.tokenizer is not None and settings.tokenizer.suffix == ".json":
            shutil.copyfile(settings.tokenizer, tokenizer_file)  # unchanged, so that its hash identifies it
        else:
            tokenizer_file.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        survey.sample.clear()

        source |= {
            "tokenizer": "learned" if settings.tokenizer is None else str(settings.tokenizer),
            "vocab_type": type(tokenizer.model).__name__.lower(),
            **normalisation(tokenizer),
            "text_field": settings.text_field,
            "documents": settings.documents,
            "dedup": settings.dedup,
            "heldout_files": settings.heldout_files,
            "weight": settings.weight,
            "sentences": "blingfire" if settings.sentences == "auto" else settings.sentences,
            "max_bytes": max_bytes,
            "heldout": settings.heldout,
            "seed": settings.seed,
        }
        writer = stack.enter_context(CorpusWriter(out, tokenizer_file, overwrite=settings.overwrite))
        bar = stack.enter_context(_bar("encoding", text.total_bytes, show_progress))
        encoding = Encoding(tokenizer_file.resolve(), settings.sentences, writer.vocab_size)
        if cluster is None:
            batches = batches_of_parts(text.documents(bar.update), survey.places, parts)
            encoded = ordered_map(functools.partial(encode_documents, encoding=encoding), batches, workers=workers)
        else:
            encoded = encode_on_cluster(cluster, text, survey.places, parts, encoding, bar.update)
        counts = tallies(writer.special.unk)
        for blocks in stack.enter_context(contextlib.closing(encoded)):
            for block in blocks:
                writer.add_block(*block[:5])
                counts[block.split].add(block)
        made_with = encoder(tokenizer_file)
        problems = check_unknown(
            counts, made_with, characters if settings.tokenizer is None else None, settings.allow_unknown
        )
        problems += check_heldout(counts, None if heldout_files else settings.heldout)
        problems += check_skipped(skipped)
        for problem in problems:
            warnings.warn(problem, stacklevel=2)
        copies = {"train": survey.copies[TRAIN], "heldout": survey.copies[HELDOUT]}
        report = {
            "splits": {split: tally.describe(made_with, copies[split]) for split, tally in counts.items()},
            "heldout_share": heldout_share(counts),
            "scripts": scripts(characters),
            "copies_left_out": survey.dropped,
            "left_out_as_held_out": survey.leaked,
            "skipped_records": skipped,
            "warnings": problems,
            "next": next_command(out),
        }
        return writer.finish(source, report)


def _check_survey(survey: Survey, text: Inputs, settings: PrepareSettings) -> None:
    """Raises UserError unless there is text to train on, and text to hold out."""
    if not len(survey.places):
        where = " ".join(settings.inputs or []) or settings.corpus
        if text.too_long is not None:
            raise UserError(
                f"--max-bytes {settings.max_bytes} is less than the first document has, {text.too_long} bytes: raise it"
            )
        if text.skipped:
            raise UserError(f"no record in {where} can be read ({text.reasons[0]})")
        raise UserError(f"there is no text in {where}: give files that are not empty")
    if not (survey.places == HELDOUT).any():
        raise UserError(
            "no document can be held out, because the text is a single one: a blank line ends a document in .txt, a "
            "record in .jsonl, and --documents line makes each line one; give at least two different documents"
        )
    if not (survey.places == TRAIN).any():
        raise UserError("every document is in --heldout-files: give other text to train on")


def _weights(settings: PrepareSettings, files: list[TextFile]) -> dict[str, float]:
    """The weight of each file that --weight names, by its key.

    Raises:
        UserError: a file is not among the inputs.
    """
    weights: dict[str, float] = {}
    known = {file.key for file in files}
    for given in settings.weight or []:
        glob, weight = parse_weight(given)
        found = {file.key for file in find_files([glob], settings.format)}
        if not found <= known:
            raise UserError(f"--weight {given}: {min(found - known)} is not among the inputs that are trained on")
        weights |= dict.fromkeys(found, weight)
    return weights


def _copy_stdin(scratch: Path, given_format: str | None, max_bytes: int | None) -> TextFile:
    file = TextFile(scratch / "stdin", "standard input", given_format)
    with open(file.path, "wb") as out:
        copied, block = 0, sys.stdin.buffer.read(BLOCK_BYTES)
        kind = file.kind or kind_of_start(block)
        ends = b" \n" if kind in (".txt", ".md") else b"\n"
        if kind in (".json", ".csv"):
            max_bytes = None  # their records have no end that can be seen here: `Inputs` applies the limit
        while block:
            copied += len(block)
            if max_bytes is not None and copied >= max_bytes:
                # Stop reading here. End with a whole word or record.
                out.write(block[: max(block.rfind(bytes((end,))) for end in ends) + 1] or block)
                break
            out.write(block)
            block = sys.stdin.buffer.read(BLOCK_BYTES)
    return file


def _copy_docstrings(
    scratch: Path, workers: int, max_bytes: int | None, show_progress: bool
) -> tuple[TextFile, pydocs.Collected]:
    path = scratch / "pydocs.jsonl"
    files = pydocs.python_files()
    with _bar("parsing", sum(file.stat().st_size for file in files), show_progress) as bar:
        found = pydocs.collect(path, workers=workers, files=files, max_bytes=max_bytes, progress=bar.update)
    return TextFile(path, "the docstrings"), found


def _learn_tokenizer(
    sample: list[str], characters: Mapping[str, int], settings: PrepareSettings, show_progress: bool
) -> Tokenizer:
    vocab_size, kind = settings.vocab_size or VOCAB_SIZE, settings.vocab_type
    lowercase = kind == "wordpiece" if settings.lowercase is None else settings.lowercase
    if show_progress:
        print(f"learning a vocabulary of {vocab_size:,} pieces ...", file=sys.stderr, flush=True)
    strip = lowercase if settings.accents == "auto" else settings.accents == "strip"
    if settings.accents == "auto" and strip:
        strip = not needs_marks(characters)
    train: Any = train_tokenizer if kind == "wordpiece" else LEARNERS[kind]
    learned: Tokenizer = train(
        sample,
        vocab_size,
        lowercase,
        strip_accents=None if strip == lowercase else strip,  # None is how BERT's own files say it
        cut_runs=share_in_long_words(sample) > LOST_TO_LENGTH,
    )
    if (reached := learned.get_vocab_size()) < vocab_size:
        warnings.warn(
            f"the text repeats too little to fill a vocabulary of {vocab_size} tokens: it has {reached}", stacklevel=3
        )
    return learned


def _bar(description: str, total: int, show: bool) -> tqdm:
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=not show, smoothing=0.05)


@contextlib.contextmanager
def _name_in_errors(out: Path) -> Iterator[None]:
    """Errors of writing, such as "No space left on device", name ``out`` and say how to go on."""
    try:
        yield
    except OSError as error:
        # Files that are written have names that the user did not choose, see `work_folder`.
        if error.errno is None or not (error.filename is None or str(error.filename).startswith(f"{out.resolve()}.")):
            raise
        reason = f"{error.strerror}; nothing is changed there: solve the problem, then give the same command again"
        raise OSError(error.errno, reason, str(out)) from error
