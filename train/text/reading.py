"""How files of text are read, and what was skipped."""

from __future__ import annotations

import dataclasses

from ..errors import UserError

DOCUMENTS = ("blank", "line", "file")
_REASONS = 3  # of skipped records that are kept


class BadRecordError(UserError):
    """A record has no text, or cannot be read, and the next one can."""


@dataclasses.dataclass
class Reading:
    """How files are read, and what was skipped.

    Attributes:
        text_field: the field of a record that holds the text; "a.b" is the field b of the object a.
        documents: what ends a document in text: "blank" (a blank line), "line" (each line is one) or "file". None: the
            file in .md, else a blank line.
        skip_bad_records: leave out records that cannot be read, in place of an error.
        skipped: how many were left out.
        reasons: why, for the first of them.
    """

    text_field: str = "text"
    documents: str | None = None
    skip_bad_records: bool = False
    skipped: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def fresh(self) -> Reading:
        """The same way of reading, with nothing skipped yet."""
        return dataclasses.replace(self, skipped=0, reasons=[])

    def add_skipped(self, skipped: int, reasons: list[str]) -> None:
        """Counts records that another reading, of later files, has skipped."""
        self.skipped += skipped
        self.reasons += reasons[: _REASONS - len(self.reasons)]

    def bad(self, error: BadRecordError) -> None:
        """Counts a record that cannot be read, or raises ``error``."""
        if not self.skip_bad_records:
            raise error
        self.skipped += 1
        if len(self.reasons) < _REASONS:
            self.reasons.append(str(error))
