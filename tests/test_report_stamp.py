"""The stamp of a report: whatever no longer is as it was written is written again, and never sent to MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from bench.experiment.experiment import Experiment, load_experiment
from bench.reporting.board import boards
from bench.reporting.protocol import protocol
from bench.reporting.report import _is_written, write_report

DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "foreign": lambda path: path.write_bytes(b"\xff\xfe other"),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_noticed_whatever_the_damage(tmp_path: Path, kind: str) -> None:
    texts = {"trials.csv": b"a,b\n1,2\n", "leaderboard.html": b"<html>"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    files = {name: [len(text), sha256(text).hexdigest()] for name, text in texts.items()}
    stamp = tmp_path / ".report"
    stamp.write_text(json.dumps({"made_of": "figures", "files": files}))
    assert _is_written(stamp, "figures")
    assert not _is_written(stamp, "other figures")
    DAMAGES[kind](tmp_path / "leaderboard.html")
    assert not _is_written(stamp, "figures")


@pytest.mark.parametrize("content", ["", "\udcff", "[]", "{}", '{"made_of": "x"}', "null", "x\nleaderboard.md"])
def test_a_stamp_that_is_none_is_not_believed(tmp_path: Path, content: str) -> None:
    (tmp_path / ".report").write_bytes(content.encode(errors="surrogateescape"))
    assert not _is_written(tmp_path / ".report", "x")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Experiment]:
    """A computed grid with its report: the settings, and the plan."""
    from bench.run import main
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("whole")
    mine = [*TINY, "grid.attacks=[badnets]", "grid.defenses=[no_defense]"]
    mine += [f"results={folder / 'results'}", f"dataset.cache={folder / 'cache'}"]
    assert main(mine) == 0
    return mine, load_experiment(mine)


def texts(folder: Path) -> dict[str, bytes]:
    """What was written; a copy of a table that is no longer whole may be kept beside it."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name[:8] not in (".report", "trials.2")}


@pytest.mark.slow
def test_a_report_is_written_again_where_it_is_damaged_and_only_there(whole: tuple[list[str], Experiment]) -> None:
    _, experiment = whole
    before, stamp = texts(experiment.folder), experiment.folder / ".report"
    assert {"trials.csv", "leaderboard.md", "leaderboard.html", "wide.csv", "config.yaml"} <= set(before)
    (experiment.folder / "gallery.csv").write_text("another command's, which it may write anew")
    written = stamp.stat().st_mtime_ns
    write_report(experiment, again=False)
    assert stamp.stat().st_mtime_ns == written
    (experiment.folder / "gallery.csv").unlink()
    for name, kind in (("trials.csv", "cut"), ("leaderboard.html", "zeroed"), ("config.yaml", "gone")):
        DAMAGES[kind](experiment.folder / name)
        write_report(experiment, again=False)
        assert texts(experiment.folder) == before, name
    DAMAGES["a folder"](stamp)
    write_report(experiment, again=False)
    assert stamp.is_file()


def test_a_run_that_changes_nothing_prints_the_boards_that_were_written(
    whole: tuple[list[str], Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, experiment = whole
    compared, trials = write_report(experiment)
    assert compared == boards(trials, protocol(experiment))
    with monkeypatch.context() as patch:
        patch.setattr("bench.reporting.marks.compare", lambda _: pytest.fail("compared again"))
        kept, _ = write_report(experiment, again=False)
    assert kept == compared
    for kind in DAMAGES:
        DAMAGES[kind](experiment.folder / ".boards.json")
        if kind == "a folder":
            (experiment.folder / ".boards.json").rmdir()
        assert write_report(experiment, again=False)[0] == compared, kind


def test_a_table_that_was_cut_is_never_sent(
    whole: tuple[list[str], Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import sync
    from bench.reporting import mlflow

    arguments, experiment = whole
    table = experiment.folder / "trials.csv"
    before = table.read_bytes()
    sent: list[bytes] = []
    monkeypatch.setattr(mlflow, "sync", lambda *_: 0)
    monkeypatch.setattr(mlflow, "log_files", lambda *_: sent.append(table.read_bytes()))
    table.write_bytes(b"".join(before.splitlines(keepends=True)[:2]))
    assert sync.main(arguments) == 0
    assert sent == [before]
