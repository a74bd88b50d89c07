"""The benchmark writes what it measured; how fast anything is, no test says."""

from __future__ import annotations

import csv

import pytest

from bench.engine.errors import UserError
from bench.perf import DEFAULTS, SECTIONS, Timed, _in_turns, main

TINY = ["size=8", "batch=4", "rounds=1", "only=training"]


def test_the_table_is_written_with_where_it_was_measured_and_read_again(tmp_path, capsys):
    out = tmp_path / "perf.csv"
    assert main([*TINY, f"out={out}"]) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["ms"]) / float(row["roofline_ms"]))
        assert (row["model"], row["batch"]) == ("test_resnet", "4")
        assert row["commit"]
        assert row["torch"]
    capsys.readouterr()
    main([*TINY, f"against={out}"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(rows[0]["path"])]
    assert printed[0].split()[-1] == f"{float(rows[0]['ratio']):.3f}"


def test_path_and_roofline_take_turns_and_the_first_rounds_do_not_count():
    calls: list[str] = []
    seconds, ideal = _in_turns(Timed("x", lambda: calls.append("a"), lambda: calls.append("b")), 3)
    assert "".join(calls) == "ab" * 5
    assert 0 < seconds < 1
    assert 0 < ideal < 1
    assert _in_turns(Timed("x", lambda: None), 1)[1] != ideal  # none: not a number


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modle=x", "write one of model="),
        ("size=big", "whole numbers"),
        ("only=speed", "write any of training"),
        ("rounds=0", "at least 1"),
        ("threads=0", "at least 1"),
        ("out=no/such/x.csv", "no such folder"),
        ("model=resnet1", "no architecture"),
        ("stem=tiny", "write one of small"),
        ("triggers=nosuch", "no attack"),
        ("attacks=adaptive_blend", "this attack takes static"),
    ],
)
def test_a_wrong_argument_is_refused(argument, message):
    with pytest.raises(UserError, match=message):
        main([argument])


def test_all_sections_run_by_default_but_the_one_that_needs_a_compiler():
    assert DEFAULTS["only"].split(",") == [name for name in SECTIONS if name != "variants"]
