"""MLflow is a view of the store: the same figures, sent once, and sent later if it was away."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from bench import tracking
from bench.door import plan
from bench.reporting.table import boards, trial_row, trial_table

FIRST = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning]"]


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow file, copied by each test: making its sixty tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    tracking._open(f"sqlite:///{path}", "template", path.parent)
    return path


@pytest.fixture
def uri(database, tmp_path):
    shutil.copy(database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_leaderboard_from_mlflow_equals_the_one_from_the_store(run_grid, tiny, uri):
    # Nothing of no_defense changes with the reserve: two of its trials are one stage, and two runs all the same.
    swept = [*FIRST, "grid.sweep=[{key:reserve.size,values:[0.02,0.05]}]"]
    run_grid(*swept, "tracking.enabled=true", f"tracking.uri={uri}")
    opened = plan([*tiny, *swept])
    stored = trial_table([trial_row(trial, opened.store) for trial in opened.trials])
    assert stored.trial.nunique() < len(stored)
    order = ["variant", "attack", "defense", "seed"]
    mirrored = tracking.read(uri, "quick").sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(mirrored, stored.sort_values(order, ignore_index=True), check_exact=True)
    # The rows may come in another order; with the store's order the text is the same, letter by letter.
    place = ["trial", "variant"]
    ordered = stored[place].merge(mirrored, on=place, how="left")[list(stored.columns)]
    assert [board.markdown() for board in boards(ordered, [])] == [board.markdown() for board in boards(stored, [])]


def test_each_trial_is_one_run_however_often_it_is_sent(run_grid, tiny, uri, tmp_path):
    run_grid(*FIRST)
    opened = plan([*tiny, *FIRST])
    place = (uri, "quick", tmp_path / "artifacts")
    assert tracking.sync(opened.trials, opened.store, *place) == 4
    assert tracking.sync(opened.trials, opened.store, *place) == 0
    assert len(tracking.read(uri, "quick")) == 4


def test_a_run_holds_params_curves_and_the_commit(run_grid, tiny, uri):
    run_grid(*FIRST, "tracking.enabled=true", "report.plots=true", f"tracking.uri={uri}")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    place = client.get_experiment_by_name("quick").experiment_id
    (run,) = client.search_runs([place], "tags.attack = 'badnets' and tags.defense = 'fine_tuning'")
    assert run.data.params["implant.attack.patch_size"] == "3"
    assert run.data.params["defend.defense.epochs"] == "1"
    assert run.info.run_name == "digits/test_resnet/badnets/fine_tuning/reserve/0"
    assert "defend/fine_tuning/loss" in run.data.metrics
    curve = client.get_metric_history(run.info.run_id, "implant/implant/loss")
    assert len(curve) == 1  # one epoch
    artifacts = {
        file.path
        for found in client.search_runs([place], "tags.kind = 'leaderboard'")
        for file in client.list_artifacts(found.info.run_id)
    }
    assert {"leaderboard.md", "leaderboard.html", "leaderboard.tex", "trials.csv", "asr_heatmap.png"} <= artifacts


def test_a_tracking_failure_loses_no_result_and_is_sent_later(run_grid, tiny, uri, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    code, trials = run_grid(*FIRST, "tracking.enabled=true", "tracking.uri=http://127.0.0.1:9")
    assert code == 0
    assert (trials.status == "done").all()
    assert "the next run sends it" in capsys.readouterr().err
    run_grid(*FIRST, "tracking.enabled=true", f"tracking.uri={uri}")
    assert len(tracking.read(uri, "quick")) == 4


def test_a_run_that_was_begun_and_not_ended_is_sent_again(run_grid, tiny, uri, tmp_path, monkeypatch):
    run_grid(*FIRST)
    opened = plan([*tiny, *FIRST])
    from mlflow import MlflowClient

    def dies(*_, **__):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", dies)
        with pytest.raises(ConnectionError):
            tracking.sync(opened.trials, opened.store, uri, "quick", tmp_path / "artifacts")
    assert tracking.sync(opened.trials, opened.store, uri, "quick", tmp_path / "artifacts") == 4
    assert len(tracking.read(uri, "quick")) == 4
