"""A claim is reproduced, not reproduced or not tested; the small tables here are judged by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from bench.claims import ROWS, answer, contamination, judge, load, main
from bench.engine.errors import UserError

LOW = {"figure": "asr", "of": {"defense": "pbe", "threat_model": "trainset"}, "at_most": 0.1}


def table(*rows: tuple[str, str, float]) -> pd.DataFrame:
    """(defense, attack, ASR) as trials, seeds counted up for repeated places."""
    found = pd.DataFrame(rows, columns=["defense", "attack", "asr"])
    found["seed"] = found.groupby(["defense", "attack"]).cumcount()
    return found.assign(dataset="d", model="m", threat_model="trainset", poison_rate=0.1, status="done", variant="")


def test_a_bound_is_on_the_mean_over_seeds_of_every_attack():
    assert judge(LOW, table(("pbe", "sig", 0.02), ("pbe", "sig", 0.16), ("pbe", "wanet", 0.1)))[0] is True
    verdict, line = judge(LOW, table(("pbe", "sig", 0.02), ("pbe", "wanet", 0.11)))
    assert verdict is False
    assert line.endswith("d m sig 2.0, d m wanet 11.0 (!)")


def test_minus_compares_on_the_same_attack():
    check = {
        "figure": "asr",
        "of": {"defense": "fine_tuning"},
        "minus": {"defense": "pbe"},
        "at_least": 0.3,
    }
    rows = [("fine_tuning", "sig", 0.5), ("pbe", "sig", 0.1), ("fine_tuning", "wanet", 0.5), ("pbe", "wanet", 0.3)]
    assert judge(check, table(*rows[:2]))[0] is True
    assert judge(check, table(*rows))[0] is False


def test_some_attacks_are_enough_where_the_claim_says_so():
    check = LOW | {"attacks": 2}
    good, bad = ("pbe", "a", 0.0), ("pbe", "b", 1.0)
    assert judge(check, table(good, bad, ("pbe", "c", 0.0)))[0] is True
    assert judge(check, table(good, bad, ("pbe", "c", 1.0)))[0] is False
    assert judge(check, table(good, bad))[0] is None  # two attacks of which one holds: a third could decide


def test_a_failed_or_diverged_seed_does_not_hold_and_a_missing_one_is_no_evidence():
    rows = table(("pbe", "sig", 0.0), ("pbe", "sig", 0.0))
    rows.loc[1, "status"] = "diverged"
    assert judge(LOW, rows)[0] is False
    rows.loc[1, "status"] = "missing"
    assert judge(LOW, rows)[0] is True
    assert judge(LOW, table(("pud", "sig", 0.0)))[0] is None


def test_each_value_of_a_sweep_is_a_cell_of_its_own():
    rows = table(("pbe", "sig", 0.0), ("pbe", "sig", 0.16)).assign(variant=["reserve.size=0.05", "reserve.size=0.01"])
    verdict, line = judge(LOW, rows)  # their mean would hold
    assert verdict is False
    assert line.endswith("d m reserve.size=0.05 sig 0.0, d m reserve.size=0.01 sig 16.0 (!)")


def test_a_claim_on_a_clean_reserve_is_not_judged_by_a_tainted_one_nor_the_other_way_round():
    swept = ["reserve.contamination=0.0", "reserve.contamination=0.2", "train.lr=0.1, reserve.contamination=0.1"]
    rows = table(("aft", "sig", 0.0), ("aft", "sig", 0.9), ("aft", "sig", 0.8)).assign(variant=swept)
    rows["contamination"] = contamination(rows, 0.0)
    assert list(rows.contamination) == [0.0, 0.2, 0.1]
    clean = {"figure": "asr", "of": {"defense": "aft", "reserve": "clean"}, "at_most": 0.1}
    tainted = clean | {"of": {"defense": "aft", "reserve": "tainted"}}
    assert judge(clean, rows)[0] is True
    assert judge(tainted, rows)[0] is False
    assert judge(tainted, rows[:1])[0] is None
    # Where nothing is swept the grid's own share is that of every row.
    assert list(contamination(rows.assign(variant=""), 0.3)) == [0.3] * 3


def test_the_clean_model_is_no_attack():
    rows = table(("pbe", "none", float("nan")), ("pbe", "sig", 0.0))
    rows.loc[0, "poison_rate"] = 0.0
    assert judge(LOW, rows)[0] is True


def test_one_failing_check_fails_a_claim_and_one_untested_leaves_it_open():
    rows = table(("pbe", "sig", 0.5))
    other = {"figure": "asr", "of": {"defense": "pud"}, "at_most": 1}
    assert answer({"checks": [other, LOW]}, rows).verdict == "not reproduced"
    assert answer({"checks": [other, LOW | {"at_most": 0.6}]}, rows).verdict == "not tested"
    assert answer({"checks": [LOW | {"at_most": 0.6}]}, rows).verdict == "reproduced"


def test_the_shipped_claims_are_well_formed_and_name_registered_methods():
    from defenses.base import THREAT_MODELS, defense

    for claim in load(Path("results/claims.yaml")):
        for check in claim["checks"]:
            for rows in (check["of"], check.get("minus", {})):
                assert set(rows) <= ROWS
                names = rows.get("defense", [])
                known = {*defense, "aft_no_adversarial"}  # the ablation of grid ablation_aft
                assert {names} <= known if isinstance(names, str) else set(names) <= known, rows
                assert not rows or rows["threat_model"] in THREAT_MODELS, rows


def test_a_door_reads_a_published_table_and_fails_on_a_claim_that_does_not_hold(tmp_path, capsys):
    rows = table(("pbe", "sig", 0.0), ("pbe", "wanet", 0.0), ("aft", "sig", 0.9)).assign(clean_accuracy=0.9)
    rows.loc[2, "threat_model"] = "reserve"
    rows.to_csv(tmp_path / "trials.csv", index=False)
    assert main([str(tmp_path / "trials.csv")]) == 1
    assert "**not reproduced**: adversarial examples of the infected model" in capsys.readouterr().out


def test_a_claim_with_a_wrong_key_is_refused_by_name(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("- {id: x, source: s, says: t, checks: [{figure: asr, of: {defense: pbe}, at_mots: 0.1}]}")
    with pytest.raises(UserError, match="x: a check needs figure, of, and at_most or at_least, and has no at_mots"):
        load(path)
    path.write_text("- {id: x, source: s, says: t, checks: [{figure: asr, of: {reserve: dirty}, at_most: 0.1}]}")
    with pytest.raises(UserError, match="x: reserve is 'dirty'; write clean or tainted"):
        load(path)


def test_a_claim_on_accuracy_is_not_judged_by_the_clean_model():
    rows = table(("pbe", "none", 0.0), ("pbe", "sig", 0.0)).assign(clean_accuracy=[0.2, 0.9])
    rows.loc[0, "poison_rate"] = 0.0
    check = {"figure": "clean_accuracy", "of": {"defense": "pbe"}, "at_least": 0.5}
    assert judge(check, rows)[0] is True


def test_a_claim_must_hold_on_each_data_set_by_itself():
    check = LOW | {"attacks": 2}
    good = table(("pbe", "a", 0.0), ("pbe", "b", 0.0), ("pbe", "c", 1.0))
    bad = table(("pbe", "a", 1.0), ("pbe", "b", 1.0), ("pbe", "c", 1.0)).assign(dataset="e")
    few = table(("pbe", "a", 0.0), ("pbe", "b", 1.0)).assign(dataset="f")
    assert judge(check, pd.concat([good, bad], ignore_index=True))[0] is False
    assert judge(check, pd.concat([good, few], ignore_index=True))[0] is None
    assert judge(check, pd.concat([few, bad], ignore_index=True))[0] is False


def test_both_bounds_belong_to_what_holds():
    rows = table(("pbe", "sig", 0.5))
    assert judge(LOW | {"at_most": 0.5, "at_least": 0.5}, rows)[0] is True
    assert judge(LOW | {"at_most": 0.6, "at_least": 0.51}, rows)[0] is False


def test_a_cell_that_does_not_apply_is_no_evidence_and_a_diverged_one_without_a_figure_does_not_hold():
    rows = table(("pbe", "sig", float("nan")), ("pbe", "wanet", 0.0))
    for status, verdict in (("not applicable", True), ("diverged", False), ("failed", False), ("wrecked", False)):
        rows.loc[0, "status"] = status
        assert judge(LOW, rows)[0] is verdict


def test_a_claim_that_is_not_tested_is_no_failure(tmp_path, capsys):
    table(("ours", "sig", 0.0)).to_csv(tmp_path / "trials.csv", index=False)
    assert main([str(tmp_path / "trials.csv")]) == 0
    assert "**not tested**" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "dataset,attack\ndigits,badnets\n"])
def test_a_file_that_is_no_table_of_trials_is_refused(tmp_path, text):
    (tmp_path / "leaderboard.csv").write_text(text)
    with pytest.raises(UserError, match=r"is no trials\.csv"):
        main([str(tmp_path / "leaderboard.csv")])


def beats(updates: dict[str, float], asr: dict[str, float], **more) -> pd.DataFrame:
    rows = table(*((name, attack, value) for attack in ("sig", "wanet") for name, value in asr.items()))
    rows = rows.assign(threat_model="reserve", defend_updates=rows.defense.map(updates), contamination=0.0)
    return rows.assign(**more)


@pytest.mark.parametrize(
    ("updates", "verdict"),
    [
        ({"fine_tuning": 200, "aft": 600, "aft_no_adversarial": 600}, "not reproduced"),  # 0.1 < 0.2
        ({"fine_tuning": 600, "aft": 600}, "reproduced"),
        ({"fine_tuning": 200, "aft": 600}, "not testable"),
        ({}, "not testable"),  # a table that does not record them
    ],
)
def test_aft_is_held_against_fine_tuning_of_as_many_updates(updates, verdict):
    (claim,) = [claim for claim in load(Path("results/claims.yaml")) if claim["id"] == "aft-beats-fine-tuning"]
    asr = {"fine_tuning": 0.9, "aft": 0.2}
    if "aft_no_adversarial" in updates:
        asr["aft_no_adversarial"] = 0.1
    found = answer(claim, beats(updates, asr))
    assert found.verdict == verdict
    assert any("aft_no_adversarial" in line and "write" in line for line in found.evidence) == (
        verdict == "not testable"
    )


def test_figures_of_different_infected_models_are_not_subtracted():
    check = {"figure": "asr", "of": {"defense": "fine_tuning"}, "minus": {"defense": "aft"}, "at_least": 0.0}
    rows = beats({}, {"fine_tuning": 0.9, "aft": 0.2}, infected_accuracy=0.9, infected_asr=0.9, implant_weights="one")
    assert answer({"checks": [check]}, rows).verdict == "reproduced"
    rows.loc[(rows.defense == "aft") & (rows.attack == "sig"), "implant_weights"] = "two"
    assert answer({"checks": [check]}, rows).verdict == "not testable"
