"""The finding as a table: what `measure.connection` left in the store, one row for each model, radius and seed."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from bench.reporting.board import Board, Entry
from bench.reporting.cells import groups_of, records
from bench.reporting.statistics import p_text
from bench.reporting.trials import BASELINE, BOARD

# Which model a row is about. `repaired` is one behind a defense; the others are the same for all of them.
KINDS = {
    "infected": "infected model",
    "clean_control": "clean control",
    "noise": "infected, random noise",
    "repaired": "repaired model",
}
FEW = 10
FIGURES = ("concentration", "similarity", "overlap")
SHARED = [*BOARD, "attack"]
CELL = [*SHARED, "threat_model", "defense", "kind", "epsilon"]


def connections(trials: pd.DataFrame, details: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each model, radius and seed; empty if no trial has the measure.

    Args:
        details: what `page.details_of` found behind each trial, in the order of the table.

    Returns:
        `CELL` (radius as a share of the pixel range), `seed`, `images`, `fooled`, each of `FIGURES` with `_low` and
        `_high` (its 95 % interval over images), `lift` over the clean control, `top_is_target` (1 or 0), and `classes`,
        the share of the fooled images that went to each class, as JSON.
    """
    rows: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    for row, trial_details in zip(records(trials), details, strict=True):
        if row.status not in ("done", "wrecked"):
            continue
        shared = {axis: getattr(row, axis) for axis in SHARED} | {"seed": row.seed}
        for step in trial_details.get("more", {}).get("connection") or ():
            told = {kind: _told(step[kind], step.get("images")) for kind in KINDS if step.get(kind)}
            for kind, figures in told.items():
                # What is measured of the infected model is in the evaluation of each repair.
                mine = {"threat_model": row.threat_model, "defense": row.defense} if kind == "repaired" else {}
                labels = {**shared, "threat_model": "", "defense": "", **mine, "kind": kind, "epsilon": step["epsilon"]}
                if tuple(labels.values()) in seen or (mine and row.defense == BASELINE):
                    continue
                seen.add(tuple(labels.values()))
                out = {**labels, "images": figures["images"], "fooled": figures.get("fooled")}
                for name in FIGURES:
                    low, high = figures.get(f"{name}_interval") or (None, None)
                    out |= {name: figures.get(name), f"{name}_low": low, f"{name}_high": high}
                out["lift"] = _ratio(figures.get("concentration"), told.get("clean_control", {}).get("concentration"))
                out["top_is_target"] = figures.get("top_is_target")
                out["classes"] = json.dumps(figures.get("classes"))
                rows.append(out)
    names = [*CELL, "seed", "images", "fooled", *(f"{n}{end}" for n in FIGURES for end in ("", "_low", "_high"))]
    table = pd.DataFrame(rows, columns=[*names, "lift", "top_is_target", "classes"])
    numbers = [name for name in table.columns[len(CELL) + 1 :] if name != "classes"]
    table[numbers] = table[numbers].astype("float64")
    return table


def _told(figures: dict[str, Any], images: float | None) -> dict[str, Any]:
    """What one model's figures say: of which fewer than `FEW` images were fooled, nothing of where they go."""
    described = {"images": images, **figures}
    if described["images"] is None or round(described.get("fooled", 1) * described["images"]) >= FEW:
        return described
    return described | dict.fromkeys(("concentration", "concentration_interval", "top_is_target", "classes"))


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds; each interval is the widest that holds those of all seeds."""
    groups = table.groupby(CELL, sort=False)
    means = groups[["fooled", *FIGURES, "lift"]].mean()
    means["images"], means["seeds"] = groups.images.sum(), groups.top_is_target.count()
    for name in FIGURES:
        means[f"{name}_low"], means[f"{name}_high"] = groups[f"{name}_low"].min(), groups[f"{name}_high"].max()
    means["top_is_target"] = groups.top_is_target.sum(min_count=1)
    return means.reset_index()


def largest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the largest radius of each infected model."""
    return table[table.epsilon == table.groupby(SHARED, sort=False).epsilon.transform("max")]


def rank_correlation(trials: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Does a defense remove those backdoors that show in the adversarial examples? A line for each.

    Spearman's correlation over attacks of the infected model's concentration at the largest radius and the ASR after
    the defense, each a mean over seeds; said where there are at least five.
    """
    from scipy import stats

    before = largest(table)
    before = before[before.kind == "infected"][[*SHARED, "seed", "concentration"]]
    done = trials[(trials.status == "done") & (trials.defense != BASELINE)]
    lines = []
    for (threat_model, defense), group in groups_of(done, ["threat_model", "defense"]):
        paired = group.merge(before, on=[*SHARED, "seed"]).dropna(subset=["concentration", "asr"])
        both = paired.groupby(SHARED)[["concentration", "asr"]].mean()  # seeds of one attack are no further blocks
        if len(both) < 5 or (both.nunique() < 2).any():
            continue
        correlation = stats.spearmanr(both.concentration, both.asr)
        lines.append(
            f"{defense} ({threat_model}): Spearman {correlation.statistic:+.2f} between share to the target and its "
            f"ASR, p {p_text(correlation.pvalue)}, over {len(both)} attacks"
        )
    return lines


NOTES = (
    "untargeted adversarial examples (PGD-20, L∞, steps of a fifth of the radius, no random start) of at most 1,000 "
    "test images that the models classify correctly; random noise: a corner of the same ball",
    "to the target: share of the fooled images that go where the attacker wants; by chance 1 / (classes - 1); "
    f"nothing where fewer than {FEW} were fooled; lift: the ratio to the clean control's; "
    "top: models whose most frequent wrong class is the target",
    "similarity: cosine of the features of adversarial and triggered image, minus that of clean and triggered; "
    "overlap: the same for the most active tenth of the units",
    "means over seeds; in brackets the widest 95 % bootstrap interval over images of any seed",
)


def boards(table: pd.DataFrame) -> list[Board]:
    """The finding at the largest radius, before and after each defense: a table for each data set and architecture."""
    built = []
    means = over_seeds(largest(table))
    header = ["model", "images", "fooled", "to the target", "lift", "top", "similarity", "overlap"]
    for group_key, group in groups_of(means, BOARD):
        radii = ", ".join(f"{255 * radius:g}/255" for radius in group.epsilon.unique())
        board = Board(", ".join([*(str(name) for name in group_key if name), f"radius {radii}"]), header)
        for attack, rows in groups_of(group, "attack"):
            board.rows.append([Entry(((f"attack: {attack}", ""),))])
            for row in records(rows.sort_values("kind", key=lambda kinds: kinds.map(list(KINDS).index), kind="stable")):
                board.rows.append([Entry(((text, ""),)) for text in _line(row)])
        board.notes = list(NOTES)
        built.append(board)
    return built


def _line(row: Any) -> list[str]:
    name = f"{row.defense} ({row.threat_model})" if row.kind == "repaired" else KINDS[row.kind]
    top = "–" if math.isnan(row.top_is_target) else f"{row.top_is_target:.0f} of {row.seeds}"
    return [
        name,
        f"{row.images:.0f}",
        _with_interval(row, "fooled", 100, ".1f"),
        _with_interval(row, "concentration", 100, ".1f"),
        "–" if math.isnan(row.lift) else f"{row.lift:.2f}",
        top,
        _with_interval(row, "similarity", 1, "+.3f"),
        _with_interval(row, "overlap", 1, "+.3f"),
    ]


def _with_interval(row: Any, name: str, scale: float, form: str) -> str:
    value = getattr(row, name)
    if math.isnan(value):
        return "–"
    low, high = getattr(row, f"{name}_low", math.nan), getattr(row, f"{name}_high", math.nan)
    text = format(scale * value, form)
    return text if math.isnan(low) else f"{text} [{scale * low:{form}}, {scale * high:{form}}]"


def _ratio(value: float | None, control: float | None) -> float | None:
    return value / control if value is not None and control else None
