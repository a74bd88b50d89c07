"""The tables of a grid as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.experiment.trial import Trial
from bench.reporting.board import Board, build_boards, escape_markdown, summary
from bench.reporting.cells import groups_of
from bench.reporting.marks import Comparison, Marks, compare, shown
from bench.reporting.reported import with_reported
from bench.reporting.spreadsheet import write_csv
from bench.reporting.trials import AXES, BOARD
from bench.storage.store import Store


def wide(table: pd.DataFrame, marked: Marks) -> pd.DataFrame:
    """One row for each defense, all figures in columns, as the printed boards have them but unrounded."""
    rows = []
    axes = [*BOARD, "threat_model", "defense", "kind"]
    for values, row in groups_of(table, axes):
        out: dict[str, Any] = dict(zip(axes, values, strict=True))
        ranking = marked.rankings.get(tuple(values[:4])) if out["kind"] == "measured" else None
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


def step_table(trials: Sequence[Trial], store: Store) -> pd.DataFrame:
    """A row for each step of each trial of a progressive method, in the order of the steps.

    What its scores look like (`suspicion`) is left to the figure `scores`.
    """
    rows = []
    for trial in trials:
        key = trial.keys.evaluate
        brief = store.brief("evaluate", key) if key else None
        result = (store.result("evaluate", key) or {}) if brief and "steps" in brief["without"] else {}
        labels = {name: getattr(trial, name) for name in (*AXES, "seed")}
        for number, step in enumerate(result.get("steps", [])):
            figures = {name: value for name, value in step.items() if name not in ("name", "suspicion")}
            rows.append({**labels, "step": number, "name": step["name"], **figures, "trial": trial.keys.evaluate})
    return pd.DataFrame(rows)


def write_tables(
    trials: pd.DataFrame,
    protocol: list[str],
    folder: Path,
    title: str,
    reported: pd.DataFrame | None = None,
    comparison: Comparison | None = None,
) -> list[Board]:
    """Tables of a grid in `folder`.

    `leaderboard.md`; `leaderboard.tex` for a paper; `leaderboard.csv` (a row for each cell), `wide.csv` (a row for each
    defense) and `trials.csv` (a row for each trial).

    Args:
        comparison: of these trials, where it is computed already.
    """
    from bench.reporting.latex import latex

    folder.mkdir(parents=True, exist_ok=True)
    measured, marked = comparison or compare(trials)
    table = with_reported(measured, reported)
    built = build_boards(trials, table, marked, protocol)
    text = f"# {escape_markdown(title)}\n\n" + "\n".join(board.markdown() for board in built)
    (folder / "leaderboard.md").write_text(text)
    (folder / "leaderboard.tex").write_text("\n".join(latex(board) for board in built))
    write_csv(_compact(table), folder / "leaderboard.csv")
    write_csv(_compact(wide(table, marked)), folder / "wide.csv")
    write_csv(_compact(trials), folder / "trials.csv")
    return built
