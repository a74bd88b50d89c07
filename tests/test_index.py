"""Tables, plans and status of finished stages read an index; it is checked against the folders, and never believed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter

import pytest

import bench.run
import bench.status
from bench.experiment.experiment import load_experiment
from bench.reporting.leaderboard import step_table
from bench.reporting.trials import of_trials
from bench.storage import index as indices
from bench.storage.index import CachedStore, Index
from bench.storage.store import LONG, Store, key_of

PROVENANCE = {"commit": "c" * 40, "clean": True, "device": "cpu", "torch": "1", "python": "3"}


def finish(store, stage, number, **more):
    """A made-up stage; gives its key."""
    identity = {"stage": stage, "number": number}
    result = {"status": "done", "seconds": 1.0, "peak_memory_mib": 2.0, "images": 3, "provenance": PROVENANCE, **more}
    store.finish(stage, identity, result)
    return key_of(identity)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def reads(monkeypatch):
    """How many records were read."""
    found = Counter()
    whole = Store._read

    def counted(self, stage, key):
        found[stage] += 1
        return whole(self, stage, key)

    monkeypatch.setattr(Store, "_read", counted)
    return found


def test_a_brief_is_the_result_without_what_is_long(store):
    long = {name: [[1, 2.5]] for name in LONG}
    key = finish(store, "evaluate", 0, figures={"asr": 0.25}, **long)
    bare = finish(store, "evaluate", 1, figures={"asr": None})
    for _ in range(2):  # from the record, and from the file
        known = CachedStore(store)
        assert known.brief("evaluate", key) == store.brief("evaluate", key)
        assert known.brief("evaluate", key)["figures"] == {"asr": 0.25}
        assert set(known.brief("evaluate", key)["without"]) == set(LONG)
        assert not set(LONG) & set(known.brief("evaluate", key))
        assert known.brief("evaluate", bare)["without"] == []
        assert known.result("evaluate", key)["curves"] == [[1, 2.5]]
        known.index.keep()


def test_a_second_look_reads_no_record_however_many_there_are(store, reads):
    counts = {}
    for number in (20, 60):
        keys = [finish(store, "evaluate", i) for i in range(number)]
        first = CachedStore(store)
        assert all(first.is_finished("evaluate", key) for key in keys)
        first.index.keep()
        reads.clear()
        again = CachedStore(store)
        assert all(again.is_finished("evaluate", key) and again.damage("evaluate", key) is None for key in keys)
        assert all(again.brief("evaluate", key) for key in keys)
        counts[number] = sum(reads.values())
    assert counts == {20: 0, 60: 0}


def _rewrite(path):
    """The same number of bytes, and the old time stamp."""
    before = path.stat()
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"seconds": 1.0', b'"seconds": 7.0'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("result.json", _rewrite),
        ("result.json", lambda path: path.write_bytes(path.read_bytes()[:-5])),
        ("result.json", lambda path: path.unlink()),
        ("config.json", lambda path: path.unlink()),
        ("config.json", lambda path: path.write_text("x" * path.stat().st_size)),
        ("config.json", lambda path: path.write_text("")),
    ],
)
def test_what_changes_after_it_was_noted_is_seen(store, name, damage):
    key = finish(store, "evaluate", 0)
    known = CachedStore(store)
    assert known.is_finished("evaluate", key)
    known.index.keep()
    damage(store.folder("evaluate", key) / name)
    for look in (CachedStore(store), store):
        assert not look.is_finished("evaluate", key)
        assert look.damage("evaluate", key)


def test_a_stage_that_was_removed_or_set_aside_is_not_finished(store):
    key, other = finish(store, "evaluate", 0), finish(store, "evaluate", 1)
    known = CachedStore(store)
    assert known.is_finished("evaluate", key)
    assert known.is_finished("evaluate", other)
    known.set_aside({("evaluate", key): "a reason"})
    assert not known.is_finished("evaluate", key)
    known.index.keep()
    shutil.rmtree(store.folder("evaluate", other))
    again = CachedStore(store)
    assert not again.is_finished("evaluate", other)
    assert again.brief("evaluate", other) is None


def _flip(text):
    return text.replace(b'"seconds":1.0', b'"seconds":9.0')


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\xff\x00 no index\n" * 3,
        lambda text: text[: len(text) // 2] + text,
        lambda text: b"\0" * len(text),
    ],
    ids=["digit", "torn", "empty", "foreign", "torn and whole", "zeros"],
)
def test_a_damaged_index_changes_no_figure_and_is_made_again(store, reads, damage):
    keys = [finish(store, "evaluate", number) for number in range(5)]
    path = store.root / "index.jsonl"
    for _ in range(2):
        known = CachedStore(store)
        assert {known.brief("evaluate", key)["seconds"] for key in keys} == {1.0}
        known.index.keep()
        path.write_bytes(damage(path.read_bytes()))
    known = CachedStore(store)
    assert {known.brief("evaluate", key)["seconds"] for key in keys} == {1.0}
    known.index.keep()
    reads.clear()
    assert all(CachedStore(store).is_finished("evaluate", key) for key in keys)
    assert sum(reads.values()) == 0


def test_an_index_that_grew_in_many_looks_is_written_anew(store, monkeypatch):
    monkeypatch.setattr(indices, "SPARE", 3)
    monkeypatch.setattr(indices, "BLOCK", 4)
    path = store.root / "index.jsonl"
    keys = []
    for number in range(30):
        keys.append(finish(store, "evaluate", number))
        known = CachedStore(store)
        assert all(known.is_finished("evaluate", key) for key in keys)
        known.index.keep()
        assert len(list(filter(None, path.read_text().split("\n")))) <= 3 + len(keys) // 4 + 1
    index = Index(store.root)
    assert all(index.find("evaluate", key) == store.brief("evaluate", key) for key in keys)


def test_a_store_that_cannot_be_written_to_does_without(store, monkeypatch):
    key = finish(store, "evaluate", 0)
    (store.root / "index.jsonl").mkdir()
    known = CachedStore(store)
    assert known.is_finished("evaluate", key)
    known.index.keep()


@pytest.mark.slow
def test_tables_are_the_same_with_and_without_an_index_and_read_what_is_new_only(run_grid, tiny, reads, capsys):
    first = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]"]
    run_grid(*first)
    experiment = load_experiment([*tiny, *first])
    stored = of_trials(experiment.trials, experiment.store)
    for _ in range(2):
        known = CachedStore(experiment.store)
        assert of_trials(experiment.trials, known).equals(stored)
        assert step_table(experiment.trials, known).equals(step_table(experiment.trials, experiment.store))
        known.index.keep()
    for _ in range(3):  # the first time, inspections are new
        reads.clear()
        for command in (bench.status.main, bench.run.main):
            assert command([*tiny, *first]) == 0
    assert reads == {}
    assert json.loads(
        (experiment.store.folder("evaluate", experiment.trials[0].keys.evaluate) / "result.json").read_text()
    )
