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
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import bench.run
import bench.status
import bench.sync
from bench._command import run_command
from bench.engine.errors import UserError
from bench.experiment.experiment import load_experiment
from bench.reporting.board import boards
from bench.reporting.mlflow import _open, check, read, sync
from bench.reporting.trials import FIGURES, of_trials
from bench.storage.store import key_of
from tests.conftest import TINY
from tests.test_page import HOSTILE

FIRST = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning]"]


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow file, copied by each test: making its sixty tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    _open(f"sqlite:///{path}", "template", path.parent)
    return path


@pytest.fixture
def uri(database, tmp_path):
    shutil.copy(database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def _finished(tmp_path_factory, cache):
    """A results folder with the stages of the first grid, computed once for all tests."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    assert bench.run.main([*TINY, *FIRST, f"results={folder}", f"dataset.cache={cache}"]) == 0
    return folder


@pytest.fixture
def finished(_finished, tiny, tmp_path):
    """The settings of the first grid, and a results folder in which it is finished."""
    shutil.copytree(_finished, tmp_path / "results")
    return [*tiny, *FIRST]


def test_a_leaderboard_from_mlflow_equals_the_one_from_the_store(run_grid, tiny, uri):
    # Nothing of no_defense changes with the reserve: two of its trials are one stage, and two runs all the same.
    swept = [*FIRST, "grid.sweep=[{key:reserve.size,values:[0.02,0.05]}]"]
    run_grid(*swept, "tracking.enabled=true", f"tracking.uri={uri}")
    experiment = load_experiment([*tiny, *swept])
    stored = of_trials(experiment.trials, experiment.store)
    assert stored.trial.nunique() < len(stored)
    order = ["variant", "attack", "defense", "seed"]
    mirrored = read(uri, "quick").sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(mirrored, stored.sort_values(order, ignore_index=True), check_exact=True)
    # The rows may come in another order; with the store's order the text is the same, letter by letter.
    place = ["trial", "variant"]
    ordered = stored[place].merge(mirrored, on=place, how="left")[list(stored.columns)]
    assert [board.markdown() for board in boards(ordered, [])] == [board.markdown() for board in boards(stored, [])]


def test_each_trial_is_one_run_however_often_it_is_sent(run_grid, tiny, uri, tmp_path):
    run_grid(*FIRST)
    experiment = load_experiment([*tiny, *FIRST])
    place = (uri, "quick", tmp_path / "artifacts")
    assert sync(experiment.trials, experiment.store, *place) == 4
    assert sync(experiment.trials, experiment.store, *place) == 0
    assert len(read(uri, "quick")) == 4


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
    for row in read(uri, "quick").to_dict("records"):
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
    experiment = load_experiment([*tiny, *FIRST])
    whole = experiment.trials[-1]
    trials = []
    for name in [*HOSTILE, "a\x00b", "half of a pair \ud800", "../x//y/", "a" * 242 + "/b", "a//" + "b" * 245]:
        defend = {**whole.defend, "defense": {**whole.defend["defense"], name: name} | {f"n{i}": i for i in range(100)}}
        evaluate = {**whole.evaluate, "defend": key_of(defend)}
        made, measured = (
            {**experiment.store.result(stage, key), "curves": {name: [(0, 0.5), (1, None)]}}
            for stage, key in zip(("defend", "evaluate"), whole.keys[1:], strict=True)
        )
        measured |= {"status": "diverged", "reason": name, "warnings": [name]}
        measured["figures"] = measured["figures"] | {"asr": None}
        experiment.store.finish("defend", defend, made)
        experiment.store.finish("evaluate", evaluate, measured)
        trials.append(replace(whole, defense=name, attack=name, variant=name, defend=defend, evaluate=evaluate))
    assert sync(trials, experiment.store, uri, "quick", tmp_path / "artifacts") == len(trials)
    stored = of_trials(trials, experiment.store)
    pd.testing.assert_frame_equal(read(uri, "quick", trials), stored, check_exact=True)
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


def test_a_tracking_failure_loses_no_result_and_is_sent_later(run_grid, tiny, uri, capsys):
    code, trials = run_grid(*FIRST, "tracking.enabled=true", "tracking.uri=http://127.0.0.1:9")
    assert code == 0
    assert (trials.status == "done").all()
    assert "127.0.0.1:9" in capsys.readouterr().err
    run_grid(*FIRST, "tracking.enabled=true", f"tracking.uri={uri}")
    assert len(read(uri, "quick")) == 4


def test_a_run_that_was_begun_and_not_ended_is_sent_again(run_grid, tiny, uri, tmp_path, monkeypatch):
    run_grid(*FIRST)
    experiment = load_experiment([*tiny, *FIRST])
    from mlflow import MlflowClient

    def dies(*_, **__):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", dies)
        with pytest.raises(ConnectionError):
            sync(experiment.trials, experiment.store, uri, "quick", tmp_path / "artifacts")
    assert sync(experiment.trials, experiment.store, uri, "quick", tmp_path / "artifacts") == 4
    assert len(read(uri, "quick")) == 4


def test_the_profile_of_a_server_asks_the_environment_where_it_is(tiny, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert load_experiment(tiny).tracking_uri.startswith("sqlite:///")
    assert load_experiment([*tiny, "tracking=server"]).tracking_uri == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org:80")
    assert load_experiment([*tiny, "tracking=server"]).tracking_uri == "http://example.org:80"
    assert load_experiment([*tiny, "tracking=server", "tracking.uri=http://other"]).tracking_uri == "http://other"
    with pytest.raises(UserError, match=r"no tracking 'sever'. Did you mean 'server'\? Known: local, server"):
        load_experiment([*tiny, "tracking=sever"])


def _count(runs):
    return Counter(found.data.tags["kind"] for found in runs)


def _kinds(client, place):
    """How many runs of each kind an experiment shows."""
    return _count(client.search_runs([place]))


def test_runs_that_a_person_deleted_are_there_again_after_the_next_sync(finished, uri, tmp_path):
    from mlflow import MlflowClient

    experiment = load_experiment(finished)
    target = (uri, "quick", tmp_path / "artifacts")
    sync(experiment.trials, experiment.store, *target)
    client = MlflowClient(tracking_uri=uri)
    place = client.get_experiment_by_name("quick").experiment_id
    before = _kinds(client, place)
    assert before == {"trial": 4, "infected model": 2, "leaderboard": 1}
    kinds = [f"tags.kind = '{kind}'" for kind in before]
    for which in [*kinds, "tags.attack = 'badnets'", ""]:
        deleted = client.search_runs([place], which)
        for found in deleted:
            client.delete_run(found.info.run_id)
        sent = sync(experiment.trials, experiment.store, *target)
        assert sent == _count(deleted)["trial"], which
        assert _kinds(client, place) == before, which
        shown = {found.info.run_id for found in client.search_runs([place])}
        trials = client.search_runs([place], "tags.kind = 'trial'")
        assert {found.data.tags["mlflow.parentRunId"] for found in trials} <= shown
        assert len(read(uri, "quick")) == 4
    for found in client.search_runs([place], "tags.kind = 'trial'"):
        client.delete_run(found.info.run_id)
    # What is not among the trials of this command stays deleted.
    assert sync(experiment.trials[:1], experiment.store, *target) == 1
    (found,) = client.search_runs([place], "tags.kind = 'trial'")
    assert found.data.tags["trial"] == experiment.trials[0].keys.evaluate


def test_an_experiment_that_a_person_deleted_is_restored_and_that_is_said(finished, uri, tmp_path, capsys):
    from mlflow import MlflowClient

    experiment = load_experiment(finished)
    target = (uri, "quick", tmp_path / "artifacts")
    sync(experiment.trials[:3], experiment.store, *target)
    client = MlflowClient(tracking_uri=uri)
    place = client.get_experiment_by_name("quick").experiment_id
    client.delete_experiment(place)
    with pytest.raises(LookupError, match="'quick'"):
        read(uri, "quick")
    capsys.readouterr()
    assert sync(experiment.trials, experiment.store, *target) == 1
    assert "'quick'" in capsys.readouterr().out
    assert _kinds(client, place) == {"trial": 4, "infected model": 2, "leaderboard": 1}


@contextmanager
def _server_that(answer):
    """A server on this machine that gives each connection to `answer`; yields its address."""
    connections = []

    def serve(listener):
        while True:
            try:
                connections.append(listener.accept()[0])
                answer(connections[-1])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    for connection in connections:
        connection.close()


def _never(connection):
    pass


def _trickle(connection):
    """A byte now and then: no time-out of a socket ends that."""

    def send():
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.2)

    threading.Thread(target=send, daemon=True).start()


def _fail(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\ngone")
    connection.close()


def _half(connection):
    """A sign of life, and then none."""
    if b"experiments/search" in connection.recv(65536):
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\nConnection: close\r\n\r\n{"experiments": []}')
        connection.close()


@pytest.mark.parametrize(
    "answer", [_fail, *(pytest.param(answer, marks=pytest.mark.slow) for answer in (_never, _trickle, _half))]
)
def test_a_hanging_or_failing_server_costs_a_run_fifteen_seconds_and_one_line(finished, capsys, monkeypatch, answer):
    import mlflow  # noqa: F401  (its import takes seconds that are not the server's)

    spent = []

    def timed(whole):
        def call(*args):
            began = time.monotonic()
            try:
                return whole(*args)
            finally:
                spent.append(time.monotonic() - began)

        return call

    for name in ("_tracking_is_away", "_track"):
        monkeypatch.setattr(bench.run, name, timed(getattr(bench.run, name)))
    experiment = load_experiment(finished)
    with _server_that(answer) as address:
        for something in (True, False):  # to compute
            spent.clear()
            if something:
                shutil.rmtree(experiment.store.folder("evaluate", experiment.trials[0].keys.evaluate))
            capsys.readouterr()
            assert bench.run.main([*finished, "tracking.enabled=true", f"tracking.uri={address}"]) == 0
            (line,) = capsys.readouterr().err.splitlines()
            assert address in line
            assert "bench.sync" in line
            assert len(spent) == 1 + something
            assert sum(spent) < 15


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_locked_database_is_named_as_such(finished, uri, capsys, monkeypatch, journal):
    monkeypatch.setattr(check, "__defaults__", (0.2,))
    sent = [*finished, f"tracking.uri={uri}", "tracking.enabled=true"]
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute(f"pragma journal_mode={journal}")
        other.execute("begin exclusive")
        capsys.readouterr()
        assert bench.run.main(sent) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "locked" in line
        assert "mlflow.db" in line
        with pytest.raises(UserError, match="locked"):
            bench.sync.main(sent)
        other.execute("rollback")
    assert bench.sync.main(sent) == 0
    assert len(read(uri, "quick")) == 4


def _locations(database):
    with closing(sqlite3.connect(database)) as connection:
        return {
            path
            for query in (
                "select artifact_location from experiments where name = 'quick'",
                "select artifact_uri from runs",
            )
            for (path,) in connection.execute(query)
        }


@pytest.mark.slow
@pytest.mark.parametrize("original", ["stays", "is gone"])
def test_a_copied_results_folder_has_its_own_artifacts(finished, database, tmp_path, capsys, original):
    first, second = tmp_path / "results", tmp_path / "copy" / "results"
    shutil.copy(database, first / "mlflow.db")
    assert bench.sync.main(finished) == 0
    assert _locations(first / "mlflow.db")
    shutil.copytree(first, second)
    files = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    if original == "is gone":
        shutil.rmtree(first)
    capsys.readouterr()
    copied = [*finished, f"results={second}", "tracking.enabled=true"]
    # In a process of its own, as a person would: MLflow keeps where a run's artifacts lie for the life of a process.
    command = [sys.executable, "-m", "bench.sync", *copied]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0 trials sent" in out
    assert str(second) in out
    assert all(path.startswith(str(second)) for path in _locations(second / "mlflow.db"))
    if original == "stays":
        assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == files
    experiment = load_experiment(copied)
    stored = of_trials(experiment.trials, experiment.store)
    pd.testing.assert_frame_equal(read(experiment.tracking_uri, "quick", experiment.trials), stored, check_exact=True)


def test_a_database_that_was_copied_without_its_artifacts_is_refused_with_advice(finished, database, tmp_path):
    first, second = tmp_path / "results", tmp_path / "copy"
    shutil.copy(database, first / "mlflow.db")
    assert bench.sync.main(finished) == 0
    shutil.copytree(first, second, ignore=lambda folder, names: ["mlflow"] if folder == str(first) else [])
    copied = [*finished, f"results={second}", "tracking.enabled=true"]
    with pytest.raises(UserError, match=str(second / "mlflow" / "quick")):
        bench.sync.main(copied)
    assert bench.run.main(copied) == 0  # the results are there without it
    (second / "mlflow.db").unlink()
    shutil.copy(database, second / "mlflow.db")
    assert bench.sync.main(copied) == 0
    assert len(read(f"sqlite:///{second / 'mlflow.db'}", "quick")) == 4


def test_another_results_folder_may_share_a_database(finished, database, tmp_path):
    shared = tmp_path / "shared" / "mlflow.db"
    shared.parent.mkdir()
    shutil.copy(database, shared)
    assert bench.sync.main([*finished, f"tracking.uri=sqlite:///{shared}"]) == 0
    before = _locations(shared)
    assert bench.sync.main([*finished, f"results={shared.parent}"]) == 0
    assert _locations(shared) == before


SECRET = "s3cr3t%40word"


@pytest.mark.parametrize(
    ("word", "works"),
    [
        (f"tracking.uri=http://me:{SECRET}@127.0.0.1:9", True),
        (f"++tracking.uri='http://{SECRET}@127.0.0.1:9/base'", True),
        (f"tracking={{uri:'http://127.0.0.1:9/base?access_token={SECRET}'}}", True),
        (f"tracking.uri='postgresql://me:{SECRET}@127.0.0.1:9/mlflow?connect_timeout=1'", True),
        ("tracking=server", True),  # its address is in the environment
        (f"tracking.uri='http://me:x/{SECRET}@127.0.0.1:9'", False),  # refused: this host is called me
        (f"tracking.uri='http://me:1/{SECRET}@127.0.0.1:9'", False),
        (f"misspelt.uri=http://me:{SECRET}@127.0.0.1:9", False),
        (f"tracking.uri=http://me:{SECRET}@127.0.0.1:9/[", False),
    ],
)
def test_no_secret_of_a_server_s_address_is_written_or_printed(finished, tmp_path, capfd, monkeypatch, word, works):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    shutil.rmtree(tmp_path / "results" / "quick")
    words = [*finished, "tracking.enabled=true", word]
    said = ""
    for command in (bench.run, bench.sync, bench.status):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit):
            run_command(command.main, "")
        said += "".join(capfd.readouterr())
    assert said
    assert "s3cr3t" not in said
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert [path for path in files if b"s3cr3t" in path.read_bytes()] == []
    assert (tmp_path / "results" / "quick" / "config.yaml").exists() == works


@pytest.mark.slow
def test_processes_that_need_a_database_at_once_make_one(tmp_path):
    path = tmp_path / "mlflow.db"
    code = "import sys; from pathlib import Path; from bench.reporting import mlflow; "
    code += "print(mlflow._open(sys.argv[1], 'quick', Path(sys.argv[2]))[1])"
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
    experiment = load_experiment([*tiny, *sent])
    stored = of_trials(experiment.trials, experiment.store)
    pd.testing.assert_frame_equal(read(uri, "quick", experiment.trials), stored, check_exact=True)
    assert sync(experiment.trials, experiment.store, uri, "quick", Path("unused")) == 0
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
        [
            "grid.defenses=[no_defense]",
            "grid.threat_models=[reserve,trainset]",
        ],  # needs no image: alike in each setting
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
    experiment = load_experiment([*tiny, *two])
    stored = of_trials(experiment.trials, experiment.store)
    assert stored.trial.nunique() == 1 < len(stored)
    pd.testing.assert_frame_equal(read(uri, "quick", experiment.trials), stored, check_exact=True)
