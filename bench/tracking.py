"""MLflow as a view of the store: one run for each finished trial, mirrored by one process, in few calls.

The store is the record. A tracking failure loses nothing: what is missing there is sent by the next run.

Runs are for people. Reading thousands of them back takes minutes, so that the rows of the table of trials also go along
as files, a few hundred in one: from these, MLflow gives a leaderboard in seconds, and tells what it has.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import sqlite3
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from bench.grid import Trial
from bench.reporting.table import FIGURES, TEXTS, Snapshot, trial_row, trial_table
from bench.store import STAGES, Store

ROWS = "rows"  # the folder of rows among the artifacts of an experiment's leaderboard
BATCH = 200  # trials whose rows go into one file

# Before any import of mlflow: it reports usage over the network unless told not to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# A server's client prints two lines for each run that it ends, and draws a bar for each file that it fetches.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is away is asked for twelve seconds, not for four minutes: what it misses is sent later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")


def default_uri(results: Path) -> str:
    """A sqlite file under the results, by its absolute path: a relative one would depend on the folder of a process."""
    return f"sqlite:///{(results / 'mlflow.db').resolve()}"


def sync(trials: list[Trial], store: Store, uri: str, experiment: str, artifacts: Path) -> int:
    """Send every trial that has an outcome and is not in MLflow yet; returns how many were sent.

    Args:
        experiment: its name, the grid's.
        artifacts: folder of MLflow's artifacts, used when the experiment is new.
    """
    while True:
        # Two drivers that end together would both send, and each take the other's half-sent runs for broken ones.
        with store.lock("tracking", experiment) as ours:
            if ours:
                return _sync(trials, store, *_open(uri, experiment, artifacts))
        time.sleep(0.5)


def _sync(trials: list[Trial], store: Store, client: Any, place: str) -> int:
    board = _board(client, place)
    there = {_name(row) for row in _rows(client, place)}
    for run in _runs(client, place, "attributes.status = 'RUNNING' and tags.kind = 'trial'"):
        if run.data.tags.get("store") != str(store.root.resolve()):
            continue  # another sweep's, which sends it now
        # Begun when the tracking broke; if its row arrived, nothing else was missing.
        if (run.data.tags["trial"], run.data.tags["variant"]) in there:
            client.set_terminated(run.info.run_id)
        else:
            client.delete_run(run.info.run_id)
    fresh: list[Trial] = []
    for trial in trials:
        key = trial.keys()[2]
        # A state that can still change is not sent: a run in MLflow is final.
        if key and (key, trial.variant) not in there and store.is_finished("evaluate", key):
            fresh.append(trial)
            there.add((key, trial.variant))
    # A file has one writer; a server has several workers.
    with ThreadPoolExecutor(4 if str(client.tracking_uri).startswith("http") else 1) as pool:
        for start in range(0, len(fresh), BATCH):
            batch, known = fresh[start : start + BATCH], Snapshot(store)
            rows = [trial_row(trial, known) for trial in batch]
            runs = list(pool.map(partial(_send, client, place, known), batch, rows))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
                path.write_text(json.dumps(rows))
                client.log_artifact(board, str(path), ROWS)
            # Last: a run that is not ended is one whose row may be missing.
            list(pool.map(client.set_terminated, runs))
    return len(fresh)


def _board(client: Any, place: str) -> str:
    """The run that holds the tables and the rows of an experiment."""
    found = _runs(client, place, "tags.kind = 'leaderboard'")
    if found:
        run: str = found[0].info.run_id
        return run
    made = client.create_run(place, tags={"mlflow.runName": "leaderboard", "kind": "leaderboard"})
    client.set_terminated(made.info.run_id)
    run = made.info.run_id
    return run


def _rows(client: Any, place: str) -> list[dict[str, Any]]:
    """The rows of all trials that an experiment has."""
    found: list[dict[str, Any]] = []
    # Two that came first at once have made a run each.
    for run in _runs(client, place, "tags.kind = 'leaderboard'"):
        if any(file.path == ROWS for file in client.list_artifacts(run.info.run_id)):
            with tempfile.TemporaryDirectory() as folder:
                for path in sorted(Path(client.download_artifacts(run.info.run_id, ROWS, folder)).iterdir()):
                    found += json.loads(path.read_text())
    return found


def published(folder: Path) -> list[Path]:
    """The tables, page and plots of a grid that its experiment shows."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".md", ".csv", ".tex", ".html", ".png")]


def log_files(uri: str, experiment: str, artifacts: Path, files: list[Path]) -> None:
    """Keep tables and plots with the experiment, in the run named leaderboard; nothing is sent if they are there."""
    client, place = _open(uri, experiment, artifacts)
    board = _board(client, place)
    stats = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    state = hashlib.sha256(repr(stats).encode()).hexdigest()
    if client.get_run(board).data.tags.get("files") != state:
        for path in files:
            client.log_artifact(board, str(path))
        client.set_tag(board, "files", state)


def read(uri: str, experiment: str, trials: list[Trial] | None = None) -> pd.DataFrame:
    """The table of trials as MLflow has it; the same figures as from the store.

    Args:
        trials: the plan whose trials are wanted; None takes all, also those of earlier settings.

    Raises:
        LookupError: there is no such experiment.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise LookupError(f"MLflow at {uri} has no experiment {experiment!r}; run the grid with tracking.enabled=true")
    rows = {_name(row): row for row in _rows(client, found.experiment_id)}
    wanted = rows if trials is None else [(trial.keys()[2], trial.variant) for trial in trials]
    return trial_table([rows[name] for name in wanted if name in rows])


def _open(uri: str, experiment: str, artifacts: Path) -> tuple[Any, str]:
    """A client and the id of the experiment, both made if needed. Only one process makes a database at a time."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("a") as lock:
            # Two processes that create the tables at once break the file for good.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                # Made beside and renamed: a process killed while it makes the tables would leave a broken file.
                beside = path.with_suffix(".new")
                beside.unlink(missing_ok=True)
                _quiet_client(MlflowClient, f"sqlite:///{beside}")
                with closing(sqlite3.connect(beside)) as database:
                    database.execute("pragma wal_checkpoint(truncate)")
                    database.execute("pragma journal_mode=WAL")  # kept in the file; halves the time of writing
                os.replace(beside, path)
            client = _quiet_client(MlflowClient, uri)
    else:
        client = _quiet_client(MlflowClient, uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return client, found.experiment_id
    # Artifacts of a server are the server's business.
    location = None if uri.startswith("http") else str((artifacts / experiment).resolve())
    try:
        return client, client.create_experiment(experiment, artifact_location=location)
    except MlflowException:  # another process was faster
        return client, client.get_experiment_by_name(experiment).experiment_id


def _quiet_client(kind: Any, uri: str) -> Any:
    import logging

    # Alembic prints a line for each of sixty tables.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = kind(tracking_uri=uri)
    client.search_experiments(max_results=1)  # opens the store, which makes the tables
    return client


def _runs(client: Any, place: str, which: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([place], filter_string=which, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _name(row: dict[str, Any]) -> tuple[str, str]:
    """What tells one run from another: where a sweep does not touch a defense, several trials are one stage."""
    return row["trial"], row["variant"]


def _send(client: Any, place: str, store: Store, trial: Trial, row: dict[str, Any]) -> str:
    """One trial: tags, params, final figures and curves in two calls; gives its run, which is not ended yet."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(row[name]), now, 0) for name in FIGURES if row[name] is not None and math.isfinite(row[name])
    ]
    for stage, key in zip(STAGES, trial.keys(), strict=True):
        result = store.result(stage, key) or {}
        for name, curve in result.get("curves", {}).items():
            allowed = re.sub(r"[^\w\-. :/]", "_", name)  # MLflow refuses other signs in names
            metrics += [
                Metric(f"{stage}/{allowed}", value, now, int(step)) for step, value in curve if value is not None
            ]
    params = [
        Param(key, str(value)[:6000])
        for stage in ("implant", "defend", "evaluate")
        for key, value in _flat(getattr(trial, stage), stage)
    ]
    texts = {name: str(row[name]) for name in (*TEXTS, "clean", "seed")} | {"kind": "trial"}
    texts |= {"mlflow.runName": trial.title, "store": str(store.root.resolve())}
    if row["commit"]:
        texts["mlflow.source.git.commit"] = row["commit"]
    # The tags come with the run: one that was begun and not ended can be told by them.
    run: str = client.create_run(place, tags={name: text[:8000] for name, text in texts.items()}).info.run_id
    client.log_batch(run, metrics[:1000], params[:100])
    for start in range(1000, len(metrics), 1000):
        client.log_batch(run, metrics[start : start + 1000])
    return run


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}")]
    return [(name, value)]
