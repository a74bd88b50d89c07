"""A leaderboard's figures are worked out by hand here, and compared."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from bench.engine.errors import UserError
from bench.reporting import trials
from bench.reporting.board import Board, boards, summary
from bench.reporting.cells import to_cells
from bench.reporting.columns import COLUMN, MEASURES
from bench.reporting.marks import marks
from bench.reporting.trials import COUNTS, of_trials, read_trials, trial_table
from defenses.base import THREAT_MODELS


def row(defense: str, attack: str, seed: int, accuracy: float | None, asr: float | None, **more):
    base = {
        "dataset": "digits",
        "model": "m",
        "threat_model": "reserve",
        "attack": attack,
        "defense": defense,
        "seed": seed,
        "poison_rate": 0.0 if attack == "none" else 0.1,
        "status": "done",
        "reason": "",
        "clean_accuracy": accuracy,
        "asr": asr,
        "commit": "c0ffee",
        "clean": True,
        "trial": "t",
    }
    return base | more


def text_of(trials) -> dict[str, list[str]]:
    (board,) = boards(trials, ["a line of protocol"])
    lines = [line.strip("|").split(" | ") for line in board.markdown().splitlines() if line.startswith("| ")]
    return {cells[0].strip(" *"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_cell_is_the_mean_and_the_sample_deviation_of_its_seeds():
    table = to_cells(trial_table([row("aft", "badnets", 0, 0.90, 0.02), row("aft", "badnets", 1, 0.94, 0.06)]))
    (cell,) = table.itertuples()
    assert cell.clean_accuracy_mean == pytest.approx(0.92)
    assert cell.clean_accuracy_std == pytest.approx(math.sqrt(((0.02) ** 2 * 2) / 1))
    assert cell.seeds == cell.done == 2
    assert (
        text_of(trial_table([row("aft", "badnets", 0, 0.90, 0.02), row("aft", "badnets", 1, 0.94, 0.06)]))["aft"][0]
        .strip("*")
        .replace("*", "")
        == "92.0±2.8 / 4.0±2.8"
    )


def test_one_seed_has_no_deviation():
    assert text_of(trial_table([row("aft", "badnets", 0, 0.9, 0.02)]))["aft"][0].replace("*", "") == "90.0 / 2.0"


def test_the_undefended_model_comes_first_and_is_never_best():
    lines = text_of(
        trial_table(
            [
                row("good", "badnets", 0, 0.86, 0.1),
                row("bad", "badnets", 0, 0.9, 0.5),
                row("no_defense", "badnets", 0, 0.95, 0.01),
            ]
        )
    )
    assert list(lines) == ["defense", "---", "threat model: reserve", "no_defense", "good", "bad"]
    # Both raise the ASR and lower the accuracy of the models that they were given: neither is marked.
    assert lines["good"][:2] == ["86.0 / 10.0", "86.0"]
    assert lines["no_defense"][0] == "95.0 / 1.0"
    assert lines["bad"][1] == "90.0"


def test_a_diverged_trial_is_never_averaged_and_its_row_is_not_ranked():
    lines = text_of(
        trial_table(
            [
                row("collapsed", "badnets", 0, 0.1, 0.0, status="diverged", reason="chance"),
                row("collapsed", "badnets", 1, 0.9, 0.2),
                row("plain", "badnets", 0, 0.9, 0.3),
                row("plain", "badnets", 1, 0.9, 0.3),
            ]
        )
    )
    assert list(lines)[3:] == ["plain", "collapsed"]
    assert lines["collapsed"][0] == "90.0 / 20.0 (1 diverged)"
    assert lines["plain"][0] == "90.0±0.0 / **30.0±0.0**"
    assert lines["collapsed"][2] == "20.0†"


def test_the_mean_asr_is_over_attacks_and_leaves_out_the_clean_model():
    lines = text_of(
        trial_table([row("d", "none", 0, 1.0, None), row("d", "a", 0, 0.9, 0.2), row("d", "b", 0, 0.8, 0.4)])
    )
    assert lines["defense"][:3] == ["none ACC", "a ACC / ASR", "b ACC / ASR"]
    assert [cell.strip("*") for cell in lines["d"][3:5]] == ["90.0", "30.0"]


def test_settings_are_ranked_apart():
    trials = trial_table(
        [row("rich", "badnets", 0, 0.9, 0.0), row("poor", "badnets", 0, 0.9, 0.9, threat_model="trainset")]
    )
    lines = text_of(trials)
    assert lines["rich"][0].endswith("**")
    assert lines["poor"][0].endswith("**")  # the best of its own setting


def test_names_with_marks_of_markdown_stay_text():
    lines = boards(trial_table([row("a|b*<i>", "badnets", 0, 0.9, 0.1)]), ["x|y"])[0].markdown()
    assert "| a\\|b\\*&lt;i> |" in lines
    assert "- x\\|y" in lines


def test_a_wrecked_model_is_known_without_the_undefended_one_in_the_grid():
    rows = [row("aft", "badnets", seed, now, 0.0, infected_accuracy=0.95) for seed, now in enumerate((0.85, 0.84))]
    trials = trial_table(rows)
    assert trials.status.tolist() == ["done", "wrecked"]
    assert trials.reason[1] == "clean accuracy 84.0, 11.0 points below the infected model's"
    assert not any("nobody can tell" in note for note in boards(trials, [])[0].notes)
    unmeasured = trial_table([row("aft", "badnets", 0, 0.2, 0.0)])
    assert any("nobody can tell" in note for note in boards(unmeasured, [])[0].notes)


def test_a_wrecked_model_that_needs_no_images_is_named_once_for_both_settings():
    wrecked = [row("clp", "badnets", 0, 0.2, 0.0, infected_accuracy=0.95, threat_model=name) for name in THREAT_MODELS]
    (board,) = boards(trial_table(wrecked), [])
    assert sum(note.startswith("wrecked: clp against badnets") for note in board.notes) == 1


def test_an_attack_that_hardly_implants_or_costs_too_much_accuracy_is_named():
    def of(attack: str, accuracy: float, asr: float | None) -> list[dict]:
        return [row("no_defense", attack, 0, accuracy, asr), row("aft", attack, 0, accuracy, 0.0)]

    trials = [*of("none", 0.75, None), *of("badnets", 0.72, 0.90), *of("sig", 0.75, 0.4), *of("blended", 0.70, 1.0)]
    (board,) = boards(trial_table(trials), [])
    assert [note for note in board.notes if note.startswith(("weak", "costly"))] == [
        "weak: sig: the infected models have an ASR of 40.0, below 90: a repair has less to remove",
        "costly: blended: the infected models are 5.0 points below the clean model",
    ]
    (board,) = boards(trial_table(trials[2:]), [])  # without a clean model nobody knows the price
    assert [note[:9] for note in board.notes if note.startswith(("weak", "costly"))] == ["weak: sig"]


def test_a_defense_that_does_not_work_in_a_setting_has_no_row_there_and_stands_in_the_notes():
    reason = "tuner does not work in the threat model 'trainset'"
    none = {"threat_model": "trainset", "status": "not applicable", "reason": reason}
    trials = [row("no_defense", attack, 0, 0.9, 0.9, threat_model="trainset") for attack in ("badnets", "blended")]
    trials += [row("tuner", attack, 0, None, None, **none) for attack in ("badnets", "blended")]
    (board,) = boards(trial_table(trials), [])
    assert [cells[0].parts[0][0] for cells in board.rows] == ["threat model: trainset", "no_defense"]
    assert board.notes[0] == "not applicable in the setting trainset: tuner"


def test_a_note_stands_beneath_the_table_of_the_trial_that_it_is_about_alone():
    trials = [row("aft", "sig", 0, 0.9, 0.1, dataset=data, commit=f"c{data}") for data in ("one", "two")]
    trials[1]["warnings"] = "gradients are masked"
    one, two = boards(trial_table(trials), [])
    assert not any("masked" in note for note in one.notes)
    assert "warning: aft against sig: gradients are masked" in two.notes
    assert ("commit: cone" in one.notes, "commit: ctwo" in two.notes) == (True, True)


def test_a_command_beneath_a_table_can_be_pasted_as_it_stands():
    line = "python -m bench.run 'grid.attacks=[badnets]' 'note=*a*_b_'"
    board = Board("a grid", ["defense"], notes=[f"command: {line}", "command: echo `id`", "rank: 1 * 2"])
    found = board.markdown().splitlines()
    assert f"- command: `{line}`" in found
    assert r"- command: echo \`id\`" in found  # would end the code; it is text, literally
    assert r"- rank: 1 \* 2" in found


def test_a_loss_of_exactly_ten_points_wrecks_no_model_whatever_its_rounding():
    # 0.8 - 0.7 is a little more than 0.1 in floats.
    assert trial_table([row("aft", "badnets", 0, 0.7, 0.0, infected_accuracy=0.8)]).status.tolist() == ["done"]


def test_a_repair_is_held_against_the_undefended_model_of_its_own_seed():
    rows = [row("no_defense", "badnets", seed, accuracy, 1.0) for seed, accuracy in enumerate((0.95, 0.80))]
    rows += [row("aft", "badnets", seed, 0.84, 0.0) for seed in range(2)]
    assert trial_table(rows).status.tolist() == ["done", "done", "wrecked", "done"]


def test_a_wrecked_model_is_counted_and_never_averaged():
    figures = enumerate(((0.94, 0.2), (0.2, 0.0)))
    trials = [row("aft", "badnets", seed, now, asr, infected_accuracy=0.95) for seed, (now, asr) in figures]
    (cell,) = to_cells(trial_table(trials)).itertuples()
    assert (cell.seeds, cell.done, cell.wrecked) == (2, 1, 1)
    assert (cell.clean_accuracy_mean, cell.asr_mean) == (0.94, 0.2)
    assert cell.wrecked_reason == "clean accuracy 20.0, 75.0 points below the infected model's"


def ranks(trials) -> dict[str, float]:
    (found,) = marks(trials, to_cells(trials)).rankings.values()
    return found.ranks


@pytest.mark.parametrize("status", ["wrecked", "diverged", "failed"])
def test_a_cell_that_is_lost_has_the_worst_rank_of_its_block(status):
    # Ranks of x, y, z: 1, 3, 2 and 2, 1, 3.
    rows = [row(name, "a", 0, 0.9, asr) for name, asr in (("x", 0.2), ("y", 0.0), ("z", 0.5))]
    rows += [row(name, "b", 0, 0.9, asr) for name, asr in (("x", 0.2), ("y", 0.1), ("z", 0.5))]
    rows[1]["status"] = status
    assert ranks(trial_table(rows)) == {"x": 1.5, "y": 2.0, "z": 2.5}


def test_a_defense_with_a_seed_that_is_missing_has_no_rank():
    rows = [row(name, "a", seed, 0.9, asr) for name, asr in (("x", 0.2), ("y", 0.0), ("z", 0.5)) for seed in range(2)]
    rows[3] |= {"status": "missing", "asr": None, "clean_accuracy": None}
    assert ranks(trial_table(rows)) == {"x": 1.0, "z": 2.0}


def test_the_clean_model_is_no_block_of_the_ranks_but_a_defense_that_wrecks_it_is_never_first():
    rows = [row(name, attack, 0, 0.9, asr) for attack in ("a", "b") for name, asr in (("x", 0.2), ("y", 0.1))]
    rows += [row("x", "none", 0, 0.9, None), row("y", "none", 0, 0.2, None, infected_accuracy=0.9)]
    trials = trial_table(rows)
    found = marks(trials, to_cells(trials))
    assert ranks(trials) == {"x": 2.0, "y": 1.0}
    place = ("digits", "m", "", "reserve")
    assert found.rankings[place].blocks == 2
    assert found.rows[(*place, "x", "rank")] == "best"
    assert (*place, "y", "rank") not in found.rows


def test_an_asr_of_ten_percent_is_not_yet_high():
    lines = text_of(trial_table([row("d", "a", 0, 0.9, 0.1), row("d", "b", 0, 0.9, 0.11)]))
    assert lines["d"][lines["defense"].index("ASR > 10 %")] == "1 of 2"


def test_figures_are_compared_seed_by_seed_in_whatever_order_the_trials_come():
    base, noise = (0.1, 0.3, 0.5), (0.02, -0.01, 0.0)
    values = {"x": base, "apart": [v + 0.05 for v in base], "near": [v + n for v, n in zip(base, noise, strict=True)]}
    values["apart"][0] += 0.002
    same = [{"implant_weights": f"w{seed}"} for seed in range(3)]
    rows = [row(name, "a", seed, 0.9, values[name][seed], **same[seed]) for name in values for seed in range(3)]
    for order in (range(9), (2, 0, 1, 3, 5, 4, 7, 8, 6)):
        trials = trial_table([rows[index] for index in order])
        table = to_cells(trials)
        found = marks(trials, table).cells
        # Gaps of 5.2, 5 and 5 points are a difference (t = 76); 2, -1 and 0 are none (t = 0.38).
        assert [found.get((index, "asr"), "") for index in table.index] == ["best", "", "alike"]


def test_over_attacks_a_row_has_the_largest_memory_the_median_asr_and_means_of_the_rest():
    figures = zip("abc", (0.0, 0.1, 0.8), (100, 300, 200), (1.0, 2.0, 6.0), strict=True)
    rows = [row("d", a, 0, 0.9, asr, peak_memory_mib=mib, defend_seconds=s) for a, asr, mib, s in figures]
    found = summary(to_cells(trial_table(rows)))
    assert (found["peak_memory_mib"], found["defend_seconds"]) == (300, 3.0)
    assert (found["asr"], found["asr_median"]) == (pytest.approx(0.3), 0.1)


def test_two_attacks_are_too_few_for_a_mean_to_be_alike():
    rows = [row(name, attack, 0, 0.9, asr) for attack in ("a", "b") for name, asr in (("x", 0.1), ("y", 0.7))]
    trials = trial_table(rows)
    found = marks(trials, to_cells(trials)).rows
    assert {key[4:]: mark for key, mark in found.items() if key[5] in ("asr", "rank")} == {
        ("x", "asr"): "best",
        ("x", "rank"): "best",
    }


@pytest.mark.parametrize(("status", "asr"), [("done", 0.1), ("diverged", 0.1), ("failed", 0.5), ("missing", 0.5)])
def test_a_published_row_takes_the_place_of_what_the_store_has_not_finished_alone(monkeypatch, status, asr):
    monkeypatch.setattr(trials, "trial_row", lambda trial, store: row("aft", "badnets", 0, 0.9, 0.1, status=status))
    found = of_trials([None], None, {"t": row("aft_of_another_grid", "badnets", 0, 0.8, 0.5)})
    assert (found.defense[0], found.asr[0]) == ("aft", asr)


def test_each_cell_has_the_intervals_of_its_own_seeds():
    seeds = {"x": (0.4,), "y": (0.25, 0.75), "z": (0.2, 0.2, 0.2), "w": (0.1, 0.3)}
    trials = trial_table([row(name, "a", seed, 0.9, asr) for name in seeds for seed, asr in enumerate(seeds[name])])
    found = to_cells(trials).set_index("defense")
    # Two seeds: their 2.5 % quantile lies 0.075 of the way from the least resampled mean to the middle one.
    expected = {"x": (math.nan,) * 2, "y": (0.26875, 0.73125), "z": (0.2, 0.2), "w": (0.1075, 0.2925)}
    for name, interval in expected.items():
        assert (found.asr_low[name], found.asr_high[name]) == pytest.approx(interval, nan_ok=True)
    t95 = [math.nan, 12.706 * 0.25, 0.0, 12.706 * 0.1]  # t(0.975) of one degree of freedom
    assert found.asr_t95[list(seeds)].tolist() == pytest.approx(t95, rel=1e-4, nan_ok=True, abs=1e-9)


def test_a_defense_without_a_rival_has_no_rank():
    lines = text_of(trial_table([row("d", "a", 0, 0.9, 0.1), row("no_defense", "a", 0, 0.9, 1.0)]))
    assert lines["d"][lines["defense"].index("rank")] == "–"


def test_a_defense_that_does_not_apply_somewhere_has_no_rank_and_takes_no_block_away():
    rows = [row(name, attack, 0, 0.9, asr) for attack in "ab" for name, asr in (("x", 0.2), ("y", 0.0), ("z", 0.5))]
    rows[4] |= {"status": "not applicable", "asr": None, "clean_accuracy": None}
    trials = trial_table(rows)
    (found,) = marks(trials, to_cells(trials)).rankings.values()
    assert (found.ranks, found.blocks) == ({"x": 1.0, "z": 2.0}, 2)


def test_over_all_data_sets_an_attack_on_each_is_a_block_of_its_own():
    figures = {"one": (0.1, 0.2), "two": (0.4, 0.3), "three": (0.4, 0.3)}
    rows = [
        row(name, "a", 0, 0.9, asr, dataset=data)
        for data, both in figures.items()
        for name, asr in zip("xy", both, strict=True)
    ]
    trials = trial_table(rows)
    found = marks(trials, to_cells(trials)).overall["reserve", ""]
    assert found.blocks == 3
    assert found.ranks == {"x": pytest.approx(5 / 3), "y": pytest.approx(4 / 3)}


def test_the_values_of_a_sweep_are_no_further_blocks_of_a_ranking():
    swept = [
        row(name, attack, 0, 0.9, asr, variant=f"reserve.size={size}")
        for size in (0.01, 0.02, 0.05)
        for attack in ("badnets", "blended")
        for name, asr in (("a", 0.1), ("b", 0.2), ("c", 0.3))
    ]
    trials = trial_table(swept)
    assert {ranking.blocks for ranking in marks(trials, to_cells(trials)).overall.values()} == {2}


def test_a_figure_that_rounds_to_zero_has_no_sign():
    assert COLUMN["relearn_gain"].text(-0.0003) == COLUMN["relearn_gain"].text(0.0003) == "0.0"
    assert COLUMN["relearn_gain"].text(-0.0006) == "-0.1"


def marked(rows) -> dict[tuple[str, str, str], str]:
    """(defense, attack or 'mean', figure) -> mark."""
    trials = trial_table(rows)
    table = to_cells(trials)
    found = marks(trials, table)
    names = {index: (cell.defense, cell.attack) for index, cell in zip(table.index, table.itertuples(), strict=True)}
    of_cells = {(*names[index], figure): mark for (index, figure), mark in found.cells.items()}
    return of_cells | {(key[4], "mean", key[5]): mark for key, mark in found.rows.items()}


def test_a_wrecked_seed_elsewhere_takes_no_mark_from_a_column_that_it_is_not_in():
    # As in SIG of cifar10_small: 0.5 is the best, though another attack wrecked the model.
    figures = {"bnp": {"sig": 0.005, "wanet": 0.5}, "awm": {"sig": 0.045, "wanet": 0.3}, "no_defense": {}}
    rows = [
        row(name, attack, seed, 0.9, asr.get(attack, 0.95), infected_accuracy=0.95, infected_asr=0.95)
        for name, asr in figures.items()
        for attack in ("sig", "wanet")
        for seed in range(2)
    ]
    rows[2] |= {"clean_accuracy": 0.2}  # bnp against wanet, seed 0: wrecked
    found = marked(rows)
    assert found.get(("bnp", "sig", "asr")) == "best"
    assert ("awm", "sig", "asr") not in found
    assert found.get(("awm", "wanet", "asr")) == "best"
    # The means of bnp leave a cell out: only awm's are whole.
    assert [key[0] for key in found if key[1] == "mean" and key[2] == "asr"] == ["awm"]


def test_a_wrecked_clean_model_takes_the_marks_of_accuracy_and_not_those_of_the_asr():
    asr = {"x": 0.1, "y": 0.3}
    rows = [row(name, "sig", 0, 0.95, asr[name], infected_accuracy=0.9, infected_asr=0.9) for name in asr]
    rows += [row(name, "none", 0, 0.95, None, infected_accuracy=0.9) for name in asr]
    rows[2]["clean_accuracy"] = 0.3
    found = marked(rows)
    assert found.get(("x", "mean", "asr")) == "best"
    assert ("x", "mean", "clean_accuracy") not in found
    assert found.get(("y", "mean", "clean_accuracy")) == "best"


@pytest.mark.parametrize(("undefended", "mark"), [(0.2, None), (0.2996, "best"), (0.3, "best"), (0.9, "best")], ids=str)
@pytest.mark.parametrize("where", ["no_defense", "infected_asr"])
def test_a_figure_that_is_worse_than_doing_nothing_is_never_marked(undefended, mark, where):
    rows = [row(name, "sig", 0, 0.9, asr) for name, asr in (("x", 0.3), ("y", 0.4))]
    if where == "no_defense":
        rows.append(row("no_defense", "sig", 0, 0.9, undefended))
    else:
        rows = [entry | {"infected_asr": undefended} for entry in rows]
    found = marked(rows)
    assert found.get(("x", "sig", "asr")) == mark
    assert found.get(("x", "mean", "asr")) == mark
    assert found.get(("x", "mean", "rank")) == mark


def test_a_defense_of_which_every_cell_failed_has_no_rank():
    rows = [row(name, attack, 0, 0.9, asr) for attack in "ab" for name, asr in (("x", 0.2), ("y", 0.0), ("z", 0.5))]
    for entry in rows:
        if entry["defense"] == "y":
            entry |= {"status": "failed", "asr": None, "clean_accuracy": None}
    assert ranks(trial_table(rows)) == {"x": 1.0, "z": 2.0}
    rows[1] |= {"status": "wrecked", "asr": 0.0}  # an outcome, and the worst one
    assert ranks(trial_table(rows)) == {"x": 1.0, "z": 2.0, "y": 3.0}


@pytest.mark.parametrize("tell", ["weights", "figures"])
def test_a_figure_of_another_infected_model_is_neither_marked_nor_ranked_nor_tested(tell):
    def of(name, asr, device):
        weights = [f"w{device}{seed}" if tell == "weights" else "" for seed in range(3)]
        return [
            row(name, attack, seed, 0.9, asr, implant_weights=weights[seed], infected_asr=0.9 + 0.01 * device)
            for attack in "ab"
            for seed in range(3)
        ]

    rows = [*of("x", 0.2, 0), *of("y", 0.3, 0), *of("z", 0.1, 1)]
    trials = trial_table(rows)
    assert ranks(trials) == {"x": 1.0, "y": 2.0}
    assert {key[0] for key, mark in marked(rows).items() if mark == "best" and key[2] == "asr"} == {"x"}
    assert sum(note.startswith("other infected models: z against") for note in boards(trials, [])[0].notes) == 2


@pytest.mark.parametrize(("weights", "mark"), [("w", "alike"), ("", None)])
def test_seeds_are_paired_only_where_the_infected_weights_are_recorded(weights, mark):
    values = {"x": (0.1, 0.3, 0.5), "near": (0.12, 0.29, 0.5)}
    rows = [
        row(name, "a", seed, 0.9, asr, implant_weights=f"{weights}{seed}" if weights else "")
        for name in values
        for seed, asr in enumerate(values[name])
    ]
    assert marked(rows).get(("near", "a", "asr")) == mark


def test_no_accuracy_is_held_against_that_of_another_infected_model():
    rows = [row("no_defense", "sig", 0, 0.95, 0.9, implant_weights="one")]
    rows += [row("x", "sig", 0, 0.8, 0.1, implant_weights=name) for name in ("one", "other")]
    rows[2]["threat_model"] = "trainset"
    assert trial_table(rows).status.tolist() == ["done", "wrecked", "done"]


TRIAL = {"dataset": "d", "model": "m", "threat_model": "reserve", "attack": "sig", "defense": "x", "seed": 0}
TRIAL |= {"poison_rate": 0.1, "status": "done", "clean_accuracy": 0.9, "asr": 0.1, "relearn_gain": -0.2, "trial": "k"}


def csv_of(tmp_path, *changes, name="trials.csv"):
    path = tmp_path / name
    pd.DataFrame([TRIAL | {"seed": number, "trial": f"k{number}"} | c for number, c in enumerate(changes)]).to_csv(
        path, index=False
    )
    return path


@pytest.mark.parametrize(
    ("column", "value"),
    [(column.name, value) for column in MEASURES for value in (97.432, -1.5)]
    + [("asr", -0.01), ("asr", math.inf), ("asr", "10 %"), ("asr", "0,1"), ("poison_rate", 10.5), ("status", "ok")]
    + [("defend_seconds", -1.5), ("seed", 0.5)],
)
def test_a_value_that_its_column_cannot_have_is_refused_by_file_row_and_column(tmp_path, column, value):
    path = csv_of(tmp_path, {}, {column: value})
    with pytest.raises(UserError) as error:
        read_trials(path)
    assert str(path) in str(error.value)
    assert f"row 3: {column} is {str(value)!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_count_may_be_any_number_from_zero(tmp_path):
    found = read_trials(csv_of(tmp_path, dict.fromkeys(COUNTS, 71)))
    assert [found[name][0] for name in COUNTS] == [71] * len(COUNTS)


def test_a_difference_of_two_shares_may_be_negative(tmp_path):
    assert read_trials(csv_of(tmp_path, {"relearn_gain": -1})).relearn_gain[0] == -1


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, ""),
        ({"defend_seconds": 3.0}, ""),
        ({"asr": 0.2}, "asr 0.1 and 0.2"),
        ({"clean_accuracy": ""}, "clean_accuracy"),
        ({"status": "failed"}, "status"),
        ({"trial": "other"}, "trial"),
        ({"defense": "y"}, ""),  # an ablation's row may be another grid's default
        ({"defense": "y", "asr": 0.2}, "asr 0.1 and 0.2"),
    ],
)
def test_a_trial_listed_twice_counts_once_and_a_contradiction_is_refused(tmp_path, change, refused):
    path = csv_of(tmp_path, {}, {"seed": 0, "trial": "k0"} | change)
    if refused:
        with pytest.raises(UserError, match=rf"rows 2 and 3 .*{refused}"):
            read_trials(path)
    else:
        assert len(read_trials(path)) == (2 if "defense" in change else 1)


@pytest.mark.parametrize("path", sorted(Path("results").glob("*/trials*.csv")), ids=str)
def test_every_published_table_is_read(path):
    assert len(read_trials(path))
