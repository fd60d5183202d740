"""The error for wrong input."""

from __future__ import annotations


class UserError(Exception):
    """An option or a file named by the user is wrong.

    The message is one line: what was given, what is allowed, what to do. The command line prints it without a
    traceback and exits with status 2.
    """
