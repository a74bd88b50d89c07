"""Who is best, who is not significantly worse, and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.reporting import statistics
from bench.reporting.cells import groups_of, state_column, to_cells
from bench.reporting.columns import COLUMN, COSTS, MEASURES, Column
from bench.reporting.trials import AXES, BASELINE, BOARD, LOST, OUTCOMES, WRECKED, elsewhere

HIGH_ASR = 0.10


STRONG = 0.90  # the ASR of an infected model that gives a repair something to remove


COSTLY = 0.03  # more clean accuracy than this is a price at which a victim could notice the attack


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


class Comparison(NamedTuple):
    """What every table of a report is made of; computed once, as it takes seconds for thousands of trials.

    Attributes:
        cells: the table of cells.
        marks: of its rows.
    """

    cells: pd.DataFrame
    marks: Marks


def compare(trials: pd.DataFrame) -> Comparison:
    """The cells of these trials, and who is best among them."""
    cells = to_cells(trials)
    return Comparison(cells, marks(trials, cells))


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
    result = Marks()
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
    result.elsewhere = frozenset(np.flatnonzero(strange).tolist())
    complete = (measured.done == measured.seeds).to_numpy() & ~strange
    rivals = measured[measured.defense != BASELINE]

    def paired(one: int, two: int, name: str) -> float:
        a, b = (slice(ends[cell - 1] if cell else 0, ends[cell]) for cell in (one, two))
        _, i, j = np.intersect1d(seeds[a], seeds[b], return_indices=True)
        same = (weights[a][i] == weights[b][j]) & (weights[a][i] != "")
        return statistics.paired_t(figures[name][a][i][same], figures[name][b][j][same])

    for group_key, group_cells in groups_of(rivals, [*BOARD, "threat_model"]):
        group_key = tuple(map(str, group_key))
        group = measured[(measured[[*BOARD, "threat_model"]].astype(str) == list(group_key)).all(axis=1)]
        for _, column_cells in groups_of(group_cells, "attack"):
            for column in columns:
                members = [i for i in column_cells.index if complete[i] and not math.isnan(means[column.name][i])]
                marked = _marked(
                    column,
                    [means[column.name][i] for i in members],
                    [undefended[column.name][i] for i in members],
                    lambda one, two, members=members, name=column.name: paired(members[one], members[two], name),
                )
                result.cells |= {(members[i], column.name): mark for i, mark in marked.items()}
        lowest: dict[str, tuple[float, float]] = {}  # mean ASR of a defense and of the models that it was given
        for column in columns:
            name = column.name
            counted = group_cells[group_cells.attack.isin(attacks_of(group, name))]
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
            result.rows |= {(*group_key, names[i], name): mark for i, mark in marked.items()}
            if name == "asr":
                lowest = dict(zip(names, zip(averages, floors, strict=True), strict=True))
        ranking = _ranking(group_cells, ["attack"], strange)
        if ranking:
            result.rankings[group_key] = ranking
            # A low rank with a model wrecked elsewhere, be it the clean one, is no first place.
            whole = {str(label) for label, row in groups_of(group_cells, "defense") if complete[row.index].all()}
            first = {name: rank for name, rank in ranking.ranks.items() if name in whole}
            reachable = statistics.least_p(ranking.blocks) * (len(ranking.ranks) - 1) < statistics.ALPHA
            for name, rank in first.items():
                if name in lowest and _worse(COLUMN["asr"], *lowest[name]):
                    continue
                mark = BEST if f"{rank:.1f}" == f"{min(first.values()):.1f}" else ""
                if mark or (reachable and name in ranking.alike):
                    result.rows[(*group_key, name, "rank")] = mark or ALIKE
    for (threat_model, variant), group_cells in groups_of(rivals, ["threat_model", "variant"]):
        ranking = _ranking(group_cells, ["dataset", "model", "attack"], strange)
        if ranking:
            result.overall[str(threat_model), str(variant)] = ranking
    return result


def _undefended(measured: pd.DataFrame, name: str) -> np.ndarray[Any, Any]:
    """The figure of the models that each cell's defense was given; NaN where nobody measured it.

    The cell's own infected models have two of them; for the others the undefended model of the same setting has them.
    """
    keys = [*BOARD, "threat_model", "attack"]
    base = measured[measured.defense == BASELINE].drop_duplicates(keys)[[*keys, f"{name}_mean"]]
    undefended = measured[keys].merge(base, on=keys, how="left")[f"{name}_mean"].to_numpy(float)
    infected_column = {"clean_accuracy": "infected_accuracy_mean", "asr": "infected_asr_mean"}.get(name)
    if infected_column is None or infected_column not in measured:
        return undefended
    return np.where(measured[infected_column].isna(), undefended, measured[infected_column].to_numpy(float))


def attacks_of(group: pd.DataFrame, name: str) -> list[str]:
    """The attacks that a mean of this figure is over, in one setting: those for which any defense has the figure.

    An attack that nobody's cell survived counts too: the ASR of one, and the accuracy of any.
    """
    complete = []
    for attack, cells in groups_of(group, "attack"):
        lost = (cells.done == 0).all() and (name == "clean_accuracy" or (name == "asr" and cells.poison_rate.max() > 0))
        if lost or cells[f"{name}_mean"].notna().any():
            complete.append(attack)
    return complete


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
    marked = {i: BEST for i, mean in enumerate(means) if column.text(mean) == column.text(means[best])}
    others = [i for i in range(len(means)) if i != best]
    for i, adjusted in zip(others, statistics.holm([p(i, best) for i in others]), strict=True):
        if i not in marked and adjusted >= statistics.ALPHA:
            marked[i] = ALIKE
    return {i: mark for i, mark in marked.items() if not _worse(column, means[i], undefended[i])}


def _ranking(cells: pd.DataFrame, blocks: list[str], strange: np.ndarray[Any, Any]) -> statistics.Ranking | None:
    """Ranks by ASR of the defenses that have an outcome in every block with a trigger; None if nobody has.

    Args:
        strange: by the row of the table of cells: is it about another infected model than its rivals?
    """
    poisoned = cells[cells.poison_rate > 0]
    # Nothing of it ended: a reason why it could not be computed is no result.
    ended = poisoned.groupby("defense")[list(OUTCOMES)].sum().sum(axis=1)
    other = set(poisoned.defense[strange[poisoned.index]])
    poisoned = poisoned[poisoned.defense.isin(ended.index[ended > 0]) & ~poisoned.defense.isin(other)]
    lost = poisoned[[state_column(state) for state in LOST]].sum(axis=1) > 0
    value = poisoned.asr_mean.where(poisoned.done == poisoned.seeds).where(~lost, math.inf)
    wide = poisoned.assign(value=value).pivot_table(
        index=blocks, columns="defense", values="value", sort=False, aggfunc="first", dropna=False
    )
    wide = wide.dropna(how="all").dropna(axis=1)
    if wide.empty or wide.shape[1] < 2:
        return None
    return statistics.rank(wide.to_numpy(), [str(name) for name in wide.columns], 1.0)
