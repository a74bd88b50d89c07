"""Figures of single measures: AutoAttack over epsilon, steps, detection, relearning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bench.measures.context import RELEARN_TABLE
from bench.reporting.cells import groups_of, records
from bench.reporting.figures.style import (
    CLEAN_CONTROL,
    MARKERS,
    WIDTH,
    FigureData,
    add_legend,
    add_title,
    averaged_over,
    by_attack,
    distinct_titles,
    draw_lines,
    look_of,
    make_panels,
    paper_style,
    place_columns,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# As bench.engine.robustness names them: heading, and unit of the radius.
_NORMS = {"linf": ("L∞", 255), "l2": ("L2", 1)}


def epsilon_curves(grid: FigureData) -> Figure | None:
    rows = [
        (
            place_columns(row, _NORMS[step["norm"]][0]),
            row.defense,
            step["epsilon"] * _NORMS[step["norm"]][1],
            100 * step["accuracy"],
        )
        for row, steps in grid.more("autoattack")
        for step in steps
        if step.get("accuracy") is not None
    ]
    what = "Accuracy under AutoAttack over the radius (L∞ in levels of 255, L2 as a norm), means over attacks."
    return draw_lines(grid, rows, "radius", "accuracy (%)", what)


def _steps_of(grid: FigureData) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """Each step of each trial with its place among all steps of its method.

    Steps are told apart by their names: a filter that removes nothing is no step of this seed, and one of the next.
    """
    told = list(grid.more("steps", "wrecked"))  # the steps tell where the accuracy was lost
    orders: dict[str, list[str]] = defaultdict(list)
    for row, steps in told:
        order, position = orders[row.defense], 0
        for step in steps:
            if step["name"] not in order:
                order.insert(position, step["name"])
            position = order.index(step["name"]) + 1
    for row, steps in told:
        for step in steps:
            yield row, orders[row.defense].index(step["name"]), step


def _stepwise(table: pd.DataFrame) -> tuple[list[pd.DataFrame], list[str], str]:
    """A panel's part for each defense and attack, its title, and what all have in common."""
    panels = by_attack(table, ["place", "defense"], "step")
    if not panels:
        return [], [], ""
    # Without a gap for the steps that no trial of a panel has.
    dense = [group.assign(step=group.step.rank(method="dense").astype(int) - 1) for _, group in panels]
    return dense, *distinct_titles([(*names, *group_key) for (group_key, *names), _ in panels])


def step_curves(grid: FigureData) -> Figure | None:
    """What a progressive method reached step by step."""
    names = {"asr": "ASR", "clean_accuracy": "clean accuracy", "selected_poison": "poison, selected"}
    names |= {"random_poison": "poison, random pick", "detection_auroc": "AUROC"}
    points = [
        (place_columns(row), row.defense, row.attack, figure, index, step["name"], 100 * step[figure])
        for row, index, step in _steps_of(grid)
        for figure in names
        if step.get(figure) is not None
    ]
    panels, titles, common = _stepwise(
        pd.DataFrame(points, columns=["place", "defense", "attack", "figure", "step", "name", "value"])
    )
    if not panels:
        return None
    import seaborn as sns

    hollow = False
    looks = dict(zip(names, zip(sns.color_palette("colorblind"), MARKERS, strict=False), strict=False))
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH, 2.2)
        for axis, title, group in zip(axes, titles, panels, strict=True):
            for name, of_figure in group.groupby("figure", sort=False):
                color, marker = looks[str(name)]
                steps = of_figure.groupby("step").value.agg(["mean", "size"])
                apart = (steps["size"] < steps["size"].max()) | steps.index.isin(
                    of_figure.step[of_figure["name"] == "tail"]
                )
                curve, alone = steps["mean"][~apart], steps["mean"][apart]
                hollow = hollow or not alone.empty
                axis.plot(curve.index, curve, label=names[str(name)], color=color, marker=marker)
                axis.plot(alone.index, alone, color=color, marker=marker, linestyle="", markerfacecolor="none")
            ticks = group.drop_duplicates("step").sort_values("step")
            axis.set_xticks(ticks.step, [short_name(name, 14) for name in ticks.name], rotation=45, ha="right")
            axis.set(title=title, ylabel="%", ylim=(-3, 103))
        add_legend(figure, axes)
        what = f"Step by step, wrecked models too; {averaged_over(panels)}."
        if hollow:
            what += " Hollow: a step that only some of these have, or the images that are unlearned."
        return add_title(figure, grid.caption(what, group_name=common))


def score_spread(grid: FigureData) -> Figure | None:
    """How far the scores of clean and poisoned images lie apart, step by step."""
    points = [
        (place_columns(row), row.defense, row.attack, kind, index, step["name"], *values)
        for row, index, step in _steps_of(grid)
        for kind, values in step.get("suspicion", {}).items()
        if len(step["suspicion"]) == 2
    ]
    marks = ["lowest", "low", "middle", "high", "highest"]
    panels, titles, common = _stepwise(
        pd.DataFrame(points, columns=["place", "defense", "attack", "kind", "step", "name", *marks])
    )
    if not panels:
        return None
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH, 2.2)
        for axis, title, group in zip(axes, titles, panels, strict=True):
            for (kind, of_kind), color, marker in zip(group.groupby("kind"), ("C0", "C3"), "os", strict=True):
                held = of_kind.groupby("step").step.transform("size")
                curve = of_kind[held == held.max()].groupby("step")[marks].mean()  # means of the same trials everywhere
                axis.plot(curve.index, curve.middle, label=f"{kind}: median", color=color, marker=marker)
                for low, high, strength in (("lowest", "highest", 0.12), ("low", "high", 0.25)):
                    axis.fill_between(curve.index, curve[low], curve[high], color=color, alpha=strength, linewidth=0)
            ticks = group.drop_duplicates("step").sort_values("step")
            axis.set_xticks(ticks.step, [short_name(name, 14) for name in ticks.name], rotation=45, ha="right")
            axis.set(title=title, ylabel="suspicion")
        add_legend(figure, axes)
        what = f"Suspicion, step by step, wrecked models too: medians, half and nine tenths; {averaged_over(panels)}."
        return add_title(figure, grid.caption(what, group_name=common))


def roc_curves(grid: FigureData) -> Figure | None:
    """ROC of suspicion scores, averaged over seeds and attacks at equal false positive rates."""
    at = np.linspace(0, 1, 201)
    rows = [
        (place_columns(row), row.defense, fpr, 100 * tpr)
        for row, details in zip(records(grid.trials), grid.details, strict=True)
        if row.status == "done" and details.get("roc")
        for fpr, tpr in zip(100 * at, np.interp(at, details["roc"]["fpr"], details["roc"]["tpr"]), strict=True)
    ]
    figure = draw_lines(
        grid,
        rows,
        "false positives (%)",
        "true positives (%)",
        "Detection of poisoned training images: mean ROC over attacks and seeds.",
        dense=True,
    )
    if figure:
        for axis in figure.axes:
            axis.plot([0, 100], [0, 100], color="0.8", linewidth=0.6, zorder=0)
    return figure


def relearning_curves(grid: FigureData) -> Figure | None:
    """ASR over the steps of relearning with the paper's number of poisoned images, and over their number."""
    course, number = [], []
    for row, steps in grid.more("relearn"):
        where = place_columns(row)
        for step in steps:
            for defense, end in ((row.defense, ""), (CLEAN_CONTROL, "_clean_control")):
                points = step.get(f"course{end}")
                if points and step["poisoned"] == RELEARN_TABLE:
                    x, y = np.transpose(points)
                    # Behind the half it was looked for once an epoch: between the looks a straight line.
                    at = np.arange(x[-1] + 1)
                    course += [(where, defense, *pair) for pair in zip(at, 100 * np.interp(at, x, y), strict=True)]
                if step.get(f"asr{end}") is not None:
                    number.append((where, defense, step["poisoned"], 100 * step[f"asr{end}"]))
    axes_of = [
        (course, f"steps, {RELEARN_TABLE} poisoned images"),
        (number, "poisoned images"),
    ]
    panels = [
        (group_key, group, label)
        for rows, label in axes_of
        for group_key, group in groups_of(pd.DataFrame(rows, columns=["place", "defense", "x", "y"]), "place")
        if group.x.nunique() > 1
    ]
    panels.sort(key=lambda panel: panel[0])
    if not panels:
        return None
    titles, common = distinct_titles([group_key for group_key, _, _ in panels])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH / 2, 1.6)
        for axis, title, (_, group, label) in zip(axes, titles, panels, strict=True):
            for defense, of_defense in groups_of(group, "defense"):
                curve = of_defense.groupby("x").y.mean()
                look = look_of(str(defense)) | ({"marker": ""} if len(curve) > 12 else {})
                axis.plot(curve.index, curve, label=defense, **look)
            if label == axes_of[1][1]:
                axis.set_xscale("log")
                values = sorted(group.x.unique())
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
            axis.set(title=title, xlabel=label, ylabel="ASR (%)", ylim=(-3, 103))
        add_legend(figure, axes)
        what = "Relearning: ASR while a model is tuned on clean and a few poisoned images; means over attacks."
        return add_title(figure, grid.caption(what, grid.attacked, common))
