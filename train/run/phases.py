"""Segments that become longer during a run, ``--seqlen 128:0.9,512``, and steps that become larger, ``--batch-tokens
32768:0.2,131072``: a size for each share of the run.

Devlin et al. 2018 trained on segments of 128 tokens for 90 % of the steps and of 512 for the rest: attention to short
segments is cheap, and the late positions need less. A phase begins between two steps. It has batches of its own shape,
so a captured step is captured anew, and reads the text in an order of its own.

A larger step has more micro-batches of the same shape: nothing is captured anew, and the text goes on where it is. The
learning rate does not depend on it. Smaller steps early in a run have the noise that a gradient can bear there, and
there are more of them for the same tokens (McCandlish et al. 2018, arXiv 1812.06162).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from ..errors import UserError

SHORTEST = 8  # tokens, for a pair of sentences
LONGEST = 1 << 20  # larger values are mistakes
LARGEST_STEP = 1 << 28  # tokens


class Phase(NamedTuple):
    """Part of a run.

    Attributes:
        size: the longest segment in tokens, or the tokens of a step.
        end: the share of the run that is over when the phase ends; 1 for the last.
    """

    size: int
    end: float


def parse_seqlen(text: str) -> int | str:
    """The value of --seqlen: a number, or text for `phases`.

    Raises:
        UserError: it is neither.
    """
    found = phases(text)
    return found[0].size if len(found) == 1 else text.replace(" ", "")


def parse_batch_tokens(text: str) -> int | str:
    """The value of --batch-tokens: a number, or text for `step_sizes`.

    Raises:
        UserError: it is neither.
    """
    found = step_sizes(text)
    return found[0].size if len(found) == 1 else text.replace(" ", "")


def phases(seqlen: int | str) -> tuple[Phase, ...]:
    """The phases that a value of --seqlen describes.

    Raises:
        UserError: a length is out of range, or the shares do not leave some of the run to each phase.
    """
    found = _parse("--seqlen", seqlen, "128:0.9,512")
    for phase in found:
        if not SHORTEST <= phase.size <= LONGEST:
            least = "at least 8, for a pair of sentences" if phase.size < SHORTEST else f"at most {LONGEST}"
            raise UserError(f"--seqlen must be {least}; got {phase.size}")
    return found


def step_sizes(batch_tokens: int | str) -> tuple[Phase, ...]:
    """The phases that a value of --batch-tokens describes.

    Raises:
        UserError: as `phases`.
    """
    found = _parse("--batch-tokens", batch_tokens, "32768:0.2,131072")
    for phase in found:
        if not 0 < phase.size <= LARGEST_STEP:
            least = "positive" if phase.size <= 0 else f"at most {LARGEST_STEP}"
            raise UserError(f"--batch-tokens must be {least}; got {phase.size}")
    return found


def common_divisor(batch_tokens: int | str) -> int:
    """The largest number of tokens that divides the step of every phase."""
    return math.gcd(*(phase.size for phase in step_sizes(batch_tokens)))


def _parse(option: str, value: int | str, example: str) -> tuple[Phase, ...]:
    found, end = [], 0.0
    parts = str(value).replace(" ", "").split(",")
    for number, part in enumerate(parts):
        size, colon, share = part.partition(":")
        last = number == len(parts) - 1
        try:
            if last == bool(colon):
                raise ValueError
            end = 1.0 if last else end + float(share)
            found.append(Phase(int(size), end))
        except ValueError as error:
            raise UserError(
                f"{option} must be a number of tokens, or numbers with the share of the run that each is for, as in "
                f"{example}; got {value!r}"
            ) from error
    ends = [0.0, *(phase.end for phase in found)]
    if not all(before < after for before, after in itertools.pairwise(ends)):
        raise UserError(f"{option} {value}: the shares must be positive, and their sum below 1")
    return tuple(found)


def longest(seqlen: int | str) -> int:
    """Of the segments of all phases, in tokens."""
    return max(phase.size for phase in phases(seqlen))


def trained_positions(seqlen: int | str, continued: bool, config: Any) -> int:
    """How many positions of the model a run has trained.

    Args:
        continued: the run began with the weights of another model, which had trained its positions.
        config: of the model.
    """
    return int(config.max_position_embeddings) if continued else longest(seqlen)


def in_words(found: tuple[Phase, ...]) -> str:
    """As in "128 for 90 % of the run, then 512"."""
    words, begin = [], 0.0
    for phase in found:
        share = f" for {100 * (phase.end - begin):.3g} % of the run" if phase.end < 1.0 else ""
        words.append(f"{phase.size}{share}")
        begin = phase.end
    return ", then ".join(words)
