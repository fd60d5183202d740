"""The options of ``fusebert prepare``. This module imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

from ..errors import UserError
from ..options import Option
from ..text.reading import DOCUMENTS
from ..text.special_tokens import MAX_VOCAB_SIZE, SMALLEST_SUBWORDS
from ..text.text_file import FORMATS

CORPORA = ("pydocs",)
ACCENTS = ("auto", "keep", "strip")
DASK = "dask:"
VOCAB_TYPES = ("wordpiece", "bpe", "unigram")
MAX_BYTES = 1 << 62
MAX_WORKERS = 256
MAX_WEIGHT = 100


def parse_size(text: str) -> int:
    """A number of bytes: "48MB" is 48·10⁶, "48MiB" 48·2²⁰, "48000000" itself.

    Raises:
        UserError: ``text`` is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"{text!r} is not a size: write 48MB, 1.5GiB or a number of bytes")
    number, prefix, binary = match.groups()
    power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    size = float(number) * (1024 if binary else 1000) ** power
    if size > MAX_BYTES:
        raise UserError(f"a size of over {MAX_BYTES} bytes is too large: leave the option out")
    return int(size)


def parse_weight(text: str) -> tuple[str, float]:
    """(Input, weight) of a value of --weight.

    Raises:
        UserError: it is not of the form GLOB=NUMBER, or the number is out of range.
    """
    glob, _, number = text.rpartition("=")
    if not glob or not re.fullmatch(r"\d{1,3}(\.\d{1,6})?", number) or not 1 <= float(number) <= MAX_WEIGHT:
        raise UserError(f"--weight must be GLOB=NUMBER with a number of 1 to {MAX_WEIGHT}; got {text!r}")
    return glob, float(number)


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """The options of ``fusebert prepare``: each field is one option, and its help text documents it.

    Raises:
        UserError: an option is out of range, or two options exclude each other.
    """

    out: Annotated[Path, Option("Where the corpus goes: a folder that does not exist yet.")]
    inputs: Annotated[
        list[str] | None,
        Option(
            "Text: files, folders (searched below too), quoted globs, URLs of these (s3://bucket/*.jsonl.zst, hf://, "
            "https://, file://; needs fusebert\\[remote]), or - for standard input. "
            "Text in .txt, .md or without a suffix: see --documents. A document each record: .jsonl (an object a "
            "line), .json (an array, or lines), .csv, .tsv. All may be compressed: .gz, .zst, .bz2, .xz. Data sets of "
            "Hugging Face: .parquet, .arrow, and folders with such files.",
            positional=True,
            metavar="INPUT...",
            show_default=False,
        ),
    ] = None
    corpus: Annotated[
        str | None,
        Option(
            "Instead of INPUT: 'pydocs' collects the docstrings of the Python packages installed on this machine "
            "(parsed, never imported; nothing is downloaded)."
        ),
    ] = None
    vocab_size: Annotated[
        int | None,
        Option("Size of the vocabulary to learn from the text.", show_default="30522, BERT's"),
    ] = None
    vocab_type: Annotated[
        str,
        Option(
            "Kind of the vocabulary to learn: wordpiece is BERT's; bpe (bytes, as in RoBERTa) and unigram (as in "
            "XLM-R) have no \\[UNK], and decoding gives the text back."
        ),
    ] = "wordpiece"
    tokenizer: Annotated[
        Path | None,
        Option(
            "Use this vocabulary instead of learning one: a tokenizer.json (WordPiece, BPE or unigram) or a vocab.txt "
            "(WordPiece), for instance that of a model to go on training."
        ),
    ] = None
    lowercase: Annotated[
        bool | None,
        Option(
            "Fold case, or keep it.",
            flags="--lowercase/--cased",
            show_default="lowercase; cased for bpe and unigram; for a vocab.txt, as its tokenizer_config.json says or "
            "it looks",
        ),
    ] = None
    accents: Annotated[
        str,
        Option(
            "'keep' or 'strip' accents and other marks. 'auto' strips them with --lowercase, as BERT does, unless the "
            "text is in a script that spells with them (Indic scripts, Thai, Hangul, kana, Arabic, Cyrillic, "
            "Vietnamese)."
        ),
    ] = "auto"
    text_field: Annotated[
        str,
        Option(
            "The field, or column, of a record that holds the text; a.b is the field b of the object a; a number is "
            "that column of a table without a header."
        ),
    ] = "text"
    documents: Annotated[
        str | None,
        Option(
            "What ends a document in text: 'blank' (a blank line), 'line' (each line is one) or 'file' (each file is "
            "one). Over 65,536 characters are several documents.",
            show_default="blank; file in .md",
        ),
    ] = None
    format: Annotated[
        str | None,
        Option(
            "Of standard input, and of files without a suffix: txt, md, jsonl, json, csv or tsv.",
            show_default="txt, or JSON where it begins so",
        ),
    ] = None
    skip_bad_records: Annotated[
        bool,
        Option(
            "Leave out records that cannot be read or have no text, and say how many and why.",
            flags="--skip-bad-records",
        ),
    ] = False
    sentences: Annotated[
        str,
        Option(
            "How sentences are found: 'blingfire' (a rule-based splitter), 'lines' (the text has one a line), or "
            "'auto', which is blingfire."
        ),
    ] = "auto"
    max_bytes: Annotated[
        int | None, Option("Take no more text than this: 48MB, 1.5GiB, ...", metavar="SIZE", parser=parse_size)
    ] = None
    heldout: Annotated[
        float,
        Option(
            "Share of the text kept out of training, to measure on: whole documents, chosen by their content, so that "
            "the copies of a document lie on one side."
        ),
    ] = 0.01
    heldout_files: Annotated[
        list[str] | None,
        Option(
            "Hold out the documents of these files (also a folder or a quoted glob; may be repeated), in place of a "
            "share of the text. Documents elsewhere with the same text are left out.",
            metavar="GLOB",
            show_default=False,
        ),
    ] = None
    dedup: Annotated[
        bool,
        Option("Leave out documents with the text of an earlier one, spaces apart.", flags="--dedup"),
    ] = False
    weight: Annotated[
        list[str] | None,
        Option(
            "Train on the documents of these inputs (a file, a folder or a quoted glob) so many times an epoch, 1 to "
            "100; 1.5 is once, and in half of the epochs twice. May be repeated. Nothing is copied.",
            metavar="GLOB=NUMBER",
            show_default=False,
        ),
    ] = None
    workers: Annotated[
        int | None, Option("Processes. The corpus does not depend on it.", show_default="one a core")
    ] = None
    executor: Annotated[
        str,
        Option(
            "Where text is read and encoded: local, or dask:ADDRESS, the scheduler of a Dask cluster "
            "(dask:tcp://host:8786) with this fusebert on its workers, which must see INPUT (a shared folder under the "
            "same path, or URLs) and the folder of --out. The corpus is the same. Needs fusebert\\[dask]."
        ),
    ] = "local"
    seed: Annotated[int, Option("Another seed holds out other documents.")] = 0
    overwrite: Annotated[
        bool, Option("Replace a corpus that is at --out, once the new one is complete.", flags="--overwrite")
    ] = False

    allow_unknown: Annotated[
        bool, Option("Write the corpus even if more than half of its tokens are \\[UNK].", flags="--allow-unknown")
    ] = False
    json: Annotated[bool, Option("Print what was made as JSON.", flags="--json")] = False

    def __post_init__(self) -> None:
        if self.corpus is not None and self.corpus not in CORPORA:
            raise UserError(f"there is no corpus {self.corpus!r}: choose one of {', '.join(CORPORA)}, or give files")
        if bool(self.inputs) == (self.corpus is not None):
            what = "not both" if self.inputs else "one"
            raise UserError(f"give either inputs (files, folders, globs, -) or --corpus, {what}")
        if self.vocab_size is not None and self.tokenizer is not None:
            raise UserError("give either --vocab-size, to learn a vocabulary, or --tokenizer, which has one, not both")
        if self.vocab_type not in VOCAB_TYPES:
            raise UserError(f"--vocab-type must be one of {', '.join(VOCAB_TYPES)}; got {self.vocab_type!r}")
        if self.vocab_type != "wordpiece" and self.tokenizer is not None:
            raise UserError(f"--tokenizer has a vocabulary: leave out --vocab-type {self.vocab_type}")
        if self.executor != "local" and not re.fullmatch(rf"{DASK}\S+", self.executor):
            raise UserError(f"--executor must be local or dask:ADDRESS, as dask:tcp://host:8786; got {self.executor!r}")
        if self.accents not in ACCENTS:
            raise UserError(f"--accents must be one of {', '.join(ACCENTS)}; got {self.accents!r}")
        for given in self.weight or []:
            parse_weight(given)
        for name, allowed in (("documents", DOCUMENTS), ("format", FORMATS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UserError(f"--{name} must be one of {', '.join(allowed)}; got {value!r}")
        if not 0 < self.heldout < 1:
            raise UserError(f"--heldout must be a fraction between 0 and 1; got {self.heldout}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed must be in [0, 2^64); got {self.seed}")
        for name, least, most in (
            ("vocab_size", 16 if self.vocab_type == "wordpiece" else SMALLEST_SUBWORDS, MAX_VOCAB_SIZE),
            ("max_bytes", 1, MAX_BYTES),
            ("workers", 1, MAX_WORKERS),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise UserError(f"--{name.replace('_', '-')} must be {bound}; got {value}")
