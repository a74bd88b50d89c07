"""MLflow as a view of the store: one run for each finished trial, mirrored by one process, in few calls.

The store is the record. A tracking failure loses nothing: what is missing there is sent by the next run.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from bench.grid import Trial
from bench.reporting.table import FIGURES, TEXTS, trial_row, trial_table
from bench.store import STAGES, Store

# Before any import of mlflow: it reports usage over the network unless told not to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
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
    there: set[tuple[str, str]] = set()
    for run in _runs(client, place):
        if run.info.status == "FINISHED":
            there.add(_name(run))
        else:  # begun when the tracking broke
            client.delete_run(run.info.run_id)
    sent = 0
    for trial in trials:
        key = trial.keys()[2]
        # A state that can still change is not sent: a run in MLflow is final.
        if not key or (key, trial.variant) in there or store.result("evaluate", key) is None:
            continue
        _send(client, place, trial, trial_row(trial, store), store)
        there.add((key, trial.variant))
        sent += 1
    return sent


def published(folder: Path) -> list[Path]:
    """The tables, page and plots of a grid that its experiment shows."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".md", ".csv", ".tex", ".html", ".png")]


def log_files(uri: str, experiment: str, artifacts: Path, files: list[Path]) -> None:
    """Keep tables and plots with the experiment, in one run named after the grid."""
    client, place = _open(uri, experiment, artifacts)
    found = client.search_runs([place], filter_string="tags.kind = 'leaderboard'", max_results=1)
    run = found[0] if found else client.create_run(place, tags={"mlflow.runName": "leaderboard", "kind": "leaderboard"})
    for path in files:
        client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id)


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
    rows: list[dict[str, Any]] = []
    wanted = None if trials is None else {(trial.keys()[2], trial.variant) for trial in trials}
    for run in _runs(client, found.experiment_id):
        if wanted is not None and _name(run) not in wanted:
            continue
        row: dict[str, Any] = {name: run.data.tags.get(name, "") for name in (*TEXTS, "clean")}
        row["seed"] = int(run.data.tags["seed"])
        row |= {name: run.data.metrics.get(name) for name in FIGURES}
        rows.append(row)
    return trial_table(rows)


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


def _runs(client: Any, place: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([place], filter_string="tags.kind = 'trial'", max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _name(run: Any) -> tuple[str, str]:
    """What tells one run from another: where a sweep does not touch a defense, several trials are one stage."""
    return run.data.tags["trial"], run.data.tags.get("variant", "")


def _send(client: Any, place: str, trial: Trial, row: dict[str, Any], store: Store) -> None:
    """One trial: tags, params, final figures and curves in two calls."""
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
    texts["mlflow.runName"] = trial.title
    if row["commit"]:
        texts["mlflow.source.git.commit"] = row["commit"]
    # The tags come with the run: one that was begun and not ended can be told by them.
    run = client.create_run(place, tags={name: text[:8000] for name, text in texts.items()}).info.run_id
    client.log_batch(run, metrics[:1000], params[:100])
    for start in range(1000, len(metrics), 1000):
        client.log_batch(run, metrics[start : start + 1000])
    client.set_terminated(run)


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}")]
    return [(name, value)]
