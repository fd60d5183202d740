"""The error for wrong input."""

from __future__ import annotations


class UserError(Exception):
    """An option or a file named by the user is wrong.

    The message is one line: what was given, what is allowed, what to do. The command line prints it without a
    traceback and exits with status 2.
    """


def in_words(error: Exception) -> str:
    """The message of an error, for the end of a run: "path: reason" for those of the operating system."""
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
