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
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd

from bench.engine.messages import masked, shortened
from bench.experiment.trial import Trial
from bench.reporting.trials import FIGURES, TEXTS, printable, trial_row, trial_table
from bench.storage.index import CachedStore
from bench.storage.store import STAGES, Store

ROWS = "rows"  # the folder of rows among the artifacts of an experiment's leaderboard


BATCH = 200  # trials whose rows go into one file


PAGE = 200  # runs that one search returns: few enough for a busy server to answer in time


ANSWER_S = 5.0  # what a server has to answer in at all, and another process to unlock a database


SETUP_S = 60.0  # what another process has to make the tables of a database


# Before any import of mlflow: it reports usage over the network unless told not to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


os.environ.setdefault("DO_NOT_TRACK", "true")


# A server's client prints two lines for each run that it ends, and draws a bar for each file that it fetches.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


# A server that stops answering costs ten seconds, not nine minutes: what it misses is sent later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


class TrackingError(Exception):
    """Why MLflow cannot be used now, in one line without secrets."""


class Unreachable(TrackingError):
    """MLflow does not answer, or its database is locked; nothing was sent."""


def check(uri: str, seconds: float = ANSWER_S) -> None:
    """Ask MLflow for a sign of life, and wait no longer than that for it.

    Raises:
        Unreachable: there is none.
    """
    if (database := _sqlite(uri)) is not None:
        _check_lock(database, seconds)
        return
    from mlflow import MlflowClient  # seconds, which are not the server's

    answers: list[str] = []

    def ask() -> None:
        try:
            _quiet_client(MlflowClient, uri)
            answers.append("")
        except Exception as error:
            answers.append(reason(error))

    # A thread of its own: a time-out of a socket begins anew with each byte, and a database's client has none.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    answer = answers[0] if answers else f"no answer within {seconds:g} s"
    if answer:
        raise Unreachable(answer)


def reason(error: Exception) -> str:
    """What went wrong with MLflow, in one line without secrets."""
    text = str(error).partition("[SQL: ")[0]  # the statement and all of its values follow
    return "its database is locked by another process" if "database is locked" in text else shortened(text)


def _sqlite(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _check_lock(database: Path, seconds: float) -> None:
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=seconds, isolation_level=None)) as connection:
            connection.execute("begin immediate")
            connection.execute("rollback")
    except sqlite3.Error as error:
        raise Unreachable(reason(error)) from error


def sync(trials: list[Trial], store: Store, uri: str, experiment: str, artifacts: Path) -> int:
    """Send every trial that has an outcome and is not in MLflow yet; returns how many were sent.

    Args:
        experiment: its name, the grid's.
        artifacts: folder of MLflow's artifacts, used when the experiment is new.

    Raises:
        TrackingError: MLflow does not answer, or the artifacts of its database are missing.
    """
    check(uri)  # before the lock, for which other drivers wait
    said = False
    while True:
        # Two drivers that end together would both send, and each take the other's half-sent runs for broken ones.
        with store.lock("tracking", experiment) as acquired:
            if acquired:
                return _sync(trials, store, *_open(uri, experiment, artifacts))
        if not said and (claim := store.claim("tracking", experiment)) and claim.owner:
            print(f"waiting for another run that sends to MLflow ({claim.owner})", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)


def _sync(trials: list[Trial], store: Store, client: Any, experiment_id: str) -> int:
    board = _board(client, experiment_id)
    sent = {_name(row) for row in _rows(client, experiment_id)}
    restored = _restore(client, experiment_id, trials, sent)
    begun = _runs(client, experiment_id, "attributes.status = 'RUNNING' and tags.kind = 'trial'")
    # Those of another sweep are being sent now; ours were begun when the tracking broke.
    if begun := [run for run in begun if run.data.tags.get("store") == _of(store)]:
        tagged = {tuple(map(_tag, name)) for name in sent}
        for run in begun:
            # If its row arrived, nothing else was missing.
            if _name(run.data.tags) in tagged:
                client.set_terminated(run.info.run_id)
            else:
                client.delete_run(run.info.run_id)
    fresh: list[Trial] = []
    known = CachedStore(store)
    for trial in trials:
        keys = trial.keys
        name = _of_trial(trial)
        # A state that can still change is not sent: a run in MLflow is final.
        if all(keys) and name not in sent and all(map(known.is_finished, STAGES, keys)):
            fresh.append(trial)
            sent.add(name)
    parents = _parents(client, experiment_id, fresh, store)
    # A file has one writer; a server has several workers.
    with ThreadPoolExecutor(4 if str(client.tracking_uri).startswith("http") else 1) as pool:
        for start in range(0, len(fresh), BATCH):
            batch = fresh[start : start + BATCH]
            rows = [trial_row(trial, known) for trial in batch]
            parent_runs = [parents[trial.keys.implant] for trial in batch]
            runs = list(pool.map(partial(_send, client, experiment_id, known), batch, rows, parent_runs))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
                path.write_text(json.dumps(rows))
                client.log_artifact(board, str(path), ROWS)
            # Last: a run that is not ended is one whose row may be missing.
            list(pool.map(client.set_terminated, runs))
    return len(fresh) + restored


def _restore(client: Any, experiment_id: str, trials: list[Trial], sent: set[tuple[str, ...]]) -> int:
    """Bring back the runs of these trials and of their infected models that a person deleted; counts the trials.

    Half-sent runs that were deleted here are not FINISHED, and stay deleted.
    """
    names = {tuple(map(_tag, name)) for name in map(_of_trial, trials) if name in sent}
    deleted = [
        run
        for run in _runs(client, experiment_id, "tags.kind = 'trial' and attributes.status = 'FINISHED'", deleted=True)
        if _name(run.data.tags) in names
    ]
    parents = _runs(
        client, experiment_id, "tags.kind = 'infected model' and attributes.status = 'FINISHED'", deleted=True
    )
    if parents:
        shown = {run.data.tags["implant"] for run in _runs(client, experiment_id, "tags.kind = 'infected model'")}
        wanted = {trial.keys.implant for trial in trials} - shown
        parents = list(
            {run.data.tags["implant"]: run for run in parents if run.data.tags["implant"] in wanted}.values()
        )
    for run in (*parents, *deleted):
        client.restore_run(run.info.run_id)
    return len(deleted)


def _parents(client: Any, experiment_id: str, trials: list[Trial], store: Store) -> dict[str, str]:
    """The run of each infected model, made where there is none: the UI folds its repairs beneath it."""
    run_of: dict[str, str] = {}
    for run in _runs(client, experiment_id, "tags.kind = 'infected model'"):
        if run.info.status == "FINISHED":
            run_of[run.data.tags["implant"]] = run.info.run_id
        elif run.data.tags.get("store") == _of(store):  # another sweep's is being sent now
            client.delete_run(run.info.run_id)  # begun when the tracking broke: no trial is beneath it yet
    for trial in trials:
        key = trial.keys.implant
        if key in run_of:
            continue
        texts = {"kind": "infected model", "implant": key, "seed": str(trial.seed), "store": _of(store)}
        texts |= {axis: getattr(trial, axis) for axis in ("dataset", "model", "attack")}
        variant = ", ".join(pair for pair in trial.variant.split(", ") if pair.startswith(("attack.", "train.")))
        texts["mlflow.runName"] = _title(trial.attack, trial.seed, variant, trial.dataset, trial.model)
        inspected = store.brief("inspect", trial.evaluate["inspect"]) or {}
        figures = dict(inspected.get("figures", {}))
        figures["implant_seconds"] = (store.brief("implant", key) or {}).get("seconds")
        run = client.create_run(experiment_id, tags=_tags(texts)).info.run_id
        _log(client, run, figures, {"implant": key}, {"implant": trial.implant}, store)
        client.set_terminated(run)
        run_of[key] = run
    return run_of


def _title(*parts: Any) -> str:
    """The name of a run: what tells it from its neighbours comes first, since the UI cuts names off."""
    attack, seed, *rest = parts
    return " · ".join(str(word) for word in (attack, f"seed {seed}", *rest) if word)


def _board(client: Any, experiment_id: str) -> str:
    """The run that holds the tables and the rows of an experiment."""
    runs = _runs(client, experiment_id, "tags.kind = 'leaderboard'")
    if not runs and (runs := _runs(client, experiment_id, "tags.kind = 'leaderboard'", deleted=True)):
        for deleted in runs:  # without its rows, every trial would be sent a second time
            client.restore_run(deleted.info.run_id)
    if runs:
        run: str = runs[0].info.run_id
        return run
    made = client.create_run(experiment_id, tags={"mlflow.runName": "leaderboard", "kind": "leaderboard"})
    client.set_terminated(made.info.run_id)
    run = made.info.run_id
    return run


def _rows(client: Any, experiment_id: str) -> list[dict[str, Any]]:
    """The rows of all trials that an experiment has."""
    rows: list[dict[str, Any]] = []
    # Two that came first at once have made a run each.
    for run in _runs(client, experiment_id, "tags.kind = 'leaderboard'"):
        if any(file.path == ROWS for file in client.list_artifacts(run.info.run_id)):
            with tempfile.TemporaryDirectory() as folder:
                for path in sorted(Path(client.download_artifacts(run.info.run_id, ROWS, folder)).iterdir()):
                    rows += json.loads(path.read_text())
    return rows


def report_files(folder: Path) -> list[Path]:
    """The tables, page and plots of a grid that its experiment shows."""
    kinds = (".md", ".csv", ".tex", ".html", ".js", ".png", ".yaml")
    return [path for path in sorted(folder.iterdir()) if path.suffix in kinds]


def log_files(uri: str, experiment: str, artifacts: Path, files: list[Path]) -> None:
    """Keep tables and plots with the experiment, in the run named leaderboard; nothing is sent if they are there."""
    client, experiment_id = _open(uri, experiment, artifacts)
    board = _board(client, experiment_id)
    stats = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    state = hashlib.sha256(repr(stats).encode()).hexdigest()
    if client.get_run(board).data.tags.get("files") != state:
        for path in files:
            client.log_artifact(board, str(path))
        client.set_tag(board, "files", state)
        # What the UI shows first of the experiment, and of this run.
        text = _overview(experiment, files)
        client.set_tag(board, "mlflow.note.content", text)
        client.set_experiment_tag(experiment_id, "mlflow.note.content", text)


def _overview(experiment: str, files: list[Path]) -> str:
    """The leaderboard without the notes beneath, in Markdown, as far as a tag has room."""
    leaderboards = [path for path in files if path.name == "leaderboard.md"]
    lines = leaderboards[0].read_text().splitlines() if leaderboards else []
    text = "\n".join(line for line in lines if not line.startswith("- "))
    advice = "Tables with their notes, the page, plots and settings: artifacts of the run `leaderboard`."
    return f"{text}\n{advice}" if len(text) < 4500 else f"# {experiment}\n\n{advice}"


def read(uri: str, experiment: str, trials: list[Trial] | None = None) -> pd.DataFrame:
    """The table of trials as MLflow has it; the same figures as from the store.

    Args:
        trials: the plan whose trials are wanted; None takes all, also those of earlier settings.

    Raises:
        LookupError: there is no such experiment.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    stored = client.get_experiment_by_name(experiment)
    if stored is None or stored.lifecycle_stage == "deleted":
        raise LookupError(
            f"MLflow at {masked(uri)} has no experiment {experiment!r}; run the grid with tracking.enabled=true"
        )
    rows = {_name(row): row for row in _rows(client, stored.experiment_id)}
    wanted = rows if trials is None else map(_of_trial, trials)
    return trial_table([rows[name] for name in wanted if name in rows])


def _open(uri: str, experiment: str, artifacts: Path) -> tuple[Any, str]:
    """A client and the id of the experiment, both made if needed. Only one process makes a database at a time."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = _sqlite(uri)
    if path is None:
        client = _quiet_client(MlflowClient, uri)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _setup_lock(path):
            if not path.exists():
                # Made beside and renamed: a process killed while it makes the tables would leave a broken file.
                new_path = path.with_suffix(".new")
                new_path.unlink(missing_ok=True)
                _quiet_client(MlflowClient, f"sqlite:///{new_path}")
                with closing(sqlite3.connect(new_path)) as database:
                    database.execute("pragma wal_checkpoint(truncate)")
                    database.execute("pragma journal_mode=WAL")  # kept in the file; halves the time of writing
                os.replace(new_path, path)
            _relocate(path, artifacts, experiment)
            client = _quiet_client(MlflowClient, uri)
    # Artifacts of a server are the server's business.
    location = None if uri.startswith("http") else str((artifacts / experiment).resolve())
    stored = client.get_experiment_by_name(experiment)
    try:
        if stored is None:
            return client, client.create_experiment(experiment, artifact_location=location)
        if stored.lifecycle_stage == "deleted":
            client.restore_experiment(stored.experiment_id)
            print(f"MLflow: the experiment {experiment!r} was deleted there; it is restored with its runs")
    except MlflowException:
        stored = client.get_experiment_by_name(experiment)
        if stored is None or stored.lifecycle_stage == "deleted":  # else another process was faster
            raise
    return client, stored.experiment_id


@contextmanager
def _setup_lock(database: Path) -> Iterator[None]:
    """Two processes that create the tables at once break the file for good."""
    path = database.with_suffix(".lock")
    with path.open("a") as lock:
        end = time.monotonic() + SETUP_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Unreachable(f"another process holds {path} for {SETUP_S:g} s") from None
                time.sleep(0.1)
        yield


def _relocate(database: Path, artifacts: Path, experiment: str) -> None:
    """Point the experiments of a copied or moved results folder at the artifacts that lie there now.

    MLflow keeps the path of the artifacts as it was when an experiment was made: a copy would read and write those of
    the original.

    Raises:
        TrackingError: the artifacts of this experiment did not come along.
    """
    if database.resolve().parent != artifacts.resolve().parent:
        return  # not the database of this results folder
    moved = 0
    with closing(sqlite3.connect(database, timeout=ANSWER_S)) as connection, connection:
        for number, name, location in connection.execute(
            "select experiment_id, name, artifact_location from experiments"
        ).fetchall():
            before, now = Path(str(location).removeprefix("file://")), (artifacts / name).resolve()
            if before.parts[-2:] != (artifacts.name, name):
                continue  # not one of ours
            if before != now and before.exists() and not (before.parent.parent / database.name).exists():
                continue  # another results folder that shares this database
            logged = connection.execute(
                "select 1 from tags join runs using (run_uuid) where experiment_id = ? and tags.key = 'files'",
                (number,),
            ).fetchone()
            if logged and not now.is_dir():
                if name != experiment:
                    continue
                source = f"copy {before} there, or " if before.is_dir() else ""
                raise TrackingError(
                    f"{database} has the experiment {name!r}, but its artifacts are not in {now}; {source}delete the "
                    "database, and bench.sync sends everything anew"
                )
            if before == now:
                continue
            connection.execute(
                "update experiments set artifact_location = ? where experiment_id = ?", (str(now), number)
            )
            connection.execute(
                "update runs set artifact_uri = ? || substr(artifact_uri, ?) "
                "where experiment_id = ? and substr(artifact_uri, 1, ?) = ?",
                (str(now), len(location) + 1, number, len(location), location),
            )
            moved += 1
    if moved:
        print(f"MLflow: {database.parent} was copied or moved; its experiments now have their artifacts in {artifacts}")


def _quiet_client(kind: Any, uri: str) -> Any:
    import logging

    # Alembic prints a line for each of sixty tables.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = kind(tracking_uri=uri)
    client.search_experiments(max_results=1)  # opens the store, which makes the tables
    return client


def _runs(client: Any, experiment_id: str, which: str, deleted: bool = False) -> list[Any]:
    from mlflow.entities import ViewType

    kind = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], which, kind, PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _name(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells one run from another: several trials are one stage where a sweep, a setting or an ablation's row
    changes nothing of a defense.
    """
    return row["trial"], row["variant"], row["threat_model"], row["defense"]


def _of_trial(trial: Trial) -> tuple[str, ...]:
    """The same of a planned trial."""
    return trial.keys.evaluate, trial.variant, trial.threat_model, trial.defense


def _send(client: Any, experiment_id: str, store: Store, trial: Trial, row: dict[str, Any], parent: str) -> str:
    """One trial beneath its infected model: tags, params, figures and curves; gives its run, which is not ended yet."""
    texts = {name: str(row[name]) for name in (*TEXTS, "clean", "seed")} | {"kind": "trial"}
    rest = (trial.threat_model, trial.variant, trial.dataset, trial.model)
    texts |= {"mlflow.runName": f"{trial.defense} · {_title(trial.attack, trial.seed, *rest)}"}
    texts |= {"mlflow.parentRunId": parent, "store": _of(store)}
    if row["commit"]:
        texts["mlflow.source.git.commit"] = row["commit"]
    # The tags come with the run: one that was begun and not ended can be told by them.
    run: str = client.create_run(experiment_id, tags=_tags(texts)).info.run_id
    keys = dict(zip(STAGES, trial.keys, strict=True))
    curves = {stage: key for stage, key in keys.items() if stage != "implant"}  # those stand with the parent
    settings = {stage: getattr(trial, stage) for stage in STAGES}
    _log(client, run, {name: row[name] for name in FIGURES}, curves, settings, store)
    return run


def _log(
    client: Any,
    run: str,
    figures: dict[str, float | None],
    curves: dict[str, str],
    settings: dict[str, Any],
    store: Store,
) -> None:
    """Figures, the curves of these stages (by their keys) and settings of a run, in few calls."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(value), now, 0)
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    ]
    for stage, key in curves.items():
        result = store.result(stage, key) or {}
        for name, curve in result.get("curves", {}).items():
            allowed = _allowed(f"{stage}/{name}")
            metrics += [Metric(allowed, value, now, int(step)) for step, value in curve if value is not None]
    # A name that is there already would be refused with another value.
    texts = {
        _allowed(key): printable(str(value))
        for stage, stage_settings in settings.items()
        for key, value in _flat(stage_settings, stage)
    }
    params = [Param(key, text[:6000]) for key, text in texts.items()]
    # Most runs fit into one call; MLflow takes no more in one.
    for call in range(max(-(-len(metrics) // 1000), -(-len(params) // 100))):
        client.log_batch(run, metrics[1000 * call : 1000 * (call + 1)], params[100 * call : 100 * (call + 1)])


def _allowed(name: str) -> str:
    """The name with what MLflow refuses in one written as _: most signs, and parts of a path that lead elsewhere."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    whole = "/".join(part if part.strip(".") else "_" for part in parts)[:250]
    return whole[:-1] + "_" if whole.endswith("/") else whole


def _tags(texts: dict[str, str]) -> dict[str, str]:
    return {name: _tag(text) for name, text in texts.items()}


def _tag(text: str) -> str:
    """As MLflow has room for it, and PostgreSQL signs."""
    return printable(text)[:8000]


def _of(store: Store) -> str:
    """The tag of what was sent from this store."""
    return _tag(store.name)


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}")]
    return [(name, value)]
