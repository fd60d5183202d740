"""Segments that become longer during a run: ``--seqlen 128:0.9,512``.

Devlin et al. 2018 trained on segments of 128 tokens for 90 % of the steps and of 512 for the rest: attention to short
segments is cheap, and the late positions need less. A phase begins between two steps. It has batches of its own shape,
so a captured step is captured anew, and reads the text in an order of its own. The tokens of a step stay the same.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from ..errors import UserError

SHORTEST = 8  # tokens, for a pair of sentences
LONGEST = 1 << 20  # larger values are mistakes


class Phase(NamedTuple):
    """Part of a run.

    Attributes:
        seqlen: the longest segment in tokens.
        end: the share of the run that is over when the phase ends; 1 for the last.
    """

    seqlen: int
    end: float


def parse_seqlen(text: str) -> int | str:
    """The value of --seqlen: a number, or text for `phases`.

    Raises:
        UserError: it is neither.
    """
    found = phases(text)
    return found[0].seqlen if len(found) == 1 else text.replace(" ", "")


def phases(seqlen: int | str) -> tuple[Phase, ...]:
    """The phases that a value of --seqlen describes.

    Raises:
        UserError: a length is out of range, or the shares do not leave some of the run to each phase.
    """
    found, end = [], 0.0
    parts = str(seqlen).replace(" ", "").split(",")
    for number, part in enumerate(parts):
        length, colon, share = part.partition(":")
        last = number == len(parts) - 1
        try:
            if last == bool(colon):
                raise ValueError
            end = 1.0 if last else end + float(share)
            found.append(Phase(int(length), end))
        except ValueError as error:
            raise UserError(
                f"--seqlen must be a number of tokens, or numbers with the share of the run that each is for, as in "
                f"128:0.9,512; got {seqlen!r}"
            ) from error
    ends = [0.0, *(phase.end for phase in found)]
    if not all(before < after for before, after in itertools.pairwise(ends)):
        raise UserError(f"--seqlen {seqlen}: the shares must be positive, and their sum below 1")
    for phase in found:
        if not SHORTEST <= phase.seqlen <= LONGEST:
            least = "at least 8, for a pair of sentences" if phase.seqlen < SHORTEST else f"at most {LONGEST}"
            raise UserError(f"--seqlen must be {least}; got {phase.seqlen}")
    return tuple(found)


def longest(seqlen: int | str) -> int:
    """Of the segments of all phases, in tokens."""
    return max(phase.seqlen for phase in phases(seqlen))


def trained_positions(seqlen: int | str, continued: bool, config: Any) -> int:
    """How many positions of the model a run has trained.

    Args:
        continued: the run began with the weights of another model, which had trained its positions.
        config: of the model.
    """
    return int(config.max_position_embeddings) if continued else longest(seqlen)


def in_words(seqlen: int | str) -> str:
    """As in "128 for 90 % of the run, then 512"."""
    words, begin = [], 0.0
    for phase in phases(seqlen):
        share = f" for {100 * (phase.end - begin):.3g} % of the run" if phase.end < 1.0 else ""
        words.append(f"{phase.seqlen}{share}")
        begin = phase.end
    return ", then ".join(words)
