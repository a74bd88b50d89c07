"""CSV for spreadsheets: no cell begins like a formula, numbers stay numbers, and every text comes back."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

from bench.reporting.leaderboard import write_tables
from bench.reporting.spreadsheet import literal, neutral, write_csv
from bench.reporting.trials import read_trials, trial_table

FORMULAS = ["=1+1", "@SUM(A1)", "+cmd", "-cmd|' /C calc'!A0", "\t=1", "\r=1", "-1+1", "+1-1", "-inf", "--1", "='a'"]
TEXTS = ["", "plain", "'quoted'", "'", "a=b", "1", "中", " =1"]
NUMBERS = ["-1", "+1.5", "-.5", "-1e-3", "+2.", "-0"]


@pytest.mark.parametrize("text", FORMULAS)
def test_what_begins_like_a_formula_is_neutralised_and_comes_back(text):
    assert neutral(text)[0] == "'"
    assert literal(neutral(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, *NUMBERS])
def test_other_texts_and_numbers_are_written_as_they_are(text):
    assert neutral(text) == literal(text) == text


@pytest.mark.parametrize("text", [*FORMULAS, *TEXTS, *NUMBERS])
def test_apostrophes_that_were_there_are_kept(text):
    for quoted in (text, f"'{text}", f"''{text}"):
        assert literal(neutral(quoted)) == quoted
    assert len({neutral(f"{quotes}{text}") for quotes in ("", "'", "''")}) == 3


def test_a_file_has_no_formula_in_any_cell_or_heading_and_numbers_keep_their_bits(tmp_path):
    numbers = [0.1 + 0.2, -1e-300, float("-inf")]
    frame = pd.DataFrame({"=x": FORMULAS[:3], "number": numbers, "count": [-1, 2, 3]})
    write_csv(frame, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[0] == "'=x"
    assert [row[0] for row in rows] == [f"'{text}" for text in FORMULAS[:3]]
    assert [float(row[1]) for row in rows] == numbers
    assert rows[0][2] == "-1"


def test_trials_with_such_names_come_back_from_their_file(tmp_path):
    names = [text for text in (*FORMULAS, *TEXTS[1:]) if "\r" not in text]
    base = {"dataset": "d", "model": "m", "threat_model": "reserve", "attack": "@a", "seed": 0, "poison_rate": 0.1}
    rows = [base | {"defense": name, "status": "failed", "reason": "=cmd", "asr": None} for name in names]
    trials = trial_table(rows)
    write_tables(trials, [], tmp_path, "=title")
    pd.testing.assert_frame_equal(read_trials(tmp_path / "trials.csv"), trials, check_exact=True)
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="") as file:
            assert not [cell for row in csv.reader(file) for cell in row if cell[:1] in "=@+\t\r" and cell], path
