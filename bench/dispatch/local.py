"""Local dispatch: a pool of worker processes on this machine, one for each GPU or core.

Parallel trials with one thread each are the CPU mode: two threads on two busy cores were measured slower than one.
A worker that dies costs its trial and nothing else. When the driver is told to stop, or is gone, its workers end at
their next safe point (bench/engine/stopping.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch

from bench.dispatch.tasks import IMPLANT, REPAIR, Progress, Task
from bench.engine import stopping, streams
from bench.engine.datasets import DatasetInfo
from bench.pipeline.provenance import provenance
from bench.pipeline.runner import Busy, Runner
from bench.storage.store import STAGES, Store, key_of

HELD = (signal.SIGUSR1, signal.SIGUSR2, *stopping.SIGNALS)


def run(
    tasks: list[Task],
    store: Store,
    infos: dict[str, DatasetInfo],
    *,
    device: torch.device,
    workers: int,
    threads: int,
    checkpoint_s: float,
    plugins: list[str],
    show: Callable[[Progress], None],
) -> None:
    """Compute all tasks; a failed one is kept in the store and stops nobody else.

    Args:
        workers: processes; 0 computes in this one.
        show: called when something changes, and about once a second.

    Raises:
        Stopped: this process was told to stop; its workers have ended.
    """
    if not tasks:
        return
    with stopping.patiently():
        _run(_Schedule(tasks, store, max(1, workers), show), workers, infos, device, threads, checkpoint_s, plugins)


def _run(
    schedule: _Schedule,
    workers: int,
    infos: dict[str, DatasetInfo],
    device: torch.device,
    threads: int,
    checkpoint_s: float,
    plugins: list[str],
) -> None:
    store = schedule.store
    if workers == 0:
        bench = Runner(store, infos, device, checkpoint_s)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            while (task := schedule.next()) is not None:
                stopping.check()
                schedule.report()
                schedule.finished(task, _attempt(bench, task))
        finally:
            torch.set_num_threads(before)
        return
    pool = _Pool(store, infos, device, threads, checkpoint_s, plugins)
    try:
        for index in range(min(workers, len(schedule.waiting))):
            pool.start(index)
        pool.drive(schedule)
    finally:
        pool.stop()


class _Schedule:
    """Which task may start: repairs wait for their infected model, and for the clean control that it is measured by."""

    def __init__(self, tasks: list[Task], store: Store, workers: int, show: Callable[[Progress], None]) -> None:
        self.store, self.workers, self.show = store, workers, show
        self.waiting = deque(tasks)
        self.running: list[Task] = []
        self.blocked = {task.trial.keys.implant for task in tasks if task.stages == IMPLANT}
        self.progress = Progress(total=len(tasks))
        self.spent: dict[tuple[str, ...], list[float]] = {IMPLANT: [], REPAIR: []}
        self.started: dict[int, float] = {}
        self.elsewhere: dict[tuple[str, str], str] = {}  # tasks that another driver is at, and what to say of each

    def next(self) -> Task | None:
        """A task that can start now; None if none can (or none is left)."""
        for _ in range(len(self.waiting)):
            task = self.waiting.popleft()
            if self.blocked.isdisjoint(task.needs):
                self.running.append(task)
                self.started[id(task)] = time.monotonic()
                return task
            self.waiting.append(task)
        return None

    @property
    def over(self) -> bool:
        return not self.waiting and not self.running

    def finished(self, task: Task, outcome: str) -> None:
        """Note what became of a task: `done`, `busy` (another driver has it) or `failed`."""
        self.running.remove(task)
        spent = time.monotonic() - self.started.pop(id(task))
        if outcome == "busy":
            self.waiting.append(task)
            self.elsewhere[task.stage_key] = self._holder(task)
            time.sleep(0.2)  # another driver computes it: look again soon, but not all the time
            return
        self.elsewhere.pop(task.stage_key, None)
        self.progress.done += outcome == "done"
        self.progress.failed += outcome == "failed"
        self.spent[task.stages].append(spent)
        if task.stages == IMPLANT:
            implant = task.trial.keys.implant
            self.blocked.discard(implant)
            if outcome == "failed":
                # Nothing can be repaired: those trials show the implant's failure, and are tried by the next run.
                lost = [other for other in self.waiting if implant in other.needs]
                self.waiting = deque(other for other in self.waiting if implant not in other.needs)
                self.progress.failed += len(lost)
        self.report()

    def report(self) -> None:
        progress = self.progress
        progress.waiting, progress.running = len(self.waiting), tuple(task.title for task in self.running)
        every = [value for spent in self.spent.values() for value in spent]
        left = 0.0
        for task in (*self.waiting, *self.running):
            known = self.spent[task.stages] or every
            left += sum(known) / len(known) if known else 0.0
        progress.seconds_left = left / self.workers if every else None
        free = [task for task in (*self.waiting, *self.running) if self.blocked.isdisjoint(task.needs)]
        is_idle = all(task.stage_key in self.elsewhere for task in free)
        progress.waits = (
            tuple(filter(None, map(self.elsewhere.get, (task.stage_key for task in free)))) if is_idle else ()
        )
        self.show(progress)

    def _holder(self, task: Task) -> str:
        """Which stage of a task another driver computes, and where; empty if it has just ended."""
        trial, title = task.trial, task.title.removesuffix(": implant")
        for stage, key in (
            ("surrogate", key_of(trial.surrogate)),
            ("implant", trial.keys.implant),
            *trial.stage_keys(),
        ):
            claim = self.store.claim(stage, key)
            if claim and claim.alive:
                return f"{stage} of {title} ({claim.owner or 'whose claim cannot be read'})"
        return ""


class _Pool:
    """The worker processes, each with a pipe of its own."""

    def __init__(
        self,
        store: Store,
        infos: dict[str, DatasetInfo],
        device: torch.device,
        threads: int,
        checkpoint_s: float,
        plugins: list[str],
    ) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.settings: dict[str, Any] = {
            "store": str(store.root),
            "infos": infos,
            "device": device.type,
            "threads": threads,
            "checkpoint_s": checkpoint_s,
            "plugins": plugins,
            "origin": provenance(),
        }
        self.store = store
        self.devices = torch.cuda.device_count() if device.type == "cuda" else 0
        self.processes: dict[int, tuple[BaseProcess, Connection]] = {}
        self.holds: dict[int, Task | None] = {}
        self.ready: set[int] = set()

    def start(self, index: int) -> None:
        driver_end, worker_end = self.context.Pipe()
        # Set before the process starts: OpenMP and CUDA read these once.
        added = {"OMP_NUM_THREADS": str(self.settings["threads"])}
        if self.devices:
            added["CUDA_VISIBLE_DEVICES"] = _visible(index % self.devices)
        before = {name: os.environ.get(name) for name in added}
        os.environ.update(added)
        # When Slurm ends a job, or a terminal is closed, every process gets the signals, and one without a handler
        # dies. The driver has handlers: it decides. What is blocked here stays blocked in the process that starts now.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            # Where no resource tracker runs, the start of a process would start one, and unblock SIGTERM thereby.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
            process = self.context.Process(target=_work, args=(worker_end, self.settings), daemon=True)
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        worker_end.close()
        self.processes[index], self.holds[index] = (process, driver_end), None

    def drive(self, schedule: _Schedule) -> None:
        while not schedule.over:
            if stopping.asked():
                self.wind_down()
            for index, (_, pipe) in self.processes.items():
                idle = index in self.ready and self.holds[index] is None
                if idle and (task := schedule.next()) is not None:
                    self.holds[index] = task
                    with suppress(OSError):  # it died idle; noticed below
                        pipe.send((task.trial, task.stages))
            schedule.report()
            ready = wait([pipe for _, pipe in self.processes.values()], timeout=1.0)
            for index, (process, pipe) in list(self.processes.items()):
                if pipe not in ready:
                    continue
                task = self.holds[index]
                try:
                    outcome = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    if index not in self.ready:
                        raise RuntimeError(
                            f"a worker could not start (exit code {process.exitcode}); see its message above"
                        ) from None
                    outcome = self._lost(task, process.exitcode)
                    self.ready.discard(index)
                    self.start(index)
                if outcome == "ready":
                    self.ready.add(index)
                    continue
                self.holds[index] = None
                if task is not None:
                    schedule.finished(task, outcome)

    def _lost(self, task: Task | None, code: int | None) -> str:
        """A worker is gone: keep the reason with the stage that it was at. It may have finished just before."""
        if task is None:
            return "idle"
        cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        cause += ": out of memory?" if code == -signal.SIGKILL else ""
        for stage, key in zip(STAGES, task.trial.keys, strict=True):
            if stage in task.stages and not self.store.is_finished(stage, key):
                self.store.fail(stage, key, f"{stage}: the worker process died ({cause})", "")
                return "failed"
        return "done"

    def wind_down(self) -> None:
        """Let each worker end at its next safe point.

        Raises:
            Stopped: they have ended.
        """
        busy = sum(task is not None for task in self.holds.values())
        print(
            f"stopping {busy} running stages at their next checkpoint, or in {stopping.GRACE_S:.0f} s; "
            "a second signal stops them now",
            file=sys.stderr,
            flush=True,
        )
        for _, pipe in self.processes.values():
            with suppress(OSError):
                pipe.send(None)
        for process, _ in self.processes.values():
            process.join()
        stopping.check()

    def stop(self) -> None:
        for process, pipe in self.processes.values():
            pipe.close()
            process.kill()
        for process, _ in self.processes.values():
            process.join(5)


def _visible(index: int) -> str:
    """The GPU with this number among those that this process may use."""
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return allowed[index] if allowed else str(index)


def _work(pipe: Connection, settings: dict[str, Any]) -> None:
    """A worker's life: take a task, compute it, say how it went; end when the driver says so, or is gone."""
    driver = multiprocessing.parent_process()

    def told(number: int, _: FrameType | None) -> None:
        # A signal reaches the whole group, or every process of a Slurm job: while there is a driver, it decides.
        if driver is None or not driver.is_alive():
            raise stopping.Stopped(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C too
    stopping.listen(told)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    # The driver sends nothing while a task is computed but the wish to stop; its end reads like that too.
    stopping.obey(pipe.poll)
    streams.protect()
    from bench.experiment.load import load_methods

    torch.set_num_threads(settings["threads"])
    load_methods(settings["plugins"])
    bench = Runner(
        Store(settings["store"]),
        settings["infos"],
        torch.device(settings["device"]),
        settings["checkpoint_s"],
        settings["origin"],
    )
    try:
        pipe.send("ready")
        while True:
            task = pipe.recv()
            if task is None:
                break
            pipe.send(_attempt(bench, Task(*task)))
    except (EOFError, OSError):
        pass
    except stopping.Stopped as stop:
        sys.exit(128 + stop.number if stop.number else 0)


def _attempt(bench: Runner, task: Task) -> str:
    try:
        bench.run(task.trial, task.stages)
    except Busy:
        return "busy"
    except Exception:
        return "failed"  # the reason is in the store
    return "done"
