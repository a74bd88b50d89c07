"""One HTML file with everything in it: the leaderboard, and behind each figure its trials, curves and command.

It opens from a file:// address and asks nobody for anything. The figures are those of the other tables; the script of
the page only filters, sorts and shows them. Of a grid of thousands of trials, what stands behind the figures lies in
files beside the page, which loads them when they are asked for.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.experiment.trial import Trial
from bench.reporting import board
from bench.reporting.board import commits_of
from bench.reporting.cells import groups_of, records, state_column
from bench.reporting.columns import Column
from bench.reporting.marks import BEST, HIGH_ASR, RULES, Comparison, compare, shown
from bench.reporting.reported import with_reported
from bench.reporting.trials import AXES, BASELINE, BOARD, STATES
from bench.storage.store import STAGES, Identity, Store

NAME = "leaderboard.html"
DETAILS = "leaderboard_details_"  # and a number: the files of a large grid
POINTS = 100  # of a curve that is drawn; the store has them all
MORE = ("steps", "relearn", "autoattack", "connection", "asr_by_class")  # of an evaluation, beside its figures
MANY, FEW_POINTS = 2000, 30  # beyond so many trials a page with whole curves would take seconds to open
SPLIT = 6_000_000  # characters of details beyond which they lie in files beside the page
PART = 1_000_000  # characters in one of these files, about


def picture_of(dataset: str, model: str, attack: str, variant: str = "") -> str:
    """The name of the file that shows a trigger; some attacks find theirs on the network.

    The digest tells names apart that read the same once they are fit for a file.
    """
    labels = [dataset, model, attack, *([swept(variant)] if swept(variant) else [])]
    digest = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:12]
    return "trigger_" + re.sub(r"[^a-zA-Z0-9-]", "_", "_".join(labels))[:150] + f"_{digest}.png"


def swept(variant: str) -> str:
    """What a variant changes of the attack: only that can change what its trigger looks like."""
    return ", ".join(pair for pair in variant.split(", ") if pair.startswith("attack."))


def details_of(trial: Trial, store: Store, command: str) -> dict[str, Any]:
    """What stands behind a trial: where it is stored, its settings, its curves, and how to compute it again."""
    keys = trial.keys
    results = [store.result(stage, key) if key else None for stage, key in zip(STAGES, keys, strict=True)]
    identities: list[Identity] = [
        {key: value for key, value in identity.items() if key not in ("stage", "seed", "implant", "defend", "inspect")}
        for identity in (trial.implant, trial.defend, trial.evaluate)
    ]
    curves = {}
    for stage, key, result in zip(STAGES, keys, results, strict=True):
        if result and result.get("curves"):
            curves[f"{stage}/{key}"] = result["curves"]
    details: dict[str, Any] = {
        "keys": [f"{stage}/{key}" for stage, key, result in zip(STAGES, keys, results, strict=True) if result],
        "config": dict(zip(STAGES, identities, strict=True)),
        "curves": curves,
        "command": command,
    }
    scored = trial.threat_model == "trainset" and all(results) and store.has("defend", keys[1], "findings")
    # Tensors may be damaged, or deleted for their room: the figures are still right.
    if scored and store.usable("defend", keys[1], "findings") and store.usable("implant", keys[0], "trigger"):
        details["roc"] = _roc(store, *keys[:2])
    if results[-1]:  # of the evaluation alone: a repair's `steps` are other things
        details["more"] = {name: results[-1][name] for name in MORE if results[-1].get(name)}
    return details


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


class Details:
    """What the page shows behind each trial, kept as JSON: as Python objects, it would be most of a report's memory.

    Attributes:
        size: characters of it.
        drawn: of each trial, what the figures of `plots` are drawn from.
    """

    def __init__(self, details: Iterable[dict[str, Any]], count: int) -> None:
        """Take in what `details` found, in the order of the table.

        Args:
            count: how many trials there are.
        """
        self.size = 0
        self.drawn: list[dict[str, Any]] = []
        self._points = FEW_POINTS if count > MANY else POINTS
        self._configs: dict[str, int] = {}
        self._curves: dict[str, str] = {}
        self._commands: list[str] = []
        self._rows: list[tuple[str, list[int], list[str], str]] = []
        for trial_details in details:
            self._add(trial_details)

    def _add(self, trial_details: dict[str, Any]) -> None:
        for key, curves in trial_details.get("curves", {}).items():
            if key not in self._curves:
                self._curves[key] = _json({name: _thinned(line, self._points) for name, line in curves.items()})
                self.size += len(self._curves[key])
        configs = [_settings({key: value}) for key, value in trial_details.get("config", {}).items() if value]
        more = _json([[key, _plain(value)] for key, value in trial_details.get("more", {}).items()])
        keys = _json(trial_details.get("keys", []))
        numbers = [self._configs.setdefault(text, len(self._configs)) for text in configs]
        self._rows.append((keys, numbers, list(trial_details.get("curves", {})), more))
        self._commands.append(trial_details.get("command", "").rpartition(" ")[0])
        self.size += len(keys) + len(more)
        self.drawn.append({name: trial_details[name] for name in ("roc", "more") if name in trial_details})

    def command(self, index: int) -> str:
        """That of a trial, without its last word, which names the seed."""
        return self._commands[index] if index < len(self._commands) else ""

    def part(self, indices: Iterable[int], figures: Callable[[int], list[Any]]) -> str:
        """`trials`, `configs` and `curves` of these trials, as the inside of a JSON object.

        Args:
            figures: the first entries of a trial's row.
        """
        configs: dict[int, int] = {}
        curves: dict[str, int] = {}
        rows = []
        for index in indices:
            keys, numbers, drawn, more = self._rows[index] if index < len(self._rows) else ("[]", [], [], "[]")
            columns = [[configs.setdefault(number, len(configs)) for number in numbers]]
            columns.append([curves.setdefault(key, len(curves)) for key in drawn])
            rows.append(f"{_json(figures(index))[:-1]},{keys},{columns[0]},{columns[1]},{more}]")
        texts = list(self._configs)
        parts = {
            "trials": rows,
            "configs": [texts[number] for number in configs],
            "curves": [self._curves[key] for key in curves],
        }
        return ",".join(f'"{name}":[{",".join(entries)}]' for name, entries in parts.items())


def write(
    trials: pd.DataFrame,
    details: Details | list[dict[str, Any]],
    protocol: list[str],
    folder: Path,
    title: str,
    reported: pd.DataFrame | None = None,
    plots: list[Path] | None = None,
    comparison: Comparison | None = None,
) -> Path:
    """`leaderboard.html` in `folder`, with the pictures of triggers that lie there; a large grid's details beside it.

    Args:
        details: of each trial, in the order of the table.
        plots: PNG files to be shown beneath the table.
        comparison: of these trials, where it is computed already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{DETAILS}*.js"):
        path.unlink()  # of an earlier report
    details = details if isinstance(details, Details) else Details(details, len(trials))
    data, inline, parts = _data(trials, comparison or compare(trials), details, protocol, title, reported)
    data["pictures"] = {path.name: _picture(path) for path in sorted(folder.glob("trigger_*.png"))}
    data["plots"] = [[path.stem.replace("_", " "), _picture(path)] for path in plots or [] if path.suffix == ".png"]
    data["parts"] = [f"{DETAILS}{number}.js" for number in range(len(parts))]
    for number, (name, content) in enumerate(zip(data["parts"], parts, strict=True)):
        (folder / name).write_text(f"(window.parts ??= {{}})[{number}] = {content};\n", encoding="utf-8")
    path = folder / NAME
    path.write_text(_fill(title, data, inline), encoding="utf-8")
    return path


# Made once: a page of 20,000 trials takes 150,000 texts.
_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_settings = json.JSONEncoder(default=str).encode


def _fill(title: str, data: dict[str, Any], details: str) -> str:
    here = files("bench.reporting")
    text = _json(data)
    if details:
        text = f"{text[:-1]},{details[1:]}"
    # Inside a script element only `<` can end the data; as a number it is the same text to JSON.
    text = text.replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "style": here.joinpath("page.css").read_text(encoding="utf-8"),
        "script": here.joinpath("page.js").read_text(encoding="utf-8"),
        "data": text,
        # Nothing is loaded but what lies beside the page.
        "beside": " 'self' file:" if data["parts"] else "",
    }
    template = here.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _number(value: float) -> float | str | None:
    """A figure for JSON, which has no word for infinity and none for no number."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _brief(column: Column, value: float) -> float | str | None:
    """A figure that nothing is computed from: with six digits, where that is the same in print."""
    short = float(f"{value:.6g}")
    return _number(short if column.text(short) == column.text(value) else value)


def _numbers(values: Any) -> list[float | str | None]:
    return [_number(float(value)) for value in values]


def _data(
    trials: pd.DataFrame,
    comparison: Comparison,
    details: Details,
    protocol: list[str],
    title: str,
    reported: pd.DataFrame | None,
) -> tuple[dict[str, Any], str, list[str]]:
    """What the page holds, and the details as JSON: all of them to be put on the page, or in parts to lie beside it."""
    trials = trials.reset_index(drop=True)
    measured, marked = comparison
    both = with_reported(measured, reported)
    columns = shown(both, everything=True)
    names = [column.name for column in columns]
    means, spreads = (both[[f"{name}_{end}" for name in names]].to_numpy(float) for end in ("mean", "std"))
    halves = [
        both[f"{name}_t95"].to_numpy(float) if f"{name}_t95" in both else np.full(len(both), np.nan) for name in names
    ]
    number = trials.groupby(AXES, sort=False).ngroup().to_numpy()
    order = np.lexsort((trials.seed.to_numpy(), number))
    ends = np.cumsum(np.bincount(number, minlength=len(measured)))
    per_cell: list[dict[int, int]] = [{} for _ in range(len(both))]
    for (index, name), mark in marked.cells.items():
        per_cell[index][names.index(name)] = 1 if mark == BEST else 2
    rates = [f"{100 * rate:g} %" if not math.isnan(rate) else "–" for rate in both.poison_rate]
    states = both[[state_column(state) for state in STATES]].to_numpy(int).tolist()
    listed = []
    for index, cell in enumerate(records(both)):
        start = int(ends[index - 1]) if 0 < index < len(ends) else 0
        listed.append(
            {
                "place": [
                    cell.dataset,
                    cell.model,
                    cell.variant,
                    cell.threat_model,
                    cell.attack,
                    rates[index],
                    cell.defense,
                ],
                "clean": bool(cell.poison_rate == 0),
                "base": cell.defense == BASELINE,
                "other": index in marked.elsewhere,
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
    figures = trials[names].to_numpy(float)
    columns_of = [
        trials[name].tolist() for name in ("seed", "status", "reason", "warnings", "commit", "clean", "machine")
    ]

    def row(index: int) -> list[Any]:
        return [*(column[index] for column in columns_of), _numbers(figures[index])]

    size = details.size + len(trials) * (300 + 20 * len(names))  # a figure has about 20 characters
    split = size > SPLIT
    room = -(-len(trials) * PART // max(1, size))  # trials in a part
    parts: list[str] = []
    taken: list[int] = []  # the cells of the next part

    def close() -> None:
        """Make a part of what was taken; the places of its trials are counted from its own first."""
        first, last = listed[taken[0]]["trials"][0], listed[taken[-1]]["trials"][1]
        of_row = {}
        for number in taken:
            cell = listed[number]
            cell["trials"] = [place - first for place in cell["trials"]]
            cell["part"] = len(parts)
            of_row[number] = {name: cell.pop(name) for name in ("command", "t95")}
        parts.append(f'{{"cells":{_json(of_row)},{details.part(order[first:last], row)}}}')
        taken.clear()

    for index, cell in enumerate(listed):
        begin, stop = cell["trials"]
        cell["command"] = next(filter(None, map(details.command, order[begin:stop])), "")
        if split:
            cell["stds"] = [_brief(column, value) for column, value in zip(columns, spreads[index], strict=True)]
            if stop == begin:
                continue  # others report it
            taken.append(index)
            if stop - listed[taken[0]]["trials"][0] >= room:
                close()
    if taken:
        close()
    implants = [(where, note) for where, group in groups_of(measured, BOARD) for note in board.implants(group)]
    data = {
        "title": title,
        "notes": [
            *(f"{', '.join(filter(None, where))}: {note}" for where, note in implants),
            *protocol,
            *RULES,
        ],
        "commits": commits_of(trials),
        "rankings": [[*place, ranking.ranks, ranking.sentence()] for place, ranking in marked.rankings.items()],
        "row_marks": [[*place, 1 if mark == BEST else 2] for place, mark in marked.rows.items()],
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
        "states": list(STATES),
        "high": HIGH_ASR,
        "cells": listed,
    }
    return data, "" if split else f"{{{details.part(order, row)}}}", parts


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
