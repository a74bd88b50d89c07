"""A leaderboard as rows of entries with notes, and as Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from bench.reporting.cells import groups_of, records, state_column
from bench.reporting.columns import COLUMN, COSTS, MEASURES, Column
from bench.reporting.marks import ALIKE, BEST, COSTLY, HIGH_ASR, RULES, STRONG, Marks, attacks_of, compare, shown
from bench.reporting.reported import with_reported
from bench.reporting.trials import BASELINE, BOARD, STATES, elsewhere


@dataclass(frozen=True)
class Entry:
    """One cell of a printed table.

    Attributes:
        parts: figures as (text, mark), e.g. clean accuracy and ASR.
        note: what is not done beside them, e.g. `1 diverged`; or why there is no figure.
    """

    parts: tuple[tuple[str, str], ...]
    note: str = ""

    @property
    def text(self) -> str:
        figures = " / ".join(text for text, _ in self.parts)
        return f"{figures} ({self.note})" if figures and self.note else figures or self.note


@dataclass
class Board:
    """A leaderboard as text: for one data set, architecture and combination of swept settings.

    Attributes:
        rows: a row of one entry is a heading.
        notes: printed beneath.
    """

    title: str
    header: list[str]
    rows: list[list[Entry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        def line(texts: list[str]) -> str:
            return "| " + " | ".join(texts) + " |"

        lines = [
            f"### {escape_markdown(self.title)}",
            "",
            line([escape_markdown(text) for text in self.header]),
            line(["---"] + ["---:"] * (len(self.header) - 1)),
        ]
        around = {BEST: "**", ALIKE: "*", "": ""}
        for row in self.rows:
            texts = []
            for entry in row:
                figures = " / ".join(
                    f"{around[mark]}{escape_markdown(text)}{around[mark]}" for text, mark in entry.parts
                )
                note = escape_markdown(entry.note)
                texts.append(f"{figures} ({note})" if figures and note else figures or note)
            lines.append(line(texts + [""] * (len(self.header) - len(texts))))
        return "\n".join([*lines, "", *(f"- {_note(note)}" for note in self.notes), ""])


def escape_markdown(text: str) -> str:
    """Text that stays text in a Markdown table."""
    text = " ".join(text.split())
    for sign in "\\`*_[]~$":  # $ is mathematics and ~ strikes through on some sites
        # In the names of ours, a _ between letters is no mark of Markdown.
        text = text.replace(sign, f"\\{sign}") if sign != "_" else _outer_underscores(text)
    return text.replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")


def _note(text: str) -> str:
    """A line beneath a table; a command is code, so that a shell can be given it as it stands."""
    name, _, command = text.partition(": ")
    if name != "command" or "`" in command or "\n" in command:
        return escape_markdown(text)
    return f"command: `{command}`"


def _outer_underscores(text: str) -> str:
    inside = [
        index and index + 1 < len(text) and text[index - 1].isalnum() and text[index + 1].isalnum()
        for index in range(len(text))
    ]
    return "".join(f"\\{sign}" if sign == "_" and not inner else sign for sign, inner in zip(text, inside, strict=True))


def boards(trials: pd.DataFrame, protocol: list[str], reported: pd.DataFrame | None = None) -> list[Board]:
    """The leaderboards of a grid, one for each data set, architecture and combination of swept settings.

    Rows are grouped by what the defender owns: one with clean data is not the rival of one without. In each group the
    undefended model comes first, then defenses by their mean ASR; those with a cell that is not done come last.
    """
    cells, marked = compare(trials)
    return build_boards(trials, with_reported(cells, reported), marked, protocol)


def build_boards(trials: pd.DataFrame, table: pd.DataFrame, marked: Marks, protocol: list[str]) -> list[Board]:
    built = []
    columns = shown(table)
    for group_key, group_cells in groups_of(table, BOARD):
        group_key = tuple(map(str, group_key))
        attacks = list(dict.fromkeys(group_cells.attack))
        clean = set(group_cells[group_cells.poison_rate == 0].attack)  # nothing was poisoned: no ASR
        header = ["defense", *(f"{a} ACC" if a in clean else f"{a} ACC / ASR" for a in attacks)]
        header += ["mean ACC", "mean ASR", "median ASR", f"ASR > {100 * HIGH_ASR:.0f} %", "rank"]
        rest = [column for column in columns if column.name not in ("clean_accuracy", "asr")]
        header += [column.title if column in COSTS else f"mean {column.title}" for column in rest]
        board = Board(", ".join(name for name in group_key if name), header)
        sources = []
        for (kind, threat_model), group in groups_of(group_cells, ["kind", "threat_model"]):
            remark = "" if kind == "measured" else "; reported, not measured here, not ranked"
            board.rows.append([Entry(((f"threat model: {threat_model or 'not named'}{remark}", ""),))])
            group = group[~_foreign(group)]  # a row of nothing but n/a tells nothing; the notes name it
            board.rows += _group((*group_key, str(threat_model)), group, attacks, clean, rest, marked)
            if kind == "reported":
                sources += [
                    f"reported: {name}: {source}{f' ({protocol_})' if protocol_ else ''}"
                    for name, source, protocol_ in dict.fromkeys(
                        zip(group.defense, group.provenance, group.protocol, strict=True)
                    )
                ]
        rankings = [
            f"threat model {threat_model}: {ranking.sentence()}"
            for (*where, threat_model), ranking in marked.rankings.items()
            if tuple(where) == group_key
        ]
        group_trials = trials[(trials[BOARD].astype(str) == list(group_key)).all(axis=1)]
        board.notes = (
            _notes(group_cells[group_cells.kind == "measured"], group_trials)
            + sources
            + rankings
            + list(RULES)
            + protocol
        )
        built.append(board)
    return built


def summary(row: pd.DataFrame) -> dict[str, float]:
    """The figures of one defense over its attacks: the mean of each, the median ASR, how many ASR are high.

    Memory is the largest. NaN where no cell has the figure.
    """
    values_by_name = {}
    for column in (*MEASURES, *COSTS):
        values = row[f"{column.name}_mean"]
        values_by_name[column.name] = float(values.max() if column.name == "peak_memory_mib" else values.mean())
    asr = row.asr_mean.dropna()
    values_by_name |= {
        "asr_median": float(asr.median()),
        "asr_high": int((asr > HIGH_ASR).sum()),
        "asr_cells": len(asr),
    }
    return values_by_name


def _group(
    group_key: tuple[str, ...],
    group: pd.DataFrame,
    attacks: list[str],
    clean: set[str],
    rest: list[Column],
    marked: Marks,
) -> list[list[Entry]]:
    """The rows of one setting."""
    lines = []
    reported = bool((group.kind == "reported").any())
    over = {
        column.name: set(attacks_of(group, column.name)) for column in (*rest, COLUMN["clean_accuracy"], COLUMN["asr"])
    }
    for name, row in groups_of(group, "defense"):
        whole = bool((row.done == row.seeds).all() or reported)
        lines.append((str(name), row, whole, summary(row)))
    lines.sort(key=lambda line: (line[1].defense.iloc[0] != BASELINE, not line[2], _or_inf(line[3]["asr"])))
    ranking = None if reported else marked.rankings.get(group_key)
    rows = []
    for name, row, whole, means in lines:

        def mark(figure: str, name: str = name) -> str:
            return "" if reported else marked.rows.get((*group_key, name, figure), "")

        def mean(figure: str, column: Column, means: dict[str, float] = means, row: pd.DataFrame = row) -> Entry:
            text = column.text(means[figure])
            cells = row[row.attack.isin(over[column.name])]
            whole = reported or (cells.done == cells.seeds).all()
            return Entry(((text + ("" if whole or text == "–" or column in COSTS else "†"), mark(figure)),))

        by_attack = {str(label): (index, cell) for label, index, cell in _cells_of(row)}
        out = [Entry(((name, ""),))]
        out += [_entry(*by_attack[a], a in clean, marked) if a in by_attack else Entry((("–", ""),)) for a in attacks]
        out += [mean("clean_accuracy", COLUMN["clean_accuracy"]), mean("asr", COLUMN["asr"])]
        out += [mean("asr_median", COLUMN["asr"])]
        out.append(Entry(((f"{means['asr_high']} of {means['asr_cells']}" if means["asr_cells"] else "–", ""),)))
        rank = ranking.ranks.get(name) if ranking else None
        out.append(Entry((("–" if rank is None else f"{rank:.1f}", mark("rank")),)))
        out += [mean(column.name, column) for column in rest]
        rows.append(out)
    return rows


def _cells_of(row: pd.DataFrame) -> list[tuple[str, int, Any]]:
    return [(label, index, cell) for label, index, cell in zip(row.attack, row.index, records(row), strict=True)]


def _entry(index: int, cell: Any, is_clean: bool, marked: Marks) -> Entry:
    """`93.4±0.2 / 1.2±0.4`, with what is not done beside it; or the state, where nothing is."""
    reported = cell.kind == "reported"
    others = [] if reported else [(state, getattr(cell, state_column(state))) for state in STATES[1:]]
    others = [(state, count) for state, count in others if count]
    if not reported and cell.not_applicable == cell.seeds:
        return Entry((), "n/a")
    if not reported and not cell.done:
        return Entry((), ", ".join(state for state, _ in others))
    marked_texts = []
    for name in ("clean_accuracy", "asr"):
        value = getattr(cell, f"{name}_mean", math.nan)
        if name == "clean_accuracy" or not (math.isnan(value) if reported else is_clean or math.isnan(value)):
            mark = marked.cells.get((index, name), "") if (name == "asr" or is_clean) and not reported else ""
            marked_texts.append((COLUMN[name].spread(value, getattr(cell, f"{name}_std", math.nan)), mark))
    return Entry(tuple(marked_texts), ", ".join(f"{count} {state}" for state, count in others))


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _foreign(cells: pd.DataFrame) -> pd.Series:
    """Which cells are of a defense that does not work in their setting at all, whatever the attack and the network."""
    return cells.not_applicable_reason.str.contains("does not work in the threat model", regex=False)


def _notes(group_cells: pd.DataFrame, trials: pd.DataFrame) -> list[str]:
    """What a board's reader must know, of its cells and of its trials."""
    notes = []
    for threat_model, cells in group_cells[_foreign(group_cells)].groupby("threat_model", sort=False):
        notes.append(f"not applicable in the setting {threat_model}: {', '.join(dict.fromkeys(cells.defense))}")
    group_cells = group_cells[~_foreign(group_cells)]
    notes += implants(group_cells)
    for state in STATES[1:-1]:
        count, reason = state_column(state), f"{state_column(state)}_reason"
        for _, cell in group_cells[group_cells[count] > 0].drop_duplicates(["defense", reason]).iterrows():
            notes.append(f"{state}: {cell.defense} against {cell.attack}: {cell[reason]}")
    if (group_cells.missing > 0).any():
        notes.append(
            f"missing: {int(group_cells.missing.sum())} trials are not computed yet; run the grid to fill them"
        )
    if (group_cells.done < group_cells.seeds).any():
        notes.append("† a mean over finished cells only, which is not compared")
    unknown = (trials.status == "done") & trials.infected_accuracy.isna()
    if BASELINE not in set(group_cells.defense) and unknown.any():
        notes.append(f"without {BASELINE} in the grid nobody can tell whether a model is wrecked")
    warned = trials[trials.warnings != ""].drop_duplicates(["defense", "attack", "warnings"])
    notes += [f"warning: {row.defense} against {row.attack}: {row.warnings}" for row in records(warned)]
    notes += pairing(trials)
    commits = commits_of(trials)
    if commits:
        notes.append(f"commit: {', '.join(commits)}")
    machines = sorted({machine for several in trials.machine for machine in several.split("; ") if machine})
    notes += [f"computed on: {machine}" for machine in machines]
    return notes


def implants(cells: pd.DataFrame) -> list[str]:
    """Which attacks of a board are not what its reader expects: a backdoor that is hardly there, or a costly one."""
    undefended = cells[cells.defense == BASELINE].drop_duplicates("attack")
    notes = []
    clean = undefended[undefended.poison_rate == 0].clean_accuracy_mean.max()
    for cell in records(undefended[undefended.poison_rate > 0]):
        if np.round(cell.asr_mean, 3) < STRONG:
            figure = COLUMN["asr"].spread(cell.asr_mean, cell.asr_std)
            notes.append(
                f"weak: {cell.attack}: the infected models have an ASR of {figure}, below {100 * STRONG:.0f}: a repair "
                "has less to remove"
            )
        lost = np.round(clean - cell.clean_accuracy_mean, 3)
        if lost > COSTLY:
            notes.append(
                f"costly: {cell.attack}: the infected models are {100 * lost:.1f} points below the clean model"
            )
    return notes


def pairing(trials: pd.DataFrame) -> list[str]:
    """What is not compared seed by seed because its infected models are others, or not known to be the same."""
    notes = []
    for (defense, attack), group in groups_of(trials[elsewhere(trials)], ["defense", "attack"]):
        seeds = ", ".join(map(str, sorted(group.seed.unique())))
        notes.append(
            f"other infected models: {defense} against {attack} (seed {seeds}) was computed on other weights than the "
            "rest of its column; it is not marked, ranked or tested"
        )
    unknown = trials[trials.status.isin(["done", "wrecked"]) & (trials.implant_weights == "")]
    if not unknown.empty and trials.seed.nunique() > 1:
        notes.append(
            f"the infected weights of {len(unknown)} of {len(trials)} trials are not recorded: their seeds are not "
            "paired, and no difference of theirs is tested over seeds"
        )
    return notes


def commits_of(trials: pd.DataFrame) -> list[str]:
    """The commits that had a hand in the figures, short, each with a word if the tree was changed."""
    return sorted(
        {
            f"{commit[:10]}{'' if clean == 'True' else ' (changed)'}"
            for several, clean in zip(trials.commit, trials.clean, strict=True)
            for commit in several.split()
        }
    )
