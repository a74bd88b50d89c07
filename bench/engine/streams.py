"""Standard output and error that may go away: what is printed is lost then, and the work is not.

A closed pipe (`| head`), a full disk (`> log`) or a terminal that was closed raises an error out of any `print`, be it
a progress line or a method's own. Here the first such error is kept, and everything after it goes to /dev/null, also
what C libraries and child processes write to the same file descriptor.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Raw(io.FileIO):
    """A file descriptor that takes whatever is written."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes


_output: _Raw | None = None


def protect() -> None:
    """Replace this process's standard output and error by streams that never fail; also where they were closed."""
    global _output
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # `>&-`: the next file that anybody opens would have this number, and get what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, _output = _protected(sys.stdout, 1)
    sys.stderr, _ = _protected(sys.stderr, 2)


def _protected(stream: Any, number: int) -> tuple[Any, _Raw]:
    raw = _Raw(number, "w", closefd=False)
    with suppress(OSError, AttributeError):
        stream.flush()
    text = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",  # a terminal that lacks "±" gets an escape for it
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=getattr(stream, "write_through", False),
    )
    return text, raw


def finish(status: int) -> int:
    """The exit status of a command that ends now, with what it has printed taken into account.

    Whoever closes a pipe has read enough: the status says how the work went. Output that got lost in another way, on
    a full disk for example, is an error: one line, and status 1 in place of 0.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    error = _output.error if _output else None
    if error is None or error.errno == errno.EPIPE:
        return status
    print(f"error: standard output could not be written: {error.strerror}", file=sys.stderr)
    return status or 1
