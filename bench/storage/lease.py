"""Who computes a stage now: a claim that holds on a network file system and ends with its process.

`flock` is honoured by some NFS servers and ignored by others, so nothing here asks a kernel for a lock. A claim is a
file with a number for a name, made by `link`, which fails everywhere if the name is taken; the highest number counts.
Its owner touches it now and then. A claim that nobody touches, or whose process is known to be dead, is taken over by
making the next number. A process that fell asleep between looking and taking may make a number below one that was made
meanwhile: it looks again behind making it, and then has nothing.

Nothing in the folder of a claim can make everybody wait for ever: a name that `take` never writes is ignored, and
whatever else lies under such a name (a folder, a damaged file) counts as a claim whose owner is unknown.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

BEAT_S = 10.0  # between touches


LOOKS = 10  # at a claim that changes hands while we look


# A time stamp that is further from the file server's clock than this, in either direction, is nobody's who lives: the
# owner touches its claim every BEAT_S. NFS may show an mtime a minute late; one in the future comes from a clock that
# was set back, or from a copy.
STALE_S = 90.0


@dataclass(frozen=True)
class Owner:
    """A process somewhere on the cluster.

    Attributes:
        machine: host, boot and process namespace: where a process id means something.
        started: the kernel's start time of the process, since process ids come round again.
        job: its Slurm job, as squeue names it; empty outside Slurm.
    """

    host: str
    machine: str
    pid: int
    started: str
    job: str
    since: float

    def __str__(self) -> str:
        """Where it is and since when, for people."""
        job = f"job {self.job}, " if self.job else ""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{job}process {self.pid} on {self.host}, since {began}"


@dataclass(frozen=True)
class Claim:
    """The newest claim on a stage; `owner` is None if its file is damaged, or no file."""

    path: Path
    number: int
    owner: Owner | None
    alive: bool
    released: bool


@functools.cache
def machine() -> str:
    """Where this process's id means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: process ids are compared with nobody's
        return f"{socket.gethostname()} {uuid.uuid4().hex}"


def slurm_job() -> str:
    """The Slurm job of this process, as squeue names it; empty outside Slurm."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def take(folder: Path) -> Path | None:
    """Claim what this folder stands for; None if somebody has it."""
    newest = read(folder)
    if newest and newest.alive:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(newest.number + 1 if newest else 1)
    temporary_path = folder / f"{uuid.uuid4().hex}.new"
    me = Owner(socket.gethostname(), machine(), os.getpid(), _started(os.getpid()), slurm_job(), time.time())
    try:
        with temporary_path.open("w") as file:
            json.dump(asdict(me), file)
        try:
            os.link(temporary_path, path)
        except OSError as error:
            # NFS repeats a request whose answer was lost, and then says that the name is taken: by ourselves.
            if os.stat(temporary_path).st_nlink != 2:
                if error.errno not in (errno.EEXIST, errno.ENOENT):
                    raise  # a file system without hard links would look taken for ever
                return None
    except FileNotFoundError:  # finished by another process just now, and the folder is gone
        return None
    finally:
        with suppress(OSError):
            temporary_path.unlink()
    numbers = _numbers(folder)
    if any(number > int(path.name) for number in numbers):
        with suppress(OSError):
            path.unlink()
        return None
    for old in numbers:
        if old < int(path.name):
            with suppress(OSError):
                (folder / str(old)).unlink()
    _heart.add(path)
    return path


def release(path: Path, forget: bool) -> None:
    """Give a claim back; `forget` it altogether if nobody will ever need it again."""
    _heart.remove(path)
    with suppress(OSError):
        if forget:
            shutil.rmtree(path.parent, ignore_errors=True)
        else:
            os.utime(path, (0, 0))  # needs no space on a full disk, and the number stays used


def read(folder: Path) -> Claim | None:
    """The newest claim, and whether its owner lives; None if there never was one."""
    for _ in range(LOOKS):
        numbers = _numbers(folder)
        if not numbers:
            return None
        path = folder / str(max(numbers))
        content = _content(path)
        if content is not None:
            break
        # taken over, or given back, since we listed them
    else:
        return None
    touched, owner = content
    if touched == 0:
        return Claim(path, int(path.name), owner, alive=False, released=True)
    if owner and owner.machine == machine():
        alive = _started(owner.pid) == owner.started
    else:
        # The remembered distance of the clocks may be off: who seems dead is judged by a fresh look.
        alive = any(abs(_server_time(folder.parent, age_s) - touched) < STALE_S for age_s in (60, 0))
    return Claim(path, int(path.name), owner, alive, released=False)


def _content(path: Path) -> tuple[float, Owner | None] | None:
    """When a claim was touched, and whose it is; None if there is no such claim any more."""
    try:
        # Opening asks the server: a bare stat may be answered from a cache. Nothing blocks, not even a named pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        try:
            return os.lstat(path).st_mtime, None  # there, but not for us: a broken link, or another user's
        except OSError:
            return None
    try:
        touched = os.fstat(handle).st_mtime
        with suppress(OSError):  # a folder
            return touched, _owner(os.read(handle, 65_536))
        return touched, None
    finally:
        os.close(handle)


def _owner(text: bytes) -> Owner | None:
    """The owner that a claim names; None if it is damaged."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    words = (owner.host, owner.machine, owner.started, owner.job)
    is_whole = all(isinstance(word, str) for word in words) and type(owner.pid) is int
    return owner if is_whole and type(owner.since) in (int, float) and 0 <= owner.since < 1e11 else None


def _numbers(folder: Path) -> list[int]:
    """The claims in a folder, by the names that `take` gives: decimal, without leading zeros."""
    try:
        return [int(name) for name in os.listdir(folder) if re.fullmatch("[1-9][0-9]*", name)]
    except OSError:
        return []


def _started(pid: int) -> str:
    """When a process of this machine started; empty if it is dead, a zombie included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


_ahead: tuple[float, float] | None = None  # how far the file server's clock is ahead of ours, and when we asked


def _server_time(folder: Path, age_s: float) -> float:
    """Now, by the clock that stamps the files: two hosts' clocks may differ by more than a claim lasts.

    Args:
        age_s: how old the last comparison of the two clocks may be, in seconds.
    """
    global _ahead
    if _ahead is None or time.monotonic() - _ahead[1] > age_s:
        probe = folder / f"{uuid.uuid4().hex}.clock"
        try:
            probe.touch()
            _ahead = (probe.stat().st_mtime - time.time(), time.monotonic())
            probe.unlink()
        except OSError:  # somebody else's results, or a full disk
            return time.time()
    return time.time() + _ahead[0]


class _Heart:
    """Touches every claim of this process while it lives."""

    def __init__(self) -> None:
        self.held: set[Path] = set()
        self.guard = threading.Lock()
        self.thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        with self.guard:
            self.held.add(path)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._beat, daemon=True, name="lease")
                self.thread.start()

    def remove(self, path: Path) -> None:
        with self.guard:
            self.held.discard(path)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self.guard:
                for path in self.held:
                    with suppress(OSError):  # the server may be away for a while
                        os.utime(path)


_heart = _Heart()
