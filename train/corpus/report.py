"""What `prepare` says about the corpus that it made: warnings, a table, the next command."""

from __future__ import annotations

import collections
import io
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UserError
from ..text.characters import loses_marks
from .format import SPLITS
from .reader import Corpus
from .tally import Tally, without_token

WARN_UNKNOWN, REFUSE_UNKNOWN = 0.01, 0.5  # share of [UNK]
FEW_HELDOUT = 16  # documents
HELDOUT_TOLERANCE = 0.1  # of the share that was asked for


def check_unknown(
    tallies: Mapping[str, Tally], tokenizer: Tokenizer, learned_from: Mapping[str, int] | None, allowed: bool
) -> list[str]:
    """A warning, or none, about the share of [UNK]: its cause and the option that helps.

    Args:
        learned_from: the characters that the vocabulary was learned from; None: it was given.
        allowed: --allow-unknown.

    Raises:
        UserError: more than half of the tokens are [UNK].
    """
    unknown, tokens = (sum(getattr(each, name) for each in tallies.values()) for name in ("unknown_tokens", "tokens"))
    share = unknown / max(tokens, 1)
    if share <= WARN_UNKNOWN:
        return []
    message = f"{share:.1%} of the tokens are [UNK]: {_cause(tallies, tokenizer, learned_from)}"
    if share > REFUSE_UNKNOWN and not allowed:
        raise UserError(f"{message}. No corpus was written; --allow-unknown writes it all the same")
    return [message]


def _cause(tallies: Mapping[str, Tally], tokenizer: Tokenizer, learned_from: Mapping[str, int] | None) -> str:
    characters: collections.Counter[str] = collections.Counter()
    for each in tallies.values():
        characters.update(each.unknown)
    missing = without_token(characters, tokenizer)
    total = sum(missing.values())
    long_words = sum(each.long_words for each in tallies.values())
    if 2 * long_words > sum(each.unknown_tokens for each in tallies.values()):
        if learned_from is not None:
            return "words of over 100 characters are [UNK]; such text (encoded data, tables) is better left out"
        return (
            "words of over 100 characters are [UNK] with this vocabulary; leave out --tokenizer: a learned vocabulary "
            "cuts long words"
        )
    listed = "the text has characters without a token" + (f" ({' '.join(missing)})" if missing else "")
    if learned_from is not None:
        new = sum(count for character, count in missing.items() if character not in learned_from)
        if 2 * new > total:
            return (
                f"{listed}, which do not occur in the part of it that the vocabulary was learned from; give more text"
            )
        return f"{listed}, for which the vocabulary of {tokenizer.get_vocab_size():,} has no room; raise --vocab-size"
    capitals = sum(count for character, count in missing.items() if character != character.lower())
    if 2 * capitals > total:
        return f"{listed}, most of them capitals; --lowercase folds case (give a vocab.txt, not a tokenizer.json)"
    marked = sum(count for character, count in missing.items() if loses_marks(character))
    if 2 * marked > total:
        return f"{listed}, most of them accented; --accents strip removes accents (give a vocab.txt, no tokenizer.json)"
    return (
        f"{listed} in the vocabulary of --tokenizer; leave that option out to learn one from this text, or give one "
        "for its language"
    )


def check_heldout(tallies: Mapping[str, Tally], share: float | None) -> list[str]:
    """A warning, or none, about the size of the held-out split.

    Args:
        share: the value of --heldout; None with --heldout-files.
    """
    heldout = tallies["heldout"]
    actual = heldout_share(tallies)
    if share is not None and abs(actual - share) > HELDOUT_TOLERANCE * share:
        return [
            f"{actual:.2%} of the text is held out, not the {share:.2%} of --heldout, because the text is "
            f"{sum(each.documents for each in tallies.values()):,} documents, copies counted: give more or shorter "
            "ones (--documents says what ends one)"
        ]
    if heldout.documents < FEW_HELDOUT:
        return [
            f"only {heldout.documents:,} documents ({heldout.tokens:,} tokens) are held out, so figures on them are "
            "rough: raise --heldout"
        ]
    return []


def check_skipped(skipped: Mapping[str, Any]) -> list[str]:
    """A warning, or none, about the records that --skip-bad-records left out."""
    if not skipped["count"]:
        return []
    return [f"{skipped['count']:,} bad records are left out; the first: {'; '.join(skipped['first'])}"]


def heldout_share(tallies: Mapping[str, Tally]) -> float:
    """The share of the tokens that is held out."""
    return tallies["heldout"].tokens / max(sum(each.tokens for each in tallies.values()), 1)


def next_command(out: Path) -> str:
    """A command that trains on the corpus in ``out``, quoted for the shell, with a folder that is free."""
    name = out.resolve().name
    run = next(
        path for i in range(1, 1000) if not (path := Path("runs") / (name if i == 1 else f"{name}-{i}")).exists()
    )
    return shlex.join(["fusebert", "pretrain", "--data", str(out), "--out", str(run), "--minutes", "5"])


def as_json(corpus: Corpus, seconds: float) -> dict[str, Any]:
    """What ``prepare --json`` prints.

    Args:
        seconds: that it took.
    """
    return {
        "corpus": str(corpus.directory),
        "vocab_size": corpus.vocab_size,
        "unigram_entropy": corpus.unigram_entropy,
        **corpus.manifest["report"],
        "source": corpus.manifest["source"],
        "seconds": round(seconds, 1),
    }


def print_report(corpus: Corpus, seconds: float) -> None:
    """Prints the same for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    report, source = corpus.manifest["report"], corpus.manifest["source"]
    table = Table("", *SPLITS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for words, name, pattern in (
        ("documents", "documents", "{:,}"),
        ("sentences", "sentences", "{:,}"),
        ("tokens", "tokens", "{:,}"),
        ("tokens a document, mean", "mean_document_tokens", "{:,.1f}"),
        ("tokens a document, median", "median_document_tokens", "{:,.1f}"),
        ("share of [UNK]", "unknown_share", "{:.3%}"),
        ("share of duplicate documents", "duplicate_share", "{:.2%}"),
    ):
        table.add_row(Text(words), *(pattern.format(report["splits"][split][name]) for split in SPLITS))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the text's characters
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for split in SPLITS:
        missing = report["splits"][split]["characters_without_token"]
        if missing:
            listed = "  ".join(f"{_visible(character)} {count:,}" for character, count in missing.items())
            console.print(f"characters without a token, {split}: {listed}", markup=False)
    for split in SPLITS:
        for tokens in report["splits"][split]["sample_lines"]:
            console.print(f"{split}: {' '.join(tokens)}", markup=False)
    scripts = ", ".join(f"{name.capitalize()} {share:.1%}" for name, share in list(report["scripts"].items())[:5])
    case = {True: "folded", False: "kept", None: "as the tokenizer says"}[source["lowercase"]]
    accents = {"keep": "kept", "strip": "stripped", None: "as the tokenizer says"}[source["accents"]]
    console.print(
        f"scripts: {scripts or 'none'}; case {case}; accents {accents}; sentences by {source['sentences']}; "
        f"held out {report['heldout_share']:.2%} of the tokens",
        markup=False,
    )
    for count, words in (
        (report["copies_left_out"], "copies left out"),
        (report["left_out_as_held_out"], "documents left out of training, because they are held out"),
    ):
        if count:
            console.print(f"{count:,} {words}", markup=False)
    console.print(
        f"vocabulary of {corpus.vocab_size:,} tokens; unigram entropy {corpus.unigram_entropy:.3f} nats a token",
        markup=False,
    )
    console.print(f"corpus in {corpus.directory}, made in {seconds:.0f} s", markup=False)
    console.print(f"next: {report['next']}", markup=False)


def _visible(character: str) -> str:
    return character if character.isprintable() else f"U+{ord(character):04X}"
