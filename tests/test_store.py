"""A stage is there or it is not, its name is its inputs, and two processes never compute it at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import is_running

from bench.storage.store import Store, key_of

IDENTITY = {"stage": "implant", "seed": 0, "attack": {"name": "badnets", "poison_rate": 0.1}}


def test_a_key_depends_on_values_and_not_on_their_order():
    shuffled = dict(reversed(list(IDENTITY.items())))
    assert key_of(shuffled) == key_of(IDENTITY)
    assert key_of({**IDENTITY, "seed": 1}) != key_of(IDENTITY)
    assert key_of({**IDENTITY, "attack": {"name": "badnets", "poison_rate": 0.2}}) != key_of(IDENTITY)


def test_what_was_finished_comes_back_exactly(tmp_path):
    store = Store(tmp_path)
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    store.finish("implant", IDENTITY, {"status": "done", "seconds": 1.0}, {"model": {"weight": weight}})
    key = key_of(IDENTITY)
    assert store.result("implant", key) == {"status": "done", "seconds": 1.0}
    assert torch.equal(store.tensors("implant", key, "model")["weight"], weight)
    assert json.loads((store.folder("implant", key) / "config.json").read_text()) == IDENTITY


def test_a_store_lists_the_keys_and_identities_of_what_is_finished(tmp_path):
    store = Store(tmp_path)
    assert store.keys("implant") == set()
    identities = [{**IDENTITY, "seed": seed} for seed in range(5)]
    for identity in identities:
        store.finish("implant", identity, {"status": "done"})
    store.finish("defend", IDENTITY, {"status": "done"})
    assert store.keys("implant") == {key_of(identity) for identity in identities}
    assert dict(store.identities("implant")) == {key_of(identity): identity for identity in identities}


def test_weights_and_figures_are_readable_to_whom_the_umask_lets_in(tmp_path):
    before = os.umask(0o027)
    try:
        store = Store(tmp_path)
        store.finish("implant", IDENTITY, {"status": "done"}, {"model": {"weight": torch.zeros(3)}})
    finally:
        os.umask(before)
    files = store.folder("implant", key_of(IDENTITY)).iterdir()
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        "config.json": 0o640,
        "result.json": 0o640,
        "model.safetensors": 0o640,
    }


def test_weights_are_on_the_disk_before_the_stage_has_its_name(tmp_path, monkeypatch):
    synced, named = [], []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (named.append(list(synced)), rename(a, b)))
    Store(tmp_path).finish("implant", IDENTITY, {"status": "done"}, {"model": {"weight": torch.zeros(3)}})
    assert {Path(path).name for path in named[-1]} == {"config.json", "result.json", "model.safetensors"}


def test_what_another_process_publishes_while_old_halves_are_swept_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "unfinished" / "half").mkdir(parents=True)
    glob = Path.glob

    def and_published(self, pattern):
        for path in glob(self, pattern):
            path.rmdir()
            yield path

    monkeypatch.setattr(Path, "glob", and_published)
    Store(tmp_path).sweep()


def test_a_store_keeps_its_name_and_a_copy_has_another(tmp_path):
    store = Store(tmp_path / "one")
    assert store.name == store.name == Store(tmp_path / "one").name
    assert Store(tmp_path / "two").name.split()[0] != store.name.split()[0]
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert Store(tmp_path / "copy").name != store.name


def test_a_half_written_stage_is_no_stage(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.finish("implant", IDENTITY, {"status": "done"})
    assert store.result("implant", key_of(IDENTITY)) is None


def test_the_second_to_finish_leaves_the_first_result(tmp_path):
    store = Store(tmp_path)
    store.finish("implant", IDENTITY, {"status": "done", "who": 1})
    store.finish("implant", IDENTITY, {"status": "done", "who": 2})
    assert store.result("implant", key_of(IDENTITY))["who"] == 1
    assert len((tmp_path / "history.log").read_text().splitlines()) == 1
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_figure_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path).finish("evaluate", IDENTITY, {"asr": float("nan")})


def test_success_forgets_an_earlier_failure(tmp_path):
    store = Store(tmp_path)
    store.fail("implant", key_of(IDENTITY), "ValueError: no", "traceback")
    assert store.failure("implant", key_of(IDENTITY)) == "ValueError: no"
    store.finish("implant", IDENTITY, {"status": "done"})
    assert store.failure("implant", key_of(IDENTITY)) is None


def _hold(root: str, ready, end) -> None:
    with Store(root).lock("implant", "k") as ours:
        assert ours
        ready.set()
        end.wait(30)


def test_a_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, end))
    process.start()
    assert ready.wait(30)
    store = Store(tmp_path)
    assert is_running(store, "implant", "k")
    with store.lock("implant", "k") as ours:
        assert not ours
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not is_running(store, "implant", "k")
    with store.lock("implant", "k") as ours:
        assert ours


def test_a_full_disk_is_said_where_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("bench.storage.store._write", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        store.finish("implant", IDENTITY, {"status": "done"})
    store.fail("implant", key_of(IDENTITY), "implant: OSError: No space left on device", "")
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert store.result("implant", key_of(IDENTITY)) is None
    store.finish("implant", IDENTITY, {"status": "done"})
    assert store.result("implant", key_of(IDENTITY)) == {"status": "done"}
