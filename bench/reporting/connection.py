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
PLACE = [*SHARED, "threat_model", "defense", "kind", "epsilon"]


def connections(trials: pd.DataFrame, details: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each model, radius and seed; empty if no trial has the measure.

    Args:
        details: what `page.details_of` found behind each trial, in the order of the table.

    Returns:
        `PLACE` (radius as a share of the pixel range), `seed`, `images`, `fooled`, each of `FIGURES` with `_low` and
        `_high` (its 95 % interval over images), `lift` over the clean control, `top_is_target` (1 or 0), and `classes`,
        the share of the fooled images that went to each class, as JSON.
    """
    found: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    for row, own in zip(records(trials), details, strict=True):
        if row.status not in ("done", "wrecked"):
            continue
        shared = {axis: getattr(row, axis) for axis in SHARED} | {"seed": row.seed}
        for step in own.get("more", {}).get("connection") or ():
            told = {kind: _told(step[kind], step.get("images")) for kind in KINDS if step.get(kind)}
            for kind, figures in told.items():
                # What is measured of the infected model is in the evaluation of each repair.
                mine = {"threat_model": row.threat_model, "defense": row.defense} if kind == "repaired" else {}
                place = {**shared, "threat_model": "", "defense": "", **mine, "kind": kind, "epsilon": step["epsilon"]}
                if tuple(place.values()) in seen or (mine and row.defense == BASELINE):
                    continue
                seen.add(tuple(place.values()))
                out = {**place, "images": figures["images"], "fooled": figures.get("fooled")}
                for name in FIGURES:
                    low, high = figures.get(f"{name}_interval") or (None, None)
                    out |= {name: figures.get(name), f"{name}_low": low, f"{name}_high": high}
                out["lift"] = _ratio(figures.get("concentration"), told.get("clean_control", {}).get("concentration"))
                out["top_is_target"] = figures.get("top_is_target")
                out["classes"] = json.dumps(figures.get("classes"))
                found.append(out)
    names = [*PLACE, "seed", "images", "fooled", *(f"{n}{end}" for n in FIGURES for end in ("", "_low", "_high"))]
    table = pd.DataFrame(found, columns=[*names, "lift", "top_is_target", "classes"])
    numbers = [name for name in table.columns[len(PLACE) + 1 :] if name != "classes"]
    table[numbers] = table[numbers].astype("float64")
    return table


def _told(figures: dict[str, Any], images: float | None) -> dict[str, Any]:
    """What one model's figures say: of which fewer than `FEW` images were fooled, nothing of where they go."""
    found = {"images": images, **figures}
    if found["images"] is None or round(found.get("fooled", 1) * found["images"]) >= FEW:
        return found
    return found | dict.fromkeys(("concentration", "concentration_interval", "top_is_target", "classes"))


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds; each interval is the widest that holds those of all seeds."""
    groups = table.groupby(PLACE, sort=False)
    found = groups[["fooled", *FIGURES, "lift"]].mean()
    found["images"], found["seeds"] = groups.images.sum(), groups.top_is_target.count()
    for name in FIGURES:
        found[f"{name}_low"], found[f"{name}_high"] = groups[f"{name}_low"].min(), groups[f"{name}_high"].max()
    found["top_is_target"] = groups.top_is_target.sum(min_count=1)
    return found.reset_index()


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
    for (threat_model, defense), part in groups_of(done, ["threat_model", "defense"]):
        paired = part.merge(before, on=[*SHARED, "seed"]).dropna(subset=["concentration", "asr"])
        both = paired.groupby(SHARED)[["concentration", "asr"]].mean()  # seeds of one attack are no further blocks
        if len(both) < 5 or (both.nunique() < 2).any():
            continue
        found = stats.spearmanr(both.concentration, both.asr)
        lines.append(
            f"{defense} ({threat_model}): Spearman {found.statistic:+.2f} between share to the target and its ASR, "
            f"p {p_text(found.pvalue)}, over {len(both)} attacks"
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
    found = []
    means = over_seeds(largest(table))
    header = ["model", "images", "fooled", "to the target", "lift", "top", "similarity", "overlap"]
    for place, part in groups_of(means, BOARD):
        radii = ", ".join(f"{255 * radius:g}/255" for radius in part.epsilon.unique())
        board = Board(", ".join([*(str(name) for name in place if name), f"radius {radii}"]), header)
        for attack, rows in groups_of(part, "attack"):
            board.rows.append([Entry(((f"attack: {attack}", ""),))])
            for row in records(rows.sort_values("kind", key=lambda kinds: kinds.map(list(KINDS).index), kind="stable")):
                board.rows.append([Entry(((text, ""),)) for text in _line(row)])
        board.notes = list(NOTES)
        found.append(board)
    return found


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
