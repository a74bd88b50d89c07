"""The benchmark away from its repository, and the commands with wrong words."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bench._command import _status
from bench.engine.packages import shipped

ROOT = Path(__file__).parents[1]


def test_what_ships_is_found_in_any_folder_and_a_users_own_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["claims.yaml", *(f"reported/{path.name}" for path in (ROOT / "results" / "reported").glob("*.csv"))]
    assert len(names) > 1
    for name in names:
        path = Path("results", name)
        assert shipped(path).read_bytes() == (ROOT / path).read_bytes()
    mine = Path("results/claims.yaml")
    mine.parent.mkdir()
    mine.write_text("mine")
    assert shipped(mine) == mine
    assert shipped(Path("results/nothing.csv")) == Path("results/nothing.csv")
    assert shipped(Path("engine/files.py")) == Path("engine/files.py")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare", []),
        ("compare", ["a"]),
        ("compare", ["a", "b", "c"]),
        ("compare", ["a", "b", "tolerance=x"]),
        ("compare", ["a", "b", "tolerance=2"]),
        ("compare", ["a", "b", "significant=perhaps"]),
        ("compare", ["a", "b", "colour=red"]),
        ("compare", ["--x", "--y"]),
        ("claims", ["--foo"]),
        ("claims", ["nowhere.csv"]),
        ("data", []),
        ("data", ["--x"]),
        ("data", ["="]),
        ("perf", ["x"]),
        ("perf", ["size=a"]),
        ("perf", ["size=0"]),
        ("perf", ["only=zz"]),
        ("perf", ["against=nowhere"]),
        ("list", ["x"]),
        ("cancel", ["--x"]),
        ("report", ["table=nowhere.csv"]),
        ("gallery", ["x"]),
        ("connection", ["="]),
        ("sync", ["grid"]),
    ],
)
def test_wrong_words_are_one_line_and_status_two(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"bench.{command}")
    assert _status(module.main, module.__doc__, words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
