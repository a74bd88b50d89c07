"""What every door does: read the command line, plan the grid, and print a user's mistake in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import streams
from bench.engine import stopping
from bench.errors import UserError
from bench.messages import masked

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from omegaconf import DictConfig

    from bench.engine.datasets import DatasetInfo
    from bench.grid import Trial
    from bench.index import Index
    from bench.store import Store

# Where things lie and run: nothing that a figure depends on.
LOCAL = re.compile(r"(results|published|dry_run|dataset\.(root|cache)|(dispatch|tracking|report)(\..*)?)=")
OURS = ("attacks", "baselines", "bench", "defenses", "slurm")


@dataclass
class Plan:
    """A grid, worked out: its trials, and the store that knows which are finished.

    Attributes:
        published: rows of `published=FILE`, by the key of the evaluation; the store goes before them.
        missing: data sets whose files are not here, each with how to get it; they are planned by their published sizes,
            and stages of theirs in the store are not recognised.
    """

    cfg: DictConfig
    trials: list[Trial]
    infos: dict[str, DatasetInfo]
    store: Store
    device: torch.device
    explicit: frozenset[str]
    arguments: list[str]
    published: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> list[Trial]:
        """The trials that are this store's to compute: all but the published ones."""
        return [trial for trial in self.trials if trial.keys()[2] not in self.published]

    @property
    def folder(self) -> Path:
        """Where the tables and plots of this grid go."""
        return Path(self.cfg.results) / str(self.cfg.grid.name)

    @property
    def tracking_uri(self) -> str:
        from bench.tracking import default_uri

        return self.cfg.tracking.uri or default_uri(Path(self.cfg.results))

    @property
    def title(self) -> str:
        return f"Grid {self.cfg.grid.name}" + (f": {self.cfg.grid.purpose}" if self.cfg.grid.purpose else "")


def plan(arguments: list[str], dry: bool = False) -> Plan:
    """Everything that a grid will do, with every mistake found before compute is spent.

    Args:
        dry: nothing will be computed, here or by Slurm, whatever `dry_run` says: neither data nor Slurm need be here.

    Raises:
        UserError: something is wrong with the command line, the grid or the data.
    """
    from bench.config import load

    return planned(load(arguments), arguments, dry)


def planned(cfg: DictConfig, arguments: list[str], dry: bool = False) -> Plan:
    """`plan`, of a configuration that is loaded."""
    from bench.config import explicit_in, separated
    from bench.grid import check, expand
    from bench.store import Store

    arguments = separated(arguments)
    check(cfg)
    _check_address(cfg)
    store = Store(Path(cfg.results) / "store")
    try:
        store.check_readable()
    except OSError as error:
        raise UserError(f"results={cfg.results} cannot be read: {error.strerror}: {error.filename}") from error
    from bench.pipeline import pick_device

    infos, missing = _data(cfg, dry)
    try:
        device = _device(cfg, pick_device)
    except ValueError as error:
        raise UserError(str(error)) from error
    if cfg.dispatch.kind == "slurm":
        from slurm.dispatch import check as check_slurm

        check_slurm(cfg.dispatch, dry)
    explicit = explicit_in(arguments)
    trials = expand(cfg, infos, "bfloat16" if device.type == "cuda" else "float32", explicit)
    return Plan(cfg, trials, infos, store, device, explicit, arguments, _published(cfg, trials), missing)


def _data(cfg: DictConfig, dry: bool) -> tuple[dict[str, DatasetInfo], dict[str, str]]:
    """What is known of each data set of the grid, and of those whose files are missing how to get them.

    Raises:
        UserError: a data set has an unknown name, or its files are missing and needed; the message lists all of them.
    """
    from bench.config import said
    from bench.engine.datasets import DataError, as_published, prepare
    from bench.grid import names

    infos: dict[str, DatasetInfo] = {}
    missing: dict[str, str] = {}
    needed = False
    chosen = {key: value for key, value in cfg.dataset.augmentation.items() if value is not None}
    for name in names(cfg)["datasets"]:
        try:
            infos[name] = prepare(name, Path(cfg.dataset.root), Path(cfg.dataset.cache), cfg.dataset.size)
        except FileNotFoundError as error:
            missing[name] = said(error)
            info = as_published(name, cfg.dataset.size) if dry else None
            needed = needed or info is None
            if info is not None:
                infos[name] = info
        except (LookupError, OSError, DataError) as error:
            raise UserError(said(error)) from error
    if needed:
        count = f"{len(missing)} data sets are missing:\n  " if len(missing) > 1 else ""
        raise UserError(count + "\n  ".join(missing.values()))
    return {name: info.augmented(**chosen) for name, info in infos.items()}, missing


def _check_address(cfg: DictConfig) -> None:
    """Refuse a tracking server's address that a sign in its password makes another one.

    Raises:
        UserError: it has no host, no port where one should be, or an @ behind them.
    """
    from urllib.parse import urlsplit

    uri = cfg.tracking.uri or ""
    try:
        parts = urlsplit(uri)
        port_is_number = parts.port is None or parts.port >= 0
    except ValueError:
        parts, port_is_number = None, False
    after = f"{parts.path}{parts.query}{parts.fragment}" if parts and parts.netloc else ""
    if not port_is_number or "@" in after or (uri.startswith("http") and not (parts and parts.hostname)):
        raise UserError(
            f"tracking.uri is {masked(uri)!r}, which has no valid host and port; write http://HOST:PORT, and signs "
            "such as / ? # @ in a user name or password as %2F %3F %23 %40"
        )


def check_writable(opened: Plan) -> None:
    """Write a file into each folder that a run fills, and remove it.

    Raises:
        UserError: one of them cannot be made or written.
    """
    from bench.engine.files import check_writable

    try:
        for folder in (*opened.store.folders(), opened.folder):
            check_writable(folder)
    except OSError as error:
        raise UserError(
            f"results={opened.cfg.results} cannot be written: {error.strerror}: {error.filename}; "
            "make room or rights there, or write results=DIR with another folder"
        ) from error


def _published(cfg: DictConfig, trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """The rows of `published=[...]` that are trials of this grid, by the key of their evaluation.

    The key is a hash of all that can change a figure, versions of methods included: a row of other settings never
    passes for one of this grid.

    Raises:
        UserError: a file is no trials.csv, has no trial of this grid, contradicts another one, or would lose trials to
            this grid's own table.
    """
    if not cfg.published:
        return {}
    from bench.reporting.table import OUTCOMES, contradiction, read_trials

    source: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    wanted = {trial.keys()[2] for trial in trials if trial.defend}
    for path in cfg.published:
        rows = read_trials(Path(path))
        ended = rows[rows.status.isin(OUTCOMES)]
        rows = ended[ended.trial.isin(wanted)]
        if rows.empty:
            raise UserError(
                f"published: {path} has no trial of this grid with these settings, data and versions of its methods; "
                "give the settings that stand beneath its table (what a CPU computed needs train.precision=float32 on "
                "a GPU) and the same data, or leave the file out"
            )
        written = Path(cfg.results) / str(cfg.grid.name) / "trials.csv"
        if len(rows) < len(ended) and written.resolve() == Path(path).resolve():
            raise UserError(
                f"published: this grid's table would be written over {path}, {len(ended) - len(rows)} of whose trials "
                "are not in it; give it a name of its own, e.g. grid.name=mine"
            )
        for row in rows.to_dict("records"):
            key = row["trial"]
            if (name := contradiction(found.get(key, row), row)) != "":
                raise UserError(
                    f"published: {source[key]} and {path} contradict each other on {row['defense']} against "
                    f"{row['attack']}, seed {row['seed']}: {name} is {found[key][name]!r} and {row[name]!r}; leave one "
                    "of the two files out"
                )
            found.setdefault(key, {str(name): value for name, value in row.items()})
            source.setdefault(key, path)
    return found


def _device(cfg: DictConfig, pick: Callable[[str], torch.device]) -> torch.device:
    """What the trials are computed on. A login node need not have what its cluster's jobs have."""
    import torch

    wanted = cfg.dispatch.device
    if cfg.dispatch.kind == "local" or wanted not in ("auto", "cuda"):
        return pick(wanted)
    return torch.device("cuda" if wanted == "cuda" or cfg.dispatch.slurm.gpus else "cpu")


def protocol(opened: Plan) -> list[str]:
    """The lines printed beneath every table: what the numbers mean, and every setting that is not a default."""
    from bench.config import to_override
    from bench.grid import ablations, applies, seeds_of

    cfg, infos = opened.cfg, opened.infos
    measure = cfg.measure
    used = _counts(opened)
    sets = [
        f"{info.title} ({sum(info.train_counts)} + {sum(info.test_counts)} images of {info.num_classes} classes, "
        f"digest {info.digest or 'unknown'})"
        for info in infos.values()
    ]
    augmented = [f"{info.title}: {info.augmentation}" for info in infos.values()]
    lines = [
        f"data: {', '.join(sets)}; seeds: {', '.join(map(str, seeds_of(cfg.grid.seeds)))}; "
        "mean ± sample standard deviation over seeds, in percent",
        f"augmentation of training images: {'; '.join(augmented)}",
        f"reserve: {used['reserve']}; cut off before poisoning, never trained on by the attacker",
        "ACC: clean test accuracy. ASR: share of triggered test images of other classes sent to the target "
        "(all-to-all: of all, to the next class). recovery: share of the same images given their true label",
        f"robust: accuracy under PGD-{measure.pgd_steps}, L∞ {measure.pgd_epsilon * 255:.3g}/255, step "
        f"{measure.pgd_step_size * 255:.3g}/255, one random start, on {used['robust']}",
        "the last checkpoint is measured; nothing is chosen on test data or by ASR",
        "means: over all attacks, and over the clean model for figures that need no trigger",
        "seconds and MiB: of the defense alone, mean seconds and largest peak memory over attacks (on a CPU: of the "
        "whole process, interpreter and data included)",
        f"infected models: stem {cfg.model.stem}; train: "
        + ", ".join(f"{key} {value}" for key, value in cfg.train.items() if key not in ("updates",) or value),
        f"settings that are not the methods' defaults: {_changed(cfg) or 'none'}",
    ]
    if used["poisoned"]:
        lines.append(f"poisoned training images, where the nearest whole number is another share: {used['poisoned']}")
    if opened.published:
        lines.append(
            f"computed elsewhere, each row with its commit in trials.csv: trials of {', '.join(cfg.published)}"
        )
    words = [word for word in opened.arguments if not LOCAL.match(word.lstrip("+"))]
    lines.append(f"command: {masked(shlex.join(['python', '-m', 'bench.run', *words]))}")

    def settings(changed: dict[str, Any]) -> str:
        return ", ".join(f"{key}={to_override(value)}" for key, value in changed.items())

    for name, entry in ablations(cfg).items():
        if name in cfg.grid.defenses:
            lines.append(f"{name}: {entry['defense']} with {settings(entry['set'])}")
    for exception in cfg.grid.exceptions:
        for where, changed in applies(cfg, exception, opened.explicit).items():
            lines.append(f"exception for {', '.join(where) or 'all cells'}: {settings(changed)}: {exception['why']}")
    return lines


def _counts(opened: Plan) -> dict[str, str]:
    """The images that the shares of a grid come to on its data sets, in words: `reserve`, `robust`, `poisoned`."""
    from bench.grid import Counts, counts_of

    named = len(opened.infos) > 1
    cells: dict[tuple[Any, ...], tuple[Trial, Counts]] = {}
    for trial in opened.trials:
        attacker, measure = trial.implant["attack"], trial.evaluate
        shares = trial.implant["pool"], attacker["poison_rate"], attacker["cover_rate"]
        reserve = tuple(trial.defend.get("reserve", {}).values())
        place = (trial.dataset, trial.attack, *shares, reserve, measure.get("pgd_images"))
        within = (*place, measure.get("autoattack_images"), bool(trial.defend))
        if within not in cells:
            cells[within] = trial, counts_of(trial, opened.infos[trial.dataset])
    found: dict[str, dict[str, None]] = {"reserve": {}, "pool": {}, "robust": {}, "poisoned": {}}
    # On a clean model the reserve is clean; the line is about the others.
    backdoored = any(trial.implant["attack"]["poison_rate"] for trial, _ in cells.values())
    for trial, counts in cells.values():
        where = f" of {trial.dataset}" if named else ""
        attacker = trial.implant["attack"]
        if counts.reserve is not None and (attacker["poison_rate"] or not backdoored):
            share = trial.defend["reserve"]
            text = f"{counts.reserve} of {counts.train} training images{where} ({counts.reserve / counts.train:.2%}"
            text += f", for reserve.size={share['size']:g})"
            if share["contamination"]:
                assert counts.tainted is not None
                text += f", {counts.tainted} of them poisoned ({counts.tainted / counts.reserve:.2%}"
                text += f", for reserve.contamination={share['contamination']:g})"
            found["reserve"][text] = None
        pool = sum(counts.pool)
        text = f"{pool} of {counts.train} training images{where} ({pool / counts.train:.2%}"
        found["pool"][f"{text}, for reserve.pool={trial.implant['pool']:g}), which no defense of this grid uses"] = None
        if trial.evaluate:
            whole = f"the whole test set{where} ({counts.test} images)"
            text = whole if counts.robust == counts.test else f"{counts.robust} fixed test images{where}"
            if counts.autoattack:
                part = whole if counts.autoattack == counts.test else f"{counts.autoattack} fixed test images{where}"
                text += f" (AutoAttack: on {part})"
            found["robust"][text] = None
        left = counts.train - sum(counts.pool)
        for kind, count in (("poison_rate", counts.poisoned), ("cover_rate", counts.covers)):
            # Equal in print is equal.
            if count is not None and f"{count / left:.1%}" != f"{attacker[kind]:.1%}":
                text = f"{trial.attack}{where}: {count} of {left} ({count / left:.2%}, for {kind}={attacker[kind]:g})"
                found["poisoned"][text] = None
    return {
        "reserve": ", ".join(found["reserve"] or found["pool"]),
        "robust": ", ".join(found["robust"]) or "test images",
        "poisoned": ", ".join(found["poisoned"]),
    }


def _changed(cfg: DictConfig) -> str:
    """Settings of the grid's methods that differ from their classes' defaults."""
    from dataclasses import asdict

    from attacks.base import attack
    from bench.config import attack_of, defense_of
    from bench.grid import method_of
    from defenses.base import defense

    found = []
    for group, names, registry, of in (
        ("attack", cfg.grid.attacks, attack, attack_of),
        ("defense", {method_of(cfg, name): None for name in cfg.grid.defenses}, defense, defense_of),
    ):
        for name in names:
            defaults = asdict(registry[name]())
            for key, value in asdict(of(cfg, name)).items():
                if value != defaults[key]:
                    found.append(f"{group}.{name}.{key}={value}")
    return ", ".join(found)


def command(opened: Plan, trial: Trial) -> str:
    """The line for a shell that computes one cell anew, apart from what is stored; its last word names the seed.

    The precision is named: on another kind of device `auto` would be another one.
    """
    from bench.config import PER_CELL, to_override
    from bench.grid import method_of, swept_path

    axes = ("dataset", "model", "attack", "defense", "setting")
    mine = (*(f"grid.{axis}s=" for axis in axes), "grid.seeds=", "train.precision=")
    # Of where things lie and run a cell needs its data, and its device: the precision may not exist elsewhere.
    kept = ("dataset.", "dispatch.device=")
    words = [
        word
        for word in opened.arguments
        if not (bare := word.lstrip("+")).startswith(mine) and (bare.startswith(kept) or not LOCAL.match(bare))
    ]
    # A grid of one cell refuses the settings of other methods.
    methods = {"attack": trial.attack, "defense": method_of(opened.cfg, trial.defense)}
    others = [f"{group}.{name}." for group in methods for name in opened.cfg[group] if name != methods[group]]
    if trial.control:
        others.remove("attack.none.")
    words = [word for word in words if not word.lstrip("+").startswith(tuple(others))]
    if opened.cfg.dispatch.threads != 1:
        words.append(f"dispatch.threads={opened.cfg.dispatch.threads}")
    if trial.variant:
        words = [word for word in words if not word.startswith("grid.sweep=")]
        pairs = re.split(rf", (?=(?:{'|'.join(PER_CELL)})\.[\w.]+=)", trial.variant)
        swept = [pair.partition("=") for pair in pairs]
        swept = [entry for entry in swept if swept_path(opened.cfg, entry[0], methods)]
        words.append("grid.sweep=[" + ",".join(f"{{key:{key},values:[{value}]}}" for key, _, value in swept) + "]")
    words += [f"grid.{axis}s=[{to_override(getattr(trial, axis))}]" for axis in axes]
    words.append("results=reproduced")
    if "train.precision=" not in trial.variant:  # what is swept cannot be set beside the sweep
        words.append(f"train.precision={trial.implant['train']['precision']}")
    return masked(shlex.join(["python", "-m", "bench.run", *words, f"grid.seeds=[{trial.seed}]"]))


def report(opened: Plan, again: bool = True, index: Index | None = None) -> Any:
    """Write tables, page and plots of what is finished, computing nothing; returns the boards and the trials.

    Args:
        again: write them also if they would be the same; of thousands of trials they take longer than all the rest.
        index: of the store, where it is loaded already.

    Raises:
        UserError: nothing of the grid is stored with these settings, or `report.reported` is no such table.
    """
    from bench.index import Snapshot
    from bench.reporting import page, plots, table
    from bench.reporting.spreadsheet import write_csv

    store = Snapshot(opened.store, index)
    trials = table.of_trials(opened.trials, store, opened.published)
    store.index.keep()
    reported = table.reported_of(Path(opened.cfg.report.reported), trials) if opened.cfg.report.reported else None
    if _nothing_is_there(trials) and (opened.folder / "leaderboard.md").exists():
        raise UserError(
            f"nothing of this grid is stored with these settings, and {opened.folder}/leaderboard.md is left as it is; "
            "for what another kind of device computed add train.precision=bfloat16 (a GPU) or float32 (a CPU)"
        )
    lines = protocol(opened)
    stamp, made_of = opened.folder / ".report", _made_of(opened, trials, lines)
    if not again and _is_written(stamp, made_of):
        return table.boards(trials, lines, reported), trials
    if stamp.is_dir():  # somebody else's
        os.replace(stamp, stamp.with_name(f".report.{time.strftime('%Y%m%d-%H%M%S')}"))
    stamp.unlink(missing_ok=True)
    before = _written_at(opened.folder)
    _keep_lost(opened, trials)
    boards = table.write(trials, lines, opened.folder, opened.title, reported)
    (opened.folder / "steps.csv").unlink(missing_ok=True)  # of other settings
    steps = table.steps(opened.trials, store)
    if not steps.empty:
        write_csv(steps, opened.folder / "steps.csv")
    _keep_settings(opened)
    details = page.Details(_evidence(opened, store), len(opened.trials))
    name = f"Grid {opened.cfg.grid.name}"
    drawn = []
    if opened.cfg.report.plots:
        from bench.gallery import pictures

        drawn = plots.write(trials, opened.folder, name, details.drawn) + pictures(opened)
    page.write(trials, details, lines, opened.folder, opened.title, reported, drawn)
    # Other commands have files there too (bench.gallery, bench.connection), which they may write anew.
    names = [name for name, time_ns in _written_at(opened.folder).items() if before.get(name) != time_ns]
    files = {name: _sum_of(opened.folder / name) for name in sorted(names)}
    stamp.write_text(json.dumps({"made_of": made_of, "files": files}, indent=1))
    return boards, trials


def _written_at(folder: Path) -> dict[str, int]:
    """The files of a folder, each with the time in nanoseconds when it was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}


def _sum_of(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _evidence(opened: Plan, store: Store) -> Iterator[dict[str, Any]]:
    """What the page shows behind each trial; the command of a cell is that of its first one, but for the seed."""
    from bench.reporting import page
    from bench.reporting.table import AXES

    seen = set()
    for trial in opened.trials:
        cell = tuple(getattr(trial, axis) for axis in AXES)
        yield page.evidence(trial, store, command(opened, trial) if cell not in seen else "")
        seen.add(cell)


def _nothing_is_there(trials: pd.DataFrame) -> bool:
    """Is nothing computed of what could be? A cell that does not apply has its row without any computation."""
    return bool((trials.status == "missing").any() and trials.status.isin(["missing", "not applicable"]).all())


def _keep_lost(opened: Plan, trials: pd.DataFrame) -> None:
    """Keep a table that is about to be written over, if this store could not bring all of it back."""
    from bench.reporting.table import OUTCOMES, read_trials

    path = opened.folder / "trials.csv"
    try:
        there = read_trials(path)
    except UserError:  # none, or none of ours
        return
    kept = set(trials.trial[trials.status.isin(OUTCOMES)])
    lost = [
        key
        for key in there.trial[there.status.isin(OUTCOMES)]
        if key not in kept and not opened.store.is_finished("evaluate", key)
    ]
    if lost:
        beside = path.with_name(f"trials.{time.strftime('%Y%m%d-%H%M%S')}.csv")
        os.replace(path, beside)
        print(
            f"warning: {len(lost)} trials of the table in {opened.folder}/ are not in this store, and are kept in "
            f"{beside}: 'published=[{beside}]' takes them up again, and grid.name=mine leaves a table as it is",
            file=sys.stderr,
        )


def _keep_settings(opened: Plan) -> None:
    """`config.yaml`: every setting that the grid was worked out from, those of its methods included."""
    from omegaconf import OmegaConf

    from bench.grid import method_of

    cfg = opened.cfg.copy()
    for group, names in (("attack", cfg.grid.attacks), ("defense", [method_of(cfg, n) for n in cfg.grid.defenses])):
        cfg[group] = {name: cfg[group][name] for name in dict.fromkeys(names)}
    command = shlex.join(["python", "-m", "bench.run", *opened.arguments])
    # The file is uploaded, and published: no password of a tracking server stands in it.
    (opened.folder / "config.yaml").write_text(masked(f"# {command}\n{OmegaConf.to_yaml(cfg)}"))


def _made_of(opened: Plan, trials: pd.DataFrame, lines: list[str]) -> str:
    """A hash of all that a report is made of: figures, settings, other people's figures, and its code."""
    import pandas as pd

    settings = [opened.title, lines, opened.arguments, str(opened.cfg.report), list(trials.columns)]
    code = Path(__file__).parent
    read = [*code.glob("*.py"), *(code / "reporting").glob("*")]
    read += [Path(opened.cfg.report.reported)] if opened.cfg.report.reported else []
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


def enter(main: Callable[[list[str]], int], usage: str) -> None:
    """Run a command and exit: `--help` prints its usage, a user's mistake is one line and exit status 2.

    Exit status: what `main` returns; 2 for wrong input and for files that cannot be read or written; 128 and the number
    of the signal that ended it. Output that is lost: see bench/streams.py.
    """
    streams.protect()
    stopping.listen()
    sys.exit(streams.finish(_status(main, usage, sys.argv[1:])))


def _status(main: Callable[[list[str]], int], usage: str, arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(usage.strip())
        return 0
    try:
        return main(arguments)
    except UserError as error:
        _say(str(error))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OURS:
            raise
        _say(f"{error} ({sys.executable} lacks it); {_how_to_install()}")
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        _say(f"{error.strerror or error}{place}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except stopping.Stopped as stop:
        print(f"stopped by {signal.Signals(stop.number).name}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
    return 2


def _say(mistake: str) -> None:
    print(f"error: {masked(mistake)}", file=sys.stderr)


def _how_to_install() -> str:
    """What to do where a package is missing: most often another Python than the project's was called."""
    folder = Path(__file__).parents[1]
    python = folder / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix) != folder / ".venv":
        return f"run it with {python}, or `source {python.with_name('activate')}` first"
    return f"`make setup` in {folder} installs what is needed; then run it with {python}"
