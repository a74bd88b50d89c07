"""MLflow is a view of the store: the same figures, sent once, and sent later if it was away."""

from __future__ import annotations

import http.client
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from bench import tracking
from bench.config import UserError
from bench.door import plan
from bench.reporting.table import FIGURES, boards, of_trials
from bench.store import key_of
from tests.test_page import HOSTILE

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
    stored = of_trials(opened.trials, opened.store)
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
    assert run.info.run_name == "fine_tuning · badnets · seed 0 · reserve · digits · test_resnet"
    assert "defend/fine_tuning/loss" in run.data.metrics
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "badnets · seed 0 · digits · test_resnet"
    assert parent.data.metrics["infected_asr"] == run.data.metrics["infected_asr"]
    curve = client.get_metric_history(parent.info.run_id, "implant/implant/loss")
    assert len(curve) == 1  # one epoch
    runs = client.search_runs([place])
    kinds = [found.data.tags["kind"] for found in runs]
    assert sorted(kinds) == ["infected model"] * 2 + ["leaderboard"] + ["trial"] * 4
    assert "| fine_tuning |" in client.get_experiment(place).tags["mlflow.note.content"]
    # What the UI shows of a trial is what the table has, figure by figure.
    shown = {found.data.tags["trial"]: found.data for found in runs if found.data.tags["kind"] == "trial"}
    for row in tracking.read(uri, "quick").to_dict("records"):
        for name in FIGURES:
            assert shown[row["trial"]].metrics.get(name) == (None if math.isnan(row[name]) else row[name])
    artifacts = {
        file.path
        for found in client.search_runs([place], "tags.kind = 'leaderboard'")
        for file in client.list_artifacts(found.info.run_id)
    }
    assert {"leaderboard.md", "leaderboard.html", "leaderboard.tex", "trials.csv", "asr_heatmap.png"} <= artifacts


def test_hostile_names_and_values_come_back_from_mlflow_as_the_store_has_them(run_grid, tiny, uri, tmp_path):
    run_grid(*FIRST)
    opened = plan([*tiny, *FIRST])
    whole = opened.trials[-1]
    trials = []
    for name in [*HOSTILE, "a\x00b", "half of a pair \ud800", "../x//y/", "a" * 242 + "/b", "a//" + "b" * 245]:
        defend = {**whole.defend, "defense": {**whole.defend["defense"], name: name} | {f"n{i}": i for i in range(100)}}
        evaluate = {**whole.evaluate, "defend": key_of(defend)}
        made, measured = (
            {**opened.store.result(stage, key), "curves": {name: [(0, 0.5), (1, None)]}}
            for stage, key in zip(("defend", "evaluate"), whole.keys()[1:], strict=True)
        )
        measured |= {"status": "diverged", "reason": name, "warnings": [name]}
        measured["figures"] = measured["figures"] | {"asr": None}
        opened.store.finish("defend", defend, made)
        opened.store.finish("evaluate", evaluate, measured)
        trials.append(replace(whole, defense=name, attack=name, variant=name, defend=defend, evaluate=evaluate))
    assert tracking.sync(trials, opened.store, uri, "quick", tmp_path / "artifacts") == len(trials)
    stored = of_trials(trials, opened.store)
    pd.testing.assert_frame_equal(tracking.read(uri, "quick", trials), stored, check_exact=True)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    place = client.get_experiment_by_name("quick").experiment_id
    runs = {run.data.tags["trial"]: run.data for run in client.search_runs([place], "tags.kind = 'trial'")}
    for row in stored.itertuples():
        assert runs[row.trial].tags["defense"] == row.defense
        assert runs[row.trial].tags["reason"] == row.reason
        params = runs[row.trial].params
        assert {params[f"defend.defense.n{i}"] for i in range(100)} == {str(i) for i in range(100)}
        assert row.defense in params.values()


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


def test_the_profile_of_a_server_asks_the_environment_where_it_is(tiny, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert plan(tiny).tracking_uri.startswith("sqlite:///")
    assert plan([*tiny, "tracking=server"]).tracking_uri == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org:80")
    assert plan([*tiny, "tracking=server"]).tracking_uri == "http://example.org:80"
    assert plan([*tiny, "tracking=server", "tracking.uri=http://other"]).tracking_uri == "http://other"
    with pytest.raises(UserError, match=r"no tracking 'sever'. Did you mean 'server'\? Known: local, server"):
        plan([*tiny, "tracking=sever"])


@pytest.mark.slow
def test_processes_that_need_a_database_at_once_make_one(tmp_path):
    path = tmp_path / "mlflow.db"
    code = "import sys; from pathlib import Path; from bench import tracking; "
    code += "print(tracking._open(sys.argv[1], 'quick', Path(sys.argv[2]))[1])"
    command = [sys.executable, "-c", code, f"sqlite:///{path}", str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert len(set(said)) == 1  # one experiment, too
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
    assert not list(tmp_path.glob("*.new*"))


@pytest.fixture
def server(tmp_path):
    """An MLflow server with PostgreSQL behind it, in a folder that PostgreSQL's own user can enter."""
    script = Path(__file__).parents[1] / "slurm" / "tracking.sh"
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        two.bind(("127.0.0.1", port + 1))
    home = Path("/tmp") / f"tracking-{os.getpid()}"
    own = {"TRACKING": str(home), "TRACKING_PORT": str(port), "TRACKING_WORKERS": "1", "PYTHON": sys.executable}

    def do(word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(script), word], env={**os.environ, **own}, capture_output=True, text=True)

    if (checked := do("check")).returncode:
        pytest.skip(checked.stderr.strip())
    try:
        started = do("up")
        assert started.returncode == 0, started.stderr
        yield f"http://127.0.0.1:{port}", do
    finally:
        do("down")
        shutil.rmtree(home)


@pytest.mark.server
def test_a_server_with_postgresql_gives_the_leaderboard_of_the_store_and_keeps_it_when_it_restarts(
    run_grid, tiny, server
):
    uri, do = server
    sent = [*FIRST, "tracking=server", f"tracking.uri={uri}", "tracking.enabled=true"]
    assert run_grid(*sent)[0] == 0
    assert do("down").returncode == 0
    assert do("up").returncode == 0
    opened = plan([*tiny, *sent])
    stored = of_trials(opened.trials, opened.store)
    pd.testing.assert_frame_equal(tracking.read(uri, "quick", opened.trials), stored, check_exact=True)
    assert tracking.sync(opened.trials, opened.store, uri, "quick", Path("unused")) == 0
    # It answers to this machine's name, as other nodes call it, and not to a stranger's.
    port = uri.rpartition(":")[2]
    for name, status in ((socket.gethostname(), 200), ("127.0.0.1", 200), ("elsewhere.example", 403)):
        found = http.client.HTTPConnection("127.0.0.1", int(port))
        found.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": f"{name}:{port}"})
        assert found.getresponse().status == status, name
    # The password is among nobody's words.
    password = Path(f"/tmp/tracking-{os.getpid()}/password").read_text().strip()
    words = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "mlflow" in words
    assert password not in words


@pytest.mark.parametrize(
    "rows",
    [
        ["grid.defenses=[no_defense]", "grid.settings=[reserve,trainset]"],  # needs no image: alike in each setting
        [
            "grid.defenses=[fine_tuning,again]",
            "grid.ablations=[{name:again,defense:fine_tuning,set:{batch_size:256}}]",
        ],
    ],
    ids=["settings", "ablation"],
)
def test_two_rows_that_are_one_stage_are_two_runs(run_grid, tiny, uri, rows):
    two = ["grid.attacks=[badnets]", *rows]
    run_grid(*two, "tracking.enabled=true", f"tracking.uri={uri}")
    opened = plan([*tiny, *two])
    stored = of_trials(opened.trials, opened.store)
    assert stored.trial.nunique() == 1 < len(stored)
    pd.testing.assert_frame_equal(tracking.read(uri, "quick", opened.trials), stored, check_exact=True)
