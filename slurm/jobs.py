"""What was submitted, and what became of it: batches on disk, and Slurm's queue by their names.

A batch is one `sbatch`. Its folder is written before it is submitted, and its name is the job's name: a driver that
dies between the two, or at any other moment, leaves nothing that the next one could not find in the queue.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.dispatch.tasks import Task
from bench.engine.datasets import DatasetInfo
from bench.experiment.trial import Trial

PREFIX = "bench-"
# What squeue calls a job that will do nothing more. One that Slurm requeues is PENDING again.
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Batch:
    """What one array computes, as JSON under the results: a job needs nothing else.

    Attributes:
        settings: store, data sets, device, threads, workers and the like.
        packs: for each element of the array, the tasks that it computes one after the other.
    """

    folder: Path
    settings: dict[str, Any]
    packs: list[list[Task]]

    @classmethod
    def new(cls, root: Path, settings: dict[str, Any], packs: list[list[Task]]) -> Batch:
        """A batch with a name that no other has, on disk: settings in `batch.json`, packs as lines of `packs.jsonl`."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        batch = cls(root / name, settings, packs)
        batch.folder.mkdir(parents=True)
        starts = []
        with (batch.folder / "packs.jsonl").open("wb") as file:
            for pack in packs:
                starts.append(file.tell())
                tasks = [{"trial": asdict(task.trial), "stages": task.stages} for task in pack]
                file.write(json.dumps(tasks).encode() + b"\n")
        temporary_path = batch.folder / "batch.new"
        temporary_path.write_text(json.dumps({"settings": settings, "starts": starts}, default=str))
        os.replace(temporary_path, batch.folder / "batch.json")
        return batch

    @classmethod
    def read(cls, folder: Path, index: int | None = None) -> Batch:
        """A batch as `new` left it.

        Args:
            index: read this pack only: an array may have thousands of tasks, and a job needs its own.
        """
        written = json.loads((folder / "batch.json").read_text())
        with (folder / "packs.jsonl").open("rb") as file:
            if index is not None:
                file.seek(written["starts"][index])
            lines = file.readlines() if index is None else [file.readline()]
        packs = [[Task(Trial(**one["trial"]), tuple(one["stages"])) for one in json.loads(line)] for line in lines]
        return cls(folder, written["settings"], packs)

    @property
    def infos(self) -> dict[str, DatasetInfo]:
        return {name: DatasetInfo.from_json(info) for name, info in self.settings["infos"].items()}


@dataclass(frozen=True)
class Element:
    """One job of a batch, in Slurm's queue or just out of it.

    Attributes:
        job: as squeue names it, `12_3` or `12`.
        state: Slurm's word: PENDING, RUNNING, COMPLETED, TIMEOUT, ...
        batch, index: which pack of which batch it computes.
        reason: why it waits, or why it was cancelled.
        node: where it runs.
    """

    job: str
    state: str
    batch: str
    index: int
    reason: str = ""
    node: str = ""

    @property
    def is_alive(self) -> bool:
        return self.state not in ENDED


class QueueError(Exception):
    """Slurm's controller does not answer."""


def slurm(*words: str) -> str:
    """The output of one of Slurm's commands.

    Raises:
        QueueError: it failed; the message is its own.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueError(f"{words[0]}: {error}") from error
    if done.returncode:
        raise QueueError(" ".join((done.stderr or done.stdout).split()) or f"{words[0]} failed")
    return done.stdout


def queue(root: Path) -> list[Element]:
    """Our jobs of these results that Slurm knows, also those that ended some minutes ago.

    Args:
        root: the folder of the batches; other results' jobs are left out.

    Raises:
        QueueError: Slurm does not answer, which says nothing about the jobs.
    """
    out = slurm("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%j|%N|%r")
    elements = []
    for line in out.splitlines():
        job, state, name, node, reason = (*line.split("|", 4), "", "", "", "")[:5]
        batch = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and (root / batch / "batch.json").exists():
            index = job.partition("_")[2]
            elements.append(Element(job, state, batch, int(index or 0), reason, node))
    return elements


def of_grid(root: Path, trials: Iterable[Trial]) -> list[Element]:
    """The living jobs that compute anything of these trials.

    Raises:
        QueueError: Slurm does not answer.
    """
    wanted = {key for trial in trials for _, key in trial.stage_keys()}
    batches: dict[str, Batch] = {}
    elements = []
    for element in queue(root):
        if not element.is_alive:
            continue
        if element.batch not in batches:
            batches[element.batch] = Batch.read(root / element.batch)
        if any(task.stage_key[1] in wanted for task in batches[element.batch].packs[element.index]):
            elements.append(element)
    return elements


def call_off(root: Path, keys: Iterable[str]) -> None:
    """Tell every driver that is at work now to submit none of these stages any more."""
    folder = root / "cancelled"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if time.time() - old.stat().st_mtime > 86_400:
            old.unlink(missing_ok=True)
    temporary_path = folder / f"{uuid.uuid4().hex}.new"
    temporary_path.write_text(json.dumps(sorted(keys)))
    os.replace(temporary_path, temporary_path.with_suffix(".json"))


def called_off(root: Path, before: Iterable[str] = ()) -> dict[str, set[str]]:
    """The keys of what was called off, by the name of the message.

    Args:
        before: messages that came before the driver did: what is asked for again is wanted again.
    """
    fresh = [path for path in (root / "cancelled").glob("*.json") if path.name not in set(before)]
    return {path.name: set(json.loads(path.read_text())) for path in fresh}


def ended_as(job: str) -> str:
    """How a job ended that the queue has forgotten, by the accounting; UNKNOWN if there is none."""
    try:
        lines = slurm("sacct", "-n", "-X", "-P", "-D", "-j", job, "-o", "JobID,State").splitlines()
    except QueueError:
        return "UNKNOWN"
    states = [line.partition("|")[2].split()[0] for line in lines if line.startswith(f"{job}|")]
    return states[-1] if states else "UNKNOWN"


def log_of(root: Path, batch: str, job: str) -> Path:
    """What a job printed."""
    return root / batch / "log" / f"{job}_0_log.out"


def find_log(root: Path, job: str) -> Path | None:
    """What a job printed, where its batch is not known."""
    logs = sorted(root.glob(f"*/log/{job}_0_log.out"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def last_line(log: Path | None, lines: int = 1) -> str:
    """The last words of a job, in one line; empty if there are none."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines_read = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return " / ".join([" ".join(line.split())[:200] for line in lines_read if line.strip()][-lines:])


def cancel(jobs: Iterable[str]) -> None:
    """End these jobs."""
    wanted = sorted(set(jobs))
    for start in range(0, len(wanted), 500):  # a command line has an end
        slurm("scancel", *wanted[start : start + 500])
