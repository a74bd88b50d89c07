"""Figures are drawn where the grid has their data, and only there."""

from __future__ import annotations

import pandas as pd
import pytest

from bench.engine import robustness
from bench.reporting.cells import to_cells
from bench.reporting.figures import style
from bench.reporting.figures.boards import _front, heatmap, robust_bars, sweep_curves
from bench.reporting.figures.curves import epsilon_curves, score_spread, step_curves
from bench.reporting.figures.draw import _CONNECTION_FIGURES, _FIGURES, draw_figures
from bench.reporting.figures.style import FigureData, look_of
from bench.reporting.trials import trial_table


def row(attack, defense, seed, asr, **more):
    base = {"dataset": "digits", "model": "net", "threat_model": "reserve", "attack": attack, "defense": defense}
    base |= {"seed": seed, "poison_rate": 0.0 if attack == "none" else 0.1, "status": "done"}
    return base | {"clean_accuracy": 0.9, "asr": asr, "defend_seconds": 1.0 + seed} | more


def test_a_clean_grid_has_no_figure_of_attacks_and_old_ones_go(tmp_path):
    for name in ("asr_heatmap.png", "asr_heatmap.pdf", "cost.png"):
        (tmp_path / name).write_text("of an earlier run")
    assert draw_figures(trial_table([row("none", "a", 0, None)]), tmp_path, "Grid x") == []
    assert list(tmp_path.iterdir()) == []


def test_the_front_has_those_that_none_beats_in_both():
    points = pd.DataFrame(
        {"asr": [0.1, 0.2, 0.3, 0.3, 0.05], "clean_accuracy": [0.9, 0.85, 0.95, 0.93, None]}, index=list("abcde")
    )
    assert list(_front(points).index) == ["a", "c"]


def test_a_defense_has_one_look_wherever_it_is_drawn():
    from defenses.base import defense

    looks = [tuple(look_of(name).items()) for name in sorted(defense)]
    assert len(set(looks)) == len(looks)
    assert look_of("somebody_elses") == look_of("somebody_elses")


@pytest.mark.slow
def test_every_figure_is_drawn_from_the_data_that_it_needs(tmp_path):
    hostile = "$a_b^{c$ <b>&%"
    attacks, defenses = ["none", "badnets", "blended", hostile], ["no_defense", "a", "b", hostile]
    sweep = [f"reserve.size={size}" for size in (0.01, 0.05)]
    figures = {"robust_accuracy": 0.3, "relearn_asr": 0.5, "relearn_asr_clean_control": 0.1}
    rows = [
        row(a, d, seed, None if a == "none" else (i + 2 * j + seed) / 20, variant=v, **figures)
        for i, a in enumerate(attacks)
        for j, d in enumerate(defenses)
        for v in sweep
        for seed in range(2)
    ]
    seen = {"fooled": 0.5, "concentration": 0.5, "similarity": 0.1, "classes": [0.5, 0.5]}
    spread = {"clean": [-1, -0.9, -0.8, -0.7, -0.6], "poison": [-0.5, -0.4, -0.3, -0.2, -0.1]}
    more = {
        "steps": [
            {"name": f"step {i}", "asr": 0.5 / (i + 1), "clean_accuracy": 0.9, "suspicion": spread} for i in range(3)
        ],
        "autoattack": [{"norm": "linf", "epsilon": e / 255, "accuracy": 1 / (1 + e)} for e in (1, 2, 4)],
        "connection": [
            {"epsilon": e / 255, "images": 100, "infected": seen, "clean_control": {"fooled": 0.0}, "repaired": seen}
            for e in (1, 2)
        ],
        "relearn": [
            {
                "poisoned": n,
                "asr": n / 50,
                "asr_clean_control": None,
                "course": [[0, 0.1], [1, 0.2]],
                "course_clean_control": None,
            }
            for n in (1, 5, 10)
        ],
    }
    evidence = [{"more": more, "roc": {"fpr": [0, 0.1, 1], "tpr": [0, 0.8, 1]}}] * len(rows)
    drawn = draw_figures(trial_table(rows), tmp_path, "Grid x", evidence)
    assert [path.stem for path in drawn] == [*_FIGURES, *_CONNECTION_FIGURES]
    assert all(path.with_suffix(".pdf").stat().st_size > 1000 for path in drawn)
    again = draw_figures(trial_table([row("badnets", "a", 0, 0.5)]), tmp_path, "Grid x")
    assert {path.stem for path in again} == {"asr_heatmap", "accuracy_against_asr", "cost"}
    assert {path.stem for path in tmp_path.iterdir()} == {path.stem for path in again}


def test_the_scores_of_clean_and_poisoned_images_are_drawn_as_the_evaluation_wrote_them():
    steps = [
        {"name": "step 0", "suspicion": {"clean": [0.0, 0.1, 0.2, 0.3, 0.4], "poison": [0.5, 0.6, 0.7, 0.8, 0.9]}},
        {"name": "unscored"},
        {"name": "step 1", "suspicion": {"clean": [0.0, 0.0, 0.1, 0.2, 0.2], "poison": [0.8, 0.8, 0.9, 1.0, 1.0]}},
    ]
    trials = trial_table([row("badnets", "pbe", 0, 0.5)])
    more = {"more": {"steps": steps}}
    figure = score_spread(FigureData(trials, to_cells(trials), pd.Series([more]), "x"))
    (axis,) = figure.axes
    assert [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] == [
        ("clean: median", [0, 1], [0.2, 0.1]),
        ("poison: median", [0, 1], [0.7, 0.9]),
    ]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["step 0", "step 1"]
    steps[0]["suspicion"] = {"clean": [0.0] * 5}  # a clean model has nothing to tell apart
    steps[2]["suspicion"] = {"clean": [0.0] * 5}
    assert score_spread(FigureData(trials, to_cells(trials), pd.Series([more]), "x")) is None


def test_the_steps_of_each_attack_are_a_panel_while_there_is_room(monkeypatch):
    asr = {"badnets": [0.9, 0.8], "blended": [0.3, 0.2]}
    trials = trial_table([row(attack, "pbe", 0, 0.5) for attack in asr])
    trials.loc[0, "status"] = "wrecked"  # the steps tell where
    behind = pd.Series(
        {"more": {"steps": [{"name": f"step {index}", "asr": value} for index, value in enumerate(values)]}}
        for values in asr.values()
    )
    grid = FigureData(trials, to_cells(trials), behind, "x")
    figure = step_curves(grid)
    assert {axis.get_title(): list(axis.lines[0].get_ydata()) for axis in figure.axes} == {
        "badnets": [90, 80],
        "blended": [30, 20],
    }
    assert "means over seeds" in figure.get_suptitle()
    monkeypatch.setattr(style, "MOST_PANELS", 1)
    figure = step_curves(grid)
    assert [list(axis.lines[0].get_ydata()) for axis in figure.axes] == [[60, 50]]
    assert "means over attacks and seeds" in figure.get_suptitle()


def test_a_step_that_one_seed_alone_has_moves_no_other_step_and_no_curve_runs_through_it():
    trials = trial_table([row("badnets", "pud", seed, 0.5) for seed in (0, 1)])
    names = [["step 0", "step 1", "tail"], ["SPECTRE", "step 0", "selection 1", "step 1", "tail"]]
    asr = {"SPECTRE": 0.8, "step 0": 0.4, "selection 1": 0.3, "step 1": 0.2, "tail": 0.1}
    behind = pd.Series({"more": {"steps": [{"name": name, "asr": asr[name]} for name in own]}} for own in names)
    for order in ([0, 1], [1, 0]):
        grid = FigureData(trials, to_cells(trials), behind[order].reset_index(drop=True), "x")
        (axis,) = step_curves(grid).axes
        assert [tick.get_text() for tick in axis.get_xticklabels()] == names[1]
        curve, alone = axis.lines
        assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([1, 3], pytest.approx([40, 20]))
        # The tail is what is unlearned: it is of all, and no step on the way.
        assert (list(alone.get_xdata()), list(alone.get_ydata())) == ([0, 2, 4], pytest.approx([80, 30, 10]))
        assert (curve.get_linestyle(), alone.get_linestyle()) == ("-", "None")
        assert "Hollow" in axis.figure.get_suptitle()


def test_the_scores_of_a_step_are_means_of_trials_that_have_all_steps_drawn():
    trials = trial_table([row("badnets", "pud", seed, 0.5) for seed in (0, 1)])

    def step(name: str, middle: float) -> dict:
        return {"name": name, "suspicion": {kind: [0.0, 0.0, middle, 1.0, 1.0] for kind in ("clean", "poisoned")}}

    steps = [
        [step("step 0", 0.2), step("step 1", 0.4)],
        [step("step 0", 0.4), step("step 0 again", 0.9), step("step 1", 0.6)],
    ]
    grid = FigureData(trials, to_cells(trials), pd.Series([{"more": {"steps": own}} for own in steps]), "x")
    (axis,) = score_spread(grid).axes
    assert list(axis.lines[0].get_ydata()) == pytest.approx([0.3, 0.5])


def test_a_swept_mean_has_no_point_where_an_attack_is_wrecked(monkeypatch):
    asr = {("badnets", 0.1): 0.9, ("badnets", 0.2): 0.8, ("blended", 0.1): 0.3, ("blended", 0.2): 0.1}
    trials = trial_table(
        [row(attack, "pbe", 0, value, variant=f"reserve.size={size}") for (attack, size), value in asr.items()]
    )
    trials.loc[1, "status"] = "wrecked"
    curves = lambda figure: [[list(line.get_ydata()) for line in axis.lines] for axis in figure.axes[::2]]  # noqa: E731
    grid = FigureData(trials, to_cells(trials), pd.Series([{}] * 4), "x")
    assert curves(sweep_curves(grid)) == [[[30, 10]]]  # badnets has one point left, which is no curve
    monkeypatch.setattr(style, "MOST_PANELS", 1)
    assert curves(sweep_curves(grid)) == [[[60]]]


def test_a_radius_that_the_evaluation_wrote_is_drawn_in_levels_of_255():
    rows = [{"norm": "linf", "epsilon": radius, "accuracy": 0.5} for radius in robustness.LINF]
    rows.append({"norm": "l2", "epsilon": robustness.L2, "accuracy": 0.5})
    trials = trial_table([row("badnets", "a", 0, 0.5)])
    figure = epsilon_curves(FigureData(trials, to_cells(trials), pd.Series([{"more": {"autoattack": rows}}]), "x"))
    (axis,) = figure.axes
    assert axis.lines[0].get_xdata() == pytest.approx([0.25, 0.5, 1, 2, 4, 8])


def test_rows_of_one_grid_have_looks_of_their_own():
    names = ["aft", "aft_thrice", *(f"aft_{letter}" for letter in "abcdefghij")]
    looks = [(look_of(name)["color"], look_of(name)["marker"]) for name in names]
    assert len(set(looks)) == len(looks)


def test_a_bar_of_fewer_cells_than_the_others_says_so():
    rows = [row(attack, name, 0, 0.5, robust_accuracy=0.3) for attack in ("badnets", "sig") for name in ("a", "b")]
    rows[-1] |= {"status": "wrecked"}
    trials = trial_table(rows)
    figure = robust_bars(FigureData(trials, to_cells(trials), pd.Series([{}] * len(trials)), "x"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["30.0", "30.0†"]


def test_a_cell_of_fewer_seeds_than_the_others_says_so_in_the_heatmap():
    rows = [row("badnets", name, seed, 0.5) for name in ("a", "b") for seed in range(2)]
    rows[-1] |= {"status": "wrecked"}
    trials = trial_table(rows)
    figure = heatmap(FigureData(trials, to_cells(trials), pd.Series([{}] * len(trials)), "x"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.0", "50.0†"]


def test_a_swept_mean_is_over_all_seeds_or_has_no_point():
    rows = [
        row("badnets", "a", seed, 0.9 if seed else 0.1, variant=f"reserve.size={size}")
        for size in (0.1, 0.2, 0.3)
        for seed in range(2)
    ]
    rows[3] |= {"status": "wrecked"}  # what is left of 0.2 is the better seed
    trials = trial_table(rows)
    figure = sweep_curves(FigureData(trials, to_cells(trials), pd.Series([{}] * len(trials)), "x"))
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.1, 0.3]
