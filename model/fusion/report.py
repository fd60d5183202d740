"""What `fuse` did to a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """One module that `fuse` changed.

    Attributes:
        name: path in the model, "" for the model itself.
        kind: name of its class.
        by: what it runs now.
    """

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class Left:
    """One module that `fuse` could not change, and the reason. name, kind: as in `Replaced`."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """The modules that one call of `fuse` replaced or left; ``print`` shows them grouped."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"fusebert: {len(self.replaced)} modules fused, {len(self.left)} left as they were"]
        lines += _grouped("fused", [(entry.kind, entry.by, entry.name) for entry in self.replaced])
        lines += _grouped("left", [(entry.kind, entry.reason, entry.name) for entry in self.left])
        return "\n".join(lines)


def _grouped(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    """One line for each (kind, text): the number of modules and the path of the first."""
    first: dict[tuple[str, str], str] = {}
    for kind, text, name in rows:
        first.setdefault((kind, text), name or "the model itself")
    counts = Counter((kind, text) for kind, text, _ in rows)
    return [
        f"  {title} {count:4d} × {kind}: {text} ({'' if count == 1 else 'first: '}{first[kind, text]})"
        for (kind, text), count in counts.items()
    ]
