"""From finished stages to a leaderboard: one row for each trial, then one for each cell, then what people read."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from bench.grid import Trial
from bench.messages import shortened
from bench.reporting import statistics
from bench.reporting.columns import COLUMN, COSTS, MEASURES, Column
from bench.reporting.spreadsheet import literal, write_csv
from bench.store import STAGES, Store

AXES = ["dataset", "model", "variant", "setting", "attack", "defense"]  # what tells one cell from another
BOARD = AXES[:3]
TEXTS = [*AXES, "status", "reason", "warnings", "trial", "commit", "machine", "implant_weights"]
# Images that the defender had, the poisoned ones among them, and those that robust accuracy is measured on.
COUNTS = ("view_images", "view_poisoned", "robust_images")
FIGURES = ["poison_rate", *COUNTS, *(column.name for column in (*MEASURES, *COSTS))]
COLUMNS = [
    *AXES,
    "poison_rate",
    "seed",
    "status",
    "reason",
    *(column.name for column in (*MEASURES, *COSTS)),
    *COUNTS,
    "warnings",
    "commit",
    "clean",
    "machine",
    "implant_weights",
    "trial",
]

STATES = ("done", "not applicable", "wrecked", "diverged", "failed", "missing")
# What two rows of one trial must agree in, whoever computed them.
AGREE = [*(column.name for column in MEASURES), "status", "implant_weights"]
OUTCOMES = ("done", "wrecked", "diverged")  # no repeat would change these
LOST = ("wrecked", "diverged", "failed")  # these count against a method
BASELINE = "no_defense"
WRECKED = 0.10  # a repaired model that loses more clean accuracy than this has not been repaired
HIGH_ASR = 0.10
STRONG = 0.90  # the ASR of an infected model that gives a repair something to remove
DEAR = 0.03  # more clean accuracy than this is a price at which a victim could notice the attack
BEST, ALIKE = "best", "alike"

RULES = (
    f"wrecked: done, but with more than {100 * WRECKED:.0f} points less clean accuracy than the infected model of the "
    "same seed; its figures stand in trials.csv and on the page, and are never averaged and never best",
    "a cell with a failed, diverged or wrecked seed has the worst rank of its block, below every figure, and counts as "
    "an ASR of 100 % in tests; a defense with a missing or not applicable cell, or of which nothing ended, is not "
    "ranked",
    "rank: mean over attacks (blocks) of the rank by ASR within the setting, 1 is best; the undefended model is not "
    "ranked",
    "bold, in the column of an attack: the best figure of the setting among the defenses whose seeds are all done "
    "there, whatever happened in other columns; in a mean: among those whose cells of this mean are all done; in the "
    "column rank: among those whose cells are all done, the clean model's included. Equal in print is equal. A figure "
    f"that is worse than the undefended model's is never marked, nor are medians, counts, costs and {BASELINE}",
    "italic (underlined in LaTeX and on the page): one of those compared for bold that is not significantly worse than "
    "the best at 5 %, by paired t-tests over seeds for one attack and by Wilcoxon's signed-rank test over attacks for "
    "means, both with Holm's correction; one seed allows no test, and seeds are paired only where both figures are "
    "known to be of the same infected weights (implant_weights in trials.csv)",
)


def trial_row(trial: Trial, store: Store) -> dict[str, Any]:
    """One trial as a row: its place in the grid, its state with the reason, its figures, its price."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    keys = trial.keys()
    row |= {axis: getattr(trial, axis) for axis in (*AXES, "seed")}
    row["status"], row["reason"], row["trial"], row["implant_weights"] = "missing", "", keys[2], ""
    made: list[dict[str, Any]] = []
    row["poison_rate"] = trial.implant["attack"]["poison_rate"]
    if not trial.defend:
        return row | {"status": "not applicable", "reason": trial.reason, "trial": ""}
    for stage, key in zip(STAGES, keys, strict=True):
        result = store.brief(stage, key)
        if result is None:
            failure = store.failure(stage, key)
            if failure is None and trial.control and (twin := store.failure("implant", trial.inspect["control"])):
                failure = f"clean twin: {twin}"
            if failure is not None:
                row |= {"status": "failed", "reason": failure}
            elif damage := store.damage(stage, key):
                row["reason"] = f"{stage} is damaged: {damage}"
            return row
        row[f"{stage}_seconds"] = result["seconds"]
        row |= {name: result[name] for name in COUNTS if name in result}  # stores of earlier versions have none
        made.append(result["provenance"])
        if stage == "implant":
            row["implant_weights"] = _weights(store, key, result)
        if stage == "defend":
            row["peak_memory_mib"], row["defend_images"] = result["peak_memory_mib"], result["images"]
            # Stores of earlier versions have none of these.
            row["defend_gflop"], row["defend_updates"] = result.get("gflop"), result.get("updates")
    assert result is not None
    row |= {"status": result["status"], "reason": result.get("reason", "")}
    row |= {column.name: result.get("figures", {}).get(column.name) for column in MEASURES}
    row["warnings"] = "; ".join(map(str, result.get("warnings", ())))
    # An implant can be older than what was done to it: every commit that had a hand in the figure is named.
    row["commit"] = " ".join(dict.fromkeys(origin["commit"] for origin in made if origin["commit"]))
    row["clean"] = all(origin["clean"] for origin in made)
    row["machine"] = "; ".join(dict.fromkeys(_machine(origin) for origin in made))
    return row


def _weights(store: Store, key: str, result: dict[str, Any]) -> str:
    """The digest of an infected model's weights; empty where neither it nor the weights were kept."""
    from safetensors import SafetensorError

    if "weights" in result:
        return str(result["weights"])
    path = store.folder("implant", key) / "model.safetensors"
    try:
        return _digest_of_file(path, path.stat().st_mtime_ns)
    except (OSError, SafetensorError):
        return ""


@functools.cache
def _digest_of_file(path: Path, written: int) -> str:
    """Of an implant that an earlier version stored without it."""
    from safetensors.torch import load_file

    from bench.engine.files import digest_of

    return digest_of(load_file(path), {})[:20]


def _machine(origin: dict[str, Any]) -> str:
    """What a stage was computed on."""
    versions = ", ".join(f"{name} {origin[name]}" for name in ("python", "torch", "timm") if name in origin)
    return f"{origin.get('device', 'unknown')}, {versions}"


def trial_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """All trials, typed and in one order, whether they come from the store, from MLflow or from a file."""
    return _wreck(_typed(rows))


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    # Before pandas sees them: a text that is no Unicode ends it.
    table = pd.DataFrame(
        {name: [printable(row.get(name)) if name in TEXTS else row.get(name) for row in rows] for name in COLUMNS}
    )
    for column in FIGURES:
        # Not to_numeric: it is off by a bit for some decimals.
        table[column] = table[column].astype("object").astype("float64")
    table["seed"] = table["seed"].astype("int64")
    table["clean"] = table["clean"].map({True: "True", False: "False", "True": "True", "False": "False"}).fillna("")
    for column in TEXTS:
        table[column] = table[column].astype("object")
    return table


def of_trials(
    trials: Sequence[Trial], store: Store, published: Mapping[str, dict[str, Any]] | None = None
) -> pd.DataFrame:
    """The table of planned trials: one row for each, as `trial_row` has it.

    Args:
        published: rows that take the place of what the store has not finished, by the key of the evaluation.
    """
    rows = [trial_row(trial, store) for trial in trials]
    for row in rows:
        elsewhere = (published or {}).get(row["trial"])
        if elsewhere and row["status"] not in OUTCOMES:
            # Under the name that this grid has for it: an ablation's row may be another grid's default.
            row |= {key: value for key, value in elsewhere.items() if key not in (*AXES, "seed")}
    return trial_table(rows)


def printable(text: Any) -> str:
    """The text with what no file and no terminal can show written as its number: \\x00, \\udcff."""
    text = "" if text is None or text != text else str(text)
    return (
        text
        if text.isprintable()
        else "".join(sign if sign.isprintable() or sign in "\n\t\u3000\xa0" else ascii(sign)[1:-1] for sign in text)
    )


def _wreck(table: pd.DataFrame) -> pd.DataFrame:
    """Tell apart the finished trials whose model lost what it was good for: their low ASR is no defense."""
    place = [*BOARD, "attack", "seed"]
    done = table.status == "done"
    base = table[done & (table.defense == BASELINE)].drop_duplicates(place)
    base = table[place].merge(base[[*place, "clean_accuracy", "implant_weights"]], on=place, how="left")
    # Each evaluation has the accuracy of its own infected model. What earlier versions measured may lack it: there the
    # undefended model's stands in, unless that is another model's.
    other = (base.implant_weights.fillna("") != table.implant_weights.to_numpy()) & (
        base.implant_weights.fillna("") != ""
    )
    other &= (table.implant_weights != "").to_numpy()
    before = base.clean_accuracy.where(~other).to_numpy()
    before = np.where(table.infected_accuracy.isna(), before, table.infected_accuracy.to_numpy())
    lost = before - table.clean_accuracy.to_numpy()
    # Rounded: 0.8 - 0.7 is a little more than 0.1.
    wrecked = (done & (np.round(lost, 9) > WRECKED)).to_numpy()
    table.loc[wrecked, "status"] = "wrecked"
    table.loc[wrecked, "reason"] = [
        f"clean accuracy {100 * now:.1f}, {100 * gone:.1f} points below the infected model's"
        for now, gone in zip(table.clean_accuracy[wrecked], lost[wrecked], strict=True)
    ]
    return table


def read_trials(source: Path | IO[bytes], name: str = "") -> pd.DataFrame:
    """`trials.csv` as `write` left it.

    Args:
        name: what an error calls it; the path if it is one.

    Raises:
        UserError: it is no such table, a value is not one that its column can have, or two rows of one trial differ.
    """
    from bench.config import UserError

    place = str(name or source)
    try:
        table = pd.read_csv(source, keep_default_na=False, dtype=str).rename(columns=literal).map(literal)
        # An earlier version swept nothing, and had no such column.
        missing = [name for name in (*AXES, "seed", "status") if name not in table and name != "variant"]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        for column in FIGURES:
            if column in table:
                table[column] = table[column].replace("", "nan")
        _check_values(table, place)
        return _wreck(_once(_typed(table.to_dict("records")), place))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        text = shortened(str(error), 200)
        raise UserError(f"{place} is no trials.csv of this benchmark: {text}") from error


def _check_values(table: pd.DataFrame, place: str) -> None:
    """Refuse a value that its column cannot have, by row and column; the heading is row 1, as in a spreadsheet."""
    from bench.config import UserError

    def refuse(wrong: Any, name: str, due: str) -> None:
        rows = np.flatnonzero(wrong)
        if len(rows):
            more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
            raise UserError(f"{place}, row {rows[0] + 2}: {name} is {table[name].iloc[rows[0]]!r}{more}; write {due}")

    refuse(~table.status.isin(STATES), "status", f"one of {', '.join(STATES)}")
    seeds = pd.to_numeric(table.seed, errors="coerce")
    refuse(~(np.isfinite(seeds) & (seeds % 1 == 0)), "seed", "a whole number")
    for name in FIGURES:
        if name not in table:
            continue
        values = pd.to_numeric(table[name], errors="coerce")
        gap = table[name].str.lower().isin(["nan"])
        low, high, due = _range(name)
        refuse(~gap & ~((values >= low) & (values <= high)), name, due)


def _range(name: str) -> tuple[float, float, str]:
    """The least and the largest value of a figure, and how to write one."""
    column = COLUMN.get(name)
    if name in COUNTS or (column is not None and column.unit != "%"):
        return 0.0, math.inf, "a number, at least 0"
    low = 0.0 if column is None else column.low  # the poison rate is no column of results
    return low, 1.0, f"a number, a share in [{low:g}, 1] (0.93 for 93 %)"


def _once(table: pd.DataFrame, place: str) -> pd.DataFrame:
    """One row of each trial.

    Raises:
        UserError: two rows of one trial contradict each other.
    """
    from bench.config import UserError

    cell = [*AXES, "seed"]
    for keys, judged in ((cell, [*AGREE, "trial"]), (["trial"], AGREE)):
        part = table[table.trial != ""] if keys == ["trial"] else table
        for _, group in part[part.duplicated(keys, keep=False)].groupby(keys, sort=False):
            (row, first), *others = group.iterrows()
            for other, again in others:
                if name := contradiction(first, again, judged):
                    what = "/".join(str(first[axis]) for axis in cell if first[axis] != "")
                    raise UserError(
                        f"{place}: rows {int(str(row)) + 2} and {int(str(other)) + 2} are one trial ({what}), "
                        f"with {name} {first[name]!r} and {again[name]!r}; leave the one that is right"
                    )
    return table.drop_duplicates(cell).reset_index(drop=True)


def contradiction(one: Any, two: Any, judged: Sequence[str] | None = None) -> str:
    """The first column in which two rows of one trial disagree; empty if they agree in all that is the same each time.

    Seconds and memory may differ; weights that one of them does not know are no contradiction.
    """
    for name in judged or AGREE:
        a, b = one[name], two[name]
        unknown = name == "implant_weights" and "" in (a, b)
        if not unknown and a != b and not (a != a and b != b):
            return name
    return ""


def infected(trials: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Which infected model each finished trial is about, as a text; empty where nothing is finished.

    The digest of its weights. Where that was not recorded, its own accuracy and ASR: two models that differ in them
    are two, and two that do not may still be.
    """
    figures = [f"{acc!r} {asr!r}" for acc, asr in zip(trials.infected_accuracy, trials.infected_asr, strict=True)]
    told = np.where(trials.implant_weights != "", trials.implant_weights, figures)
    return np.where(trials.status.isin(["done", "wrecked"]), told, "")


def elsewhere(trials: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Which trials are about another infected model than most of their data set, attack and seed.

    Training amplifies rounding: the same settings give another infected model on another kind of device. What was
    measured of it is a figure like any other, and no pair of those beside it.
    """
    place = [*BOARD, "attack", "seed"]
    all_of = trials[place].assign(model_of=infected(trials))
    told = all_of[all_of.model_of != ""]
    counts = told.groupby([*place, "model_of"], sort=False).size().reset_index(name="count")
    usual = counts.sort_values("count", ascending=False, kind="stable").drop_duplicates(place)
    most = all_of[place].merge(usual.drop(columns="count"), on=place, how="left").model_of
    return ((all_of.model_of != "").to_numpy()) & (all_of.model_of.to_numpy() != most.to_numpy())


def cells(trials: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell: mean, sample standard deviation, 95 % intervals and number of seeds of each figure.

    Only finished trials are averaged; a wrecked, diverged or failed one is counted in its own column with its reason.
    `NAME_t95` is half of the t-interval, `NAME_low` and `NAME_high` are the bootstrap's.
    """
    trials = trials.reset_index(drop=True)
    groups = trials.groupby(AXES, sort=False)
    number = groups.ngroup().to_numpy()
    count = int(number.max()) + 1 if len(number) else 0
    found = trials.loc[~pd.Series(number).duplicated().to_numpy(), [*AXES, "poison_rate"]].reset_index(drop=True)
    found["seeds"] = np.bincount(number, minlength=count)
    added: dict[str, Any] = {}
    for state in STATES:
        there = (trials.status == state).to_numpy()
        added[_field(state)] = np.bincount(number[there], minlength=count)
        if state not in ("done", "missing"):
            first = pd.Series(trials.reason.to_numpy()[there]).groupby(number[there]).first()
            added[f"{_field(state)}_reason"] = first.reindex(range(count)).fillna("").to_numpy(dtype=object)
    done = (trials.status == "done").to_numpy()
    for column in (*MEASURES, *COSTS):
        values = trials[column.name].to_numpy()
        there = done & ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            grouped = pd.Series(values[there]).groupby(number[there])
            mean, std = grouped.mean().reindex(range(count)), grouped.std(ddof=1).reindex(range(count))
        added[f"{column.name}_mean"], added[f"{column.name}_std"] = mean.to_numpy(), std.to_numpy()
        if column in MEASURES and there.any():
            added |= _intervals(column.name, values[there], number[there], std.to_numpy())
    found = pd.concat([found, pd.DataFrame(added, index=found.index)], axis=1)
    found["kind"] = "measured"
    return found


def records(frame: pd.DataFrame) -> list[Any]:
    """The rows of a frame with its columns as attributes."""
    return list(frame.itertuples())


def parts(frame: pd.DataFrame, by: str | list[str]) -> list[tuple[Any, pd.DataFrame]]:
    """The groups of a frame in the order in which they come: their names, and their rows."""
    return list(frame.groupby(by, sort=False))


def _field(state: str) -> str:
    return state.replace(" ", "_")


def _intervals(
    name: str, values: np.ndarray[Any, Any], number: np.ndarray[Any, Any], std: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """95 % intervals of one figure's means; cells with as many seeds are resampled together."""
    count = len(std)
    low, high = np.full(count, np.nan), np.full(count, np.nan)
    order = np.argsort(number, kind="stable")
    values, sizes = values[order], np.bincount(number, minlength=count)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for size in np.unique(sizes[sizes > 1]):
        members = np.flatnonzero(sizes == size)
        rows = values[starts[members][:, None] + np.arange(size)]
        low[members], high[members] = statistics.bootstrap_interval(rows)
    return {f"{name}_t95": statistics.t_halfwidth(std, sizes), f"{name}_low": low, f"{name}_high": high}


def read_reported(source: Path | IO[bytes], name: str = "") -> pd.DataFrame:
    """Cells that somebody else reports: a CSV with dataset, model, setting, attack, defense, provenance and figures.

    Figures are shares in [0, 1] under this project's names, e.g. `asr`; `asr_std` may stand beside it, and `seeds`.

    Raises:
        UserError: a column is missing or unknown, a value is no number, or a share lies outside [0, 1].
    """
    from bench.config import UserError

    path = name or source
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False)
        # The names that results/published has for them.
        table = table.rename(columns={"source": "provenance", "differs": "protocol"})
    except (OSError, ValueError) as error:
        raise UserError(f"report.reported: {path} cannot be read: {shortened(str(error), 200)}") from error
    needed = [axis for axis in AXES if axis != "variant"] + ["provenance"]
    known = {*needed, "variant", "seeds", "protocol", "poison_rate", *COLUMN, *(f"{name}_std" for name in COLUMN)}
    missing, odd = [name for name in needed if name not in table], [name for name in table if name not in known]
    if missing or odd:
        fault = f"has no column {missing[0]!r}" if missing else f"has a column {odd[0]!r} that is not known"
        raise UserError(f"report.reported: {path} {fault}; it needs {', '.join(needed)} and figures such as asr")
    if (table.provenance.str.strip() == "").any():
        raise UserError(f"report.reported: {path} has a row without provenance; say where its figures were printed")
    rows: dict[str, Any] = {axis: table[axis].astype(object) if axis in table else "" for axis in AXES}
    rows["poison_rate"] = math.nan
    goals = [("poison_rate", "poison_rate", _range("poison_rate"))]
    goals += [("seeds", "seeds", (1.0, math.inf, "a whole number, at least 1"))]
    for name in COLUMN:
        low, high, due = _range(name)
        goals += [(name, f"{name}_mean", (low, high, due)), (f"{name}_std", f"{name}_std", (0.0, high, due))]
    for figure, goal, (low, high, due) in goals:
        if figure in table:
            values = pd.to_numeric(table[figure].replace("", "nan"), errors="coerce")
            gap = table[figure].str.lower().isin(["", "nan"])
            wrong = ~gap & ~((values >= low) & (values <= high))
            if figure == "seeds":
                wrong |= ~gap & (values % 1 != 0)
            if wrong.any():
                raise UserError(f"report.reported: {path}: {figure} is {table[figure][wrong].iloc[0]!r}; write {due}")
            rows[goal] = values
    found = pd.DataFrame(rows)
    found["provenance"] = table.provenance
    found["protocol"] = table.protocol if "protocol" in table else ""
    found["seeds"] = found.seeds.fillna(1).astype(int) if "seeds" in found else 1
    found["kind"] = "reported"
    return found


def reported_of(path: Path, trials: pd.DataFrame) -> pd.DataFrame:
    """What somebody else reports, without the poison rates that this table does not have.

    Raises:
        UserError: as `read_reported`, or a cell is reported twice.
    """
    from bench.config import UserError

    found = read_reported(path)
    own = {attack: part.poison_rate.unique() for attack, part in trials.groupby("attack")}
    usual = trials.poison_rate[trials.poison_rate > 0].mode()  # for an attack that this table does not have
    found = found[
        [
            np.isnan(rate) or bool(np.isclose(rate, own.get(attack, usual)).any())
            for attack, rate in zip(found.attack, found.poison_rate, strict=True)
        ]
    ]
    twice = found[found.duplicated(AXES)]
    if not twice.empty:
        cell = "/".join(text for text in twice.iloc[0][AXES] if text)
        raise UserError(f"report.reported: {path} has {cell} more than once; leave one row of each cell")
    return found.reset_index(drop=True)


def with_reported(table: pd.DataFrame, reported: pd.DataFrame | None) -> pd.DataFrame:
    """Measured cells with reported ones beneath; every count of the latter is zero."""
    if reported is None or reported.empty:
        return table
    both = pd.concat([table, reported], ignore_index=True)
    for state in STATES:
        both[_field(state)] = both[_field(state)].fillna(0).astype(int)
        if f"{_field(state)}_reason" in both:
            both[f"{_field(state)}_reason"] = both[f"{_field(state)}_reason"].fillna("")
    both[["provenance", "protocol"]] = both[["provenance", "protocol"]].fillna("")
    return both


@dataclass
class Marks:
    """Who is best and who is not significantly worse.

    Attributes:
        cells: (row of the table of cells, figure) -> `best` or `alike`.
        rows: (data set, model, variant, setting, defense, figure) -> the same, for means over attacks.
        rankings: (data set, model, variant, setting) -> ranks over attacks.
        overall: (setting, variant) -> ranks over all attacks, data sets and architectures: a swept value's infected
            models are no further blocks beside another's.
        elsewhere: rows of the table of cells that are about other infected models than their rivals.
    """

    cells: dict[tuple[int, str], str] = field(default_factory=dict)
    rows: dict[tuple[str, ...], str] = field(default_factory=dict)
    rankings: dict[tuple[str, ...], statistics.Ranking] = field(default_factory=dict)
    overall: dict[tuple[str, str], statistics.Ranking] = field(default_factory=dict)
    elsewhere: frozenset[int] = frozenset()


def shown(table: pd.DataFrame, everything: bool = False) -> list[Column]:
    """The columns that the table has figures for: those printed by default, or all."""
    return [
        column
        for column in (*MEASURES, *COSTS)
        if (column.shown or everything) and table[f"{column.name}_mean"].notna().any()
    ]


def marks(trials: pd.DataFrame, table: pd.DataFrame) -> Marks:
    """Compare the defenses of each setting; `RULES` says what is compared with what.

    Reported rows, the undefended model, and figures of another infected model (`elsewhere`) are nobody's rivals.
    """
    found = Marks()
    measured = table[table.kind == "measured"]
    columns = [column for column in shown(measured, everything=True) if column.sign]
    trials = trials.reset_index(drop=True)
    number = trials.groupby(AXES, sort=False).ngroup().to_numpy()
    order = np.lexsort((trials.seed.to_numpy(), number))
    ends = np.cumsum(np.bincount(number)) if len(number) else np.empty(0, int)
    figures = {column.name: trials[column.name].to_numpy()[order] for column in columns}
    weights, seeds = trials.implant_weights.to_numpy()[order], trials.seed.to_numpy()[order]
    means = {column.name: measured[f"{column.name}_mean"].to_numpy() for column in columns}
    undefended = {column.name: _undefended(measured, column.name) for column in columns}
    strange = np.bincount(number[elsewhere(trials)], minlength=len(measured)) > 0
    found.elsewhere = frozenset(np.flatnonzero(strange).tolist())
    complete = (measured.done == measured.seeds).to_numpy() & ~strange
    rivals = measured[measured.defense != BASELINE]

    def paired(one: int, two: int, name: str) -> float:
        a, b = (slice(ends[cell - 1] if cell else 0, ends[cell]) for cell in (one, two))
        _, i, j = np.intersect1d(seeds[a], seeds[b], return_indices=True)
        same = (weights[a][i] == weights[b][j]) & (weights[a][i] != "")
        return statistics.paired_t(figures[name][a][i][same], figures[name][b][j][same])

    for place, part in parts(rivals, [*BOARD, "setting"]):
        place = tuple(map(str, place))
        group = measured[(measured[[*BOARD, "setting"]].astype(str) == list(place)).all(axis=1)]
        for _, column_cells in parts(part, "attack"):
            for column in columns:
                members = [i for i in column_cells.index if complete[i] and not math.isnan(means[column.name][i])]
                marked = _marked(
                    column,
                    [means[column.name][i] for i in members],
                    [undefended[column.name][i] for i in members],
                    lambda one, two, members=members, name=column.name: paired(members[one], members[two], name),
                )
                found.cells |= {(members[i], column.name): mark for i, mark in marked.items()}
        lowest: dict[str, tuple[float, float]] = {}  # mean ASR of a defense and of the models that it was given
        for column in columns:
            name = column.name
            counted = part[part.attack.isin(attacks_of(group, name))]
            value = counted[f"{name}_mean"].where(complete[counted.index])
            blocks = counted.assign(value=value).pivot(index="attack", columns="defense", values="value")
            # A mean over other attacks than its rivals' is not compared.
            blocks = blocks.reindex(columns=counted.defense.unique()).dropna(axis=1)
            if blocks.empty:
                continue
            names = list(blocks.columns)
            before = counted.assign(value=undefended[name][counted.index]).groupby("defense").value
            floors = [float(before.get_group(n).mean(skipna=False)) for n in names]
            averages = [float(blocks[n].mean()) for n in names]
            reachable = statistics.least_p(len(blocks)) * max(1, len(names) - 1) < statistics.ALPHA
            marked = _marked(
                column,
                averages,
                floors,
                lambda one, two, blocks=blocks, reachable=reachable: (
                    statistics.signed_ranks(blocks.iloc[:, one], blocks.iloc[:, two]) if reachable else math.nan
                ),
            )
            found.rows |= {(*place, names[i], name): mark for i, mark in marked.items()}
            if name == "asr":
                lowest = dict(zip(names, zip(averages, floors, strict=True), strict=True))
        ranking = _ranking(part, ["attack"], strange)
        if ranking:
            found.rankings[place] = ranking
            # A low rank with a model wrecked elsewhere, be it the clean one, is no first place.
            whole = {str(label) for label, row in parts(part, "defense") if complete[row.index].all()}
            first = {name: rank for name, rank in ranking.ranks.items() if name in whole}
            reachable = statistics.least_p(ranking.blocks) * (len(ranking.ranks) - 1) < statistics.ALPHA
            for name, rank in first.items():
                if name in lowest and _worse(COLUMN["asr"], *lowest[name]):
                    continue
                mark = BEST if f"{rank:.1f}" == f"{min(first.values()):.1f}" else ""
                if mark or (reachable and name in ranking.alike):
                    found.rows[(*place, name, "rank")] = mark or ALIKE
    for (setting, variant), part in parts(rivals, ["setting", "variant"]):
        ranking = _ranking(part, ["dataset", "model", "attack"], strange)
        if ranking:
            found.overall[str(setting), str(variant)] = ranking
    return found


def _undefended(measured: pd.DataFrame, name: str) -> np.ndarray[Any, Any]:
    """The figure of the models that each cell's defense was given; NaN where nobody measured it.

    The cell's own infected models have two of them; for the others the undefended model of the same setting has them.
    """
    place = [*BOARD, "setting", "attack"]
    base = measured[measured.defense == BASELINE].drop_duplicates(place)[[*place, f"{name}_mean"]]
    found = measured[place].merge(base, on=place, how="left")[f"{name}_mean"].to_numpy(float)
    own = {"clean_accuracy": "infected_accuracy_mean", "asr": "infected_asr_mean"}.get(name)
    if own is None or own not in measured:
        return found
    return np.where(measured[own].isna(), found, measured[own].to_numpy(float))


def attacks_of(group: pd.DataFrame, name: str) -> list[str]:
    """The attacks that a mean of this figure is over, in one setting: those for which any defense has the figure.

    An attack that nobody's cell survived counts too: the ASR of one, and the accuracy of any.
    """
    found = []
    for attack, cells in parts(group, "attack"):
        lost = (cells.done == 0).all() and (name == "clean_accuracy" or (name == "asr" and cells.poison_rate.max() > 0))
        if lost or cells[f"{name}_mean"].notna().any():
            found.append(attack)
    return found


def _worse(column: Column, value: float, other: float) -> bool:
    """Is a figure worse than another as both are printed? False where there is no other."""
    if math.isnan(value) or math.isnan(other):
        return False
    return column.sign * float(column.text(value)) > column.sign * float(column.text(other))


def _marked(column: Column, means: list[float], undefended: list[float], p: Any) -> dict[int, str]:
    """Index -> mark of the figures in one column.

    Args:
        undefended: the figure of the models before the defense; a figure that is worse has no mark.
        p: p(i, j) is the p-value of i against j, NaN where there is no test.
    """
    if not means:
        return {}
    best = int(np.argmin([column.sign * mean for mean in means]))
    found = {i: BEST for i, mean in enumerate(means) if column.text(mean) == column.text(means[best])}
    others = [i for i in range(len(means)) if i != best]
    for i, adjusted in zip(others, statistics.holm([p(i, best) for i in others]), strict=True):
        if i not in found and adjusted >= statistics.ALPHA:
            found[i] = ALIKE
    return {i: mark for i, mark in found.items() if not _worse(column, means[i], undefended[i])}


def _ranking(part: pd.DataFrame, blocks: list[str], strange: np.ndarray[Any, Any]) -> statistics.Ranking | None:
    """Ranks by ASR of the defenses that have an outcome in every block with a trigger; None if nobody has.

    Args:
        strange: by the row of the table of cells: is it about another infected model than its rivals?
    """
    poisoned = part[part.poison_rate > 0]
    # Nothing of it ended: a reason why it could not be computed is no result.
    ended = poisoned.groupby("defense")[list(OUTCOMES)].sum().sum(axis=1)
    other = set(poisoned.defense[strange[poisoned.index]])
    poisoned = poisoned[poisoned.defense.isin(ended.index[ended > 0]) & ~poisoned.defense.isin(other)]
    lost = poisoned[[_field(state) for state in LOST]].sum(axis=1) > 0
    value = poisoned.asr_mean.where(poisoned.done == poisoned.seeds).where(~lost, math.inf)
    wide = poisoned.assign(value=value).pivot_table(
        index=blocks, columns="defense", values="value", sort=False, aggfunc="first", dropna=False
    )
    wide = wide.dropna(how="all").dropna(axis=1)
    if wide.empty or wide.shape[1] < 2:
        return None
    return statistics.rank(wide.to_numpy(), [str(name) for name in wide.columns], 1.0)


@dataclass(frozen=True)
class Entry:
    """One cell of a printed table.

    Attributes:
        parts: figures as (text, mark), e.g. clean accuracy and ASR.
        note: what is not done beside them, e.g. `1 diverged`; or why there is no figure.
    """

    parts: tuple[tuple[str, str], ...]
    note: str = ""

    @property
    def text(self) -> str:
        figures = " / ".join(text for text, _ in self.parts)
        return f"{figures} ({self.note})" if figures and self.note else figures or self.note


@dataclass
class Board:
    """A leaderboard as text: for one data set, architecture and combination of swept settings.

    Attributes:
        rows: a row of one entry is a heading.
        notes: printed beneath.
    """

    title: str
    header: list[str]
    rows: list[list[Entry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        def line(texts: list[str]) -> str:
            return "| " + " | ".join(texts) + " |"

        lines = [
            f"### {_safe(self.title)}",
            "",
            line([_safe(text) for text in self.header]),
            line(["---"] + ["---:"] * (len(self.header) - 1)),
        ]
        around = {BEST: "**", ALIKE: "*", "": ""}
        for row in self.rows:
            texts = []
            for entry in row:
                figures = " / ".join(f"{around[mark]}{_safe(text)}{around[mark]}" for text, mark in entry.parts)
                note = _safe(entry.note)
                texts.append(f"{figures} ({note})" if figures and note else figures or note)
            lines.append(line(texts + [""] * (len(self.header) - len(texts))))
        return "\n".join([*lines, "", *(f"- {_note(note)}" for note in self.notes), ""])


def _safe(text: str) -> str:
    """Text that stays text in a Markdown table."""
    text = " ".join(text.split())
    for sign in "\\`*_[]~$":  # $ is mathematics and ~ strikes through on some sites
        # In the names of ours, a _ between letters is no mark of Markdown.
        text = text.replace(sign, f"\\{sign}") if sign != "_" else _outer_underscores(text)
    return text.replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")


def _note(text: str) -> str:
    """A line beneath a table; a command is code, so that a shell can be given it as it stands."""
    name, _, command = text.partition(": ")
    if name != "command" or "`" in command or "\n" in command:
        return _safe(text)
    return f"command: `{command}`"


def _outer_underscores(text: str) -> str:
    inside = [
        index and index + 1 < len(text) and text[index - 1].isalnum() and text[index + 1].isalnum()
        for index in range(len(text))
    ]
    return "".join(f"\\{sign}" if sign == "_" and not inner else sign for sign, inner in zip(text, inside, strict=True))


def boards(trials: pd.DataFrame, protocol: list[str], reported: pd.DataFrame | None = None) -> list[Board]:
    """The leaderboards of a grid, one for each data set, architecture and combination of swept settings.

    Rows are grouped by what the defender owns: one with clean data is not the rival of one without. In each group the
    undefended model comes first, then defenses by their mean ASR; those with a cell that is not done come last.
    """
    measured = cells(trials)
    return _boards(trials, with_reported(measured, reported), marks(trials, measured), protocol)


def _boards(trials: pd.DataFrame, table: pd.DataFrame, marked: Marks, protocol: list[str]) -> list[Board]:
    found = []
    columns = shown(table)
    for place, part in parts(table, BOARD):
        place = tuple(map(str, place))
        attacks = list(dict.fromkeys(part.attack))
        clean = set(part[part.poison_rate == 0].attack)  # nothing was poisoned: no ASR
        header = ["defense", *(f"{a} ACC" if a in clean else f"{a} ACC / ASR" for a in attacks)]
        header += ["mean ACC", "mean ASR", "median ASR", f"ASR > {100 * HIGH_ASR:.0f} %", "rank"]
        rest = [column for column in columns if column.name not in ("clean_accuracy", "asr")]
        header += [column.title if column in COSTS else f"mean {column.title}" for column in rest]
        board = Board(", ".join(name for name in place if name), header)
        sources = []
        for (kind, setting), group in parts(part, ["kind", "setting"]):
            remark = "" if kind == "measured" else "; reported, not measured here, not ranked"
            board.rows.append([Entry(((f"setting: {setting or 'not named'}{remark}", ""),))])
            group = group[~_foreign(group)]  # a row of nothing but n/a tells nothing; the notes name it
            board.rows += _group((*place, str(setting)), group, attacks, clean, rest, marked)
            if kind == "reported":
                sources += [
                    f"reported: {name}: {source}{f' ({protocol_})' if protocol_ else ''}"
                    for name, source, protocol_ in dict.fromkeys(
                        zip(group.defense, group.provenance, group.protocol, strict=True)
                    )
                ]
        rankings = [
            f"setting {setting}: {ranking.sentence()}"
            for (*where, setting), ranking in marked.rankings.items()
            if tuple(where) == place
        ]
        own = trials[(trials[BOARD].astype(str) == list(place)).all(axis=1)]
        board.notes = _notes(part[part.kind == "measured"], own) + sources + rankings + list(RULES) + protocol
        found.append(board)
    return found


def summary(row: pd.DataFrame) -> dict[str, float]:
    """The figures of one defense over its attacks: the mean of each, the median ASR, how many ASR are high.

    Memory is the largest. NaN where no cell has the figure.
    """
    found = {}
    for column in (*MEASURES, *COSTS):
        values = row[f"{column.name}_mean"]
        found[column.name] = float(values.max() if column.name == "peak_memory_mib" else values.mean())
    asr = row.asr_mean.dropna()
    found |= {"asr_median": float(asr.median()), "asr_high": int((asr > HIGH_ASR).sum()), "asr_cells": len(asr)}
    return found


def _group(
    place: tuple[str, ...],
    group: pd.DataFrame,
    attacks: list[str],
    clean: set[str],
    rest: list[Column],
    marked: Marks,
) -> list[list[Entry]]:
    """The rows of one setting."""
    lines = []
    reported = bool((group.kind == "reported").any())
    over = {
        column.name: set(attacks_of(group, column.name)) for column in (*rest, COLUMN["clean_accuracy"], COLUMN["asr"])
    }
    for name, row in parts(group, "defense"):
        whole = bool((row.done == row.seeds).all() or reported)
        lines.append((str(name), row, whole, summary(row)))
    lines.sort(key=lambda line: (line[1].defense.iloc[0] != BASELINE, not line[2], _or_inf(line[3]["asr"])))
    ranking = None if reported else marked.rankings.get(place)
    rows = []
    for name, row, whole, means in lines:

        def mark(figure: str, name: str = name) -> str:
            return "" if reported else marked.rows.get((*place, name, figure), "")

        def mean(figure: str, column: Column, means: dict[str, float] = means, row: pd.DataFrame = row) -> Entry:
            text = column.text(means[figure])
            cells = row[row.attack.isin(over[column.name])]
            whole = reported or (cells.done == cells.seeds).all()
            return Entry(((text + ("" if whole or text == "–" or column in COSTS else "†"), mark(figure)),))

        by_attack = {str(label): (index, cell) for label, index, cell in _cells_of(row)}
        out = [Entry(((name, ""),))]
        out += [_entry(*by_attack[a], a in clean, marked) if a in by_attack else Entry((("–", ""),)) for a in attacks]
        out += [mean("clean_accuracy", COLUMN["clean_accuracy"]), mean("asr", COLUMN["asr"])]
        out += [mean("asr_median", COLUMN["asr"])]
        out.append(Entry(((f"{means['asr_high']} of {means['asr_cells']}" if means["asr_cells"] else "–", ""),)))
        rank = ranking.ranks.get(name) if ranking else None
        out.append(Entry((("–" if rank is None else f"{rank:.1f}", mark("rank")),)))
        out += [mean(column.name, column) for column in rest]
        rows.append(out)
    return rows


def _cells_of(row: pd.DataFrame) -> list[tuple[str, int, Any]]:
    return [(label, index, cell) for label, index, cell in zip(row.attack, row.index, records(row), strict=True)]


def _entry(index: int, cell: Any, is_clean: bool, marked: Marks) -> Entry:
    """`93.4±0.2 / 1.2±0.4`, with what is not done beside it; or the state, where nothing is."""
    reported = cell.kind == "reported"
    others = [] if reported else [(state, getattr(cell, _field(state))) for state in STATES[1:]]
    others = [(state, count) for state, count in others if count]
    if not reported and cell.not_applicable == cell.seeds:
        return Entry((), "n/a")
    if not reported and not cell.done:
        return Entry((), ", ".join(state for state, _ in others))
    found = []
    for name in ("clean_accuracy", "asr"):
        value = getattr(cell, f"{name}_mean", math.nan)
        if name == "clean_accuracy" or not (math.isnan(value) if reported else is_clean or math.isnan(value)):
            mark = marked.cells.get((index, name), "") if (name == "asr" or is_clean) and not reported else ""
            found.append((COLUMN[name].spread(value, getattr(cell, f"{name}_std", math.nan)), mark))
    return Entry(tuple(found), ", ".join(f"{count} {state}" for state, count in others))


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _foreign(cells: pd.DataFrame) -> pd.Series:
    """Which cells are of a defense that does not work in their setting at all, whatever the attack and the network."""
    return cells.not_applicable_reason.str.contains("does not work in the setting", regex=False)


def _notes(part: pd.DataFrame, trials: pd.DataFrame) -> list[str]:
    """What a board's reader must know, of its cells and of its trials."""
    notes = []
    for setting, cells in part[_foreign(part)].groupby("setting", sort=False):
        notes.append(f"not applicable in the setting {setting}: {', '.join(dict.fromkeys(cells.defense))}")
    part = part[~_foreign(part)]
    notes += implants(part)
    for state in STATES[1:-1]:
        count, reason = _field(state), f"{_field(state)}_reason"
        for _, cell in part[part[count] > 0].drop_duplicates(["defense", reason]).iterrows():
            notes.append(f"{state}: {cell.defense} against {cell.attack}: {cell[reason]}")
    if (part.missing > 0).any():
        notes.append(f"missing: {int(part.missing.sum())} trials are not computed yet; run the grid to fill them")
    if (part.done < part.seeds).any():
        notes.append("† a mean over finished cells only, which is not compared")
    unknown = (trials.status == "done") & trials.infected_accuracy.isna()
    if BASELINE not in set(part.defense) and unknown.any():
        notes.append(f"without {BASELINE} in the grid nobody can tell whether a model is wrecked")
    warned = trials[trials.warnings != ""].drop_duplicates(["defense", "attack", "warnings"])
    notes += [f"warning: {row.defense} against {row.attack}: {row.warnings}" for row in records(warned)]
    notes += pairing(trials)
    commits = commits_of(trials)
    if commits:
        notes.append(f"commit: {', '.join(commits)}")
    machines = sorted({machine for several in trials.machine for machine in several.split("; ") if machine})
    notes += [f"computed on: {machine}" for machine in machines]
    return notes


def implants(part: pd.DataFrame) -> list[str]:
    """Which attacks of a board are not what its reader expects: a backdoor that is hardly there, or a dear one."""
    undefended = part[part.defense == BASELINE].drop_duplicates("attack")
    notes = []
    clean = undefended[undefended.poison_rate == 0].clean_accuracy_mean.max()
    for cell in records(undefended[undefended.poison_rate > 0]):
        if np.round(cell.asr_mean, 3) < STRONG:
            figure = COLUMN["asr"].spread(cell.asr_mean, cell.asr_std)
            notes.append(
                f"weak: {cell.attack}: the infected models have an ASR of {figure}, below {100 * STRONG:.0f}: a repair "
                "has less to remove"
            )
        lost = np.round(clean - cell.clean_accuracy_mean, 3)
        if lost > DEAR:
            notes.append(f"dear: {cell.attack}: the infected models are {100 * lost:.1f} points below the clean model")
    return notes


def pairing(trials: pd.DataFrame) -> list[str]:
    """What is not compared seed by seed because its infected models are others, or not known to be the same."""
    notes = []
    for (defense, attack), part in parts(trials[elsewhere(trials)], ["defense", "attack"]):
        seeds = ", ".join(map(str, sorted(part.seed.unique())))
        notes.append(
            f"other infected models: {defense} against {attack} (seed {seeds}) was computed on other weights than the "
            "rest of its column; it is not marked, ranked or tested"
        )
    unknown = trials[trials.status.isin(["done", "wrecked"]) & (trials.implant_weights == "")]
    if not unknown.empty and trials.seed.nunique() > 1:
        notes.append(
            f"the infected weights of {len(unknown)} of {len(trials)} trials are not recorded: their seeds are not "
            "paired, and no difference of theirs is tested over seeds"
        )
    return notes


def commits_of(trials: pd.DataFrame) -> list[str]:
    """The commits that had a hand in the figures, short, each with a word if the tree was changed."""
    return sorted(
        {
            f"{commit[:10]}{'' if clean == 'True' else ' (changed)'}"
            for several, clean in zip(trials.commit, trials.clean, strict=True)
            for commit in several.split()
        }
    )


def wide(table: pd.DataFrame, marked: Marks) -> pd.DataFrame:
    """One row for each defense, all figures in columns, as the printed boards have them but unrounded."""
    rows = []
    axes = [*BOARD, "setting", "defense", "kind"]
    for place, row in parts(table, axes):
        out: dict[str, Any] = dict(zip(axes, place, strict=True))
        ranking = marked.rankings.get(tuple(place[:4])) if out["kind"] == "measured" else None
        out["rank"] = ranking.ranks.get(out["defense"], math.nan) if ranking else math.nan
        out |= summary(row)
        for column in shown(table, everything=True):
            figures = row[["attack", f"{column.name}_mean", f"{column.name}_std"]]
            for attack, mean, std in figures.itertuples(index=False):
                out[f"{attack}: {column.name}"], out[f"{attack}: {column.name}_std"] = mean, std
        rows.append(out)
    return pd.DataFrame(rows)


def _compact(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of optional figures that nobody measured."""
    optional = [
        name for name in table if str(name).removesuffix("_mean") not in ("poison_rate", "clean_accuracy", "asr")
    ]
    empty = [name for name in optional if table[name].isna().all()]
    return table.drop(columns=empty)


def steps(trials: Sequence[Trial], store: Store) -> pd.DataFrame:
    """A row for each step of each trial of a progressive method, in the order of the steps.

    What its scores look like (`suspicion`) is left to the figure `scores`.
    """
    rows = []
    for trial in trials:
        key = trial.keys()[2]
        brief = store.brief("evaluate", key) if key else None
        result = (store.result("evaluate", key) or {}) if brief and "rounds" in brief["without"] else {}
        place = {name: getattr(trial, name) for name in (*AXES, "seed")}
        for number, step in enumerate(result.get("rounds", [])):
            figures = {name: value for name, value in step.items() if name not in ("name", "suspicion")}
            rows.append({**place, "step": number, "name": step["name"], **figures, "trial": trial.keys()[2]})
    return pd.DataFrame(rows)


def write(
    trials: pd.DataFrame, protocol: list[str], folder: Path, title: str, reported: pd.DataFrame | None = None
) -> list[Board]:
    """Tables of a grid in `folder`.

    `leaderboard.md`; `leaderboard.tex` for a paper; `leaderboard.csv` (a row for each cell), `wide.csv` (a row for each
    defense) and `trials.csv` (a row for each trial).
    """
    from bench.reporting.latex import latex

    folder.mkdir(parents=True, exist_ok=True)
    measured = cells(trials)
    marked = marks(trials, measured)
    table = with_reported(measured, reported)
    found = _boards(trials, table, marked, protocol)
    text = f"# {_safe(title)}\n\n" + "\n".join(board.markdown() for board in found)
    (folder / "leaderboard.md").write_text(text)
    (folder / "leaderboard.tex").write_text("\n".join(latex(board) for board in found))
    write_csv(_compact(table), folder / "leaderboard.csv")
    write_csv(_compact(wide(table, marked)), folder / "wide.csv")
    write_csv(_compact(trials), folder / "trials.csv")
    return found
