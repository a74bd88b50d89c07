"""Draw what a grid has data for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.reporting.cells import to_cells
from bench.reporting.figures.boards import (
    cost_scatter,
    heatmap,
    rank_diagrams,
    relearn_bars,
    robust_bars,
    scatter,
    sweep_curves,
)
from bench.reporting.figures.connection import connection_classes, connection_curves, connection_repaired
from bench.reporting.figures.curves import epsilon_curves, relearning_curves, roc_curves, score_spread, step_curves
from bench.reporting.figures.style import FigureData, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_figures(
    trials: pd.DataFrame, folder: Path, title: str, details: list[dict[str, Any]] | None = None
) -> list[Path]:
    """Draw what the grid has data for, and never an empty axis; figures of an earlier run that are not due go.

    Args:
        title: opens every caption.
        details: what `page.details` found behind each trial, in the order of the table.

    Returns:
        the PNG files; a PDF lies beside each.
    """
    return _drawn({**_FIGURES, **_CONNECTION_FIGURES}, trials, folder, title, details)


def draw_connection(
    trials: pd.DataFrame, folder: Path, title: str, details: list[dict[str, Any]] | None = None
) -> list[Path]:
    """The figures of the finding alone, as `write`."""
    return _drawn(_CONNECTION_FIGURES, trials, folder, title, details)


def _drawn(
    figures: Mapping[str, Callable[[FigureData], Figure | None]],
    trials: pd.DataFrame,
    folder: Path,
    title: str,
    details: list[dict[str, Any]] | None,
) -> list[Path]:
    details_by_trial = pd.Series(details or [{}] * len(trials), dtype=object)
    grid = FigureData(trials.reset_index(drop=True), to_cells(trials), details_by_trial, title)
    paths = []
    for name, draw in figures.items():
        figure = draw(grid)
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            path.with_suffix(".pdf").unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_figure(figure, path)
            paths.append(path)
    return paths


_FIGURES = {
    "asr_heatmap": heatmap,
    "accuracy_against_asr": scatter,
    "robust_accuracy": robust_bars,
    "ranks": rank_diagrams,
    "cost": cost_scatter,
    "sweep": sweep_curves,
    "epsilon": epsilon_curves,
    "steps": step_curves,
    "scores": score_spread,
    "detection": roc_curves,
    "relearn": relearn_bars,
    "relearn_curves": relearning_curves,
}


_CONNECTION_FIGURES = {
    "connection": connection_curves,
    "connection_repaired": connection_repaired,
    "connection_classes": connection_classes,
}
