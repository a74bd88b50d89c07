"""From finished stages to a leaderboard: one row for each trial, then one for each cell, then what people read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bench.grid import Trial
from bench.store import STAGES, Store

AXES = ["dataset", "model", "variant", "setting", "attack", "defense"]
MEASURES = ["clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy", "detection_auroc"]
COSTS = ["implant_seconds", "defend_seconds", "evaluate_seconds", "peak_memory_mib", "defend_images"]
TEXTS = [*AXES, "status", "reason", "trial", "commit"]
FIGURES = ["poison_rate", *MEASURES, *COSTS]
COLUMNS = [*AXES, "poison_rate", "seed", "status", "reason", *MEASURES, *COSTS, "commit", "clean", "trial"]

STATES = ("done", "not applicable", "diverged", "failed", "missing")


def trial_row(trial: Trial, store: Store) -> dict[str, Any]:
    """One trial as a row: its place in the grid, its state with the reason, its figures, its price."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {axis: getattr(trial, axis) for axis in (*AXES, "seed")}
    row["status"], row["reason"], row["trial"] = "missing", "", trial.keys()[2]
    made: list[dict[str, Any]] = []
    row["poison_rate"] = trial.implant["attack"]["poison_rate"]
    if not trial.defend:
        return row | {"status": "not applicable", "reason": trial.reason, "trial": ""}
    for stage, key in zip(STAGES, trial.keys(), strict=True):
        result = store.result(stage, key)
        if result is None:
            failure = store.failure(stage, key)
            if failure is not None:
                # A training that ended in NaN is no bug, and no accident: it has a name of its own.
                row["status"] = "diverged" if f"{stage}: Diverged:" in failure else "failed"
                row["reason"] = failure
            return row
        row[f"{stage}_seconds"] = result["seconds"]
        made.append(result["provenance"])
        if stage == "defend":
            row["peak_memory_mib"], row["defend_images"] = result["peak_memory_mib"], result["images"]
    assert result is not None
    row |= {"status": result["status"], "reason": result.get("reason", "")}
    row |= {name: value for name, value in result.get("figures", {}).items() if name in MEASURES}
    # An implant can be older than what was done to it: every commit that had a hand in the figure is named.
    row["commit"] = " ".join(dict.fromkeys(origin["commit"] for origin in made if origin["commit"]))
    row["clean"] = all(origin["clean"] for origin in made)
    return row


def trial_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """All trials, typed and in one order, whether they come from the store or from MLflow."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    for column in FIGURES:
        table[column] = pd.to_numeric(table[column]).astype("float64")
    table["seed"] = table["seed"].astype("int64")
    table["clean"] = table["clean"].map({True: "True", False: "False", "True": "True", "False": "False"}).fillna("")
    for column in TEXTS:
        table[column] = table[column].fillna("").astype("object")
    return table


def cells(trials: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell: mean, sample standard deviation and number of seeds of each figure.

    Only finished trials are averaged; a diverged one is counted in its own column, never averaged.
    """
    rows = []
    for place, group in trials.groupby(AXES, sort=False):
        row: dict[str, Any] = dict(zip(AXES, place, strict=True))
        done = group[group.status == "done"]
        row["seeds"] = len(group)
        row |= {state.replace(" ", "_"): int((group.status == state).sum()) for state in STATES}
        for name in FIGURES:
            values = (group if name == "poison_rate" else done)[name].dropna()
            row[f"{name}_mean"] = values.mean() if len(values) else math.nan
            row[f"{name}_std"] = values.std(ddof=1) if len(values) > 1 else math.nan
        for state in STATES[1:4]:
            reasons = group[group.status == state].reason
            row[f"{state.replace(' ', '_')}_reason"] = reasons.iloc[0] if len(reasons) else ""
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass
class Board:
    """A leaderboard as text: for one data set and architecture.

    Attributes:
        rows: cells as (text, is the best of its column); a row of one cell is a heading.
        notes: printed beneath.
    """

    title: str
    header: list[str]
    rows: list[list[tuple[str, bool]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        def line(texts: list[str]) -> str:
            return "| " + " | ".join(texts) + " |"

        lines = [
            f"### {self.title}",
            "",
            line(self.header),
            line(["---"] + ["---:"] * (len(self.header) - 1)),
        ]
        for row in self.rows:
            texts = [_bold(_safe(text)) if best else _safe(text) for text, best in row]
            lines.append(line(texts + [""] * (len(self.header) - len(texts))))
        return "\n".join([*lines, "", *(f"- {_safe(note)}" for note in self.notes), ""])


def _bold(text: str) -> str:
    """Bold for the figure that was compared: of `accuracy / ASR`, the ASR."""
    rest, slash, figure = text.rpartition(" / ")
    return f"{rest}{slash}**{figure}**"


def _safe(text: str) -> str:
    """Text that stays text in a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def boards(trials: pd.DataFrame, protocol: list[str]) -> list[Board]:
    """The leaderboards of a grid, one for each data set, architecture and combination of swept settings.

    Rows are grouped by what the defender owns: one with clean data is not the rival of one without. In each group the
    undefended model comes first, then defenses by their mean ASR; those with a cell that is not done come last.
    """
    table = cells(trials)
    found = []
    for (data, model, variant), part in table.groupby(["dataset", "model", "variant"], sort=False):
        attacks = list(dict.fromkeys(part.attack))
        clean = set(part[part.poison_rate_mean == 0].attack)  # nothing was poisoned: no ASR
        header = ["defense", *(f"{a} ACC" if a in clean else f"{a} ACC / ASR" for a in attacks)]
        header += ["mean ACC", "mean ASR", "mean recovery", "mean robust", "seconds", "MiB"]
        board = Board(", ".join(str(name) for name in (data, model, variant) if name), header)
        for setting, group in part.groupby("setting", sort=False):
            board.rows.append([(f"setting: {setting}", False)])
            board.rows += _group(group, attacks, clean)
        board.notes = _notes(part, trials) + protocol
        found.append(board)
    return found


def _group(group: pd.DataFrame, attacks: list[str], clean: set[str]) -> list[list[tuple[str, bool]]]:
    """The rows of one setting."""
    lines = []
    for name, row in group.groupby("defense", sort=False):
        by_attack: dict[str, Any] = {str(cell.attack): cell for cell in row.itertuples()}
        whole = all(cell.done == cell.seeds for cell in by_attack.values())
        infected = row[~row.attack.isin(clean)]
        means = {
            "clean_accuracy": row.clean_accuracy_mean.mean(),
            **{key: infected[f"{key}_mean"].mean() for key in ("asr", "recovery_accuracy")},
            "robust_accuracy": row.robust_accuracy_mean.mean(),
            "defend_seconds": row.defend_seconds_mean.mean(),
            "peak_memory_mib": row.peak_memory_mib_mean.max(),
        }
        lines.append((str(name), by_attack, whole, means))
    lines.sort(key=lambda line: (line[0] != "no_defense", not line[2], _or_inf(line[3]["asr"])))
    rivals = [line for line in lines if line[0] != "no_defense" and line[2]]

    def best(of: Callable[[Any], float], sign: float) -> float:
        values = [sign * of(line) for line in rivals if not math.isnan(of(line))]
        return sign * min(values) if values else math.nan

    def is_best(line: Any, of: Callable[[Any], float], sign: float) -> bool:
        # Equal in print is equal: a difference that cannot be seen is not worth a bold figure.
        value = best(of, sign)
        return line in rivals and not math.isnan(value) and _percent(of(line)) == _percent(value)

    rows = []
    for line in lines:
        name, by_attack, whole, means = line
        out: list[tuple[str, bool]] = [(name, False)]
        for attack in attacks:

            def figure(line: Any, attack: str = attack) -> float:
                cell = line[1][attack]
                return float(cell.clean_accuracy_mean if attack in clean else cell.asr_mean)

            out.append((_cell(by_attack[attack]), is_best(line, figure, -1 if attack in clean else 1)))
        mark = "" if whole else "†"
        for key, sign in (
            ("clean_accuracy", -1),
            ("asr", 1),
            ("recovery_accuracy", -1),
            ("robust_accuracy", -1),
        ):
            text = _percent(means[key]) + (mark if not math.isnan(means[key]) else "")
            out.append((text, is_best(line, lambda other, key=key: other[3][key], sign)))  # type: ignore[misc]
        out += [(_number(means["defend_seconds"]), False), (_number(means["peak_memory_mib"]), False)]
        rows.append(out)
    return rows


def _cell(cell: Any) -> str:
    """`93.4±0.2 / 1.2±0.4`, with what is not done beside it; or the state, where nothing is."""
    others = [
        f"{getattr(cell, state.replace(' ', '_'))} {state}"
        for state in STATES[1:]
        if getattr(cell, state.replace(" ", "_"), 0)
    ]
    if cell.not_applicable == cell.seeds:
        return "n/a"
    if not cell.done:
        return ", ".join(text.split(" ", 1)[1] for text in others)
    text = _spread(cell.clean_accuracy_mean, cell.clean_accuracy_std)
    if not math.isnan(cell.asr_mean):
        text += " / " + _spread(cell.asr_mean, cell.asr_std)
    return f"{text} ({', '.join(others)})" if others else text


def _spread(mean: float, std: float) -> str:
    return _percent(mean) if math.isnan(std) else f"{_percent(mean)}±{_percent(std)}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _notes(part: pd.DataFrame, trials: pd.DataFrame) -> list[str]:
    notes = []
    for state in STATES[1:-1]:
        count, reason = state.replace(" ", "_"), f"{state.replace(' ', '_')}_reason"
        for _, cell in part[part[count] > 0].drop_duplicates(["defense", "setting", reason]).iterrows():
            notes.append(f"{state}: {cell.defense} against {cell.attack}: {cell[reason]}")
    if (part.missing > 0).any():
        notes.append(f"missing: {int(part.missing.sum())} trials are not computed yet; run the grid to fill them")
    if (part.done < part.seeds).any():
        notes.append("† a mean over finished cells only; such a row is not ranked and nothing in it is bold")
    commits = sorted(
        {
            f"{commit[:10]}{'' if clean == 'True' else ' (changed)'}"
            for several, clean in zip(trials.commit, trials.clean, strict=True)
            for commit in several.split()
        }
    )
    if commits:
        notes.append(f"commit: {', '.join(commits)}")
    return notes


def write(trials: pd.DataFrame, protocol: list[str], folder: Path, title: str) -> list[Board]:
    """`leaderboard.md`, `leaderboard.csv` (a row for each cell) and `trials.csv` (a row for each trial)."""
    folder.mkdir(parents=True, exist_ok=True)
    found = boards(trials, protocol)
    text = f"# {title}\n\n" + "\n".join(board.markdown() for board in found)
    (folder / "leaderboard.md").write_text(text)
    cells(trials).to_csv(folder / "leaderboard.csv", index=False)
    trials.to_csv(folder / "trials.csv", index=False)
    return found
