"""Told to stop: a command ends at its next safe point, and what it has computed until then is kept.

A safe point is the end of an epoch (its checkpoint is written first) and the end of a stage. What has none within
GRACE_S is cut off, as by a second signal: its last checkpoint keeps the work.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
GRACE_S = 60.0
TOGETHER_S = 0.5  # `timeout` signals its child and then its group, and systemd sends SIGHUP after SIGTERM


class Stopped(BaseException):
    """The process was told to stop, by a signal or (0) by its driver.

    Not an Exception: a method that catches those does not go on, and no stage fails by it.
    """

    def __init__(self, number: int = 0) -> None:
        super().__init__(number)
        self.number = number


_number = 0  # of the first signal that came ...
_came = -math.inf  # ... and when the last one did
_patient = False
_is_ending = False
_timer: threading.Timer | None = None


def listen(handler: Callable[[int, FrameType | None], None] | None = None) -> None:
    """Answer SIGTERM and SIGHUP, by default with Stopped; what this process was started to ignore (nohup) stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler or _told)


def _told(number: int, _: FrameType | None) -> None:
    global _number, _came, _is_ending, _timer
    if time.monotonic() - _came < TOGETHER_S:
        return
    _came = time.monotonic()
    if _is_ending:
        os._exit(128 + number)
    if _patient and not _number:
        _number = number
        _timer = threading.Timer(GRACE_S, os.kill, (os.getpid(), number))
        _timer.daemon = True
        _timer.start()
        return
    _is_ending = True
    raise Stopped(_number or number)


@contextmanager
def patiently() -> Iterator[None]:
    """Within, the first signal waits for a safe point: who computes here asks `check` at each."""
    global _patient, _number
    _patient = True
    try:
        yield
        check()
    finally:
        _patient, _number = False, 0
        if _timer:
            _timer.cancel()


def asked() -> bool:
    """Is this process to stop?"""
    return _asked()


def check() -> None:
    """A safe point.

    Raises:
        Stopped: this process is to stop.
    """
    if asked():
        raise Stopped(_number)


def obey(asked: Callable[[], bool]) -> None:
    """Let another process say when this one is to stop: a worker listens to its driver."""
    global _asked
    _asked = asked


def _asked() -> bool:
    return bool(_number)
