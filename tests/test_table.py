"""A leaderboard's figures are worked out by hand here, and compared."""

from __future__ import annotations

import math

import pytest

from bench.reporting.table import Board, boards, cells, trial_table
from defenses.base import SETTINGS


def row(defense: str, attack: str, seed: int, accuracy: float | None, asr: float | None, **more):
    base = {
        "dataset": "digits",
        "model": "m",
        "setting": "reserve",
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
    table = cells(trial_table([row("aft", "badnets", 0, 0.90, 0.02), row("aft", "badnets", 1, 0.94, 0.06)]))
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
    assert list(lines) == ["defense", "---", "setting: reserve", "no_defense", "good", "bad"]
    assert lines["good"][0] == "86.0 / **10.0**"  # the figure that was compared
    assert lines["no_defense"][0] == "95.0 / 1.0"
    assert lines["bad"][1] == "**90.0**"  # the best mean accuracy among rivals


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
    trials = trial_table([row("rich", "badnets", 0, 0.9, 0.0), row("poor", "badnets", 0, 0.9, 0.9, setting="trainset")])
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
    wrecked = [row("clp", "badnets", 0, 0.2, 0.0, infected_accuracy=0.95, setting=name) for name in SETTINGS]
    (board,) = boards(trial_table(wrecked), [])
    assert sum(note.startswith("wrecked: clp against badnets") for note in board.notes) == 1


def test_an_attack_that_hardly_implants_or_costs_too_much_accuracy_is_named():
    def of(attack: str, accuracy: float, asr: float | None) -> list[dict]:
        return [row("no_defense", attack, 0, accuracy, asr), row("aft", attack, 0, accuracy, 0.0)]

    trials = [*of("none", 0.75, None), *of("badnets", 0.72, 0.90), *of("sig", 0.75, 0.4), *of("blended", 0.70, 1.0)]
    (board,) = boards(trial_table(trials), [])
    assert [note for note in board.notes if note.startswith(("weak", "dear"))] == [
        "weak: sig: the infected models have an ASR of 40.0, below 90: a repair has less to remove",
        "dear: blended: the infected models are 5.0 points below the clean model",
    ]
    (board,) = boards(trial_table(trials[2:]), [])  # without a clean model nobody knows the price
    assert [note[:9] for note in board.notes if note.startswith(("weak", "dear"))] == ["weak: sig"]


def test_a_defense_that_does_not_work_in_a_setting_has_no_row_there_and_stands_in_the_notes():
    reason = "tuner does not work in the setting 'trainset'"
    none = {"setting": "trainset", "status": "not applicable", "reason": reason}
    trials = [row("no_defense", attack, 0, 0.9, 0.9, setting="trainset") for attack in ("badnets", "blended")]
    trials += [row("tuner", attack, 0, None, None, **none) for attack in ("badnets", "blended")]
    (board,) = boards(trial_table(trials), [])
    assert [cells[0].parts[0][0] for cells in board.rows] == ["setting: trainset", "no_defense"]
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
