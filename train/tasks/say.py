"""Messages to the user."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line on stderr, above the progress bar."""
    tqdm.write(f"fusebert: {line}", file=sys.stderr)
