"""What changed between two results, with significance; or how ours stand beside published ones.

    python -m bench.compare A B [tolerance=0.02] [figures=asr,clean_accuracy] [significant=true]
    python -m bench.compare A REPORTED.csv [ignore=model] [rename=cifar10_jpeg:cifar10]

A, B            a grid's folder under results/, a trials.csv, or COMMIT:PATH of one that git keeps
tolerance=0.02  how much worse a figure of B may be, as a share: 0.02 is two points
figures=...     which figures count; all that tell better from worse by default
significant=true  only a difference at 5 % (paired t-test over seeds, Holm over all) is a regression; seeds are paired
                where both results have the same infected weights (`implant_weights` in trials.csv)

Either may be a CSV of reported figures (with a column `provenance`, as for report.reported): then the two are set side
by side, cell by cell with the differences in protocol that its column `protocol` names, and with rank correlations over
all pairs and over those of repairs.
ignore=AXES (of dataset, model) sets cells side by side that differ there, and says so; rename=OURS:THEIRS reads one
name as another.

Exit status: 0 nothing is worse, 1 something is worse by more than the tolerance, or a cell of both is no longer done,
2 a wrong argument. Cells that only one of them has are counted.
"""

from __future__ import annotations

import io
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._command import run_command

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Change:
    """One figure of one cell in both.

    Attributes:
        worse: by how much B is worse, in the figure's own unit; negative is better.
        p: adjusted by Holm over all figures compared; NaN where fewer than two seeds of both are known to be of the
            same infected model.
    """

    cell: str
    figure: str
    text: str
    worse: float
    p: float


def main(arguments: list[str]) -> int:
    from bench.engine.errors import UserError

    places = [argument for argument in arguments if "=" not in argument.partition(":")[0].rpartition("/")[2]]
    settings = dict(argument.split("=", 1) for argument in arguments if argument not in places)
    if len(places) != 2:
        raise UserError(f"{len(places)} results came; write two: python -m bench.compare A B (folders or trials.csv)")
    odd = set(settings) - {"tolerance", "figures", "significant", "ignore", "rename"}
    if odd:
        raise UserError(f"there is no setting {min(odd)!r}; known: tolerance, figures, significant, ignore, rename")
    tolerance, figures = _tolerance(settings.get("tolerance", "0.02")), _figures(settings.get("figures"))
    if settings.get("significant", "false") not in ("true", "false"):
        raise UserError(f"significant is {settings['significant']!r}; write true or false")
    ignored = _ignored(settings.get("ignore", ""))
    one, two = (_load(source) for source in places)
    if "kind" in one or "kind" in two:
        return _beside(*_alike(one, two, settings), places, figures, ignored)
    if idle := {"ignore", "rename"} & set(settings):
        raise UserError(f"{min(idle)} is for reported figures; both of these results were measured: leave it out")
    return _regressions(one, two, tolerance, figures, settings.get("significant") == "true")


def _tolerance(text: str) -> float:
    from bench.engine.errors import UserError

    try:
        tolerance = float(text)
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance < 1:
        raise UserError(f"tolerance is {text!r}; write a share in [0, 1): 0.02 is two points")
    return tolerance


def _ignored(text: str) -> list[str]:
    from bench.engine.errors import UserError

    chosen = [name for name in text.strip("[]").replace(" ", "").split(",") if name]
    for name in chosen:
        if name not in ("dataset", "model"):
            raise UserError(f"ignore: {name!r} must be the same in both; write dataset, model or both")
    return chosen


def _alike(one: pd.DataFrame, two: pd.DataFrame, settings: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, with names read as others where the command line says so."""
    from bench.engine.errors import UserError

    names = dict(pair.rpartition(":")[::2] for pair in settings.get("rename", "").split(",") if pair)
    if not all(names) or not all(names.values()):
        raise UserError(f"rename is {settings['rename']!r}; write rename=cifar10_jpeg:cifar10")
    axes = ["dataset", "model", "attack", "defense"]
    return one.assign(**one[axes].replace(names)), two.assign(**two[axes].replace(names))


def _figures(text: str | None) -> list[str]:
    from bench.engine.errors import UserError
    from bench.engine.registry import did_you_mean
    from bench.reporting.columns import MEASURES

    known = [column.name for column in MEASURES if column.sign]
    chosen = known if text is None else [name for name in text.strip("[]").replace(" ", "").split(",") if name]
    for name in chosen:
        if name not in known:
            raise UserError(f"figures: {name!r} is no figure that tells better from worse.{did_you_mean(name, known)}")
    return chosen


def _load(source_name: str) -> pd.DataFrame:
    """A table of trials, or the cells of a reported one (these have a column `kind`)."""
    import pandas as pd

    from bench.engine.errors import UserError
    from bench.engine.packages import shipped
    from bench.reporting.reported import read_reported
    from bench.reporting.trials import read_trials

    path, source = shipped(Path(source_name)), io.BytesIO()
    if path.is_dir():
        path = path / "trials.csv"
    if not path.exists() and ":" in source_name:
        done = subprocess.run(["git", "show", source_name], capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"{source_name}: {done.stderr.decode(errors='replace').strip()}")
        source = io.BytesIO(done.stdout)
    elif path.exists():
        source = io.BytesIO(path.read_bytes())
    else:
        raise UserError(f"{path} does not exist; name a grid's folder, a trials.csv, or COMMIT:PATH")
    try:
        head = set(pd.read_csv(source, nrows=0).columns)
    except ValueError as error:
        raise UserError(
            f"{source_name} is no table: {error}; name a grid's folder, a trials.csv, or COMMIT:PATH"
        ) from error
    source.seek(0)
    return read_reported(source, source_name) if {"provenance", "source"} & head else read_trials(source, source_name)


def _regressions(one: pd.DataFrame, two: pd.DataFrame, tolerance: float, figures: list[str], significant: bool) -> int:
    from bench.reporting.statistics import ALPHA, p_text

    changed, broken, counts = changes(one, two, figures)
    print(counts)
    failed = untested = 0
    for change in sorted(changed, key=lambda change: -change.worse):
        # Rounded: 0.1 - 0.08 is a little more than 0.02.
        beyond = round(change.worse, 9) > tolerance
        worse = beyond and (not significant or change.p < ALPHA)
        failed += worse
        untested += beyond and significant and math.isnan(change.p)
        test = f"p {p_text(change.p)}"
        if math.isnan(change.p):
            test = "no test: fewer than two seeds are known to share their infected weights"
        print(f"{'WORSE ' if worse else ''}{change.cell}: {change.text} ({test})")
    for line in broken:
        print(f"WORSE {line}")
    if untested:
        print(f"{untested} figures are worse by more than {100 * tolerance:g} points and cannot be tested")
    if failed or broken:
        print(f"{failed} figures are worse by more than {100 * tolerance:g} points, {len(broken)} cells are not done")
        return 1
    print(f"nothing is{' significantly' if significant else ''} worse by more than {100 * tolerance:g} points")
    return 0


def changes(one: pd.DataFrame, two: pd.DataFrame, figures: list[str]) -> tuple[list[Change], list[str], str]:
    """Figures that differ, cells that are no longer done, and how many cells were compared.

    Only seeds that both have are compared; where they share none, means are. A test pairs those that are known to be of
    one infected model: on another device the same settings train another one.
    """
    from bench.engine.errors import UserError
    from bench.reporting import statistics
    from bench.reporting.cells import groups_of
    from bench.reporting.columns import COLUMN
    from bench.reporting.trials import AXES

    def grouped(table: pd.DataFrame) -> dict[tuple[Any, ...], pd.DataFrame]:
        return {cell: group.set_index("seed") for cell, group in groups_of(table, AXES)}

    before, after = grouped(one), grouped(two)
    common = [cell for cell in before if cell in after]
    if not common:
        raise UserError("the two results have no cell in common; write two tables of one grid")
    entries, broken = [], []
    for cell in common:
        a, b, title = before[cell], after[cell], "/".join(name for name in cell if name)
        lost = a.index[a.status == "done"].intersection(b.index[b.status != "done"])
        if len(lost):
            states = ", ".join(dict.fromkeys(b.status[lost]))
            reason = next(iter(b.reason[lost]), "")
            broken.append(f"{title}: done before, now {states}{f': {reason}' if reason else ''}")
        for name in figures:
            column = COLUMN[name]
            x, y = a[name][a.status == "done"].dropna(), b[name][b.status == "done"].dropna()
            if x.empty or y.empty:
                continue
            both = x.index.intersection(y.index)
            if len(both):
                x, y = x[both], y[both]
            change = float(y.mean() - x.mean())
            if len(x) == len(y) and (x.to_numpy() == y.to_numpy()).all():
                continue
            same = [seed for seed in both if a.implant_weights[seed] == b.implant_weights[seed] != ""]
            p = statistics.paired_t(x[same], y[same])
            text = (
                f"{column.title} {column.spread(x.mean(), x.std(ddof=1))} -> {column.spread(y.mean(), y.std(ddof=1))}, "
                f"{100 * change:+.1f} points"
            )
            entries.append((title, name, text, column.sign * change, p))
    adjusted = statistics.holm([entry[-1] for entry in entries])
    counts = (
        f"{len(common)} cells in both, {len(before) - len(common)} only in the first, "
        f"{len(after) - len(common)} only in the second; {len(entries)} figures differ"
    )
    return [Change(*entry[:-1], float(p)) for entry, p in zip(entries, adjusted, strict=True)], broken, counts


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """The cells of a table; `protocol` says what their figures differ in."""
    from bench.reporting.cells import to_cells

    if "kind" in table:  # reported
        return table
    cells = to_cells(table)
    return cells.assign(
        protocol=[
            f"{done} of {seeds} seeds done" if done < seeds else ""
            for done, seeds in zip(cells.done, cells.seeds, strict=True)
        ]
    )


def _beside(one: pd.DataFrame, two: pd.DataFrame, places: list[str], figures: list[str], ignored: list[str]) -> int:
    """Print cells that both have side by side, and how alike the two order them."""
    import numpy as np

    from bench.engine.errors import UserError
    from bench.reporting.columns import COLUMN
    from bench.reporting.trials import AXES, BASELINE

    a, b = (_cells(table).reset_index(names="row") for table in (one, two))
    # A published table names no setting of ours, and often no poison rate: what is not said fits every cell.
    named = [axis for axis in AXES if axis not in ("threat_model", *ignored)]
    both = a.merge(b, on=named, suffixes=("", "_other"))
    fits = (both.threat_model == both.threat_model_other) | (both.threat_model == "") | (both.threat_model_other == "")
    rates = both[["poison_rate", "poison_rate_other"]]
    fits &= rates.isna().any(axis=1) | np.isclose(rates.iloc[:, 0], rates.iloc[:, 1])
    both = both[fits].assign(threat_model=both.threat_model.where(both.threat_model != "", both.threat_model_other))
    known = [f"{name}_mean" for name in figures if {f"{name}_mean", f"{name}_mean_other"} <= set(both)]
    shared = [both[name].notna() & both[f"{name}_other"].notna() for name in known]
    both = both[np.any(shared, axis=0)] if shared else both[:0]
    alone = f"{len(a) - both.row.nunique()} of the first, {len(b) - both.row_other.nunique()} of the second"
    # A repair that needs no image stands in each setting of ours; beside a cell that names none it is one.
    others = [f"{axis}_other" for axis in [*ignored, "threat_model", "protocol", *known]]
    others += [name for name in ("provenance_other", "provenance") if name in both]
    both = both.drop_duplicates([*named, *others, *known])
    if both.empty:
        raise UserError(f"{places[0]} and {places[1]} have no figure of a cell in common; names must be this project's")
    count = len(both[AXES].drop_duplicates())
    print(f"{len(both)} pairs of {count} cells: {places[0]} | {places[1]} | difference, in points")
    print(f"not beside another, or without a figure: {alone}")
    for _, row in both.iterrows():
        parts = []
        for name in figures:
            x, y = row.get(f"{name}_mean", math.nan), row.get(f"{name}_mean_other", math.nan)
            if not (math.isnan(x) or math.isnan(y)):
                parts.append(f"{COLUMN[name].title} {100 * x:.1f} | {100 * y:.1f} | {100 * (y - x):+.1f}")
        other = [f"{axis} {row[f'{axis}_other']}" for axis in ignored if row[axis] != row[f"{axis}_other"]]
        protocols = "; ".join(text for text in (row.protocol, *other, row.protocol_other) if text)
        cell = "/".join(name for name in row[AXES] if name)
        print(f"{cell}: {', '.join(parts)}{f' [{protocols}]' if protocols else ''}")
    # Undefended models have high figures everywhere, which makes any two tables look alike: repairs count alone too.
    repairs = both[both.defense != BASELINE]
    chosen = {"pairs": both} | ({"pairs of repairs": repairs} if len(repairs) < len(both) else {})
    for name in figures:
        for what, rows in chosen.items():
            if line := _agreement(rows, name, what):
                print(line)
    return 0


def _agreement(both: pd.DataFrame, name: str, what: str) -> str:
    """How alike two tables order a figure; empty if there is too little to order."""
    from scipy import stats

    from bench.reporting.columns import COLUMN

    figures = [f"{name}_mean", f"{name}_mean_other"]
    if not set(figures) <= set(both):
        return ""
    pair = both[figures].dropna()
    if len(pair) < 3 or (pair.nunique() < 2).any():
        return ""
    spearman, kendall = stats.spearmanr(*pair.T.to_numpy()), stats.kendalltau(*pair.T.to_numpy())
    gap = 100 * (pair.iloc[:, 1] - pair.iloc[:, 0]).mean()
    return (
        f"{COLUMN[name].title}, rank correlation over {len(pair)} {what}: Spearman {spearman.statistic:.2f}, "
        f"Kendall {kendall.statistic:.2f}; mean difference {gap:+.1f} points"
    )


if __name__ == "__main__":
    run_command(main, __doc__)
