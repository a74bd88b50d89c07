"""bench.compare: what counts as worse, what exits with 1, and ours beside published figures."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from attacks.base import attack
from bench import compare
from bench.engine.errors import UserError
from bench.experiment.load import load_methods
from bench.reporting.leaderboard import write_tables
from bench.reporting.reported import read_reported
from bench.reporting.trials import trial_table
from defenses.base import defense

PUBLISHED = Path(__file__).parents[1] / "results" / "published"


def row(defense, seed, accuracy, asr, **more):
    base = {"dataset": "digits", "model": "net", "threat_model": "reserve", "attack": "badnets", "defense": defense}
    base |= {"seed": seed, "poison_rate": 0.1, "status": "done", "clean_accuracy": accuracy, "asr": asr}
    return base | more


@pytest.fixture
def saved(tmp_path):
    def save(name, rows):
        folder = tmp_path / name
        write_tables(trial_table(rows), [], folder, name)
        return str(folder)

    return save


OLD = [row("a", seed, 0.9 + 0.01 * seed, 0.1 + 0.02 * seed, implant_weights=f"w{seed}") for seed in range(3)]


def test_nothing_changed_is_nothing_worse(saved, capsys):
    assert compare.main([saved("one", OLD), saved("two", OLD)]) == 0
    assert "1 cells in both" in capsys.readouterr().out


@pytest.mark.parametrize(("asr", "status"), [(0.02, 0), (0.021, 1), (-0.1, 0)])
def test_an_asr_is_worse_when_it_rises_by_more_than_the_tolerance(saved, asr, status):
    new = [entry | {"asr": entry["asr"] + asr} for entry in OLD]
    assert compare.main([saved("one", OLD), saved("two", new), "tolerance=0.02"]) == status


def test_an_accuracy_is_worse_when_it_falls(saved, capsys):
    new = [entry | {"clean_accuracy": entry["clean_accuracy"] - 0.05} for entry in OLD]
    assert compare.main([saved("one", OLD), saved("two", new)]) == 1
    assert "WORSE digits/net/reserve/badnets/a: ACC 91.0±1.0 -> 86.0±1.0, -5.0 points" in capsys.readouterr().out
    assert compare.main([saved("one", OLD), saved("two", new), "figures=asr"]) == 0


def test_only_a_significant_difference_counts_where_that_is_asked_for(saved):
    # Differences 0, 0.15 and 0 of three seeds: t = 1, p = 0.42.
    noisy = [entry | {"asr": entry["asr"] + 0.15 * (entry["seed"] == 1)} for entry in OLD]
    assert compare.main([saved("one", OLD), saved("two", noisy)]) == 1
    assert compare.main([saved("one", OLD), saved("two", noisy), "significant=true"]) == 0
    (change,), _, _ = compare.changes(trial_table(OLD), trial_table(noisy), ["asr"])
    assert change.p == pytest.approx(0.4226, abs=1e-4)
    assert change.worse == pytest.approx(0.05)


@pytest.mark.parametrize(("weights", "tested"), [(["w0", "w1", "w2"], 3), (["w0", "w1", "x"], 2), (["", "", ""], 0)])
def test_seeds_are_paired_only_where_the_infected_weights_are_known_to_be_the_same(saved, capsys, weights, tested):
    from scipy import stats

    gaps = (0.15, 0.11, 0.3)
    new = [
        entry | {"asr": entry["asr"] + gap, "implant_weights": name}
        for entry, gap, name in zip(OLD, gaps, weights, strict=True)
    ]
    (change,), _, _ = compare.changes(trial_table(OLD), trial_table(new), ["asr"])
    expected = stats.ttest_1samp(gaps[:tested], 0).pvalue if tested else math.nan
    assert change.p == pytest.approx(expected, nan_ok=True)
    assert change.worse == pytest.approx(sum(gaps) / 3)  # the means are compared all the same
    compare.main([saved("one", OLD), saved("two", new), "significant=true"])
    assert ("cannot be tested" in capsys.readouterr().out) == (not tested)


def test_a_trial_that_is_no_longer_done_is_a_regression(saved, capsys):
    new = [OLD[0] | {"status": "failed", "reason": "boom", "asr": None, "clean_accuracy": None}, *OLD[1:]]
    assert compare.main([saved("one", OLD), saved("two", new)]) == 1
    assert "WORSE digits/net/reserve/badnets/a: done before, now failed: boom" in capsys.readouterr().out


def test_nor_may_a_cell_cease_to_apply(saved, capsys):
    new = [entry | {"status": "not applicable", "reason": "no such layer"} for entry in OLD]
    assert compare.main([saved("one", OLD), saved("two", new)]) == 1
    assert "a: done before, now not applicable: no such layer" in capsys.readouterr().out


def test_different_seeds_are_compared_and_not_tested():
    other = [entry | {"seed": entry["seed"] + 10, "asr": 0.5} for entry in OLD]
    changes, _, _ = compare.changes(trial_table(OLD), trial_table(other), ["asr"])
    assert math.isnan(changes[0].p)


def test_published_figures_stand_beside_ours_with_the_rank_correlation(saved, tmp_path, capsys):
    ours = [row(name, 0, 0.9, asr) for name, asr in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.4))]
    theirs = tmp_path / "theirs.csv"
    lines = [
        f"digits,net,reserve,badnets,{name},{asr},Paper,100 epochs"
        for name, asr in (("a", 0.01), ("b", 0.02), ("c", 0.04), ("d", 0.03))
    ]
    theirs.write_text("\n".join(["dataset,model,threat_model,attack,defense,asr,provenance,protocol", *lines]))
    assert compare.main([saved("one", ours), str(theirs)]) == 0
    out = capsys.readouterr().out
    assert "digits/net/reserve/badnets/c: ASR 30.0 | 4.0 | -26.0 [100 epochs]" in out
    # One pair of six in the other order: Kendall 1 - 2/6, Spearman 1 - 6 * 2 / 60.
    assert "Spearman 0.80, Kendall 0.67" in out
    assert "pairs of repairs" not in out, "the same pairs again"


def test_repairs_alone_are_compared_too_beside_undefended_models(saved, tmp_path, capsys):
    ours = [row("no_defense", 0, 0.9, 0.9)] + [
        row(name, 0, 0.9, asr) for name, asr in (("a", 0.1), ("b", 0.2), ("c", 0.3))
    ]
    theirs = tmp_path / "theirs.csv"
    lines = [
        f"digits,net,reserve,badnets,{name},{asr},{source}"
        for source in ("One", "Two")
        for name, asr in (("no_defense", 0.99), ("a", 0.3), ("b", 0.2), ("c", 0.1))
    ]
    theirs.write_text("\n".join(["dataset,model,threat_model,attack,defense,asr,provenance", *lines]))
    assert compare.main([saved("one", ours), str(theirs)]) == 0
    out = capsys.readouterr().out
    assert "8 pairs of 4 cells" in out
    assert "ASR, rank correlation over 6 pairs of repairs: Spearman -1.00" in out


def test_a_published_table_fits_every_setting_and_only_its_own_poison_rate(saved, tmp_path, capsys):
    theirs = tmp_path / "published.csv"
    lines = ["Board,digits,net,badnets,0.01,a,,0.9,0.5,x", "Board,digits,net,badnets,0.1,a,,0.9,0.25,one run"]
    head = "source,dataset,model,attack,poison_rate,defense,threat_model,clean_accuracy,asr,differs"
    theirs.write_text("\n".join([head, *lines]))
    assert compare.main([saved("one", [row("a", 0, 0.9, 0.1)]), str(theirs)]) == 0
    out = capsys.readouterr().out
    assert "1 pairs of 1 cells" in out
    assert "digits/net/reserve/badnets/a: ACC 90.0 | 90.0 | +0.0, ASR 10.0 | 25.0 | +15.0 [one run]" in out


def test_two_sources_of_one_cell_stand_beside_it_both_and_what_is_not_done_of_ours_is_said(saved, tmp_path, capsys):
    theirs = tmp_path / "published.csv"
    head = "provenance,dataset,model,attack,defense,threat_model,asr"
    theirs.write_text(f"{head}\nPaper A,digits,net,badnets,a,,0.05\nPaper B,digits,net,badnets,a,,0.6")
    ours = [row("a", 0, 0.9, 0.1), row("a", 1, 0.3, 0.0, status="wrecked", reason="60 points")]
    assert compare.main([saved("one", ours), str(theirs)]) == 0
    out = capsys.readouterr().out
    assert "ASR 10.0 | 5.0 | -5.0 [1 of 2 seeds done]" in out
    assert "ASR 10.0 | 60.0 | +50.0 [1 of 2 seeds done]" in out


def test_another_network_and_another_name_of_the_data_can_be_set_side_by_side_and_are_named(saved, tmp_path, capsys):
    theirs = tmp_path / "published.csv"
    head = "provenance,dataset,model,attack,poison_rate,defense,threat_model,asr,protocol"
    theirs.write_text(f"{head}\nBoard,numerals,large,badnets,0.1,a,,0.25,one run")
    ours = saved("one", [row("a", 0, 0.9, 0.1)])
    with pytest.raises(UserError, match="no figure of a cell in common"):
        compare.main([ours, str(theirs), "ignore=model"])
    assert compare.main([ours, str(theirs), "ignore=model", "rename=digits:numerals"]) == 0
    assert "ASR 10.0 | 25.0 | +15.0 [model large; one run]" in capsys.readouterr().out


def test_a_cell_without_a_figure_in_common_is_left_out_and_one_of_two_settings_counts_once(saved, tmp_path, capsys):
    theirs = tmp_path / "published.csv"
    head = "provenance,dataset,model,attack,defense,threat_model,clean_accuracy,asr"
    theirs.write_text(f"{head}\nBoard,digits,net,badnets,a,,0.9,0.25\nBoard,digits,net,badnets,b,,,")
    same = [row("a", 0, 0.9, 0.1), row("a", 0, 0.9, 0.1, threat_model="trainset"), row("b", 0, 0.9, 0.1)]
    assert compare.main([saved("one", same), str(theirs)]) == 0
    assert "1 pairs of 1 cells" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.csv")), ids=lambda path: path.name)
def test_what_is_published_can_be_read_and_names_methods_of_ours_where_we_have_them(path):
    found = read_reported(path)
    assert found[["clean_accuracy_mean", "asr_mean"]].notna().any(axis=1).all()
    load_methods([])
    assert set(found.attack) - {"blind"} <= set(attack)
    assert set(found.defense) - {"d-br", "d-st", "dde", "mbns", "dbd"} <= set(defense)


def test_a_table_of_an_earlier_version_is_read(tmp_path):
    known = pd.read_csv(Path(__file__).parents[1] / "results" / "cifar10_attacks" / "trials_seed0.csv")
    path = str(tmp_path / "trials.csv")
    known.drop(columns=["variant", "der", "consistency", "infected_asr", "warnings"]).to_csv(path, index=False)
    assert compare.main([path, path]) == 0


def test_two_commits_are_compared_through_git(saved, tmp_path, monkeypatch):
    folder = saved("one", OLD)
    monkeypatch.chdir(tmp_path)
    for words in (["init", "-q"], ["add", "-f", "one/trials.csv"], ["commit", "-qm", "x"]):
        name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *name, *words], check=True, capture_output=True)
    assert compare.main(["HEAD:one/trials.csv", folder]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one"], "write two"),
        (["nowhere", "nowhere"], "does not exist"),
        (["a", "b", "tolerance=2"], r"share in \[0, 1\)"),
        (["a", "b", "tolerence=0.1"], "known: tolerance"),
        (["a", "b", "figures=asrr"], "asr"),
        (["a", "b", "significant=1"], "true or false"),
        (["results/cifar10_attacks/trials_seed0.csv"] * 2 + ["ignore=attack"], "must be the same in both"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, words):
    with pytest.raises(UserError, match=words):
        compare.main(arguments)


def test_p_values_are_adjusted_over_all_figures_that_differ():
    gaps = (0.01, 0.02, 0.03)  # t = 0.02 / (0.01 / sqrt(3)) = 3.46 of two degrees of freedom: p = 0.074
    new = [
        entry | {"asr": entry["asr"] + gap, "clean_accuracy": entry["clean_accuracy"] - gap}
        for entry, gap in zip(OLD, gaps, strict=True)
    ]
    before, after = trial_table(OLD), trial_table(new)
    (alone,), _, _ = compare.changes(before, after, ["asr"])
    both, _, _ = compare.changes(before, after, ["asr", "clean_accuracy"])
    assert alone.p == pytest.approx(0.0742, abs=1e-4)
    assert [change.p for change in both] == pytest.approx([2 * 0.0742] * 2, abs=2e-4)


def test_a_wrecked_seed_has_no_part_in_what_is_compared():
    new = [OLD[0] | {"asr": 0.9, "status": "wrecked", "reason": "60 points"}, *OLD[1:]]
    found, broken, _ = compare.changes(trial_table(OLD), trial_table(new), ["asr"])
    assert found == []
    assert broken == ["digits/net/reserve/badnets/a: done before, now wrecked: 60 points"]


def test_where_one_seed_is_shared_it_alone_is_compared_and_not_tested():
    one = trial_table([row("a", seed, 0.9, asr) for seed, asr in ((0, 0.1), (1, 0.3))])
    two = trial_table([row("a", seed, 0.9, asr) for seed, asr in ((1, 0.4), (2, 0.9))])
    ((change,), _, _) = compare.changes(one, two, ["asr"])
    assert change.worse == pytest.approx(0.1)
    assert math.isnan(change.p)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_of_three_cells_or_more_are_compared_and_the_mean_difference_is_theirs_minus_ours(
    saved, tmp_path, capsys, count
):
    theirs = tmp_path / "theirs.csv"
    names = "abc"[:count]
    lines = [f"digits,net,reserve,badnets,{name},{0.1 * index + 0.05},Paper" for index, name in enumerate(names)]
    theirs.write_text("\n".join(["dataset,model,threat_model,attack,defense,asr,provenance", *lines]))
    ours = [row(name, 0, 0.9, 0.1 * index) for index, name in enumerate(names)]
    assert compare.main([saved("one", ours), str(theirs)]) == 0
    line = "ASR, rank correlation over 3 pairs: Spearman 1.00, Kendall 1.00; mean difference +5.0 points"
    assert [text for text in capsys.readouterr().out.splitlines() if "rank correlation" in text] == [line][: count - 2]


def test_two_reported_tables_stand_side_by_side_and_of_theirs_no_seeds_of_ours_are_counted(saved, tmp_path, capsys):
    theirs = tmp_path / "published.csv"
    theirs.write_text("provenance,dataset,model,attack,defense,threat_model,asr,seeds\nP,digits,net,badnets,a,,0.05,5")
    assert compare.main([str(theirs), str(theirs)]) == 0
    assert compare.main([str(theirs), saved("one", OLD)]) == 0
    assert "seeds done" not in capsys.readouterr().out


def test_what_stands_alone_is_counted_and_two_results_of_nothing_in_common_are_refused(saved, tmp_path, capsys):
    theirs = tmp_path / "published.csv"
    head = "provenance,dataset,model,attack,defense,threat_model,asr"
    theirs.write_text(f"{head}\nP,digits,net,badnets,a,,0.05\nP,digits,net,badnets,b,,0.05\nP,digits,net,sig,a,,0.05")
    ours = [*OLD, row("b", 0, 0.3, 0.0, status="wrecked", reason="60 points")]
    assert compare.main([saved("one", ours), str(theirs)]) == 0
    assert "without a figure: 1 of the first, 2 of the second" in capsys.readouterr().out
    with pytest.raises(UserError, match="no cell in common"):
        compare.main([saved("two", OLD), saved("three", [entry | {"dataset": "other"} for entry in OLD])])


def test_an_empty_file_is_one_line(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is no table"):
        compare.main([str(tmp_path / "empty.csv")] * 2)


def test_one_seed_beside_three_is_compared_with_its_own(saved, capsys):
    assert compare.main([saved("one", OLD[:1]), saved("two", OLD)]) == 0
    assert "0 figures differ" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["ignore=model", "rename=a:b"])
def test_a_setting_for_reported_figures_is_refused_between_two_measured_tables(saved, setting):
    with pytest.raises(UserError, match=f"{setting.partition('=')[0]} is for reported figures"):
        compare.main([saved("one", OLD), saved("two", OLD), setting])
