"""What a command says in one line; in a file of its own, since it must be there where no package is installed."""


class UserError(Exception):
    """A mistake of the user's: the command prints its one line and exits with 2."""
