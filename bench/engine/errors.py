"""What a command says in one line; in a file of its own, since it must be there where no package is installed."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's: the command prints its one line and exits with 2."""


def message_of(error: Exception) -> str:
    """What an error says, without its type or number; a KeyError would put it in quotes."""
    return str(error.args[0]) if len(error.args) == 1 else str(error)
