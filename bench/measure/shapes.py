"""Shapes of operators, as on the command line: ``N=128; N=512,D=128,lengths=half``.

A shape is keys with values, separated by commas. Shapes are separated by semicolons. A key that is absent has its
default. Each operator has its own keys, named as in the papers and in the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Value = int | float | str
Shape = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a shape.

    Attributes:
        meaning: in a few words.
        default: gives the type of values: a positive integer, a probability in [0, 1), or one of ``choices``.
    """

    meaning: str
    default: Value
    choices: tuple[str, ...] = ()

    def read(self, name: str, text: str) -> Value:
        """The value in ``text``.

        Raises:
            ValueError: it is not allowed.
        """
        if isinstance(self.default, str):
            if text not in self.choices:
                raise ValueError(f"{name}={text}: choose one of {', '.join(self.choices)}")
            return text
        kind = type(self.default)
        allowed = "a positive integer" if kind is int else "a number from 0 up to, not including, 1"
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{name}={text}: must be {allowed}") from None
        if not (value >= 1 if kind is int else 0 <= value < 1):
            raise ValueError(f"{name}={text}: must be {allowed}")
        return value


def parse(text: str, keys: Mapping[str, Key]) -> list[Shape]:
    """The shapes in ``text``, each with a value for every key.

    Raises:
        ValueError: it is not of the form above, a key is not known or given twice, or a value is not allowed.
    """
    shapes = []
    for part in text.split(";"):
        shape: Shape = {}
        for pair in filter(None, (pair.strip() for pair in part.split(","))):
            name, equals, value = (piece.strip() for piece in pair.partition("="))
            if not equals or not value:
                raise ValueError(f"shapes are written N=128,D=64; N=512, not {pair!r}")
            if name not in keys:
                raise ValueError(f"{pair}: there is no key {name!r}: choose among {', '.join(keys)}")
            if name in shape:
                raise ValueError(f"{part.strip()}: {name} is given twice")
            shape[name] = keys[name].read(name, value)
        if shape:
            shapes.append({name: shape.get(name, key.default) for name, key in keys.items()})
    if not shapes:
        raise ValueError(f"shapes are written N=128,D=64; N=512, not {text!r}")
    return shapes
