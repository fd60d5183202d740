"""The labels of a table: classes, sets of classes, or numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.heads import MULTI, REGRESSION, SINGLE
from ..errors import UserError
from .rows import Row

MANY_CLASSES = 50  # that so many classes are over half of the rows is a mistake


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the labels of a task mean.

    Attributes:
        problem: one of `heads.PROBLEMS`.
        names: of the C outputs, in order.
        separator: between the classes of one text; None: a text has one class.
    """

    problem: str
    names: tuple[str, ...]
    separator: str | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], task: str, separator: str | None, known: Sequence[str] | None = None) -> Labels:
        """The labels of the training ``rows``: classes sorted, by value if they are integers.

        Args:
            known: names of the outputs of the model's own head. They are kept if they include all classes.

        Raises:
            UserError: there are fewer than two classes, or so many that the task is another one.
        """
        if task == "regress":
            return cls(REGRESSION, ("LABEL_0",))
        found = {name for row in rows for name in _names(row, separator)}
        problem = SINGLE if separator is None else MULTI
        if known is not None and found <= set(known) and (problem == MULTI or len(known) > 1):
            return cls(problem, tuple(known), separator)
        if len(found) < (2 if separator is None else 1):
            raise UserError(f"the training files have no two classes to tell apart, only {', '.join(found) or 'none'}")
        if len(found) > MANY_CLASSES and 2 * len(found) > len(rows):
            raise UserError(
                f"{len(found):,} different labels in {len(rows):,} rows are not classes: name the column with --label, "
                "or give --task regress if they are numbers"
            )
        try:
            names = sorted(found, key=int)
        except ValueError:
            names = sorted(found)
        return cls(problem, tuple(names), separator)

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """The rows' labels as `TextBatch` has them: int64 [n], float32 [n], or float32 [n, C].

        Raises:
            UserError: a label is no number, or not a class of the training files. The message names file and line.
        """
        if self.problem == REGRESSION:
            return torch.tensor([_number(row) for row in rows], dtype=torch.float32)
        number = {name: i for i, name in enumerate(self.names)}
        numbered = [[_class(row, name, number) for name in _names(row, self.separator)] for row in rows]
        if self.problem == SINGLE:
            return torch.tensor([each[0] for each in numbered], dtype=torch.int64)
        encoded = torch.zeros(len(rows), len(self.names))
        for i, each in enumerate(numbered):
            encoded[i, each] = 1.0
        return encoded


def _names(row: Row, separator: str | None) -> list[str]:
    """The names of the row's classes; one without a separator."""
    if separator is None:
        return [_name(row, row.label)]
    if isinstance(row.label, list):
        return [_name(row, each) for each in row.label]
    if row.label is None or not str(row.label).strip():
        return []
    return [word for part in _name(row, row.label).split(separator) if (word := part.strip())]


def _name(row: Row, label: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int | float):
        raise UserError(f"{row.where}: the label is a {type(label).__name__}, not a string or a number")
    name = str(label).strip()
    if not name:
        raise UserError(f"{row.where}: the label is empty")
    return name


def _class(row: Row, name: str, number: dict[str, int]) -> int:
    if name not in number:
        shown = ", ".join(list(number)[:8]) + (", …" if len(number) > 8 else "")
        raise UserError(f"{row.where}: the label {name!r} is not in the training files, whose labels are {shown}")
    return number[name]


def _number(row: Row) -> float:
    try:
        value = float(row.label)
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value) < 1e15:  # its square must be finite in float32
        raise UserError(f"{row.where}: the label {str(row.label)[:80]!r} is not a number, as --task regress needs")
    return value
