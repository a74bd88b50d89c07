"""The table and figures of the finding, from results that are written by hand."""

from __future__ import annotations

import json
import math

import pytest

from bench import connection as command
from bench.engine.errors import UserError
from bench.reporting.connection import boards, connections, largest, over_seeds, rank_correlation
from bench.reporting.figures import draw
from bench.reporting.figures.draw import draw_connection
from bench.reporting.trials import trial_table


def one(share: float | None, reach: float = 0.1, **more) -> dict:
    """What `bench.engine.connection` says of one model."""
    interval = None if share is None else [share - reach, share + reach]
    found = {"fooled": 0.5, "top_is_target": True, "classes": None if share is None else [share, 1 - share]}
    for name in ("concentration", "similarity", "overlap"):
        found |= {name: share, f"{name}_interval": interval}
    return found | more


def steps(infected: float | None, control: float | None, repaired: float | None) -> list[dict]:
    kinds = {"infected": one(infected), "clean_control": one(control), "noise": one(None, fooled=0.0)}
    kinds["repaired"] = one(repaired, images=90)
    return [{"epsilon": radius / 255, "images": 100, **kinds} for radius in (1, 8)]


def grid(rows: list[tuple]) -> tuple:
    """Trials and details from (attack, defense, seed, asr, infected, control, repaired)."""
    trials = [
        {
            "dataset": "digits",
            "model": "net",
            "threat_model": "reserve",
            "attack": attack,
            "defense": defense,
            "seed": seed,
        }
        | {"poison_rate": 0.1, "status": "done", "clean_accuracy": 0.9, "asr": asr}
        for attack, defense, seed, asr, *_ in rows
    ]
    return trial_table(trials), [{"more": {"connection": steps(*row[4:])}} for row in rows]


TWO_SEEDS = [
    ("blended", "no_defense", 0, 1.0, 0.4, 0.1, 0.4),
    ("blended", "aft", 0, 0.0, 0.4, 0.1, 0.1),
    ("blended", "no_defense", 1, 1.0, 0.6, 0.3, 0.6),
    ("blended", "aft", 1, 0.0, 0.6, 0.3, 0.2),
]


def test_what_is_measured_of_the_infected_model_is_told_once_and_no_defense_repairs_nothing():
    table = connections(*grid(TWO_SEEDS))
    assert table.kind.value_counts().to_dict() == dict.fromkeys(("infected", "clean_control", "noise", "repaired"), 4)
    assert set(table[table.kind == "repaired"].defense) == {"aft"}
    assert set(table[table.kind != "repaired"].defense) == {""}
    assert table[table.kind == "repaired"].images.tolist() == [90] * 4
    assert json.loads(table.classes.iloc[0]) == [0.4, 0.6]


def test_means_are_over_seeds_and_an_interval_holds_those_of_every_seed():
    table = over_seeds(largest(connections(*grid(TWO_SEEDS))))
    rows = {row.kind: row for row in table.itertuples()}
    assert {row.epsilon for row in rows.values()} == {8 / 255}
    assert rows["infected"].concentration == pytest.approx(0.5)
    assert (rows["infected"].concentration_low, rows["infected"].concentration_high) == pytest.approx((0.3, 0.7))
    assert rows["infected"].lift == pytest.approx((0.4 / 0.1 + 0.6 / 0.3) / 2)
    assert (rows["infected"].top_is_target, rows["infected"].seeds, rows["infected"].images) == (2, 2, 200)
    assert rows["repaired"].concentration == pytest.approx(0.15)
    assert math.isnan(rows["noise"].concentration)


def test_a_share_of_a_handful_of_images_is_no_share():
    trials, evidence = grid(TWO_SEEDS[:2])
    for own in evidence:
        for step in own["more"]["connection"]:
            step["infected"]["fooled"], step["clean_control"]["fooled"] = 0.09, 0.10  # of 100 images
    rows = {row.kind: row for row in over_seeds(connections(trials, evidence)).itertuples()}
    assert math.isnan(rows["infected"].concentration)
    assert math.isnan(rows["infected"].top_is_target)
    assert rows["infected"].similarity == pytest.approx(0.4)
    assert rows["clean_control"].concentration == pytest.approx(0.1)


def test_the_table_has_controls_before_repairs_and_nothing_where_nothing_was_fooled():
    (board,) = boards(connections(*grid(TWO_SEEDS)))
    rows = {row[0].text: [entry.text for entry in row[1:]] for row in board.rows}
    assert list(rows) == [
        "attack: blended",
        "infected model",
        "clean control",
        "infected, random noise",
        "aft (reserve)",
    ]
    assert rows["aft (reserve)"][2] == "15.0 [0.0, 30.0]"
    assert rows["infected, random noise"][1:4] == ["0.0", "–", "–"]
    assert board.title == "digits, net, radius 8/255"


def test_the_rank_correlation_of_share_and_asr_is_that_of_five_models_and_of_no_fewer():
    rows = [(f"attack {n}", "aft", 0, asr, share, 0.1, 0.1) for n, (asr, share) in enumerate(PAIRS)]
    trials, evidence = grid(rows)
    # Ranks (1, 2, 3, 4, 5) against (5, 4, 3, 1, 2): 1 - 6 * (16 + 4 + 0 + 9 + 9) / (5 * 24) = -0.9
    assert "Spearman -0.90" in rank_correlation(trials, connections(trials, evidence))[0]
    few = grid(rows[:4])
    assert rank_correlation(few[0], connections(*few)) == []
    seeds = grid([("blended", "aft", seed, asr, share, 0.1, 0.1) for seed, (asr, share) in enumerate(PAIRS)])
    assert rank_correlation(seeds[0], connections(*seeds)) == []  # one attack, however many seeds


PAIRS = [(0.9, 0.1), (0.5, 0.2), (0.4, 0.3), (0.1, 0.4), (0.2, 0.5)]


@pytest.mark.slow
def test_figures_are_drawn_where_there_is_something_to_see_and_only_there(tmp_path):
    trials, evidence = grid([*TWO_SEEDS, ("<$a_b$>", "<$a_b$>", 0, 0.5, 0.4, None, 0.3)])
    names = [path.stem for path in draw_connection(trials, tmp_path, "Grid x", evidence)]
    assert names == ["connection", "connection_repaired", "connection_classes"]
    trials, evidence = grid([("blended", "no_defense", 0, 1.0, None, None, None)])
    assert [path.stem for path in draw_connection(trials, tmp_path, "Grid x", evidence)] == []


def test_the_door_reads_what_the_run_measured_and_refuses_a_grid_without_it(
    run_grid, tiny, tmp_path, monkeypatch, capsys
):
    from bench.engine import connection
    from bench.measures import evaluation

    monkeypatch.setattr(connection, "STEPS", 1)
    monkeypatch.setattr(connection, "EPSILONS", (8 / 255,))
    monkeypatch.setattr(connection, "RESAMPLES", 10)
    monkeypatch.setattr(evaluation, "PROBE_IMAGES", 20)
    axes = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]"]
    run_grid(*axes, "measure.connection=true")
    folder = tmp_path / "results" / "quick"
    with pytest.raises(UserError, match=r"run it with measure\.connection=true first"):
        command.main([*tiny, *axes])
    history = (folder.parent / "store" / "history.log").read_text()
    monkeypatch.setattr(draw, "draw_connection", lambda *_: [])  # drawing takes seconds
    assert command.main([*tiny, *axes, "measure.connection=true"]) == 0
    assert (folder.parent / "store" / "history.log").read_text() == history
    assert "fine_tuning (reserve)" in capsys.readouterr().out
    assert "| infected model | 20 |" in (folder / "connection.md").read_text()
    lines = (folder / "connection.csv").read_text().splitlines()
    assert len(lines) == 1 + 4  # infected, control, noise, one repair


def test_what_a_handful_of_images_says_is_in_no_ratio_no_count_and_no_correlation():
    trials, evidence = grid([("blended", "aft", seed, *pair, 0.25, 0.1) for seed, pair in enumerate(PAIRS)])
    for seed, own in enumerate(evidence):
        for step in own["more"]["connection"]:
            step["clean_control"]["fooled"] = 0.04  # of 100 images
            step["infected"]["fooled"] = 0.05 if seed else 0.5
    table = connections(trials, evidence)
    infected = boards(table)[0].rows[1]
    assert [entry.text for entry in infected[4:6]] == ["–", "1 of 1"]
    assert set(table[table.kind == "clean_control"].classes) == {"null"}
    assert rank_correlation(trials, table) == []
