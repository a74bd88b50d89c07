"""One HTML file with everything in it: the leaderboard, and behind each figure its trials, curves and command.

It opens from a file:// address and asks nobody for anything. The figures are those of the other tables; the script of
the page only filters, sorts and shows them.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.grid import Trial
from bench.reporting import table
from bench.store import STAGES, Identity, Store

NAME = "leaderboard.html"
POINTS = 100  # of a curve that is drawn; the store has them all
MORE = ("rounds", "relearn", "autoattack", "connection", "asr_by_class")  # of an evaluation, beside its figures
MANY, FEW_POINTS = 2000, 30  # beyond so many trials a page with whole curves would take seconds to open


def picture_of(dataset: str, model: str, attack: str, variant: str = "") -> str:
    """The name of the file that shows a trigger; some attacks find theirs on the network."""
    place = f"{dataset}_{model}_{attack}" + (f"_{swept(variant)}" if swept(variant) else "")
    return "trigger_" + re.sub(r"[^\w-]", "_", place)[:200] + ".png"


def swept(variant: str) -> str:
    """What a variant changes of the attack: only that can change what its trigger looks like."""
    return ", ".join(pair for pair in variant.split(", ") if pair.startswith("attack."))


def evidence(trial: Trial, store: Store, command: str) -> dict[str, Any]:
    """What stands behind a trial: where it is stored, its settings, its curves, and how to compute it again."""
    keys = trial.keys()
    results = [store.result(stage, key) if key else None for stage, key in zip(STAGES, keys, strict=True)]
    own: list[Identity] = [
        {key: value for key, value in identity.items() if key not in ("stage", "seed", "implant", "defend", "inspect")}
        for identity in (trial.implant, trial.defend, trial.evaluate)
    ]
    curves = {}
    for stage, key, result in zip(STAGES, keys, results, strict=True):
        if result and result.get("curves"):
            curves[f"{stage}/{key}"] = result["curves"]
    found: dict[str, Any] = {
        "keys": [f"{stage}/{key}" for stage, key, result in zip(STAGES, keys, results, strict=True) if result],
        "config": dict(zip(STAGES, own, strict=True)),
        "curves": curves,
        "command": command,
    }
    scored = trial.setting == "trainset" and all(results) and store.has("defend", keys[1], "findings")
    # Tensors may be damaged, or deleted for their room: the figures are still right.
    if scored and store.usable("defend", keys[1], "findings") and store.usable("implant", keys[0], "trigger"):
        found["roc"] = _roc(store, *keys[:2])
    if results[-1]:  # of the evaluation alone: a repair's `rounds` are other things
        found["more"] = {name: results[-1][name] for name in MORE if results[-1].get(name)}
    return found


def _roc(store: Store, implant: str, defend: str) -> dict[str, list[float]] | None:
    """Share of clean and of poisoned training images above each threshold; None if there are no scores or no poison."""
    from safetensors import safe_open
    from sklearn.metrics import roc_curve

    from attacks.base import POISON

    with safe_open(store.path("defend", defend, "findings"), framework="pt") as file:
        if "suspicion" not in set(file.keys()):
            return None
        scores = file.get_tensor("suspicion").float().numpy()
    with safe_open(store.path("implant", implant, "trigger"), framework="pt") as file:
        poisoned = (file.get_tensor("roles") == POISON).numpy()
    if not poisoned.any():
        return None
    fpr, tpr, _ = roc_curve(poisoned, scores)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def write(
    trials: pd.DataFrame,
    evidence: list[dict[str, Any]],
    protocol: list[str],
    folder: Path,
    title: str,
    reported: pd.DataFrame | None = None,
    plots: list[Path] | None = None,
) -> Path:
    """`leaderboard.html` in `folder`; the pictures of triggers that lie there are taken along.

    Args:
        evidence: of each trial, in the order of the table.
        plots: PNG files to be shown beneath the table.
    """
    data = _data(trials, evidence, protocol, title, reported)
    data["pictures"] = {path.name: _picture(path) for path in sorted(folder.glob("trigger_*.png"))}
    data["plots"] = [[path.stem.replace("_", " "), _picture(path)] for path in plots or [] if path.suffix == ".png"]
    path = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_fill(title, data), encoding="utf-8")
    return path


def _fill(title: str, data: dict[str, Any]) -> str:
    here = files("bench.reporting")
    # Inside a script element only `<` can end the data; as a number it is the same text to JSON.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "style": here.joinpath("page.css").read_text(encoding="utf-8"),
        "script": here.joinpath("page.js").read_text(encoding="utf-8"),
        "data": text,
    }
    template = here.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _number(value: float) -> float | str | None:
    """A figure for JSON, which has no word for infinity and none for no number."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _numbers(values: Any) -> list[float | str | None]:
    return [_number(float(value)) for value in values]


class _Shared:
    """Texts that many trials share, each kept once and named by its place."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))


def _data(
    trials: pd.DataFrame,
    evidence: list[dict[str, Any]],
    protocol: list[str],
    title: str,
    reported: pd.DataFrame | None,
) -> dict[str, Any]:
    trials = trials.reset_index(drop=True)
    measured = table.cells(trials)
    marked = table.marks(trials, measured)
    both = table.with_reported(measured, reported)
    columns = table.shown(both, everything=True)
    names = [column.name for column in columns]
    means, spreads = (both[[f"{name}_{end}" for name in names]].to_numpy(float) for end in ("mean", "std"))
    halves = [
        both[f"{name}_t95"].to_numpy(float) if f"{name}_t95" in both else np.full(len(both), np.nan) for name in names
    ]
    number = trials.groupby(table.AXES, sort=False).ngroup().to_numpy()
    order = np.lexsort((trials.seed.to_numpy(), number))
    ends = np.cumsum(np.bincount(number, minlength=len(measured)))
    per_cell: list[dict[int, int]] = [{} for _ in range(len(both))]
    for (index, name), mark in marked.cells.items():
        per_cell[index][names.index(name)] = 1 if mark == table.BEST else 2
    rates = [f"{100 * rate:g} %" if not math.isnan(rate) else "–" for rate in both.poison_rate]
    states = both[[table._field(state) for state in table.STATES]].to_numpy(int).tolist()
    listed = []
    for index, cell in enumerate(table.records(both)):
        start = int(ends[index - 1]) if 0 < index < len(ends) else 0
        listed.append(
            {
                "place": [
                    cell.dataset,
                    cell.model,
                    cell.variant,
                    cell.setting,
                    cell.attack,
                    rates[index],
                    cell.defense,
                ],
                "clean": bool(cell.poison_rate == 0),
                "base": cell.defense == table.BASELINE,
                "kind": cell.kind,
                "seeds": int(cell.seeds),
                "states": states[index],
                "means": _numbers(means[index]),
                "stds": _numbers(spreads[index]),
                "t95": _numbers(half[index] for half in halves),
                "marks": per_cell[index],
                "trials": [start, int(ends[index])] if index < len(ends) else [0, 0],
                "source": str(getattr(cell, "provenance", "") or ""),
                "picture": picture_of(cell.dataset, cell.model, cell.attack, cell.variant),
            }
        )
    configs, curves, commands = _Shared(), _Shared(), []
    points = FEW_POINTS if len(trials) > MANY else POINTS
    figures = trials[names].to_numpy(float)
    rows = []
    columns_of = [
        trials[name].tolist() for name in ("seed", "status", "reason", "warnings", "commit", "clean", "machine")
    ]
    drawn: dict[str, int] = {}
    for index in order:
        own = evidence[index] if index < len(evidence) else {}
        for key, curve in own.get("curves", {}).items():
            if key not in drawn:
                drawn[key] = curves.place(json.dumps({name: _thinned(line, points) for name, line in curve.items()}))
        command, _, _ = own.get("command", "").rpartition(" ")
        commands.append(command)
        rows.append(
            [
                *(column[index] for column in columns_of),
                _numbers(figures[index]),
                own.get("keys", []),
                [configs.place(json.dumps({k: v}, default=str)) for k, v in own.get("config", {}).items() if v],
                [drawn[key] for key in own.get("curves", {})],
                [[key, _plain(value)] for key, value in own.get("more", {}).items()],
            ]
        )
    implants = [(where, note) for where, part in table.parts(measured, table.BOARD) for note in table.implants(part)]
    for cell in listed:
        start, end = cell["trials"]
        cell["command"] = commands[start] if end > start else ""
    return {
        "title": title,
        "notes": [
            *(f"{', '.join(filter(None, where))}: {note}" for where, note in implants),
            *protocol,
            *table.RULES,
        ],
        "commits": table.commits_of(trials),
        "rankings": [[*place, ranking.ranks, ranking.sentence()] for place, ranking in marked.rankings.items()],
        "row_marks": [[*place, 1 if mark == table.BEST else 2] for place, mark in marked.rows.items()],
        "columns": [
            {
                "name": column.name,
                "title": column.title,
                "scale": 100 if column.unit == "%" else 1,
                "decimals": column.decimals,
                "sign": column.sign,
                "shown": column.shown,
                "about": column.about,
                "largest": column.name == "peak_memory_mib",
            }
            for column in columns
        ],
        "states": list(table.STATES),
        "high": table.HIGH_ASR,
        "cells": listed,
        "trials": rows,
        "configs": [json.loads(text) for text in configs.places],
        "curves": [json.loads(text) for text in curves.places],
    }


def _thinned(line: list[Any], points: int) -> list[list[Any]]:
    """At most so many points of a curve, first and last among them, with four digits."""
    chosen = line if len(line) <= points else [line[round(i * (len(line) - 1) / (points - 1))] for i in range(points)]
    return [
        [step, None if value is None or not math.isfinite(value) else float(f"{value:.4g}")] for step, value in chosen
    ]


def _plain(value: Any) -> Any:
    """JSON without its non-numbers, whatever a method or an evaluator left."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return _number(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
