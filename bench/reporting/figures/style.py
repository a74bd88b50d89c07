"""What all figures share: sizes, looks, panels, legends, captions."""

from __future__ import annotations

import functools
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bench.reporting.cells import groups_of, records
from bench.reporting.connection import KINDS, connections
from bench.reporting.trials import BASELINE, BOARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH = 3.35  # inches: one column of a two-column paper


PAGE = 6.9


MOST_PANELS = 24  # with one for each attack; beyond, attacks are averaged


MARKERS = "osD^vP*X<>"


LINE_STYLES = ("-", "--", "-.", ":")


CLEAN_CONTROL = "clean control"


class FigureData:
    """What the figures are drawn from."""

    def __init__(self, trials: pd.DataFrame, table: pd.DataFrame, details: pd.Series, title: str) -> None:
        self.trials, self.cells, self.details, self.title = trials, table, details, title
        # A defense that has no meaning in a setting would be an empty row there.
        rows = [table[axis] for axis in (*BOARD, "threat_model", "defense")]
        self.table = table[~(table.not_applicable == table.seeds).groupby(rows).transform("all")]
        self.attacked = self.table[self.table.poison_rate > 0]
        self.connections = connections(self.trials, list(details))
        groups = table.assign(whole=table.done == table.seeds).groupby([*BOARD, "threat_model", "defense"], sort=False)
        self._whole = groups.whole.all().to_dict()

    def whole(self, row: Any) -> bool:
        """Is every cell of this defense done? If not, its means are over other attacks than its rivals'."""
        return bool(self._whole[(*(getattr(row, axis) for axis in BOARD), row.threat_model, row.defense)])

    def caption(self, what: str, table: pd.DataFrame | None = None, group_name: str = "") -> str:
        done = (self.table if table is None else table).done
        seeds = sorted({int(count) for count in done if count})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "no"
        where = f"{self.title}: {group_name}" if group_name else self.title
        return f"{what} {where}; n = {count} seed{'' if count == '1' else 's'}."

    def more(self, name: str, *also: str) -> Iterator[tuple[Any, Any]]:
        """Finished trials, and such as have `also` for a status, with something beside their figures: row, and that."""
        for row, details in zip(records(self.trials), self.details, strict=True):
            value = details.get("more", {}).get(name)
            if row.status in ("done", *also) and value:
                yield row, value


def look_of(name: str) -> dict[str, Any]:
    """Colour, marker and line of a defense, the same wherever it is drawn."""
    import seaborn as sns

    if name in (BASELINE, CLEAN_CONTROL):
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
    index = places[name]
    return {
        "color": sns.color_palette("colorblind")[index % 10],
        "marker": MARKERS[(index + index // 10) % len(MARKERS)],
        "linestyle": LINE_STYLES[index // 10 % len(LINE_STYLES)],
    }


@functools.cache
def _places() -> dict[str, int]:
    from defenses.base import defense

    return {name: index for index, name in enumerate(sorted(name for name in defense if name != BASELINE))}


@contextmanager
def paper_style() -> Iterator[Any]:
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


def make_panels(plt: Any, count: int, width: float, height: float, across: int = 0) -> tuple[Figure, list[Axes]]:
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


def add_title(figure: Figure, caption: str) -> Figure:
    """The caption above, for which the figure grows."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, int(width * 19))
    figure.set_size_inches(width, height + 0.12 * len(lines))
    figure.suptitle("\n".join(lines), x=0.02, ha="left")
    return figure


def names_width(table: pd.DataFrame) -> float:
    """Inches that the names of defenses take beside a panel."""
    return 0.065 * (max(len(short_name(name)) for name in table.defense) + 3)


def set_height(axis: Axes, inches: float, width: float) -> None:
    """Give a panel its own height, from the top: rows are as high in a panel with few of them."""
    axis.set_box_aspect(inches / width)
    axis.set_anchor("N")


def add_legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels beneath them, for which the figure grows."""
    entries: dict[str, Any] = {}
    for axis in axes:
        entries |= {short_name(label): handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        width, height = figure.get_size_inches()
        across = max(1, min(len(entries), int(width * 15 // (max(map(len, entries)) + 6))))
        figure.set_size_inches(width, height + 0.14 * -(-len(entries) // across))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=across, frameon=False)


def short_name(name: Any, length: int = 28) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def board_title(group_key: tuple[Any, ...]) -> str:
    return ", ".join(short_name(name) for name in group_key if name)


def distinct_titles(places: list[tuple[Any, ...]]) -> tuple[list[str], str]:
    """A title for each panel, of what tells it from the others, and what all have in common."""
    differs = [len(set(names)) > 1 for names in zip(*places, strict=True)]
    titles = [
        board_title(tuple(name for name, differs_here in zip(group_key, differs, strict=True) if differs_here))
        for group_key in places
    ]
    return titles, board_title(
        tuple(name for name, differs_here in zip(places[0], differs, strict=True) if not differs_here)
    )


def method_means(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """One row for each defense of a place: means over attacks of the figures."""
    means = table.groupby([*BOARD, "threat_model", "defense"], sort=False)[[f"{name}_mean" for name in names]].mean()
    means.columns = pd.Index(names)
    return means.reset_index()


def draw_point(axis: Axes, grid: FigureData, row: Any, x: float, y: float) -> None:
    """A defense as a large marker, hollow where not all of its cells are done."""
    look = look_of(str(row.defense))
    inside: dict[str, Any] = {} if grid.whole(row) or look["marker"] in "x+" else {"markerfacecolor": "white"}
    axis.plot(x, y, label=row.defense, linestyle="none", color=look["color"], marker=look["marker"], **inside, zorder=3)


HOLLOW = "hollow: not all cells are done"


def by_attack(table: pd.DataFrame, by: list[str], along: str) -> list[tuple[Any, pd.DataFrame]]:
    """Curves' names and parts, one more name for the attack; all attacks together where that are too many panels."""
    groups: list[tuple[Any, pd.DataFrame]] = []
    for names in ([*by, "attack"], by):
        groups = [(group_key, group) for group_key, group in groups_of(table, names) if group[along].nunique() > 1]
        if len(groups) <= MOST_PANELS:
            break
    return groups


def averaged_over(panels: list[pd.DataFrame]) -> str:
    """What the figures of these parts are means over."""
    return f"means over {'attacks and ' if any(group.attack.nunique() > 1 for group in panels) else ''}seeds"


def draw_lines(
    grid: FigureData, rows: list[tuple[Any, ...]], xlabel: str, ylabel: str, what: str, dense: bool = False
) -> Figure | None:
    """Mean curves of defenses: rows of (place, defense, x, y); dense ones have no markers."""
    table = pd.DataFrame(rows, columns=["place", "defense", "x", "y"]).dropna()
    panels = [(group_key, group) for group_key, group in groups_of(table, "place") if group.x.nunique() > 1]
    if not panels:
        return None
    titles, common = distinct_titles([group_key for group_key, _ in panels])
    with paper_style() as plt:
        figure, axes = make_panels(plt, len(panels), WIDTH, 1.9)
        for axis, title, (_, group) in zip(axes, titles, panels, strict=True):
            for defense, of_defense in groups_of(group, "defense"):
                curve = of_defense.groupby("x").y.mean()
                axis.plot(
                    curve.index, curve, label=defense, **look_of(str(defense)) | ({"marker": ""} if dense else {})
                )
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        add_legend(figure, axes)
        return add_title(figure, grid.caption(what, group_name=common))


def place_columns(row: Any, *more: str) -> tuple[str, ...]:
    return (*(getattr(row, axis) for axis in (*BOARD, "threat_model")), *more)


# Of the connection: colour, marker, line; the order is that of the legend.
CONNECTION_LOOKS = {"infected": (3, "o", "-"), "clean_control": (2, "s", "--"), "noise": (None, "x", ":")}


def draw_interval(axis: Axes, curve: pd.DataFrame, name: str, kind: str) -> None:
    import seaborn as sns

    color, marker, line = CONNECTION_LOOKS[kind]
    scale = 100 if name == "concentration" else 1
    values = scale * curve[[name, f"{name}_low", f"{name}_high"]]
    reach = [values[name] - values[f"{name}_low"], values[f"{name}_high"] - values[name]]
    axis.errorbar(
        255 * curve.epsilon,
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


def save_figure(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    # A panel with a shape of its own moves within its place: names beside it must not be cut.
    whole: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.04}
    figure.savefig(path, dpi=200, **whole)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, **whole)  # the same data, the same file
    plt.close(figure)
    return path
