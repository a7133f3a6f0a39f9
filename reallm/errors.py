"""The user's mistakes, told in one line each; the command line turns them into exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: names the file or option, what was found, what was expected, and the way out."""
