"""Tables, page and figures of what is finished."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engine.errors import UserError
from bench.engine.messages import masked
from bench.engine.packages import shipped
from bench.experiment.experiment import Experiment
from bench.reporting.protocol import command, protocol

if TYPE_CHECKING:
    import pandas as pd

    from bench.reporting.board import Board
    from bench.storage.index import Index
    from bench.storage.store import Store

BOARDS = ".boards.json"  # the leaderboards as `bench.run` prints them


def write_report(experiment: Experiment, again: bool = True, index: Index | None = None) -> Any:
    """Write tables, page and plots of what is finished, computing nothing; returns the boards and the trials.

    Args:
        again: write them also if they would be the same; of thousands of trials they take longer than all the rest.
        index: of the store, where it is loaded already.

    Raises:
        UserError: nothing of the grid is stored with these settings, or `report.reported` is no such table.
    """
    from bench.reporting import page
    from bench.reporting.leaderboard import step_table, write_tables
    from bench.reporting.marks import compare
    from bench.reporting.reported import reported_of
    from bench.reporting.spreadsheet import write_csv
    from bench.reporting.trials import of_trials
    from bench.storage.index import CachedStore

    store = CachedStore(experiment.store, index)
    trials = of_trials(experiment.trials, store, experiment.reused)
    store.index.keep()
    reported = reported_of(Path(experiment.cfg.report.reported), trials) if experiment.cfg.report.reported else None
    if _nothing_is_there(trials) and (experiment.folder / "leaderboard.md").exists():
        raise UserError(
            f"nothing of this grid is stored with these settings, and {experiment.folder}/leaderboard.md is left as it "
            "is; for what another kind of device computed add train.precision=bfloat16 (a GPU) or float32 (a CPU)"
        )
    lines = protocol(experiment)
    stamp, made_of = experiment.folder / ".report", _made_of(experiment, trials, lines)
    if not again and _is_written(stamp, made_of) and (printed := _kept_boards(experiment.folder)):
        return printed, trials
    if stamp.is_dir():  # somebody else's
        os.replace(stamp, stamp.with_name(f".report.{time.strftime('%Y%m%d-%H%M%S')}"))
    stamp.unlink(missing_ok=True)
    before = _written_at(experiment.folder)
    _keep_lost(experiment, trials)
    comparison = compare(trials)
    boards = write_tables(trials, lines, experiment.folder, experiment.title, reported, comparison)
    (experiment.folder / BOARDS).write_text(json.dumps([asdict(board) for board in boards]))
    (experiment.folder / "steps.csv").unlink(missing_ok=True)  # of other settings
    steps = step_table(experiment.trials, store)
    if not steps.empty:
        write_csv(steps, experiment.folder / "steps.csv")
    _keep_settings(experiment)
    details = page.Details(_details_of_trials(experiment, store), len(experiment.trials))
    name = f"Grid {experiment.cfg.grid.name}"
    drawn = []
    if experiment.cfg.report.plots:
        from bench.reporting.figures.draw import draw_figures
        from bench.reporting.triggers import pictures

        drawn = draw_figures(trials, experiment.folder, name, details.drawn) + pictures(experiment)
    page.write(trials, details, lines, experiment.folder, experiment.title, reported, drawn, comparison)
    # Other commands have files there too (bench.gallery, bench.connection), which they may write anew.
    names = [name for name, time_ns in _written_at(experiment.folder).items() if before.get(name) != time_ns]
    files = {name: _sum_of(experiment.folder / name) for name in sorted(names)}
    stamp.write_text(json.dumps({"made_of": made_of, "files": files}, indent=1))
    return boards, trials


def _kept_boards(folder: Path) -> list[Board]:
    """The printed leaderboards of the last report, so that a run with nothing to compute does not compare again."""
    from bench.reporting.board import Board, Entry

    try:
        stored = json.loads((folder / BOARDS).read_text())
    except FileNotFoundError:
        return []
    return [
        Board(
            board["title"],
            board["header"],
            [
                [Entry(tuple((text, mark) for text, mark in e["parts"]), e["note"]) for e in row]
                for row in board["rows"]
            ],
            board["notes"],
        )
        for board in stored
    ]


def _written_at(folder: Path) -> dict[str, int]:
    """The files of a folder, each with the time in nanoseconds when it was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}


def _sum_of(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _details_of_trials(experiment: Experiment, store: Store) -> Iterator[dict[str, Any]]:
    """What the page shows behind each trial; the command of a cell is that of its first one, but for the seed."""
    from bench.reporting import page
    from bench.reporting.trials import AXES

    seen = set()
    for trial in experiment.trials:
        cell = tuple(getattr(trial, axis) for axis in AXES)
        yield page.details_of(trial, store, command(experiment, trial) if cell not in seen else "")
        seen.add(cell)


def _nothing_is_there(trials: pd.DataFrame) -> bool:
    """Is nothing computed of what could be? A cell that does not apply has its row without any computation."""
    return bool((trials.status == "missing").any() and trials.status.isin(["missing", "not applicable"]).all())


def _keep_lost(experiment: Experiment, trials: pd.DataFrame) -> None:
    """Keep a table that is about to be written over, if this store could not bring all of it back."""
    from bench.reporting.trials import OUTCOMES, read_trials

    path = experiment.folder / "trials.csv"
    try:
        published = read_trials(path)
    except UserError:  # none, or none of ours
        return
    computed = set(trials.trial[trials.status.isin(OUTCOMES)])
    lost = [
        key
        for key in published.trial[published.status.isin(OUTCOMES)]
        if key not in computed and not experiment.store.is_finished("evaluate", key)
    ]
    if lost:
        backup_path = path.with_name(f"trials.{time.strftime('%Y%m%d-%H%M%S')}.csv")
        os.replace(path, backup_path)
        print(
            f"warning: {len(lost)} trials of the table in {experiment.folder}/ are not in this store, and are kept in "
            f"{backup_path}: 'reuse=[{backup_path}]' takes them up again, and grid.name=mine leaves a table as it is",
            file=sys.stderr,
        )


def _keep_settings(experiment: Experiment) -> None:
    """`config.yaml`: every setting that the grid was worked out from, those of its methods included."""
    from omegaconf import OmegaConf

    from bench.experiment.axes import method_of

    cfg = experiment.cfg.copy()
    for group, names in (("attack", cfg.grid.attacks), ("defense", [method_of(cfg, n) for n in cfg.grid.defenses])):
        cfg[group] = {name: cfg[group][name] for name in dict.fromkeys(names)}
    command = shlex.join(["python", "-m", "bench.run", *experiment.arguments])
    # The file is uploaded, and published: no password of a tracking server stands in it.
    (experiment.folder / "config.yaml").write_text(masked(f"# {command}\n{OmegaConf.to_yaml(cfg)}"))


def _made_of(experiment: Experiment, trials: pd.DataFrame, lines: list[str]) -> str:
    """A hash of all that a report is made of: figures, settings, other people's figures, and its code."""
    import pandas as pd

    settings = [experiment.title, lines, experiment.arguments, str(experiment.cfg.report), list(trials.columns)]
    code = Path(__file__).parent
    read = [path for path in code.rglob("*") if path.suffix in (".py", ".css", ".html", ".js")]
    read += [shipped(Path(experiment.cfg.report.reported))] if experiment.cfg.report.reported else []
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(read)]
    figures = pd.util.hash_pandas_object(trials).to_numpy().tobytes()
    return hashlib.sha256(repr((settings, stats)).encode() + figures).hexdigest()


def _is_written(stamp: Path, made_of: str) -> bool:
    """Was the report last made of this, and is all of it still there, byte for byte?"""
    try:
        last = json.loads(stamp.read_text())
        # Of whatever a foreign or broken stamp holds, nothing is believed.
        files = last["files"].items() if last["made_of"] == made_of else ()
        return bool(files) and all(_sum_of(stamp.parent / name) == told for name, told in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
