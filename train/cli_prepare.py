"""``fusebert prepare``: the command line of `prepare.prepare`."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_size(text: str) -> int:
    """Bytes: "48MB" is 48·10⁶, "48MiB" 48·2²⁰, "48000000" itself.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"{text!r} is no size: write 48MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def command(
    out: Annotated[Path, typer.Option(help="Where the corpus goes: a folder that does not exist yet.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Text: files, folders (searched below too), quoted globs, or - for standard input. "
            ".txt: a blank line ends a document. .jsonl: one JSON object a line, a document each. "
            "Either may be compressed: .gz, .zst.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Instead of INPUT: 'pydocs' collects the docstrings of the Python packages installed on this machine "
            "(parsed, never imported; nothing is downloaded)."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Size of the WordPiece vocabulary to learn from the text.", show_default="30522, BERT's"),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Use this vocabulary instead of learning one: a WordPiece tokenizer.json or vocab.txt, for instance "
            "that of a model to go on training."
        ),
    ] = None,
    lowercase: Annotated[
        bool | None,
        typer.Option(
            "--lowercase/--cased",
            help="Fold case and accents, or keep them.",
            show_default="lowercase; for a vocab.txt, whatever it looks like",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field of a .jsonl object that holds the text.")] = "text",
    sentences: Annotated[
        str,
        typer.Option(
            help="How sentences are found: 'blingfire' (a rule-based splitter), 'lines' (the text has one a line), or "
            "'auto', which is blingfire."
        ),
    ] = "auto",
    max_bytes: Annotated[
        str | None, typer.Option(help="Take no more text than this: 48MB, 1.5GiB, ...", metavar="SIZE")
    ] = None,
    heldout: Annotated[
        float,
        typer.Option(
            help="Fraction of the documents kept out of training, to measure on. At least 16 documents are, or a tenth "
            "of them if that is fewer."
        ),
    ] = 0.01,
    workers: Annotated[
        int | None, typer.Option(help="Processes. The corpus does not depend on it.", show_default="one a core")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed holds out other documents.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus that is at --out, once the new one is complete.")
    ] = False,
) -> None:
    """Turn text into a corpus to pretrain on: learn a vocabulary, split sentences, write token ids.

    Memory stays bounded however large the text is, and the folder appears only when the corpus is complete.

    Examples:

        fusebert prepare --corpus pydocs --out data/pydocs --vocab-size 8192

        fusebert prepare wiki/ 'news/*.jsonl.zst' --text-field body --out data/mine

        zcat books.gz | fusebert prepare - --out data/books --tokenizer bert-base-uncased/tokenizer.json
    """
    from .corpus.prepare import prepare

    started = time.perf_counter()
    with _terminable(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = prepare(
            inputs or [],
            out,
            corpus=corpus,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            lowercase=lowercase,
            text_field=text_field,
            sentences=sentences,
            max_bytes=None if max_bytes is None else parse_size(max_bytes),
            heldout=heldout,
            workers=workers,
            seed=seed,
            overwrite=overwrite,
            show_progress=True,
        )
    for warning in caught:
        typer.echo(f"fusebert: warning: {warning.message}", err=True)
    for name in ("train", "heldout"):
        split = made.split(name)
        typer.echo(
            f"{name:8} {split.num_documents:>12,} documents {split.num_sentences:>14,} sentences "
            f"{split.num_tokens:>16,} tokens"
        )
    typer.echo(f"vocabulary of {made.vocab_size:,} tokens; unigram entropy {made.unigram_entropy:.3f} nats a token")
    typer.echo(f"corpus in {out}, made in {time.perf_counter() - started:.0f} s")
    typer.echo(f"next: fusebert pretrain --data {out}")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Ended by a batch system, clean up as after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["command", "parse_size"]
