"""From finished stages to the table of trials: one row for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from bench.engine.messages import shortened
from bench.experiment.trial import Trial
from bench.reporting.columns import COLUMN, COSTS, MEASURES
from bench.reporting.spreadsheet import literal
from bench.storage.store import STAGES, Store

AXES = ["dataset", "model", "variant", "threat_model", "attack", "defense"]  # what tells one cell from another


BOARD = AXES[:3]


TEXTS = [*AXES, "status", "reason", "warnings", "trial", "commit", "machine", "implant_weights"]


# Images that the defender had, the poisoned ones among them, and those that robust accuracy is measured on.
COUNTS = ("view_images", "view_poisoned", "robust_images")


FIGURES = ["poison_rate", *COUNTS, *(column.name for column in (*MEASURES, *COSTS))]


COLUMNS = [
    *AXES,
    "poison_rate",
    "seed",
    "status",
    "reason",
    *(column.name for column in (*MEASURES, *COSTS)),
    *COUNTS,
    "warnings",
    "commit",
    "clean",
    "machine",
    "implant_weights",
    "trial",
]


STATES = ("done", "not applicable", "wrecked", "diverged", "failed", "missing")


# What two rows of one trial must agree in, whoever computed them.
AGREE = [*(column.name for column in MEASURES), "status", "implant_weights"]


OUTCOMES = ("done", "wrecked", "diverged")  # no repeat would change these


LOST = ("wrecked", "diverged", "failed")  # these count against a method


BASELINE = "no_defense"


WRECKED = 0.10  # a repaired model that loses more clean accuracy than this has not been repaired


def trial_row(trial: Trial, store: Store) -> dict[str, Any]:
    """One trial as a row: its place in the grid, its state with the reason, its figures, its price."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    keys = trial.keys
    row |= {axis: getattr(trial, axis) for axis in (*AXES, "seed")}
    row["status"], row["reason"], row["trial"], row["implant_weights"] = "missing", "", keys[2], ""
    made: list[dict[str, Any]] = []
    row["poison_rate"] = trial.implant["attack"]["poison_rate"]
    if not trial.defend:
        return row | {"status": "not applicable", "reason": trial.reason, "trial": ""}
    for stage, key in zip(STAGES, keys, strict=True):
        result = store.brief(stage, key)
        if result is None:
            failure = store.failure(stage, key)
            if (
                failure is None
                and trial.clean_control
                and (control := store.failure("implant", trial.inspect["clean_control"]))
            ):
                failure = f"clean control: {control}"
            if failure is not None:
                row |= {"status": "failed", "reason": failure}
            elif damage := store.damage(stage, key):
                row["reason"] = f"{stage} is damaged: {damage}"
            return row
        row[f"{stage}_seconds"] = result["seconds"]
        row |= {name: result[name] for name in COUNTS if name in result}  # stores of earlier versions have none
        made.append(result["provenance"])
        if stage == "implant":
            row["implant_weights"] = _weights(store, key, result)
        if stage == "defend":
            row["peak_memory_mib"], row["defend_images"] = result["peak_memory_mib"], result["images"]
            # Stores of earlier versions have none of these.
            row["defend_gflop"], row["defend_updates"] = result.get("gflop"), result.get("updates")
    assert result is not None
    row |= {"status": result["status"], "reason": result.get("reason", "")}
    figures = result.get("figures", {})
    row |= {column.name: figures.get(column.name) for column in MEASURES}
    row["warnings"] = "; ".join(map(str, result.get("warnings", ())))
    # An implant can be older than what was done to it: every commit that had a hand in the figure is named.
    row["commit"] = " ".join(dict.fromkeys(origin["commit"] for origin in made if origin["commit"]))
    row["clean"] = all(origin["clean"] for origin in made)
    row["machine"] = "; ".join(dict.fromkeys(_machine(origin) for origin in made))
    return row


def _weights(store: Store, key: str, result: dict[str, Any]) -> str:
    """The digest of an infected model's weights; empty where neither it nor the weights were kept."""
    from safetensors import SafetensorError

    if "weights" in result:
        return str(result["weights"])
    path = store.folder("implant", key) / "model.safetensors"
    try:
        return _digest_of_file(path, path.stat().st_mtime_ns)
    except (OSError, SafetensorError):
        return ""


@functools.cache
def _digest_of_file(path: Path, written: int) -> str:
    """Of an implant that an earlier version stored without it."""
    from safetensors.torch import load_file

    from bench.engine.files import digest_of

    return digest_of(load_file(path), {})[:20]


def _machine(origin: dict[str, Any]) -> str:
    """What a stage was computed on."""
    versions = ", ".join(f"{name} {origin[name]}" for name in ("python", "torch", "timm") if name in origin)
    return f"{origin.get('device', 'unknown')}, {versions}"


def trial_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """All trials, typed and in one order, whether they come from the store, from MLflow or from a file."""
    return _wreck(_typed(rows))


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    # Before pandas sees them: a text that is no Unicode ends it. Most texts are those of thousands of rows.
    text_of = functools.cache(printable)
    table = pd.DataFrame(
        {name: [text_of(row.get(name)) if name in TEXTS else row.get(name) for row in rows] for name in COLUMNS}
    )
    for column in FIGURES:
        # Not to_numeric: it is off by a bit for some decimals.
        table[column] = table[column].astype("object").astype("float64")
    table["seed"] = table["seed"].astype("int64")
    table["clean"] = table["clean"].map({True: "True", False: "False", "True": "True", "False": "False"}).fillna("")
    for column in TEXTS:
        table[column] = table[column].astype("object")
    return table


def of_trials(
    trials: Sequence[Trial], store: Store, reused: Mapping[str, dict[str, Any]] | None = None
) -> pd.DataFrame:
    """The table of planned trials: one row for each, as `trial_row` has it.

    Args:
        published: rows that take the place of what the store has not finished, by the key of the evaluation.
    """
    rows = [trial_row(trial, store) for trial in trials]
    for row in rows:
        elsewhere = (reused or {}).get(row["trial"])
        if elsewhere and row["status"] not in OUTCOMES:
            # Under the name that this grid has for it: an ablation's row may be another grid's default.
            row |= {key: value for key, value in elsewhere.items() if key not in (*AXES, "seed")}
    return trial_table(rows)


def printable(text: Any) -> str:
    """The text with what no file and no terminal can show written as its number: \\x00, \\udcff."""
    text = "" if text is None or text != text else str(text)
    return (
        text
        if text.isprintable()
        else "".join(sign if sign.isprintable() or sign in "\n\t\u3000\xa0" else ascii(sign)[1:-1] for sign in text)
    )


def _wreck(table: pd.DataFrame) -> pd.DataFrame:
    """Tell apart the finished trials whose model lost what it was good for: their low ASR is no defense."""
    keys = [*BOARD, "attack", "seed"]
    done = table.status == "done"
    base = table[done & (table.defense == BASELINE)].drop_duplicates(keys)
    base = table[keys].merge(base[[*keys, "clean_accuracy", "implant_weights"]], on=keys, how="left")
    # Each evaluation has the accuracy of its own infected model. What earlier versions measured may lack it: there the
    # undefended model's stands in, unless that is another model's.
    other = (base.implant_weights.fillna("") != table.implant_weights.to_numpy()) & (
        base.implant_weights.fillna("") != ""
    )
    other &= (table.implant_weights != "").to_numpy()
    before = base.clean_accuracy.where(~other).to_numpy()
    before = np.where(table.infected_accuracy.isna(), before, table.infected_accuracy.to_numpy())
    lost = before - table.clean_accuracy.to_numpy()
    # Rounded: 0.8 - 0.7 is a little more than 0.1.
    wrecked = (done & (np.round(lost, 9) > WRECKED)).to_numpy()
    table.loc[wrecked, "status"] = "wrecked"
    table.loc[wrecked, "reason"] = [
        f"clean accuracy {100 * now:.1f}, {100 * gone:.1f} points below the infected model's"
        for now, gone in zip(table.clean_accuracy[wrecked], lost[wrecked], strict=True)
    ]
    return table


def read_trials(source: Path | IO[bytes], name: str = "") -> pd.DataFrame:
    """`trials.csv` as `write` left it.

    Args:
        name: what an error calls it; the path if it is one.

    Raises:
        UserError: it is no such table, a value is not one that its column can have, or two rows of one trial differ.
    """
    from bench.engine.errors import UserError

    source_name = str(name or source)
    try:
        table = pd.read_csv(source, keep_default_na=False, dtype=str).rename(columns=literal).map(literal)
        # An earlier version swept nothing, and had no such column.
        missing = [name for name in (*AXES, "seed", "status") if name not in table and name != "variant"]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        for column in FIGURES:
            if column in table:
                table[column] = table[column].replace("", "nan")
        _check_values(table, source_name)
        return _wreck(_once(_typed(table.to_dict("records")), source_name))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        text = shortened(str(error), 200)
        raise UserError(f"{source_name} is no trials.csv of this benchmark: {text}") from error


def _check_values(table: pd.DataFrame, source: str) -> None:
    """Refuse a value that its column cannot have, by row and column; the heading is row 1, as in a spreadsheet."""
    from bench.engine.errors import UserError

    def refuse(wrong: Any, name: str, due: str) -> None:
        rows = np.flatnonzero(wrong)
        if len(rows):
            more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
            raise UserError(f"{source}, row {rows[0] + 2}: {name} is {table[name].iloc[rows[0]]!r}{more}; write {due}")

    refuse(~table.status.isin(STATES), "status", f"one of {', '.join(STATES)}")
    seeds = pd.to_numeric(table.seed, errors="coerce")
    refuse(~(np.isfinite(seeds) & (seeds % 1 == 0)), "seed", "a whole number")
    for name in FIGURES:
        if name not in table:
            continue
        values = pd.to_numeric(table[name], errors="coerce")
        gap = table[name].str.lower().isin(["nan"])
        low, high, due = allowed_range(name)
        refuse(~gap & ~((values >= low) & (values <= high)), name, due)


def allowed_range(name: str) -> tuple[float, float, str]:
    """The least and the largest value of a figure, and how to write one."""
    column = COLUMN.get(name)
    if name in COUNTS or (column is not None and column.unit != "%"):
        return 0.0, math.inf, "a number, at least 0"
    low = 0.0 if column is None else column.low  # the poison rate is no column of results
    return low, 1.0, f"a number, a share in [{low:g}, 1] (0.93 for 93 %)"


def _once(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """One row of each trial.

    Raises:
        UserError: two rows of one trial contradict each other.
    """
    from bench.engine.errors import UserError

    cell = [*AXES, "seed"]
    for keys, judged in ((cell, [*AGREE, "trial"]), (["trial"], AGREE)):
        named = table[table.trial != ""] if keys == ["trial"] else table
        for _, group in named[named.duplicated(keys, keep=False)].groupby(keys, sort=False):
            (row, first), *others = group.iterrows()
            for other, again in others:
                if name := contradiction(first, again, judged):
                    what = "/".join(str(first[axis]) for axis in cell if first[axis] != "")
                    raise UserError(
                        f"{source}: rows {int(str(row)) + 2} and {int(str(other)) + 2} are one trial ({what}), "
                        f"with {name} {first[name]!r} and {again[name]!r}; leave the one that is right"
                    )
    return table.drop_duplicates(cell).reset_index(drop=True)


def contradiction(one: Any, two: Any, judged: Sequence[str] | None = None) -> str:
    """The first column in which two rows of one trial disagree; empty if they agree in all that is the same each time.

    Seconds and memory may differ; weights that one of them does not know are no contradiction.
    """
    for name in judged or AGREE:
        a, b = one[name], two[name]
        unknown = name == "implant_weights" and "" in (a, b)
        if not unknown and a != b and not (a != a and b != b):
            return name
    return ""


def infected(trials: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Which infected model each finished trial is about, as a text; empty where nothing is finished.

    The digest of its weights. Where that was not recorded, its own accuracy and ASR: two models that differ in them
    are two, and two that do not may still be.
    """
    figures = [f"{acc!r} {asr!r}" for acc, asr in zip(trials.infected_accuracy, trials.infected_asr, strict=True)]
    told = np.where(trials.implant_weights != "", trials.implant_weights, figures)
    return np.where(trials.status.isin(["done", "wrecked"]), told, "")


def elsewhere(trials: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Which trials are about another infected model than most of their data set, attack and seed.

    Training amplifies rounding: the same settings give another infected model on another kind of device. What was
    measured of it is a figure like any other, and no pair of those beside it.
    """
    keys = [*BOARD, "attack", "seed"]
    all_of = trials[keys].assign(model_of=infected(trials))
    told = all_of[all_of.model_of != ""]
    counts = told.groupby([*keys, "model_of"], sort=False).size().reset_index(name="count")
    usual = counts.sort_values("count", ascending=False, kind="stable").drop_duplicates(keys)
    most = all_of[keys].merge(usual.drop(columns="count"), on=keys, how="left").model_of
    return ((all_of.model_of != "").to_numpy()) & (all_of.model_of.to_numpy() != most.to_numpy())
