"""Figures of the finding behind PBE and PUD."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from bench.reporting.cells import groups_of, records
from bench.reporting.connection import KINDS, SHARED, largest, over_seeds
from bench.reporting.figures.style import (
    CONNECTION_LOOKS,
    PAGE,
    WIDTH,
    FigureData,
    add_legend,
    add_title,
    distinct_titles,
    draw_interval,
    look_of,
    make_panels,
    paper_style,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def connection_curves(grid: FigureData) -> Figure | None:
    """Adversarial examples of each infected model over the radius, beside its clean control and random noise."""
    table = over_seeds(grid.connections)
    table = table[table.kind != "repaired"]
    panels = [
        (group_key, group, name)
        for group_key, group in groups_of(table, SHARED)
        for name in ("concentration", "similarity")
        if group[name].notna().any()
    ]
    if not panels:
        return None
    labels = {"concentration": "to the target (%)", "similarity": "similarity"}
    titles, common = distinct_titles([group_key for group_key, _, _ in panels])
    radii = sorted({round(255 * radius, 3) for radius in table.epsilon})
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH / 2, 1.3, 2 if len(panels) <= 8 else 4)
        for axis, title, (_, group, name) in zip(axes, titles, panels, strict=True):
            for kind, of_kind in groups_of(group, "kind"):
                draw_interval(axis, of_kind, name, str(kind))
            if name == "similarity":
                axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            else:
                axis.set_ylim(-3, 103)
            axis.set(title=title, xlabel="radius (levels of 255)", ylabel=labels[name])
            axis.set_xlim(0, 1.05 * radii[-1])
            axis.set_xticks(radii, [f"{radius:g}" for radius in radii])
        add_legend(figure, axes)
        what = (
            "Adversarial examples: share given the attacker's class, of those that fool the model, and how much nearer "
            "than the clean image their features are to the triggered image's (cosine). Bars: widest 95 % interval "
            "over images of any seed."
        )
        return add_title(figure, grid.caption(what, group_name=common))


def connection_repaired(grid: FigureData) -> Figure | None:
    """The share to the target at the largest radius, after each defense, between infected model and clean control."""
    import seaborn as sns

    table = over_seeds(largest(grid.connections))
    table = table[table.concentration.notna()]
    panels = [(group_key, group) for group_key, group in groups_of(table, SHARED) if (group.kind == "repaired").any()]
    if not panels:
        return None
    rows = table[table.kind == "repaired"][["defense", "threat_model"]].drop_duplicates()
    several = rows.threat_model.nunique() > 1
    order = {pair: at for at, pair in enumerate(rows.itertuples(index=False, name=None))}
    names = [f"{short_name(defense, 20)}{f' ({threat_model})' if several else ''}" for defense, threat_model in order]
    colors = sns.color_palette("colorblind")
    titles, common = distinct_titles([group_key for group_key, _ in panels])
    with paper_style() as plt:
        wide = 0.065 * (max(map(len, names)) + 2)
        across = min(len(panels), 2 if len(panels) <= 4 else 4)
        width = ((WIDTH if across < 4 else PAGE) - wide) / across
        figure, axes = make_panels(plt, len(panels), width, 0.8 + 0.17 * len(order), across)
        figure.set_size_inches(width * across + wide, figure.get_size_inches()[1])
        for axis, title, (_, group) in zip(axes, titles, panels, strict=True):
            for kind in ("infected", "clean_control"):
                for row in records(group[group.kind == kind]):
                    color, _, line = CONNECTION_LOOKS[kind]
                    shade = colors[color or 0]
                    axis.axvspan(
                        100 * row.concentration_low, 100 * row.concentration_high, color=shade, alpha=0.15, lw=0
                    )
                    axis.axvline(100 * row.concentration, color=shade, linestyle=line, label=KINDS[kind])
            for row in records(group[group.kind == "repaired"]):
                value, low, high = (100 * getattr(row, f"concentration{end}") for end in ("", "_low", "_high"))
                reach = np.nan_to_num([[max(0, value - low)], [max(0, high - value)]])
                at = order[row.defense, row.threat_model]
                color = look_of(row.defense)["color"]
                axis.errorbar(
                    [value], [at], xerr=reach, color=color, marker="o", markersize=3, capsize=1.5, elinewidth=0.8
                )
            axis.set(title=title, xlabel="to the target (%)", xlim=(-3, 103), ylim=(len(order) - 0.5, -0.5))
            spec = axis.get_subplotspec()
            first = spec is None or spec.is_first_col()
            axis.set_yticks(range(len(order)), names if first else [""] * len(order))
            axis.grid(axis="y", color="0.9", linewidth=0.5)
            axis.set_axisbelow(True)
        add_legend(figure, axes)
        what = (
            f"Adversarial examples at {255 * table.epsilon.max():g}/255 after each defense: share given the "
            "attacker's class, of those that fool it; bars and bands: widest 95 % interval over images of any seed."
        )
        return add_title(figure, grid.caption(what, group_name=common))


def connection_classes(grid: FigureData) -> Figure | None:
    """Where the adversarial examples of infected model and clean control go, class by class, at the largest radius."""
    import seaborn as sns

    table = largest(grid.connections)
    table = table[table.kind.isin(["infected", "clean_control"]) & (table.classes != "null")]
    panels = groups_of(table, SHARED)
    if not panels:
        return None
    titles, common = distinct_titles([group_key for group_key, _ in panels])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH / 2 if len(panels) > 1 else WIDTH, 1.3)
        for axis, title, (_, group) in zip(axes, titles, panels, strict=True):
            for index, kind in enumerate(("infected", "clean_control")):
                shares = [json.loads(text) for text in group[group.kind == kind].classes]
                if shares:
                    mean = 100 * np.mean(shares, axis=0)
                    color = sns.color_palette("colorblind")[CONNECTION_LOOKS[kind][0] or 0]
                    at = np.arange(len(mean)) + 0.4 * (index - 0.5)
                    axis.bar(at, mean, 0.4, color=color, label=KINDS[kind])
            axis.set(title=title, xlabel="class", ylabel="share (%)")
            if len(mean) <= 10:
                axis.set_xticks(range(len(mean)))
        add_legend(figure, axes)
        what = f"Classes that adversarial examples at {255 * table.epsilon.max():g}/255 are given, of those that fool."
        return add_title(figure, grid.caption(what, group_name=common))
