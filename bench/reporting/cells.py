"""From trials to cells: means, spreads and intervals over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.reporting import statistics
from bench.reporting.columns import COSTS, MEASURES
from bench.reporting.trials import AXES, STATES


def to_cells(trials: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell: mean, sample standard deviation, 95 % intervals and number of seeds of each figure.

    Only finished trials are averaged; a wrecked, diverged or failed one is counted in its own column with its reason.
    `NAME_t95` is half of the t-interval, `NAME_low` and `NAME_high` are the bootstrap's.
    """
    trials = trials.reset_index(drop=True)
    groups = trials.groupby(AXES, sort=False)
    number = groups.ngroup().to_numpy()
    count = int(number.max()) + 1 if len(number) else 0
    cells = trials.loc[~pd.Series(number).duplicated().to_numpy(), [*AXES, "poison_rate"]].reset_index(drop=True)
    cells["seeds"] = np.bincount(number, minlength=count)
    added: dict[str, Any] = {}
    for state in STATES:
        counted = (trials.status == state).to_numpy()
        added[state_column(state)] = np.bincount(number[counted], minlength=count)
        if state not in ("done", "missing"):
            first = pd.Series(trials.reason.to_numpy()[counted]).groupby(number[counted]).first()
            added[f"{state_column(state)}_reason"] = first.reindex(range(count)).fillna("").to_numpy(dtype=object)
    done = (trials.status == "done").to_numpy()
    for column in (*MEASURES, *COSTS):
        values = trials[column.name].to_numpy()
        counted = done & ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            grouped = pd.Series(values[counted]).groupby(number[counted])
            mean, std = grouped.mean().reindex(range(count)), grouped.std(ddof=1).reindex(range(count))
        added[f"{column.name}_mean"], added[f"{column.name}_std"] = mean.to_numpy(), std.to_numpy()
        if column in MEASURES and counted.any():
            added |= _intervals(column.name, values[counted], number[counted], std.to_numpy())
    cells = pd.concat([cells, pd.DataFrame(added, index=cells.index)], axis=1)
    cells["kind"] = "measured"
    return cells


def records(frame: pd.DataFrame) -> list[Any]:
    """The rows of a frame with its columns as attributes."""
    return list(frame.itertuples())


def groups_of(frame: pd.DataFrame, by: str | list[str]) -> list[tuple[Any, pd.DataFrame]]:
    """The groups of a frame in the order in which they come: their names, and their rows."""
    return list(frame.groupby(by, sort=False))


def state_column(state: str) -> str:
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
