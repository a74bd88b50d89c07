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
from bench.store import STAGES, Store

AXES = ["dataset", "model", "variant", "setting", "attack", "defense"]  # what tells one cell from another
BOARD = AXES[:3]
TEXTS = [*AXES, "status", "reason", "warnings", "trial", "commit", "machine"]
FIGURES = ["poison_rate", *(column.name for column in (*MEASURES, *COSTS))]
COLUMNS = [
    *AXES,
    "poison_rate",
    "seed",
    "status",
    "reason",
    *(column.name for column in (*MEASURES, *COSTS)),
    "warnings",
    "commit",
    "clean",
    "machine",
    "trial",
]

STATES = ("done", "not applicable", "wrecked", "diverged", "failed", "missing")
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
    "an ASR of 100 % in tests; a defense with a missing or not applicable cell is not ranked",
    "rank: mean over attacks (blocks) of the rank by ASR within the setting, 1 is best; the undefended model is not "
    "ranked",
    "bold: best of its setting, equal in print is equal; italic (underlined in LaTeX and on the page): not "
    "significantly worse than the best at 5 %, by paired t-tests over seeds for one attack and by Wilcoxon's "
    "signed-rank test over attacks for means, both with Holm's correction; one seed allows no test",
)


class Snapshot(Store):
    """A store that is read once: many trials share an infected model, and tables and page ask for the same stages."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root)
        self.result = functools.cache(store.result)  # type: ignore[method-assign]


def trial_row(trial: Trial, store: Store) -> dict[str, Any]:
    """One trial as a row: its place in the grid, its state with the reason, its figures, its price."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    keys = trial.keys()
    row |= {axis: getattr(trial, axis) for axis in (*AXES, "seed")}
    row["status"], row["reason"], row["trial"] = "missing", "", keys[2]
    made: list[dict[str, Any]] = []
    row["poison_rate"] = trial.implant["attack"]["poison_rate"]
    if not trial.defend:
        return row | {"status": "not applicable", "reason": trial.reason, "trial": ""}
    for stage, key in zip(STAGES, keys, strict=True):
        result = store.result(stage, key)
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
        made.append(result["provenance"])
        if stage == "defend":
            row["peak_memory_mib"], row["defend_images"] = result["peak_memory_mib"], result["images"]
            row["defend_gflop"] = result.get("gflop")  # stores of earlier versions have none
    assert result is not None
    row |= {"status": result["status"], "reason": result.get("reason", "")}
    row |= {column.name: result.get("figures", {}).get(column.name) for column in MEASURES}
    row["warnings"] = "; ".join(map(str, result.get("warnings", ())))
    # An implant can be older than what was done to it: every commit that had a hand in the figure is named.
    row["commit"] = " ".join(dict.fromkeys(origin["commit"] for origin in made if origin["commit"]))
    row["clean"] = all(origin["clean"] for origin in made)
    row["machine"] = "; ".join(dict.fromkeys(_machine(origin) for origin in made))
    return row


def _machine(origin: dict[str, Any]) -> str:
    """What a stage was computed on."""
    versions = ", ".join(f"{name} {origin[name]}" for name in ("python", "torch", "timm") if name in origin)
    return f"{origin.get('device', 'unknown')}, {versions}"


def trial_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """All trials, typed and in one order, whether they come from the store, from MLflow or from a file."""
    # Before pandas sees them: a text that is no Unicode ends it.
    texts = [{name: printable(row.get(name)) for name in TEXTS} for row in rows]
    table = pd.DataFrame([row | text for row, text in zip(rows, texts, strict=True)], columns=COLUMNS)
    for column in FIGURES:
        # Not to_numeric: it is off by a bit for some decimals.
        table[column] = table[column].astype("object").astype("float64")
    table["seed"] = table["seed"].astype("int64")
    table["clean"] = table["clean"].map({True: "True", False: "False", "True": "True", "False": "False"}).fillna("")
    for column in TEXTS:
        table[column] = table[column].astype("object")
    return _wreck(table)


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
    base = table[done & (table.defense == BASELINE)].drop_duplicates(place)[[*place, "clean_accuracy"]]
    before = table[place].merge(base, on=place, how="left").clean_accuracy.to_numpy()
    # Without the undefended model in the grid, each evaluation still has its accuracy.
    before = np.where(np.isnan(before), table.infected_accuracy.to_numpy(), before)
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
        UserError: it is no such table.
    """
    from bench.config import UserError

    try:
        table = pd.read_csv(source, keep_default_na=False, dtype=str)
        # An earlier version swept nothing, and had no such column.
        missing = [name for name in (*AXES, "seed", "status") if name not in table and name != "variant"]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        for column in FIGURES:
            if column in table:
                table[column] = table[column].replace("", "nan")
        return trial_table(table.to_dict("records"))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        text = shortened(str(error), 200)
        raise UserError(f"{name or source} is no trials.csv of this benchmark: {text}") from error


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
    goals = [("poison_rate", "poison_rate", "%"), ("seeds", "seeds", "")]
    for name, column in COLUMN.items():
        goals += [(name, f"{name}_mean", column.unit), (f"{name}_std", f"{name}_std", column.unit)]
    for figure, goal, unit in goals:
        if figure in table:
            values = pd.to_numeric(table[figure].replace("", "nan"), errors="coerce")
            wrong = values.isna() & ~table[figure].str.lower().isin(["", "nan"])
            due = "a number"
            if unit == "%":
                wrong |= (values < 0) | (values > 1)
                due = "a number, a share in [0, 1] (0.93 for 93 %)"
            elif figure == "seeds":
                wrong |= (values < 1) | (values % 1 != 0)
                due = "a whole number, at least 1"
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
    """

    cells: dict[tuple[int, str], str] = field(default_factory=dict)
    rows: dict[tuple[str, ...], str] = field(default_factory=dict)
    rankings: dict[tuple[str, ...], statistics.Ranking] = field(default_factory=dict)
    overall: dict[tuple[str, str], statistics.Ranking] = field(default_factory=dict)


def shown(table: pd.DataFrame, everything: bool = False) -> list[Column]:
    """The columns that the table has figures for: those printed by default, or all."""
    return [
        column
        for column in (*MEASURES, *COSTS)
        if (column.shown or everything) and table[f"{column.name}_mean"].notna().any()
    ]


def marks(trials: pd.DataFrame, table: pd.DataFrame) -> Marks:
    """Compare the defenses of each setting; reported rows and the undefended model are nobody's rivals.

    A row is ranked and marked only where every one of its seeds is done.
    """
    found = Marks()
    measured = table[table.kind == "measured"]
    rivals = measured[measured.defense != BASELINE]
    columns = [column for column in shown(measured, everything=True) if column.sign]
    trials = trials.reset_index(drop=True)
    number = trials.groupby(AXES, sort=False).ngroup().to_numpy()
    order = np.lexsort((trials.seed.to_numpy(), number))
    ends = np.cumsum(np.bincount(number)) if len(number) else np.empty(0, int)
    figures = {column.name: trials[column.name].to_numpy()[order] for column in columns}
    means = {column.name: measured[f"{column.name}_mean"].to_numpy() for column in columns}
    complete = (measured.done == measured.seeds).to_numpy()

    def seeds(cell: int, name: str) -> np.ndarray[Any, Any]:
        return figures[name][(ends[cell - 1] if cell else 0) : ends[cell]]

    for place, part in parts(rivals, [*BOARD, "setting"]):
        place = tuple(map(str, place))
        whole = [label for label, row in parts(part, "defense") if complete[row.index].all()]
        ranked = part[part.defense.isin(whole)]
        for _, column_cells in parts(ranked, "attack"):
            for column in columns:
                members = [i for i in column_cells.index if not math.isnan(means[column.name][i])]
                marked = _marked(
                    column,
                    [means[column.name][i] for i in members],
                    lambda one, two, members=members, name=column.name: statistics.paired_t(
                        seeds(members[one], name), seeds(members[two], name)
                    ),
                )
                found.cells |= {(members[i], column.name): mark for i, mark in marked.items()}
        for column in columns:
            wide = ranked.pivot_table(
                index="attack", columns="defense", values=f"{column.name}_mean", sort=False
            ).reindex(columns=whole)
            wide = wide.loc[:, wide.notna().any()]
            names = list(wide.columns)
            blocks = wide.dropna()
            reachable = statistics.least_p(len(blocks)) * max(1, len(names) - 1) < statistics.ALPHA
            marked = _marked(
                column,
                [wide[name].mean() for name in names],
                lambda one, two, blocks=blocks, reachable=reachable: (
                    statistics.signed_ranks(blocks.iloc[:, one], blocks.iloc[:, two]) if reachable else math.nan
                ),
            )
            found.rows |= {(*place, names[i], column.name): mark for i, mark in marked.items()}
        ranking = _ranking(part, ["attack"])
        if ranking:
            found.rankings[place] = ranking
            # A low rank with a model wrecked elsewhere, be it the clean one, is no first place.
            first = {name: rank for name, rank in ranking.ranks.items() if name in whole}
            reachable = statistics.least_p(ranking.blocks) * (len(ranking.ranks) - 1) < statistics.ALPHA
            for name, rank in first.items():
                mark = BEST if f"{rank:.1f}" == f"{min(first.values()):.1f}" else ""
                if mark or (reachable and name in ranking.alike):
                    found.rows[(*place, name, "rank")] = mark or ALIKE
    for (setting, variant), part in parts(rivals, ["setting", "variant"]):
        ranking = _ranking(part, ["dataset", "model", "attack"])
        if ranking:
            found.overall[str(setting), str(variant)] = ranking
    return found


def _marked(column: Column, means: list[float], p: Any) -> dict[int, str]:
    """Index -> mark of the figures in one column; p(i, j) is the p-value of i against j, NaN where there is no test."""
    if not means:
        return {}
    best = int(np.argmin([column.sign * mean for mean in means]))
    found = {i: BEST for i, mean in enumerate(means) if column.text(mean) == column.text(means[best])}
    others = [i for i in range(len(means)) if i != best]
    for i, adjusted in zip(others, statistics.holm([p(i, best) for i in others]), strict=True):
        if i not in found and adjusted >= statistics.ALPHA:
            found[i] = ALIKE
    return found


def _ranking(part: pd.DataFrame, blocks: list[str]) -> statistics.Ranking | None:
    """Ranks by ASR of the defenses that have an outcome in every block with a trigger; None if nobody has."""
    poisoned = part[part.poison_rate > 0]
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
    for name, row in parts(group, "defense"):
        whole = bool((row.done == row.seeds).all() or reported)
        lines.append((str(name), row, whole, summary(row)))
    lines.sort(key=lambda line: (line[1].defense.iloc[0] != BASELINE, not line[2], _or_inf(line[3]["asr"])))
    ranking = None if reported else marked.rankings.get(place)
    rows = []
    for name, row, whole, means in lines:

        def mark(figure: str, name: str = name) -> str:
            return "" if reported else marked.rows.get((*place, name, figure), "")

        def mean(figure: str, column: Column, means: dict[str, float] = means, whole: bool = whole) -> Entry:
            text = column.text(means[figure])
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
        notes.append("† a mean over finished cells only; nothing in such a row is bold")
    unknown = (trials.status == "done") & trials.infected_accuracy.isna()
    if BASELINE not in set(part.defense) and unknown.any():
        notes.append(f"without {BASELINE} in the grid nobody can tell whether a model is wrecked")
    warned = trials[trials.warnings != ""].drop_duplicates(["defense", "attack", "warnings"])
    notes += [f"warning: {row.defense} against {row.attack}: {row.warnings}" for row in records(warned)]
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
        result = store.result("evaluate", trial.keys()[2]) or {}
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
    _compact(table).to_csv(folder / "leaderboard.csv", index=False)
    _compact(wide(table, marked)).to_csv(folder / "wide.csv", index=False)
    _compact(trials).to_csv(folder / "trials.csv", index=False)
    return found
