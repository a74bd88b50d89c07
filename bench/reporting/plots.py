"""The figures of a grid for a paper, as PNG and PDF. matplotlib is imported here, and only when a figure is due.

A defense has one colour and one marker in every figure; the palette can be told apart by colour-blind readers.
"""

from __future__ import annotations

import functools
import json
import math
import textwrap
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bench.grid import RELEARN_TABLE
from bench.reporting.columns import COLUMN
from bench.reporting.connection import KINDS, SHARED, connections, largest, over_seeds
from bench.reporting.table import BASELINE, BOARD, STATES, cells, marks, parts, records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

WIDTH = 3.35  # inches: one column of a two-column paper
PAGE = 6.9
MOST_PANELS = 24  # with one for each attack; beyond, attacks are averaged
_MARKERS = "osD^vP*X<>"
_LINES = ("-", "--", "-.", ":")
TWIN = "clean twin"


def write(trials: pd.DataFrame, folder: Path, title: str, evidence: list[dict[str, Any]] | None = None) -> list[Path]:
    """Draw what the grid has data for, and never an empty axis; figures of an earlier run that are not due go.

    Args:
        title: opens every caption.
        evidence: what `page.evidence` found behind each trial, in the order of the table.

    Returns:
        the PNG files; a PDF lies beside each.
    """
    return _drawn({**_DRAWN, **_CONNECTION}, trials, folder, title, evidence)


def write_connection(
    trials: pd.DataFrame, folder: Path, title: str, evidence: list[dict[str, Any]] | None = None
) -> list[Path]:
    """The figures of the finding alone, as `write`."""
    return _drawn(_CONNECTION, trials, folder, title, evidence)


def _drawn(
    figures: Mapping[str, Callable[[_Grid], Figure | None]],
    trials: pd.DataFrame,
    folder: Path,
    title: str,
    evidence: list[dict[str, Any]] | None,
) -> list[Path]:
    behind = pd.Series(evidence or [{}] * len(trials), dtype=object)
    grid = _Grid(trials.reset_index(drop=True), cells(trials), behind, title)
    found = []
    for name, draw in figures.items():
        figure = draw(grid)
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            path.with_suffix(".pdf").unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _save(figure, path)
            found.append(path)
    return found


class _Grid:
    """What the figures are drawn from."""

    def __init__(self, trials: pd.DataFrame, table: pd.DataFrame, behind: pd.Series, title: str) -> None:
        self.trials, self.cells, self.behind, self.title = trials, table, behind, title
        # A defense that has no meaning in a setting would be an empty row there.
        rows = [table[axis] for axis in (*BOARD, "setting", "defense")]
        self.table = table[~(table.not_applicable == table.seeds).groupby(rows).transform("all")]
        self.attacked = self.table[self.table.poison_rate > 0]
        self.connections = connections(self.trials, list(behind))
        groups = table.assign(whole=table.done == table.seeds).groupby([*BOARD, "setting", "defense"], sort=False)
        self._whole = groups.whole.all().to_dict()

    def whole(self, row: Any) -> bool:
        """Is every cell of this defense done? If not, its means are over other attacks than its rivals'."""
        return bool(self._whole[(*(getattr(row, axis) for axis in BOARD), row.setting, row.defense)])

    def caption(self, what: str, table: pd.DataFrame | None = None, place: str = "") -> str:
        done = (self.table if table is None else table).done
        seeds = sorted({int(count) for count in done if count})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "no"
        where = f"{self.title}: {place}" if place else self.title
        return f"{what} {where}; n = {count} seed{'' if count == '1' else 's'}."

    def more(self, name: str, *also: str) -> Iterator[tuple[Any, Any]]:
        """Finished trials, and such as have `also` for a status, with something beside their figures: row, and that."""
        for row, own in zip(records(self.trials), self.behind, strict=True):
            value = own.get("more", {}).get(name)
            if row.status in ("done", *also) and value:
                yield row, value


def _look(name: str) -> dict[str, Any]:
    """Colour, marker and line of a defense, the same wherever it is drawn."""
    import seaborn as sns

    if name in (BASELINE, TWIN):
        return {
            "color": "0.35",
            "marker": "x" if name == BASELINE else "+",
            "linestyle": ":" if name == BASELINE else "--",
        }
    places = _places()
    if name not in places:  # the row of an ablation, say: the next look that is nobody's
        wanted = zlib.crc32(name.encode())
        free = (at % 100 for at in range(wanted, wanted + 100) if at % 100 not in places.values())
        places[name] = next(free, wanted % 100)
    place = places[name]
    return {
        "color": sns.color_palette("colorblind")[place % 10],
        "marker": _MARKERS[(place + place // 10) % len(_MARKERS)],
        "linestyle": _LINES[place // 10 % len(_LINES)],
    }


@functools.cache
def _places() -> dict[str, int]:
    from defenses.base import defense

    return {name: place for place, name in enumerate(sorted(name for name in defense if name != BASELINE))}


@contextmanager
def _paper() -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[Any, Any] = {
        "font.size": 7,
        "axes.titlesize": 7,
        "axes.labelsize": 7,
        "legend.fontsize": 6.5,
        "figure.titlesize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 4,
        "lines.linewidth": 1,
        "pdf.fonttype": 42,  # type 3 fonts are refused by some publishers
        "text.usetex": False,
        "text.parse_math": False,  # a name may hold dollars
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
    }
    with plt.rc_context(settings):
        yield plt


def _panels(plt: Any, count: int, width: float, height: float, across: int = 0) -> tuple[Figure, list[Axes]]:
    """So many axes, side by side while a page has room, or so many in each row."""
    across = across or max(1, min(count, int(PAGE // width)))
    down = -(-count // across)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across, height * down), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def _titled(figure: Figure, caption: str) -> Figure:
    """The caption above, for which the figure grows."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, int(width * 19))
    figure.set_size_inches(width, height + 0.12 * len(lines))
    figure.suptitle("\n".join(lines), x=0.02, ha="left")
    return figure


def _names(table: pd.DataFrame) -> float:
    """Inches that the names of defenses take beside a panel."""
    return 0.065 * (max(len(_short(name)) for name in table.defense) + 3)


def _tall(axis: Axes, inches: float, width: float) -> None:
    """Give a panel its own height, from the top: rows are as high in a panel with few of them."""
    axis.set_box_aspect(inches / width)
    axis.set_anchor("N")


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels beneath them, for which the figure grows."""
    entries: dict[str, Any] = {}
    for axis in axes:
        entries |= {_short(label): handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        width, height = figure.get_size_inches()
        across = max(1, min(len(entries), int(width * 15 // (max(map(len, entries)) + 6))))
        figure.set_size_inches(width, height + 0.14 * -(-len(entries) // across))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=across, frameon=False)


def _short(name: Any, length: int = 28) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _place(place: tuple[Any, ...]) -> str:
    return ", ".join(_short(name) for name in place if name)


def _apart(places: list[tuple[Any, ...]]) -> tuple[list[str], str]:
    """A title for each panel, of what tells it from the others, and what all have in common."""
    differs = [len(set(names)) > 1 for names in zip(*places, strict=True)]
    titles = [_place(tuple(name for name, own in zip(place, differs, strict=True) if own)) for place in places]
    return titles, _place(tuple(name for name, own in zip(places[0], differs, strict=True) if not own))


def _means(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """One row for each defense of a place: means over attacks of the figures."""
    found = table.groupby([*BOARD, "setting", "defense"], sort=False)[[f"{name}_mean" for name in names]].mean()
    found.columns = pd.Index(names)
    return found.reset_index()


def _point(axis: Axes, grid: _Grid, row: Any, x: float, y: float) -> None:
    """A defense as a large marker, hollow where not all of its cells are done."""
    look = _look(str(row.defense))
    inside: dict[str, Any] = {} if grid.whole(row) or look["marker"] in "x+" else {"markerfacecolor": "white"}
    axis.plot(x, y, label=row.defense, linestyle="none", color=look["color"], marker=look["marker"], **inside, zorder=3)


HOLLOW = "hollow: not all cells are done"


def _heatmap(grid: _Grid) -> Figure | None:
    table = grid.attacked
    if table.asr_mean.notna().sum() == 0:
        return None
    import seaborn as sns

    places = parts(table, [*BOARD, "setting"])
    rows = max(part.defense.nunique() for _, part in places)
    width = max(WIDTH, 1.2 + 0.37 * table.attack.nunique())
    titles, common = _apart([place for place, _ in places])
    with _paper() as plt:
        figure, axes = _panels(
            plt, len(places), width, 0.45 + 0.19 * rows + 0.06 * min(28, table.attack.str.len().max())
        )
        for axis, title, (_, part) in zip(axes, titles, places, strict=True):
            wide = 100 * part.pivot(index="defense", columns="attack", values="asr_mean")
            wide = wide.reindex(index=part.defense.unique(), columns=part.attack.unique())
            texts = wide.map("{:.1f}".format)
            for row in records(part[part.done < part.seeds]):
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
            for row in records(part[part.asr_mean.isna()]):
                states = [state for state in STATES if getattr(row, state.replace(" ", "_"))]
                where = list(wide.columns).index(row.attack) + 0.5, list(wide.index).index(row.defense) + 0.5
                text = {"not applicable": "n/a"}.get(states[0], states[0]) if states else ""
                axis.text(*where, text, ha="center", va="center", size=5, color="0.25")
            axis.set(title=title, xlabel="", ylabel="")
            _tall(axis, 0.19 * len(wide), width - _names(table) - 0.2)
            axis.set_xticklabels([_short(name) for name in wide.columns], rotation=45, ha="right")
            axis.set_yticklabels([_short(name) for name in wide.index], rotation=0)
        # It would anchor the panels anew.
        bar: dict[str, Any] = {"shrink": 0.6, "aspect": 30, "fraction": 0.04, "pad": 0.02, "panchor": False}
        figure.colorbar(axes[0].collections[0], ax=axes, label="ASR (%)", **bar)
        return _titled(
            figure, grid.caption("Attack success rate; grey: no figure; †: not all seeds are done.", table, common)
        )


def _scatter(grid: _Grid) -> Figure | None:
    points = grid.attacked.dropna(subset=["asr_mean", "clean_accuracy_mean"])
    if points.empty:
        return None
    means = _means(points, ["asr", "clean_accuracy"])
    places = parts(means, [*BOARD, "setting"])
    titles, common = _apart([place for place, _ in places])
    with _paper() as plt:
        figure, axes = _panels(plt, len(places), WIDTH, 2.5)
        for axis, title, (place, part) in zip(axes, titles, places, strict=True):
            for row in records(part):
                look = _look(str(row.defense))
                own = points[(points[[*BOARD, "setting", "defense"]] == [*place, row.defense]).all(axis=1)]
                faint = {"color": look["color"], "marker": look["marker"], "s": 7, "alpha": 0.35, "linewidths": 0.5}
                axis.scatter(100 * own.asr_mean, 100 * own.clean_accuracy_mean, **faint)
                _point(axis, grid, row, 100 * row.asr, 100 * row.clean_accuracy)
            whole = [grid.whole(row) and row.defense != BASELINE for row in records(part)]
            front = _front(part[whole])
            if len(front) > 1:
                axis.plot(100 * front.asr, 100 * front.clean_accuracy, color="0.6", linewidth=0.8, zorder=1)
            axis.set_xlim(-3, 103)
            low, high = axis.get_ylim()
            # At least ten points high: a tenth of a point must not fill the figure.
            axis.set_ylim(min(low, max(high - 10, 0)), min(high + 0.5, 101))
            axis.set(title=title, xlabel="ASR (%)", ylabel="clean accuracy (%)")
        _legend(figure, axes)
        what = f"Upper left is best. Large: mean over attacks ({HOLLOW}), small: one attack; line: Pareto front."
        return _titled(figure, grid.caption(what, points, common))


def _front(part: pd.DataFrame) -> pd.DataFrame:
    """The defenses that none beats in both, by rising ASR."""
    ordered = part.dropna().sort_values(["asr", "clean_accuracy"], ascending=[True, False])
    best = ordered.clean_accuracy.cummax()
    return ordered[(ordered.clean_accuracy == best) & ~best.duplicated()]


def _robust(grid: _Grid) -> Figure | None:
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


def _relearn(grid: _Grid) -> Figure | None:
    names = [
        name
        for name in ("asr", "relearn_asr", "relearn_asr_control", "reactivate_asr", "reactivate_asr_control")
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


def _bars(grid: _Grid, table: pd.DataFrame, names: list[str], label: str, what: str) -> Figure:
    """Bars of several figures side by side for each defense."""
    import seaborn as sns

    places = parts(_means(table, names), [*BOARD, "setting"])
    rows = max(len(part) for _, part in places)
    titles, common = _apart([place for place, _ in places])
    with _paper() as plt:
        figure, axes = _panels(plt, len(places), WIDTH, 0.9 + rows * (0.12 + 0.1 * len(names)))
        colors = sns.color_palette("colorblind", len(names))
        thick = 0.8 / len(names)
        for axis, title, (place, part) in zip(axes, titles, places, strict=True):
            own = table[(table[[*BOARD, "setting"]] == list(place)).all(axis=1)]
            for index, name in enumerate(names):
                at = np.arange(len(part)) + (index - (len(names) - 1) / 2) * thick
                # With one figure, the bar wears the colour of its defense.
                color = colors[index] if len(names) > 1 else [_look(str(defense))["color"] for defense in part.defense]
                figure_name = COLUMN[name].heading if len(names) > 1 else None
                axis.barh(at, 100 * part[name], thick * 0.9, color=color, label=figure_name)
                for where, row, mean in zip(at, records(part), 100 * part[name], strict=True):
                    values = 100 * own[own.defense == row.defense][f"{name}_mean"]
                    axis.scatter(values, np.full(len(values), where), s=4, color="black", alpha=0.5, linewidths=0)
                    text = "no figure" if math.isnan(mean) else f"{mean:.1f}{'' if grid.whole(row) else '†'}"
                    beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "ha": "right"}
                    axis.text(1, where, text, size=5.5, color="0.25", **beside)
            axis.set_yticks(range(len(part)), [_short(defense) for defense in part.defense])
            axis.set_ylim(len(part) - 0.5, -0.5)
            _tall(axis, len(part) * (0.12 + 0.1 * len(names)), WIDTH - _names(table))
            # A fifth of the axis for the means as figures; small ones are shown large.
            most = 100 * np.nanmax([0.0, *own[[f"{name}_mean" for name in names]].to_numpy().flat])
            axis.set(title=title, xlabel=label, xlim=(0, max(12.0, 1.25 * most)))
            axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
        _legend(figure, axes)
        return _titled(figure, grid.caption(what, table, common))


def _ranks(grid: _Grid) -> Figure | None:
    """Critical-difference diagrams (Demsar, JMLR 7, 2006), one for each setting."""
    from bench.reporting.statistics import cliques, p_text

    found = {
        place: ranking
        for place, ranking in marks(grid.trials, grid.cells).overall.items()
        if len(ranking.ranks) > 2 and not math.isnan(ranking.p)
    }
    if not found:
        return None
    with _paper() as plt:
        most = max(len(ranking.ranks) for ranking in found.values())
        figure, axes = _panels(plt, len(found), WIDTH, 0.95 + 0.1 * most)
        for axis, (place, ranking) in zip(axes, found.items(), strict=True):
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
                look = _look(name)
                axis.plot([rank, rank, edge], [0, depth, depth], color=look["color"], linewidth=0.9)
                text = f"{_short(name, 22)} {rank:.2f}" if left else f"{rank:.2f} {_short(name, 22)}"
                axis.text(edge, depth, text + " " if left else " " + text, ha="right" if left else "left", va="center")
            if ranking.difference < count - 1:
                axis.hlines(1.05, 1, 1 + ranking.difference, color="black", linewidth=1.2)
                axis.text(1 + ranking.difference / 2, 1.15, f"CD {ranking.difference:.2f}", ha="center", va="bottom")
            axis.set_xlim(1 - 0.55 * count, count + 0.55 * count)
            axis.set_ylim(start - 0.42 * half, 1.9)
            axis.set_axis_off()
            axis.set_title(f"setting {_place(place)}\n{ranking.blocks} blocks, Friedman p {p_text(ranking.p)}")
        what = "Average ranks by ASR over attacks, data sets and architectures, 1 is best; a bar joins defenses that "
        return _titled(figure, grid.caption(what + "cannot be told apart (Nemenyi, 5 %)."))


def _cost(grid: _Grid) -> Figure | None:
    points = grid.attacked.dropna(subset=["asr_mean", "defend_seconds_mean"])
    points = points[points.defense != BASELINE]
    if points.empty or not (points.defend_seconds_mean > 0).any():
        return None
    from matplotlib.ticker import LogLocator

    means = _means(points[points.defend_seconds_mean > 0], ["asr", "defend_seconds"])
    places = parts(means, [*BOARD, "setting"])
    titles, common = _apart([place for place, _ in places])
    with _paper() as plt:
        figure, axes = _panels(plt, len(places), WIDTH, 2.3)
        for axis, title, (_, part) in zip(axes, titles, places, strict=True):
            for row in records(part):
                _point(axis, grid, row, row.defend_seconds, 100 * row.asr)
            axis.set(title=title, xlabel="seconds of the defense", ylabel="ASR (%)", xscale="log", ylim=(-3, 103))
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        _legend(figure, axes)
        what = f"Effect against cost, means over attacks; lower left is best; {HOLLOW}."
        return _titled(figure, grid.caption(what, points, common))


def _by_attack(table: pd.DataFrame, by: list[str], along: str) -> list[tuple[Any, pd.DataFrame]]:
    """Curves' names and parts, one more name for the attack; all attacks together where that are too many panels."""
    found: list[tuple[Any, pd.DataFrame]] = []
    for names in ([*by, "attack"], by):
        found = [(place, part) for place, part in parts(table, names) if part[along].nunique() > 1]
        if len(found) <= MOST_PANELS:
            break
    return found


def _averaged(panels: list[pd.DataFrame]) -> str:
    """What the figures of these parts are means over."""
    return f"means over {'attacks and ' if any(part.attack.nunique() > 1 for part in panels) else ''}seeds"


def _sweep(grid: _Grid) -> Figure | None:
    """Curves over each numeric setting that the grid sweeps."""
    found = []
    for row in records(grid.table[(grid.table.variant != "") & (grid.table.done == grid.table.seeds)]):
        pairs = [pair.partition("=") for pair in row.variant.split(", ")]
        for index, (key, _, value) in enumerate(pairs):
            rest = ", ".join("=".join((k, v)) for i, (k, _, v) in enumerate(pairs) if i != index)
            with_value = pd.to_numeric(value, errors="coerce")
            for name in ("asr", "clean_accuracy"):
                mean = getattr(row, f"{name}_mean")
                if not (math.isnan(with_value) or math.isnan(mean)):
                    place = (row.dataset, row.model, row.setting, rest)
                    found.append((key, *place, name, row.defense, row.attack, with_value, mean))
    columns = ["key", "dataset", "model", "setting", "rest", "figure", "defense", "attack", "value", "mean"]
    table = pd.DataFrame(found, columns=columns)
    axes_of = ["key", "dataset", "model", "setting", "rest", "figure"]
    panels = _by_attack(table, axes_of, "value")
    if not panels:
        return None
    titles, common = _apart([(*place[1:5], *place[6:]) for place, _ in panels])
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH, 1.9)
        for axis, title, (place, part) in zip(axes, titles, panels, strict=True):
            for defense, own in parts(part, "defense"):
                at = own.groupby("value")["mean"]
                curve = 100 * at.mean()[at.count() == part.attack.nunique()]  # means of the same attacks
                axis.plot(curve.index, curve, label=defense, **_look(str(defense)))
            values = sorted(part.value.unique())
            if values[0] > 0 and values[-1] / values[0] >= 10:
                axis.set_xscale("log")
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
            axis.set(title=title, xlabel=place[0], ylabel=f"{COLUMN[place[5]].heading} (%)")
        _legend(figure, axes)
        what = f"What the grid sweeps; {_averaged([part for _, part in panels])}; no point where a seed is not done."
        return _titled(figure, grid.caption(what, place=common))


def _lines(
    grid: _Grid, rows: list[tuple[Any, ...]], xlabel: str, ylabel: str, what: str, dense: bool = False
) -> Figure | None:
    """Mean curves of defenses: rows of (place, defense, x, y); dense ones have no markers."""
    table = pd.DataFrame(rows, columns=["place", "defense", "x", "y"]).dropna()
    panels = [(place, part) for place, part in parts(table, "place") if part.x.nunique() > 1]
    if not panels:
        return None
    titles, common = _apart([place for place, _ in panels])
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH, 1.9)
        for axis, title, (_, part) in zip(axes, titles, panels, strict=True):
            for defense, own in parts(part, "defense"):
                curve = own.groupby("x").y.mean()
                axis.plot(curve.index, curve, label=defense, **_look(str(defense)) | ({"marker": ""} if dense else {}))
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        _legend(figure, axes)
        return _titled(figure, grid.caption(what, place=common))


def _where(row: Any, *more: str) -> tuple[str, ...]:
    return (*(getattr(row, axis) for axis in (*BOARD, "setting")), *more)


# As bench.engine.robustness names them: heading, and unit of the radius.
_NORMS = {"linf": ("L∞", 255), "l2": ("L2", 1)}


def _epsilon(grid: _Grid) -> Figure | None:
    rows = [
        (
            _where(row, _NORMS[step["norm"]][0]),
            row.defense,
            step["epsilon"] * _NORMS[step["norm"]][1],
            100 * step["accuracy"],
        )
        for row, steps in grid.more("autoattack")
        for step in steps
        if step.get("accuracy") is not None
    ]
    what = "Accuracy under AutoAttack over the radius (L∞ in levels of 255, L2 as a norm), means over attacks."
    return _lines(grid, rows, "radius", "accuracy (%)", what)


def _steps_of(grid: _Grid) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """Each step of each trial with its place among all steps of its method.

    Steps are told apart by their names: a filter that removes nothing is no step of this seed, and one of the next.
    """
    told = list(grid.more("rounds", "wrecked"))  # the steps tell where the accuracy was lost
    orders: dict[str, list[str]] = defaultdict(list)
    for row, steps in told:
        order, place = orders[row.defense], 0
        for step in steps:
            if step["name"] not in order:
                order.insert(place, step["name"])
            place = order.index(step["name"]) + 1
    for row, steps in told:
        for step in steps:
            yield row, orders[row.defense].index(step["name"]), step


def _stepwise(table: pd.DataFrame) -> tuple[list[pd.DataFrame], list[str], str]:
    """A panel's part for each defense and attack, its title, and what all have in common."""
    found = _by_attack(table, ["place", "defense"], "step")
    if not found:
        return [], [], ""
    # Without a gap for the steps that no trial of a panel has.
    dense = [part.assign(step=part.step.rank(method="dense").astype(int) - 1) for _, part in found]
    return dense, *_apart([(*names, *place) for (place, *names), _ in found])


def _rounds(grid: _Grid) -> Figure | None:
    """What a progressive method reached step by step."""
    names = {"asr": "ASR", "clean_accuracy": "clean accuracy", "selected_poison": "poison, selected"}
    names |= {"random_poison": "poison, random pick", "detection_auroc": "AUROC"}
    found = [
        (_where(row), row.defense, row.attack, figure, index, step["name"], 100 * step[figure])
        for row, index, step in _steps_of(grid)
        for figure in names
        if step.get(figure) is not None
    ]
    panels, titles, common = _stepwise(
        pd.DataFrame(found, columns=["place", "defense", "attack", "figure", "step", "name", "value"])
    )
    if not panels:
        return None
    import seaborn as sns

    hollow = False
    looks = dict(zip(names, zip(sns.color_palette("colorblind"), _MARKERS, strict=False), strict=False))
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH, 2.2)
        for axis, title, part in zip(axes, titles, panels, strict=True):
            for name, own in part.groupby("figure", sort=False):
                color, marker = looks[str(name)]
                steps = own.groupby("step").value.agg(["mean", "size"])
                apart = (steps["size"] < steps["size"].max()) | steps.index.isin(own.step[own["name"] == "tail"])
                curve, alone = steps["mean"][~apart], steps["mean"][apart]
                hollow = hollow or not alone.empty
                axis.plot(curve.index, curve, label=names[str(name)], color=color, marker=marker)
                axis.plot(alone.index, alone, color=color, marker=marker, linestyle="", markerfacecolor="none")
            ticks = part.drop_duplicates("step").sort_values("step")
            axis.set_xticks(ticks.step, [_short(name, 14) for name in ticks.name], rotation=45, ha="right")
            axis.set(title=title, ylabel="%", ylim=(-3, 103))
        _legend(figure, axes)
        what = f"Step by step, wrecked models too; {_averaged(panels)}."
        if hollow:
            what += " Hollow: a step that only some of these have, or the images that are unlearned."
        return _titled(figure, grid.caption(what, place=common))


def _scores(grid: _Grid) -> Figure | None:
    """How far the scores of clean and poisoned images lie apart, step by step."""
    found = [
        (_where(row), row.defense, row.attack, kind, index, step["name"], *values)
        for row, index, step in _steps_of(grid)
        for kind, values in step.get("suspicion", {}).items()
        if len(step["suspicion"]) == 2
    ]
    marks = ["lowest", "low", "middle", "high", "highest"]
    panels, titles, common = _stepwise(
        pd.DataFrame(found, columns=["place", "defense", "attack", "kind", "step", "name", *marks])
    )
    if not panels:
        return None
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH, 2.2)
        for axis, title, part in zip(axes, titles, panels, strict=True):
            for (kind, own), color, marker in zip(part.groupby("kind"), ("C0", "C3"), "os", strict=True):
                held = own.groupby("step").step.transform("size")
                curve = own[held == held.max()].groupby("step")[marks].mean()  # means of the same trials everywhere
                axis.plot(curve.index, curve.middle, label=f"{kind}: median", color=color, marker=marker)
                for low, high, strength in (("lowest", "highest", 0.12), ("low", "high", 0.25)):
                    axis.fill_between(curve.index, curve[low], curve[high], color=color, alpha=strength, linewidth=0)
            ticks = part.drop_duplicates("step").sort_values("step")
            axis.set_xticks(ticks.step, [_short(name, 14) for name in ticks.name], rotation=45, ha="right")
            axis.set(title=title, ylabel="suspicion")
        _legend(figure, axes)
        what = f"Suspicion, step by step, wrecked models too: medians, half and nine tenths; {_averaged(panels)}."
        return _titled(figure, grid.caption(what, place=common))


def _detection(grid: _Grid) -> Figure | None:
    """ROC of suspicion scores, averaged over seeds and attacks at equal false positive rates."""
    at = np.linspace(0, 1, 201)
    rows = [
        (_where(row), row.defense, fpr, 100 * tpr)
        for row, own in zip(records(grid.trials), grid.behind, strict=True)
        if row.status == "done" and own.get("roc")
        for fpr, tpr in zip(100 * at, np.interp(at, own["roc"]["fpr"], own["roc"]["tpr"]), strict=True)
    ]
    figure = _lines(
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


# Of the connection: colour, marker, line; the order is that of the legend.
_SEEN = {"infected": (3, "o", "-"), "twin": (2, "s", "--"), "noise": (None, "x", ":")}


def _connection(grid: _Grid) -> Figure | None:
    """Adversarial examples of each infected model over the radius, beside its clean twin and random noise."""
    table = over_seeds(grid.connections)
    table = table[table.kind != "repaired"]
    panels = [
        (place, part, name)
        for place, part in parts(table, SHARED)
        for name in ("concentration", "similarity")
        if part[name].notna().any()
    ]
    if not panels:
        return None
    labels = {"concentration": "to the target (%)", "similarity": "similarity"}
    titles, common = _apart([place for place, _, _ in panels])
    radii = sorted({round(255 * radius, 3) for radius in table.epsilon})
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH / 2, 1.3, 2 if len(panels) <= 8 else 4)
        for axis, title, (_, part, name) in zip(axes, titles, panels, strict=True):
            for kind, own in parts(part, "kind"):
                _with_interval(axis, own, name, str(kind))
            if name == "similarity":
                axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            else:
                axis.set_ylim(-3, 103)
            axis.set(title=title, xlabel="radius (levels of 255)", ylabel=labels[name])
            axis.set_xlim(0, 1.05 * radii[-1])
            axis.set_xticks(radii, [f"{radius:g}" for radius in radii])
        _legend(figure, axes)
        what = (
            "Adversarial examples: share given the attacker's class, of those that fool the model, and how much nearer "
            "than the clean image their features are to the triggered image's (cosine). Bars: widest 95 % interval "
            "over images of any seed."
        )
        return _titled(figure, grid.caption(what, place=common))


def _with_interval(axis: Axes, own: pd.DataFrame, name: str, kind: str) -> None:
    import seaborn as sns

    color, marker, line = _SEEN[kind]
    scale = 100 if name == "concentration" else 1
    values = scale * own[[name, f"{name}_low", f"{name}_high"]]
    reach = [values[name] - values[f"{name}_low"], values[f"{name}_high"] - values[name]]
    axis.errorbar(
        255 * own.epsilon,
        values[name],
        np.nan_to_num(np.maximum(reach, 0)),
        label=KINDS[kind],
        color="0.45" if color is None else sns.color_palette("colorblind")[color],
        marker=marker,
        markersize=3,
        linestyle=line,
        capsize=1.5,
        elinewidth=0.6,
    )


def _connection_repaired(grid: _Grid) -> Figure | None:
    """The share to the target at the largest radius, after each defense, between infected model and clean twin."""
    import seaborn as sns

    table = over_seeds(largest(grid.connections))
    table = table[table.concentration.notna()]
    panels = [(place, part) for place, part in parts(table, SHARED) if (part.kind == "repaired").any()]
    if not panels:
        return None
    rows = table[table.kind == "repaired"][["defense", "setting"]].drop_duplicates()
    several = rows.setting.nunique() > 1
    order = {pair: at for at, pair in enumerate(rows.itertuples(index=False, name=None))}
    names = [f"{_short(defense, 20)}{f' ({setting})' if several else ''}" for defense, setting in order]
    colors = sns.color_palette("colorblind")
    titles, common = _apart([place for place, _ in panels])
    with _paper() as plt:
        wide = 0.065 * (max(map(len, names)) + 2)
        across = min(len(panels), 2 if len(panels) <= 4 else 4)
        width = ((WIDTH if across < 4 else PAGE) - wide) / across
        figure, axes = _panels(plt, len(panels), width, 0.8 + 0.17 * len(order), across)
        figure.set_size_inches(width * across + wide, figure.get_size_inches()[1])
        for axis, title, (_, part) in zip(axes, titles, panels, strict=True):
            for kind in ("infected", "twin"):
                for row in records(part[part.kind == kind]):
                    color, _, line = _SEEN[kind]
                    shade = colors[color or 0]
                    axis.axvspan(
                        100 * row.concentration_low, 100 * row.concentration_high, color=shade, alpha=0.15, lw=0
                    )
                    axis.axvline(100 * row.concentration, color=shade, linestyle=line, label=KINDS[kind])
            for row in records(part[part.kind == "repaired"]):
                value, low, high = (100 * getattr(row, f"concentration{end}") for end in ("", "_low", "_high"))
                reach = np.nan_to_num([[max(0, value - low)], [max(0, high - value)]])
                at = order[row.defense, row.setting]
                color = _look(row.defense)["color"]
                axis.errorbar(
                    [value], [at], xerr=reach, color=color, marker="o", markersize=3, capsize=1.5, elinewidth=0.8
                )
            axis.set(title=title, xlabel="to the target (%)", xlim=(-3, 103), ylim=(len(order) - 0.5, -0.5))
            spec = axis.get_subplotspec()
            first = spec is None or spec.is_first_col()
            axis.set_yticks(range(len(order)), names if first else [""] * len(order))
            axis.grid(axis="y", color="0.9", linewidth=0.5)
            axis.set_axisbelow(True)
        _legend(figure, axes)
        what = (
            f"Adversarial examples at {255 * table.epsilon.max():g}/255 after each defense: share given the "
            "attacker's class, of those that fool it; bars and bands: widest 95 % interval over images of any seed."
        )
        return _titled(figure, grid.caption(what, place=common))


def _connection_classes(grid: _Grid) -> Figure | None:
    """Where the adversarial examples of infected model and clean twin go, class by class, at the largest radius."""
    import seaborn as sns

    table = largest(grid.connections)
    table = table[table.kind.isin(["infected", "twin"]) & (table.classes != "null")]
    panels = parts(table, SHARED)
    if not panels:
        return None
    titles, common = _apart([place for place, _ in panels])
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH / 2 if len(panels) > 1 else WIDTH, 1.3)
        for axis, title, (_, part) in zip(axes, titles, panels, strict=True):
            for index, kind in enumerate(("infected", "twin")):
                shares = [json.loads(text) for text in part[part.kind == kind].classes]
                if shares:
                    mean = 100 * np.mean(shares, axis=0)
                    color = sns.color_palette("colorblind")[_SEEN[kind][0] or 0]
                    at = np.arange(len(mean)) + 0.4 * (index - 0.5)
                    axis.bar(at, mean, 0.4, color=color, label=KINDS[kind])
            axis.set(title=title, xlabel="class", ylabel="share (%)")
            if len(mean) <= 10:
                axis.set_xticks(range(len(mean)))
        _legend(figure, axes)
        what = f"Classes that adversarial examples at {255 * table.epsilon.max():g}/255 are given, of those that fool."
        return _titled(figure, grid.caption(what, place=common))


def _relearning(grid: _Grid) -> Figure | None:
    """ASR over the steps of relearning with the paper's number of poisoned images, and over their number."""
    course, number = [], []
    for row, steps in grid.more("relearn"):
        where = _where(row)
        for step in steps:
            for defense, end in ((row.defense, ""), (TWIN, "_control")):
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
        (place, part, label)
        for rows, label in axes_of
        for place, part in parts(pd.DataFrame(rows, columns=["place", "defense", "x", "y"]), "place")
        if part.x.nunique() > 1
    ]
    panels.sort(key=lambda panel: panel[0])
    if not panels:
        return None
    titles, common = _apart([place for place, _, _ in panels])
    with _paper() as plt:
        figure, axes = _panels(plt, len(panels), WIDTH / 2, 1.6)
        for axis, title, (_, part, label) in zip(axes, titles, panels, strict=True):
            for defense, own in parts(part, "defense"):
                curve = own.groupby("x").y.mean()
                look = _look(str(defense)) | ({"marker": ""} if len(curve) > 12 else {})
                axis.plot(curve.index, curve, label=defense, **look)
            if label == axes_of[1][1]:
                axis.set_xscale("log")
                values = sorted(part.x.unique())
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
            axis.set(title=title, xlabel=label, ylabel="ASR (%)", ylim=(-3, 103))
        _legend(figure, axes)
        what = "Relearning: ASR while a model is tuned on clean and a few poisoned images; means over attacks."
        return _titled(figure, grid.caption(what, grid.attacked, common))


_DRAWN = {
    "asr_heatmap": _heatmap,
    "accuracy_against_asr": _scatter,
    "robust_accuracy": _robust,
    "ranks": _ranks,
    "cost": _cost,
    "sweep": _sweep,
    "epsilon": _epsilon,
    "rounds": _rounds,
    "scores": _scores,
    "detection": _detection,
    "relearn": _relearn,
    "relearn_curves": _relearning,
}
_CONNECTION = {
    "connection": _connection,
    "connection_repaired": _connection_repaired,
    "connection_classes": _connection_classes,
}


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    # A panel with a shape of its own moves within its place: names beside it must not be cut.
    whole: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.04}
    figure.savefig(path, dpi=200, **whole)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, **whole)  # the same data, the same file
    plt.close(figure)
    return path


def gallery(drawn: dict[str, tuple[Tensor, Tensor]], rows: list[dict[str, Any]], folder: Path) -> Path:
    """`gallery.png`: a row for each attack with three images: clean, triggered, difference stretched to full contrast.

    Args:
        drawn: title -> clean and triggered images, (3, C, H, W) in [0, 1].
        rows: the scores of each, in the same order.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(drawn), 9, figsize=(11.5, 1.25 * len(drawn) + 0.3), squeeze=False, layout="constrained"
    )
    for line, (title, (clean, triggered)) in enumerate(drawn.items()):
        change = triggered - clean
        # The factor that fills the range stands in the title.
        shown, reach = _contrast(change)
        for index in range(len(clean)):
            for kind, images in enumerate((clean, triggered, shown)):
                axis = axes[line][3 * index + kind]
                picture = images[index].permute(1, 2, 0).cpu().numpy()
                axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
                if line == 0:
                    axis.set_title(("clean", "triggered", "difference")[kind], fontsize="small")
        score = rows[line]
        text = f"{title}\nL∞ {score['linf']:.0f}, SSIM {score['ssim']:.2f}\n×{1 / (2 * reach) if reach else 1:.1f}"
        axes[line][0].text(
            -0.1, 0.5, text, transform=axes[line][0].transAxes, ha="right", va="center", fontsize="small"
        )
    path = folder / "gallery.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def triggers(drawn: dict[str, tuple[Tensor, Tensor]], folder: Path, title: str) -> Path:
    """`triggers.png`: one image of each attack, clean, triggered, and the difference at full contrast.

    Args:
        drawn: title -> clean and triggered image, (C, H, W) in [0, 1].
    """
    with _paper() as plt:
        across = 2 if len(drawn) > 1 else 1
        down = -(-len(drawn) // across)
        # An empty column between two attacks.
        ratios = [1.0, 1.0, 1.0, 0.12] * across
        figure, axes = plt.subplots(
            down,
            len(ratios) - 1,
            figsize=(WIDTH if across > 1 else WIDTH / 2, 0.72 * down),
            squeeze=False,
            layout="constrained",
            gridspec_kw={"width_ratios": ratios[:-1], "wspace": 0.02},
        )
        for axis in axes.flat:
            axis.set_axis_off()
        for index, (name, (clean, triggered)) in enumerate(drawn.items()):
            row, first = index // across, 4 * (index % across)
            shown, reach = _contrast(triggered - clean)
            for axis, image in zip(axes[row][first : first + 3], (clean, triggered, shown), strict=True):
                picture = image.permute(1, 2, 0).cpu().numpy()
                axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            axes[row][first + 1].set_title(f"{_short(name)}, L∞ {255 * reach:.0f}", fontsize=6)
        what = f"Clean image, triggered image, difference at full contrast; L∞ in levels of 255. {title}."
        return _save(_titled(figure, what), folder / "triggers.png")


def _contrast(change: Tensor) -> tuple[Tensor, float]:
    """A difference as an image, in which grey is no change, and the largest change."""
    reach = float(change.abs().amax())
    return (0.5 + 0.5 * change / (reach or 1.0)).clamp(0, 1), reach


def trigger_picture(clean: Tensor, triggered: Tensor, path: Path) -> None:
    """One image (C, H, W) in [0, 1] without and with a trigger, and the difference at full contrast, side by side.

    Small, for the page of the leaderboard; every pixel is shown as a square.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    shown, _ = _contrast(triggered - clean)
    gap = clean.new_ones(clean.shape[0], clean.shape[1], 1)
    strip = torch.cat([clean, gap, triggered, gap, shown], dim=2)
    zoom = max(1, 96 // clean.shape[1])
    picture = strip.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    plt.imsave(path, picture.repeat(zoom, axis=0).repeat(zoom, axis=1))
