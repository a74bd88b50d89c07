"""What the commands share: entering, one-line errors, exit statuses, printing."""

from __future__ import annotations

import gc
import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engine import stopping, streams
from bench.engine.errors import UserError
from bench.engine.messages import masked
from bench.engine.packages import OURS

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.dispatch.tasks import Task
    from bench.experiment.experiment import Experiment
    from bench.storage.store import Store


MANY = 1000  # trials, whose plan costs the garbage collector seconds


def open_experiment(arguments: list[str], dry: bool = False, cfg: DictConfig | None = None) -> Experiment:
    """What every command on a grid starts with: the experiment, with the rows that it reuses.

    Args:
        dry: nothing will be computed, here or by Slurm: neither data nor Slurm need be here.
        cfg: the configuration, where the command has loaded it already.

    Raises:
        UserError: the command line, the grid, the data, a reused table or a parameter of Slurm is wrong.
    """
    from bench.experiment.experiment import planned
    from bench.experiment.load import load
    from bench.reporting.reuse import reused_rows

    experiment = planned(load(arguments) if cfg is None else cfg, arguments, dry)
    if experiment.cfg.dispatch.kind == "slurm":
        from slurm.dispatch import check

        check(experiment.cfg.dispatch, dry)
    experiment.reused = reused_rows(experiment.cfg, experiment.trials)
    if len(experiment.trials) > MANY:
        gc.freeze()  # each full collection would walk through a plan that lives as long as the process
    return experiment


def check_writable(experiment: Experiment) -> None:
    """Write a file into each folder that a run fills, and remove it.

    Raises:
        UserError: one of them cannot be made or written.
    """
    from bench.engine.files import check_writable

    try:
        for folder in (*experiment.store.folders(), experiment.folder):
            check_writable(folder)
    except OSError as error:
        raise UserError(
            f"results={experiment.cfg.results} cannot be written: {error.strerror}: {error.filename}; "
            "make room or rights there, or write results=DIR with another folder"
        ) from error


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show(boards: Any) -> None:
    """Print leaderboards: a table on a terminal, Markdown elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = Console()
    style = {"best": "bold", "alike": "italic", "": ""}
    for board in boards:
        if not console.is_terminal:
            print(board.markdown())
            continue
        table = Table(*[escape(name) for name in board.header], title=escape(board.title), title_justify="left")
        for row in board.rows:
            cells = []
            for entry in row:
                text = Text(" / ").join(
                    Text(figure, "bold" if len(row) == 1 else style[mark]) for figure, mark in entry.parts
                )
                text.append(f" ({entry.note})" if entry.parts and entry.note else entry.note)
                cells.append(text)
            table.add_row(*cells)
        console.print(table)
        for note in board.notes:
            console.print(Text(f"- {note}"))


def run_command(main: Callable[[list[str]], int], usage: str) -> None:
    """Run a command and exit: `--help` prints its usage, a user's mistake is one line and exit status 2.

    Exit status: what `main` returns; 2 for wrong input and for files that cannot be read or written; 128 and the number
    of the signal that ended it. Output that is lost: see bench/engine/streams.py.
    """
    streams.protect()
    stopping.listen()
    sys.exit(streams.finish(_status(main, usage, sys.argv[1:])))


def _status(main: Callable[[list[str]], int], usage: str, arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(usage.strip())
        return 0
    try:
        _check_packages()
        return main(arguments)
    except UserError as error:
        _say(str(error))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OURS:
            raise
        _say(f"{error} ({sys.executable} lacks it); {_how_to_install()}")
    except OSError as error:
        path = "" if error.filename is None else f": {error.filename}"
        _say(f"{error.strerror or error}{path}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except stopping.Stopped as stop:
        print(f"stopped by {signal.Signals(stop.number).name}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
    return 2


def _check_packages() -> None:
    """Raise UserError where a folder of the user's has the name of one of our packages, and would be imported."""
    root = Path(__file__).parents[1]
    for name in OURS:
        spec = importlib.util.find_spec(name)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        if folder and folder.parent != root:
            raise UserError(
                f"{folder} hides the package {name!r} of this benchmark ({root}); start the command in another folder, "
                "or rename yours"
            )


def _say(mistake: str) -> None:
    print(f"error: {masked(mistake)}", file=sys.stderr)


def _how_to_install() -> str:
    """What to do where a package is missing: most often another Python than the project's was called."""
    folder = Path(__file__).parents[1]
    python = folder / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix) != folder / ".venv":
        return f"run it with {python}, or `source {python.with_name('activate')}` first"
    return f"`make setup` in {folder} installs what is needed; then run it with {python}"


def print_plan(experiment: Experiment, tasks: list[Task], store: Store) -> None:
    """What there is, and what is to be computed, in a few lines.

    Args:
        store: the experiment's, or a cached one.
    """
    from bench.dispatch.tasks import IMPLANT, Task
    from bench.storage.store import STAGES

    trials = experiment.trials
    applicable = [trial for trial in trials if trial.defend]
    finished = sum(
        trial.keys.evaluate in experiment.reused or Task(trial, STAGES).is_finished(store) for trial in applicable
    )
    print(experiment.title)
    for name, how in experiment.missing.items():
        print(f"planned by the published size of {name}, and without what is stored of it: {how}")
    print(f"trials: {len(trials)}, of them {finished} finished, {len(trials) - len(applicable)} not applicable")
    infected_keys = {trial.keys.implant for trial in applicable}
    implants = [task.trial.keys.implant for task in tasks if task.stages == IMPLANT]
    infected = sum(key in infected_keys for key in implants)
    controls = len(implants) - infected
    with_controls = f", {controls} clean controls to measure them by" if controls else ""
    repairs = f"{len(tasks) - len(implants)} repairs with their measures{with_controls}"
    print(f"to compute: {infected} infected models, {repairs}")
