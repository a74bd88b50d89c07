"""Figures of a leaderboard: heat map, scatter, bars, ranks, costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bench.reporting.cells import groups_of, records
from bench.reporting.columns import COLUMN
from bench.reporting.figures.style import (
    HOLLOW,
    WIDTH,
    FigureData,
    add_legend,
    add_title,
    averaged_over,
    board_title,
    by_attack,
    distinct_titles,
    draw_point,
    look_of,
    make_panels,
    method_means,
    names_width,
    paper_style,
    set_height,
    short_name,
)
from bench.reporting.marks import marks
from bench.reporting.trials import BASELINE, BOARD, STATES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmap(grid: FigureData) -> Figure | None:
    table = grid.attacked
    if table.asr_mean.notna().sum() == 0:
        return None
    import seaborn as sns

    places = groups_of(table, [*BOARD, "threat_model"])
    rows = max(group.defense.nunique() for _, group in places)
    width = max(WIDTH, 1.2 + 0.37 * table.attack.nunique())
    titles, common = distinct_titles([group_key for group_key, _ in places])
    with paper_style() as plt:
        figure, axes = make_panels(
            plt, len(places), width, 0.45 + 0.19 * rows + 0.06 * min(28, table.attack.str.len().max())
        )
        for axis, title, (_, group) in zip(axes, titles, places, strict=True):
            wide = 100 * group.pivot(index="defense", columns="attack", values="asr_mean")
            wide = wide.reindex(index=group.defense.unique(), columns=group.attack.unique())
            texts = wide.map("{:.1f}".format)
            for row in records(group[group.done < group.seeds]):
                texts.loc[row.defense, row.attack] += "†"
            # A cell without a figure stays grey; a white one would read as an ASR of zero.
            axis.set_facecolor("0.88")
            sns.heatmap(
                wide,
                annot=texts,
                fmt="",
                vmin=0,
                vmax=100,
                cmap="rocket_r",
                ax=axis,
                annot_kws={"size": 6},
                cbar=False,
            )
            for row in records(group[group.asr_mean.isna()]):
                states = [state for state in STATES if getattr(row, state.replace(" ", "_"))]
                where = list(wide.columns).index(row.attack) + 0.5, list(wide.index).index(row.defense) + 0.5
                text = {"not applicable": "n/a"}.get(states[0], states[0]) if states else ""
                axis.text(*where, text, ha="center", va="center", size=5, color="0.25")
            axis.set(title=title, xlabel="", ylabel="")
            set_height(axis, 0.19 * len(wide), width - names_width(table) - 0.2)
            axis.set_xticklabels([short_name(name) for name in wide.columns], rotation=45, ha="right")
            axis.set_yticklabels([short_name(name) for name in wide.index], rotation=0)
        # It would anchor the panels anew.
        bar: dict[str, Any] = {"shrink": 0.6, "aspect": 30, "fraction": 0.04, "pad": 0.02, "panchor": False}
        figure.colorbar(axes[0].collections[0], ax=axes, label="ASR (%)", **bar)
        return add_title(
            figure, grid.caption("Attack success rate; grey: no figure; †: not all seeds are done.", table, common)
        )


def scatter(grid: FigureData) -> Figure | None:
    points = grid.attacked.dropna(subset=["asr_mean", "clean_accuracy_mean"])
    if points.empty:
        return None
    means = method_means(points, ["asr", "clean_accuracy"])
    places = groups_of(means, [*BOARD, "threat_model"])
    titles, common = distinct_titles([group_key for group_key, _ in places])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(places), WIDTH, 2.5)
        for axis, title, (group_key, group) in zip(axes, titles, places, strict=True):
            for row in records(group):
                look = look_of(str(row.defense))
                cells = points[(points[[*BOARD, "threat_model", "defense"]] == [*group_key, row.defense]).all(axis=1)]
                faint = {"color": look["color"], "marker": look["marker"], "s": 7, "alpha": 0.35, "linewidths": 0.5}
                axis.scatter(100 * cells.asr_mean, 100 * cells.clean_accuracy_mean, **faint)
                draw_point(axis, grid, row, 100 * row.asr, 100 * row.clean_accuracy)
            whole = [grid.whole(row) and row.defense != BASELINE for row in records(group)]
            front = _front(group[whole])
            if len(front) > 1:
                axis.plot(100 * front.asr, 100 * front.clean_accuracy, color="0.6", linewidth=0.8, zorder=1)
            axis.set_xlim(-3, 103)
            low, high = axis.get_ylim()
            # At least ten points high: a tenth of a point must not fill the figure.
            axis.set_ylim(min(low, max(high - 10, 0)), min(high + 0.5, 101))
            axis.set(title=title, xlabel="ASR (%)", ylabel="clean accuracy (%)")
        add_legend(figure, axes)
        what = f"Upper left is best. Large: mean over attacks ({HOLLOW}), small: one attack; line: Pareto front."
        return add_title(figure, grid.caption(what, points, common))


def _front(points: pd.DataFrame) -> pd.DataFrame:
    """The defenses that none beats in both, by rising ASR."""
    ordered = points.dropna().sort_values(["asr", "clean_accuracy"], ascending=[True, False])
    best = ordered.clean_accuracy.cummax()
    return ordered[(ordered.clean_accuracy == best) & ~best.duplicated()]


def robust_bars(grid: FigureData) -> Figure | None:
    names = [
        name
        for name in ("robust_accuracy", "autoattack_accuracy", "autoattack_l2_accuracy")
        if grid.table[f"{name}_mean"].notna().any()
    ]
    if not names:
        return None
    return _bars(
        grid,
        grid.table,
        names,
        "accuracy under attack (%)",
        "Robust accuracy: mean over attacks and the clean model (its figure at the right, † where not all cells are "
        "done); dots: one of them.",
    )


def relearn_bars(grid: FigureData) -> Figure | None:
    names = [
        name
        for name in (
            "asr",
            "relearn_asr",
            "relearn_asr_clean_control",
            "reactivate_asr",
            "reactivate_asr_clean_control",
        )
        if grid.attacked[f"{name}_mean"].notna().any()
    ]
    if len(names) < 2:
        return None
    return _bars(
        grid,
        grid.attacked,
        names,
        "ASR (%)",
        "Does it hold? ASR after the defense, and after fine-tuning on a few "
        "poisoned images (relearn) and under an optimised trigger (reactivate); control: a model without "
        "backdoor. Mean over attacks (its figure at the right, † where not all cells are done); dots: one of them.",
    )


def _bars(grid: FigureData, table: pd.DataFrame, names: list[str], label: str, what: str) -> Figure:
    """Bars of several figures side by side for each defense."""
    import seaborn as sns

    places = groups_of(method_means(table, names), [*BOARD, "threat_model"])
    rows = max(len(group) for _, group in places)
    titles, common = distinct_titles([group_key for group_key, _ in places])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(places), WIDTH, 0.9 + rows * (0.12 + 0.1 * len(names)))
        colors = sns.color_palette("colorblind", len(names))
        thick = 0.8 / len(names)
        for axis, title, (group_key, group) in zip(axes, titles, places, strict=True):
            cells = table[(table[[*BOARD, "threat_model"]] == list(group_key)).all(axis=1)]
            for index, name in enumerate(names):
                at = np.arange(len(group)) + (index - (len(names) - 1) / 2) * thick
                # With one figure, the bar wears the colour of its defense.
                color = (
                    colors[index] if len(names) > 1 else [look_of(str(defense))["color"] for defense in group.defense]
                )
                figure_name = COLUMN[name].heading if len(names) > 1 else None
                axis.barh(at, 100 * group[name], thick * 0.9, color=color, label=figure_name)
                for where, row, mean in zip(at, records(group), 100 * group[name], strict=True):
                    values = 100 * cells[cells.defense == row.defense][f"{name}_mean"]
                    axis.scatter(values, np.full(len(values), where), s=4, color="black", alpha=0.5, linewidths=0)
                    text = "no figure" if math.isnan(mean) else f"{mean:.1f}{'' if grid.whole(row) else '†'}"
                    left_of_axis: dict[str, Any] = {
                        "transform": axis.get_yaxis_transform(),
                        "va": "center",
                        "ha": "right",
                    }
                    axis.text(1, where, text, size=5.5, color="0.25", **left_of_axis)
            axis.set_yticks(range(len(group)), [short_name(defense) for defense in group.defense])
            axis.set_ylim(len(group) - 0.5, -0.5)
            set_height(axis, len(group) * (0.12 + 0.1 * len(names)), WIDTH - names_width(table))
            # A fifth of the axis for the means as figures; small ones are shown large.
            most = 100 * np.nanmax([0.0, *cells[[f"{name}_mean" for name in names]].to_numpy().flat])
            axis.set(title=title, xlabel=label, xlim=(0, max(12.0, 1.25 * most)))
            axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
        add_legend(figure, axes)
        return add_title(figure, grid.caption(what, table, common))


def rank_diagrams(grid: FigureData) -> Figure | None:
    """Critical-difference diagrams (Demsar, JMLR 7, 2006), one for each setting."""
    from bench.reporting.statistics import cliques, p_text

    rankings = {
        group_key: ranking
        for group_key, ranking in marks(grid.trials, grid.cells).overall.items()
        if len(ranking.ranks) > 2 and not math.isnan(ranking.p)
    }
    if not rankings:
        return None
    with paper_style() as plt:
        most = max(len(ranking.ranks) for ranking in rankings.values())
        figure, axes = make_panels(plt, len(rankings), WIDTH, 0.95 + 0.1 * most)
        for axis, (group_key, ranking) in zip(axes, rankings.items(), strict=True):
            ordered = sorted(ranking.ranks.items(), key=lambda pair: pair[1])
            count, half = len(ordered), -(-len(ordered) // 2)
            axis.hlines(0, 1, count, color="black", linewidth=0.8)
            for tick in range(1, count + 1):
                axis.vlines(tick, 0, 0.18, color="black", linewidth=0.8)
                axis.text(tick, 0.25, str(tick), ha="center", va="bottom")
            bars = cliques(list(ranking.ranks.values()), ranking.difference)
            for level, (low, high) in enumerate(bars):
                axis.hlines(-0.22 - 0.2 * level, low - 0.04, high + 0.04, color="black", linewidth=2.5)
            start = -0.4 - 0.2 * len(bars)
            for index, (name, rank) in enumerate(ordered):
                left = index < half
                depth = start - 0.42 * (index if left else count - 1 - index)
                edge = 1 - 0.08 * count if left else count + 0.08 * count
                look = look_of(name)
                axis.plot([rank, rank, edge], [0, depth, depth], color=look["color"], linewidth=0.9)
                text = f"{short_name(name, 22)} {rank:.2f}" if left else f"{rank:.2f} {short_name(name, 22)}"
                axis.text(edge, depth, text + " " if left else " " + text, ha="right" if left else "left", va="center")
            if ranking.difference < count - 1:
                axis.hlines(1.05, 1, 1 + ranking.difference, color="black", linewidth=1.2)
                axis.text(1 + ranking.difference / 2, 1.15, f"CD {ranking.difference:.2f}", ha="center", va="bottom")
            axis.set_xlim(1 - 0.55 * count, count + 0.55 * count)
            axis.set_ylim(start - 0.42 * half, 1.9)
            axis.set_axis_off()
            axis.set_title(
                f"threat model {board_title(group_key)}\n{ranking.blocks} blocks, Friedman p {p_text(ranking.p)}"
            )
        what = "Average ranks by ASR over attacks, data sets and architectures, 1 is best; a bar joins defenses that "
        return add_title(figure, grid.caption(what + "cannot be told apart (Nemenyi, 5 %)."))


def cost_scatter(grid: FigureData) -> Figure | None:
    points = grid.attacked.dropna(subset=["asr_mean", "defend_seconds_mean"])
    points = points[points.defense != BASELINE]
    if points.empty or not (points.defend_seconds_mean > 0).any():
        return None
    from matplotlib.ticker import LogLocator

    means = method_means(points[points.defend_seconds_mean > 0], ["asr", "defend_seconds"])
    places = groups_of(means, [*BOARD, "threat_model"])
    titles, common = distinct_titles([group_key for group_key, _ in places])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(places), WIDTH, 2.3)
        for axis, title, (_, group) in zip(axes, titles, places, strict=True):
            for row in records(group):
                draw_point(axis, grid, row, row.defend_seconds, 100 * row.asr)
            axis.set(title=title, xlabel="seconds of the defense", ylabel="ASR (%)", xscale="log", ylim=(-3, 103))
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        add_legend(figure, axes)
        what = f"Effect against cost, means over attacks; lower left is best; {HOLLOW}."
        return add_title(figure, grid.caption(what, points, common))


def sweep_curves(grid: FigureData) -> Figure | None:
    """Curves over each numeric setting that the grid sweeps."""
    points = []
    for row in records(grid.table[(grid.table.variant != "") & (grid.table.done == grid.table.seeds)]):
        pairs = [pair.partition("=") for pair in row.variant.split(", ")]
        for index, (key, _, value) in enumerate(pairs):
            rest = ", ".join("=".join((k, v)) for i, (k, _, v) in enumerate(pairs) if i != index)
            with_value = pd.to_numeric(value, errors="coerce")
            for name in ("asr", "clean_accuracy"):
                mean = getattr(row, f"{name}_mean")
                if not (math.isnan(with_value) or math.isnan(mean)):
                    panel_key = (row.dataset, row.model, row.threat_model, rest)
                    points.append((key, *panel_key, name, row.defense, row.attack, with_value, mean))
    columns = ["key", "dataset", "model", "threat_model", "rest", "figure", "defense", "attack", "value", "mean"]
    table = pd.DataFrame(points, columns=columns)
    axes_of = ["key", "dataset", "model", "threat_model", "rest", "figure"]
    panels = by_attack(table, axes_of, "value")
    if not panels:
        return None
    titles, common = distinct_titles([(*panel_key[1:5], *panel_key[6:]) for panel_key, _ in panels])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH, 1.9)
        for axis, title, (panel_key, group) in zip(axes, titles, panels, strict=True):
            for defense, of_defense in groups_of(group, "defense"):
                at = of_defense.groupby("value")["mean"]
                curve = 100 * at.mean()[at.count() == group.attack.nunique()]  # means of the same attacks
                axis.plot(curve.index, curve, label=defense, **look_of(str(defense)))
            values = sorted(group.value.unique())
            if values[0] > 0 and values[-1] / values[0] >= 10:
                axis.set_xscale("log")
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
            axis.set(title=title, xlabel=panel_key[0], ylabel=f"{COLUMN[panel_key[5]].heading} (%)")
        add_legend(figure, axes)
        what = (
            f"What the grid sweeps; {averaged_over([group for _, group in panels])}; no point where a seed is not done."
        )
        return add_title(figure, grid.caption(what, group_name=common))
