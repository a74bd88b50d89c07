"""Run a grid: compute what is missing and print the leaderboard.

    python -m bench.run [grid=NAME] [key=value ...]

    grid=quick                       the grid: a file in bench/conf/grid (python -m bench.list names them)
    'grid.attacks=[badnets,blended]' axes: datasets, models, attacks, defenses, settings
    grid.seeds=3                     a number (seeds 0, 1, 2) or a list
    attack.badnets.patch_size=4      a setting of a method; the types are checked
    train.epochs=20 model.stem=half  how infected models are trained; see bench/engine/training.py
    reserve.size=0.02                the defender's share of the training split (reserve.held_out is what is cut off)
    reserve.contamination=0.1        share of the reserve that is poisoned
    measure.pgd_images=1000          robust accuracy on a fixed part of the test set
    dataset.root=DIR                 where data sets lie ($BENCH_DATA, or data/)
    dispatch.workers=2               worker processes; 0 computes in this one
    dispatch=slurm                   have it computed by a cluster; or a profile: dispatch=university
    dispatch.slurm.partition=gpu     what each job asks for; dispatch.trials_per_job=4 and dispatch.trials_per_gpu=2
                                     pack small trials; dispatch.slurm.additional.KEY=VALUE is any option of sbatch
    tracking=server                  an MLflow server, at $MLFLOW_TRACKING_URI or tracking.uri=URI, in place of the
                                     sqlite file under results/; slurm/tracking.sh starts one
    plugins=[my_package.my_defense]  methods of your own, in a module of yours
    report.plots=false               tables and the page alone; report.reported=FILE.csv adds figures that others report
    reuse=[FILE.csv]             trials.csv files of this grid's trials, e.g. of a published table: these are not
                                     computed again (results/cifar10_small/trials.csv has 405)
    results=DIR                      where the store, tables and plots go (results/)
    dry_run=true                     print the plan: what is there, what would be computed; bench.plan says how long

Stop it at any time; the same command goes on. Ctrl-C stops at once; SIGTERM and SIGHUP stop the workers at their next
checkpoint, within a minute, and a second one at once. A closed output (`| head`) does not stop it.

Exit status: 0 every trial has an outcome (diverged, wrecked and not applicable are outcomes, which no repeat would
change), 1 some trial failed or is missing, or the output could not be written, 2 a wrong setting or a file that cannot
be read or written, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._command import check_writable, duration, open_experiment, run_command, show
from bench.engine.messages import masked
from bench.experiment.experiment import Experiment

if TYPE_CHECKING:
    from bench.dispatch.tasks import Progress, Task

ATTEMPTS = 3  # at a grid whose store turns out to be damaged while it is computed


def main(arguments: list[str]) -> int:
    from bench.experiment.load import load

    cfg = load(arguments)
    experiment = open_experiment(arguments, cfg.dry_run, cfg)
    from bench.dispatch.tasks import pending
    from bench.reporting.report import write_report
    from bench.storage.index import CachedStore, Index

    store = experiment.store
    store.sweep()
    index = Index(store.root)
    known = CachedStore(store, index)
    if not cfg.dry_run:
        known.mend(stage for trial in experiment.own for stage in trial.stage_keys())
        known.index.keep()
    tasks = pending(experiment.own, known, cfg.dispatch.max_tries)
    if cfg.dry_run:
        from bench._command import print_plan

        print_plan(experiment, tasks, known)
        for task in tasks:
            print(f"  {task.title}")
        if cfg.dispatch.kind == "slurm":
            _rehearse(experiment, tasks)
        return 0
    if tasks:
        check_writable(experiment)
    _print_fits(experiment)
    told = bool(tasks) and _tracking_is_away(experiment)
    with _Display(experiment) as display:
        for _ in range(ATTEMPTS):
            aside = store.aside().keys()
            _dispatch(experiment, tasks, display.show)
            if store.aside().keys() == aside:
                break
            # Damage that showed when bytes were read: finished stages that were computed from them were set aside.
            tasks = pending(experiment.own, store, cfg.dispatch.max_tries)
    boards, trials = write_report(experiment, again=False, index=index)
    show(boards)
    _track(experiment, told)
    print(
        f"Tables and plots: {experiment.folder}/   the store: {store.root}/   MLflow: {masked(experiment.tracking_uri)}"
    )
    counts = trials.status.value_counts()
    for state in ("diverged", "wrecked"):
        if state in counts:
            print(f"{counts[state]} trials {state}: an outcome, which the tables show as such")
    failed = int(counts.get("failed", 0))
    if failed:
        tries = cfg.dispatch.max_tries
        print(f"{failed} trials failed; the next run tries them again, up to dispatch.max_tries={tries} times in all:")
        for reason in trials[trials.status == "failed"].reason.unique():
            print(f"  {reason}")
    return 1 if trials.status.isin(["failed", "missing"]).any() else 0


def _dispatch(experiment: Experiment, tasks: list[Task], show: Callable[[Progress], None]) -> None:
    """Have the tasks computed, here or by Slurm: the same plan, the same store, the same figures."""
    cfg, store, infos, device = experiment.cfg, experiment.store, experiment.infos, experiment.device
    plugins = list(cfg.plugins)
    if cfg.dispatch.kind == "slurm":
        import slurm.dispatch

        root = Path(cfg.results) / "slurm"
        slurm.dispatch.run(
            tasks, store, infos, device=device, dispatch=cfg.dispatch, plugins=plugins, root=root, show=show
        )
        return
    from bench.dispatch.local import run

    workers = cfg.dispatch.workers
    run(
        tasks,
        store,
        infos,
        device=device,
        workers=_default_workers(experiment) if workers is None else workers,
        threads=cfg.dispatch.threads,
        checkpoint_s=cfg.dispatch.checkpoint_s,
        plugins=plugins,
        show=show,
    )


def _rehearse(experiment: Experiment, tasks: list[Task]) -> None:
    """Print the job script that Slurm would be given first, on any machine."""
    import slurm.dispatch

    cfg, root = experiment.cfg, Path(experiment.cfg.results) / "slurm"
    scripts = slurm.dispatch.rehearsed(
        tasks,
        experiment.store,
        experiment.infos,
        device=experiment.device,
        dispatch=cfg.dispatch,
        plugins=list(cfg.plugins),
        root=root,
    )
    if scripts:
        print(f"\n{len(scripts)} job arrays would be submitted at first, with scripts such as the first one:\n")
        print(scripts[0])


def _default_workers(experiment: Experiment) -> int:
    import os

    import torch

    if experiment.device.type == "cuda":
        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // max(1, experiment.cfg.dispatch.threads))


def _print_fits(experiment: Experiment) -> None:
    """Say what was changed about each architecture: it is no longer quite the one that timm has."""
    from bench.experiment.axes import names
    from bench.experiment.identity import adaptation_notes

    for data, info in experiment.infos.items():
        for model in names(experiment.cfg)["models"]:
            notes = adaptation_notes(experiment.cfg, info, model)
            size = "x".join(map(str, info.shape[1:]))
            print(f"{model} on {data} ({size}): {', '.join(notes) or 'as timm has it'}")


def _tracking_is_away(experiment: Experiment) -> bool:
    """Say before the computing, not after it, that MLflow does not answer."""
    if not experiment.cfg.tracking.enabled:
        return False
    from bench.reporting.mlflow import Unreachable, check

    try:
        check(experiment.tracking_uri)
    except Unreachable as error:
        _warn(experiment, f"MLflow does not answer: {error}; the run goes on")
        return True
    return False


def _track(experiment: Experiment, told: bool) -> None:
    """Mirror finished trials into MLflow; if it fails, the results are safe and are sent later.

    Args:
        told: was it said at the start that MLflow does not answer? If it still does not, that is not said again.
    """
    if not experiment.cfg.tracking.enabled:
        return
    from bench.reporting import mlflow
    from bench.reporting.mlflow import Unreachable, log_files, report_files, sync

    name, artifacts = str(experiment.cfg.grid.name), Path(experiment.cfg.results) / "mlflow"
    try:
        sync(experiment.trials, experiment.store, experiment.tracking_uri, name, artifacts)
        log_files(experiment.tracking_uri, name, artifacts, report_files(experiment.folder))
    except Exception as error:
        if not (told and isinstance(error, Unreachable)):
            _warn(experiment, f"could not log everything to MLflow: {mlflow.reason(error)}")


def _warn(experiment: Experiment, text: str) -> None:
    later = "bench.sync, or the next run, sends what is missing"
    print(f"warning: {text} ({masked(experiment.tracking_uri)}); {later}", file=sys.stderr)


class _Display:
    """Cells done, running, failed and the time left: live on a terminal, now and then a plain line elsewhere."""

    plain_every_s = 10.0

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
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
        left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
        failed = f", {progress.failed} failed" if progress.failed else ""
        others = len(progress.waits)
        if others:
            left = f", waiting for {others} {'stage' if others == 1 else 'stages'} of another run: {progress.waits[0]}"
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


if __name__ == "__main__":
    run_command(main, __doc__)
