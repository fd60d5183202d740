"""The error that is the user's to correct."""

from __future__ import annotations


class UserError(Exception):
    """Something given on the command line, or a file it names, is wrong. The message is one line that says what was
    given and the remedy; the command line prints it alone, without a traceback, and exits with status 2."""


__all__ = ["UserError"]
