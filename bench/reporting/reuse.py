"""Rows of trials.csv files that need not be computed again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engine.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.experiment.trial import Trial


def reused_rows(cfg: DictConfig, trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """The rows of `reuse=[...]` that are trials of this grid, by the key of their evaluation.

    The key is a hash of all that can change a figure, versions of methods included: a row of other settings never
    passes for one of this grid.

    Raises:
        UserError: a file is no trials.csv, has no trial of this grid, contradicts another one, or would lose trials to
            this grid's own table.
    """
    if not cfg.reuse:
        return {}
    from bench.reporting.trials import OUTCOMES, contradiction, read_trials

    source: dict[str, str] = {}
    row_of: dict[str, dict[str, Any]] = {}
    wanted = {trial.keys.evaluate for trial in trials if trial.defend}
    for path in cfg.reuse:
        rows = read_trials(Path(path))
        ended = rows[rows.status.isin(OUTCOMES)]
        rows = ended[ended.trial.isin(wanted)]
        if rows.empty:
            raise UserError(
                f"reuse: {path} has no trial of this grid with these settings, data and versions of its methods; "
                "give the settings that stand beneath its table (what a CPU computed needs train.precision=float32 on "
                "a GPU) and the same data, or leave the file out"
            )
        written = Path(cfg.results) / str(cfg.grid.name) / "trials.csv"
        if len(rows) < len(ended) and written.resolve() == Path(path).resolve():
            raise UserError(
                f"reuse: this grid's table would be written over {path}, {len(ended) - len(rows)} of whose trials "
                "are not in it; give it a name of its own, e.g. grid.name=mine"
            )
        for row in rows.to_dict("records"):
            key = row["trial"]
            if (name := contradiction(row_of.get(key, row), row)) != "":
                raise UserError(
                    f"reuse: {source[key]} and {path} contradict each other on {row['defense']} against "
                    f"{row['attack']}, seed {row['seed']}: {name} is {row_of[key][name]!r} and {row[name]!r}; "
                    "leave one of the two files out"
                )
            row_of.setdefault(key, {str(name): value for name, value in row.items()})
            source.setdefault(key, path)
    return row_of
