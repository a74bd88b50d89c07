"""`reuse=FILE`: what a published table has is not computed again, and nothing else passes for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from bench._command import open_experiment
from bench.dispatch.tasks import pending
from bench.engine.errors import UserError
from bench.reporting.columns import MEASURES
from bench.reporting.report import write_report
from bench.run import main

FIRST = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning]"]
MORE = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning,fine_pruning]"]
RunGrid = Callable[..., tuple[int, pd.DataFrame]]


@pytest.fixture
def published(run_grid: RunGrid, tmp_path: Path) -> Path:
    """The trials.csv of a grid of four trials, moved away from the store that computed them."""
    assert run_grid(*FIRST)[0] == 0
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    return tmp_path / "elsewhere" / "quick" / "trials.csv"


def test_only_the_new_method_is_computed_and_the_table_is_that_of_the_whole(
    tiny: list[str], published: Path, tmp_path: Path
) -> None:
    mine = [*tiny, *MORE, f"reuse=[{published}]"]
    experiment = open_experiment(mine)
    repairs = [
        task.trial.defense for task in pending(experiment.own, experiment.store) if task.stages[-1] == "evaluate"
    ]
    assert repairs == ["fine_pruning", "fine_pruning"]
    assert main(mine) == 0
    assert len(experiment.store.keys("evaluate")) == 2
    joined = pd.read_csv(tmp_path / "results" / "quick" / "trials.csv")
    assert main([*tiny, *MORE, f"results={tmp_path / 'whole'}"]) == 0
    whole = pd.read_csv(tmp_path / "whole" / "quick" / "trials.csv")
    assert list(joined.columns) == list(whole.columns)
    figures = [column.name for column in MEASURES if column.name in whole]
    same = ["attack", "defense", "seed", "status", "trial", *figures]
    pd.testing.assert_frame_equal(joined[same], whole[same])
    note = f"computed elsewhere, each row with its commit in trials.csv: trials of {published}"
    assert note in (tmp_path / "results" / "quick" / "leaderboard.md").read_text()


def test_a_row_of_other_settings_never_passes_for_a_trial_of_this_grid(tiny: list[str], published: Path) -> None:
    other = open_experiment([*tiny, *FIRST, "attack.badnets.patch_size=4", f"reuse=[{published}]"])
    assert {trial.attack for trial in other.own} == {"badnets"}
    with pytest.raises(UserError, match="no trial of this grid with these settings"):
        open_experiment([*tiny, *FIRST, "train.epochs=2", f"reuse=[{published}]"])


def test_a_trial_without_an_outcome_is_computed(tiny: list[str], published: Path) -> None:
    table = pd.read_csv(published)
    table.loc[table.attack == "badnets", "status"] = "failed"
    table.to_csv(published, index=False)
    assert {trial.attack for trial in open_experiment([*tiny, *FIRST, f"reuse=[{published}]"]).own} == {"badnets"}


def test_a_file_that_is_no_table_is_refused(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"is no trials\.csv"):
        open_experiment([*tiny, *FIRST, f"reuse=[{tmp_path / 'other.csv'}]"])
    with pytest.raises(UserError, match=r"nowhere\.csv is no trials\.csv"):
        open_experiment([*tiny, *FIRST, f"reuse=[{tmp_path / 'nowhere.csv'}]"])


@pytest.mark.slow
def test_a_report_of_nothing_leaves_a_table_as_it_is_also_where_some_cells_do_not_apply(
    tiny: list[str], run_grid: RunGrid, tmp_path: Path
) -> None:
    both = "grid.threat_models=[reserve,trainset]"  # fine-tuning needs a reserve: not applicable in the other
    assert run_grid(*FIRST, both)[0] == 0
    table = tmp_path / "results" / "quick" / "leaderboard.md"
    before = table.read_text()
    with pytest.raises(UserError, match="is left as it is"):
        write_report(open_experiment([*tiny, *FIRST, both, "train.epochs=2"]))
    assert table.read_text() == before


@pytest.mark.slow
def test_a_table_that_this_store_cannot_bring_back_is_kept_and_one_that_it_can_is_not(
    tiny: list[str], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "quick"
    folder.mkdir(parents=True)
    before = published.read_text()
    (folder / "trials.csv").write_text(before)
    capsys.readouterr()
    assert main([*tiny, "grid.attacks=[none]", FIRST[1]]) == 0
    (kept,) = folder.glob("trials.*.csv")
    assert kept.read_text() == before
    assert "2 trials of the table in" in capsys.readouterr().err  # those of the clean model are computed again
    assert main([*tiny, "grid.attacks=[none]", "grid.defenses=[no_defense]"]) == 0  # a smaller one, all of it stored
    assert list(folder.glob("trials.*.csv")) == [kept]
    assert main([*tiny, *FIRST, f"reuse=[{kept}]"]) == 0
    assert len(pd.read_csv(folder / "trials.csv")) == 4


@pytest.mark.slow
def test_a_repair_that_is_stored_and_not_evaluated_has_no_evidence_and_breaks_no_report(
    tiny: list[str], run_grid: RunGrid, tmp_path: Path
) -> None:
    first = [
        "grid.attacks=[badnets]",
        "grid.defenses=[no_defense,pbe]",
        "grid.threat_models=[trainset]",
        "grid.seeds=1",
    ]
    first += ["defense.pbe.rates=[]", "defense.pbe.epochs=1", "report.plots=true"]
    assert run_grid(*first)[0] == 0
    there = tmp_path / "results" / "quick" / "trials.csv"
    there.rename(tmp_path / "pbe.csv")
    shutil.rmtree(tmp_path / "results" / "store" / "evaluate")
    write_report(open_experiment([*tiny, *first, f"reuse=[{tmp_path / 'pbe.csv'}]"]))
    assert list(pd.read_csv(there).status) == ["done", "done"]


def test_a_published_table_is_never_written_over_by_a_smaller_one(tiny: list[str], published: Path) -> None:
    there = [*tiny, f"results={published.parent.parent}", f"reuse=[{published}]"]
    with pytest.raises(UserError, match="2 of whose trials are not in it; give it a name of its own"):
        open_experiment([*there, "grid.attacks=[badnets]", FIRST[1]])
    assert open_experiment([*there, *MORE]).own  # a larger one goes on in its place
    assert open_experiment([*there, "grid.attacks=[badnets]", FIRST[1], "grid.name=mine"]).own == []


@pytest.mark.slow
def test_rows_of_two_files_that_contradict_each_other_are_refused_and_equal_ones_count_once(
    tiny: list[str], published: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(published)
    table.to_csv(tmp_path / "again.csv", index=False)
    both = f"reuse=[{published},{tmp_path / 'again.csv'}]"
    assert open_experiment([*tiny, *FIRST, both]).own == []
    table.loc[3, "clean_accuracy"] = 0.123
    table.to_csv(tmp_path / "again.csv", index=False)
    with pytest.raises(UserError, match=r"again\.csv .*clean_accuracy is .* and 0\.123"):
        open_experiment([*tiny, *FIRST, both])
    # One digest for all that was done to an infected model, another for each model.
    assert table.groupby("attack").implant_weights.nunique().tolist() == [1, 1]
    assert table.implant_weights.nunique() == 2
    assert table.implant_weights.str.fullmatch("[0-9a-f]{20}").all()
    # An implant of an earlier version has none: it is that of the stored weights.
    (result, *_) = sorted((tmp_path / "elsewhere" / "store" / "implant").glob("*/*/model.safetensors"))
    from bench.reporting.trials import _weights
    from bench.storage.store import Store

    found = _weights(Store(tmp_path / "elsewhere" / "store"), result.parent.name, {})
    assert found in set(table.implant_weights)
    assert _weights(Store(tmp_path / "nowhere"), result.parent.name, {}) == ""
