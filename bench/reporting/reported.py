"""Figures that others report, beside measured ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from bench.engine.messages import shortened
from bench.engine.packages import shipped
from bench.reporting.cells import state_column
from bench.reporting.columns import COLUMN
from bench.reporting.trials import AXES, STATES, allowed_range


def read_reported(source: Path | IO[bytes], name: str = "") -> pd.DataFrame:
    """Cells that somebody else reports: a CSV with dataset, model, setting, attack, defense, provenance and figures.

    Figures are shares in [0, 1] under this project's names, e.g. `asr`; `asr_std` may stand beside it, and `seeds`.

    Raises:
        UserError: a column is missing or unknown, a value is no number, or a share lies outside [0, 1].
    """
    from bench.engine.errors import UserError

    path = name or source
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False)
        # The names that results/reported has for them.
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
    goals = [("poison_rate", "poison_rate", allowed_range("poison_rate"))]
    goals += [("seeds", "seeds", (1.0, math.inf, "a whole number, at least 1"))]
    for name in COLUMN:
        low, high, due = allowed_range(name)
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
    figures = pd.DataFrame(rows)
    figures["provenance"] = table.provenance
    figures["protocol"] = table.protocol if "protocol" in table else ""
    figures["seeds"] = figures.seeds.fillna(1).astype(int) if "seeds" in figures else 1
    figures["kind"] = "reported"
    return figures


def reported_of(path: Path, trials: pd.DataFrame) -> pd.DataFrame:
    """What somebody else reports, without the poison rates that this table does not have.

    Raises:
        UserError: as `read_reported`, or a cell is reported twice.
    """
    from bench.engine.errors import UserError

    figures = read_reported(shipped(path), str(path))
    rates = {attack: group.poison_rate.unique() for attack, group in trials.groupby("attack")}
    usual = trials.poison_rate[trials.poison_rate > 0].mode()  # for an attack that this table does not have
    figures = figures[
        [
            np.isnan(rate) or bool(np.isclose(rate, rates.get(attack, usual)).any())
            for attack, rate in zip(figures.attack, figures.poison_rate, strict=True)
        ]
    ]
    twice = figures[figures.duplicated(AXES)]
    if not twice.empty:
        cell = "/".join(text for text in twice.iloc[0][AXES] if text)
        raise UserError(f"report.reported: {path} has {cell} more than once; leave one row of each cell")
    return figures.reset_index(drop=True)


def with_reported(table: pd.DataFrame, reported: pd.DataFrame | None) -> pd.DataFrame:
    """Measured cells with reported ones beneath; every count of the latter is zero."""
    if reported is None or reported.empty:
        return table
    both = pd.concat([table, reported], ignore_index=True)
    for state in STATES:
        both[state_column(state)] = both[state_column(state)].fillna(0).astype(int)
        if f"{state_column(state)}_reason" in both:
            both[f"{state_column(state)}_reason"] = both[f"{state_column(state)}_reason"].fillna("")
    both[["provenance", "protocol"]] = both[["provenance", "protocol"]].fillna("")
    return both
