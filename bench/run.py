"""The front door: a grid in, a leaderboard out.

    python -m bench.run [grid=NAME] [key=value ...]

    grid=quick                       the grid: a file in bench/conf/grid (python -m bench.list names them)
    'grid.attacks=[badnets,blended]' axes: datasets, models, attacks, defenses, settings
    grid.seeds=3                     a number (seeds 0, 1, 2) or a list
    attack.badnets.patch_size=4      a setting of a method; the types are checked
    train.epochs=20 model.stem=half  how infected models are trained; see bench/engine/training.py
    reserve.size=0.02                the defender's share of the training split (reserve.pool is what is cut off)
    reserve.contamination=0.1        share of the reserve that is poisoned
    measure.pgd_images=1000          robust accuracy on a fixed part of the test set
    dataset.root=DIR                 where data sets lie ($BENCH_DATA, or data/)
    dispatch.workers=2               worker processes; 0 computes in this one
    tracking.uri=URI                 an MLflow server in place of the sqlite file under results/
    plugins=[my_package.my_defense]  methods of your own, in a module of yours
    report.plots=false               tables and the page alone; report.reported=FILE.csv adds figures that others report
    results=DIR                      where the store, tables and plots go (results/)
    dry_run=true                     print the plan: what is there, what would be computed

Stop it at any time; the same command goes on. Exit status: 0 all done, 1 some trial failed, 2 a wrong setting.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.door import Plan, enter, plan, report, show

if TYPE_CHECKING:
    from bench.dispatch import Progress, Task


def main(arguments: list[str]) -> int:
    opened = plan(arguments)
    from bench import dispatch

    cfg, store = opened.cfg, opened.store
    store.sweep()
    tasks = dispatch.pending(opened.trials, store)
    if cfg.dry_run:
        _print_plan(opened, tasks)
        return 0
    workers = cfg.dispatch.workers
    if workers is None:
        workers = _default_workers(opened)
    _print_fits(opened)
    with _Display(opened) as display:
        dispatch.run(
            tasks,
            store,
            opened.infos,
            device=opened.device,
            workers=workers,
            threads=cfg.dispatch.threads,
            checkpoint_s=cfg.dispatch.checkpoint_s,
            plugins=list(cfg.plugins),
            show=display.show,
        )
    boards, trials = report(opened)
    show(boards)
    _track(opened)
    print(f"Tables and plots: {opened.folder}/   the store: {store.root}/   MLflow: {opened.tracking_uri}")
    failed = int((trials.status == "failed").sum())
    if failed:
        print(f"{failed} trials failed and are tried again by the next run; python -m bench.status shows why:")
        for reason in trials[trials.status == "failed"].reason.unique():
            print(f"  {reason}")
    return 1 if trials.status.isin(["failed", "missing"]).any() else 0


def _default_workers(opened: Plan) -> int:
    import os

    import torch

    if opened.device.type == "cuda":
        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // max(1, opened.cfg.dispatch.threads))


def _print_fits(opened: Plan) -> None:
    """Say what was changed about each architecture: it is no longer quite the one that timm has."""
    from bench.grid import fits, names

    for data, info in opened.infos.items():
        for model in names(opened.cfg)["models"]:
            notes = fits(opened.cfg, info, model)
            size = "x".join(map(str, info.shape[1:]))
            print(f"{model} on {data} ({size}): {', '.join(notes) or 'as timm has it'}")


def _print_plan(opened: Plan, tasks: list[Task]) -> None:
    """The plan in a few lines, then each stage that would be computed."""
    from bench.dispatch import IMPLANT

    trials = opened.trials
    applicable = [trial for trial in trials if trial.defend]
    there = sum(opened.store.result("evaluate", trial.keys()[2]) is not None for trial in applicable)
    print(f"{opened.title}")
    print(f"trials: {len(trials)}, of them {there} finished, {len(trials) - len(applicable)} not applicable")
    implants = [task for task in tasks if task.stages == IMPLANT]
    print(f"to compute: {len(implants)} infected models, {len(tasks) - len(implants)} repairs with their measures")
    for task in tasks:
        print(f"  {task.title}")


def _track(opened: Plan) -> None:
    """Mirror finished trials into MLflow; if it fails, the results are safe and the next run sends them."""
    if not opened.cfg.tracking.enabled:
        return
    from bench import tracking

    name, artifacts = str(opened.cfg.grid.name), Path(opened.cfg.results) / "mlflow"
    try:
        tracking.sync(opened.trials, opened.store, opened.tracking_uri, name, artifacts)
        files = [
            path for path in sorted(opened.folder.iterdir()) if path.suffix in (".md", ".csv", ".tex", ".html", ".png")
        ]
        tracking.log_files(opened.tracking_uri, name, artifacts, files)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        print(
            f"warning: MLflow at {opened.tracking_uri} took nothing or not all ({reason}); the next run sends it",
            file=sys.stderr,
        )


class _Display:
    """Cells done, running, failed and the time left: live on a terminal, now and then a plain line elsewhere."""

    plain_every_s = 10.0

    def __init__(self, opened: Plan) -> None:
        self.opened = opened
        self.bar: Any = None
        self.printed = 0.0
        self.last = ""

    def __enter__(self) -> _Display:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console()
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("planning", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, progress: Progress) -> None:
        left = "" if progress.seconds_left is None else f", about {_duration(progress.seconds_left)} left"
        failed = f", {progress.failed} failed" if progress.failed else ""
        if self.bar:
            text = f"{len(progress.running)} running{failed}{left}  {'  '.join(progress.running)[:80]}"
            done = progress.done + progress.failed
            self.bar.update(self.task, description=text, completed=done, total=progress.total)
            return
        line = f"{progress.done}/{progress.total} stages done, {len(progress.running)} running{failed}{left}"
        over = progress.done + progress.failed == progress.total
        now = time.monotonic()
        if line != self.last and (over or now - self.printed >= self.plain_every_s):
            self.printed, self.last = now, line
            print(line, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    enter(main, __doc__)
