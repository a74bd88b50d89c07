"""A claim has one owner, whatever dies: a process, a host, or the network in the middle of a request."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import is_running

from bench.storage import lease
from bench.storage.store import Store


def _hold(root: str, host: str, beat_s: float, ready, end) -> None:
    """Another process, on a host of this name as far as it and everybody else can see."""
    lease.machine = lambda: host
    lease.BEAT_S = beat_s
    with Store(root).lock("implant", "k") as ours:
        assert ours
        ready.set()
        end.wait(30)


@pytest.fixture
def elsewhere(tmp_path: Path):
    """Starts a process that holds the lock on another host."""
    started = []

    def start(beat_s: float):
        context = multiprocessing.get_context("spawn")
        ready, end = context.Event(), context.Event()
        process = context.Process(target=_hold, args=(str(tmp_path), "node2", beat_s, ready, end), daemon=True)
        process.start()
        assert ready.wait(30)
        started.append(process)
        return process, end

    yield start
    for process in started:
        process.kill()


def test_a_living_process_of_another_host_keeps_its_lock_however_long_it_takes(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    _, end = elsewhere(beat_s=0.1)
    time.sleep(2.0)
    store = Store(tmp_path)
    assert is_running(store, "implant", "k")
    with store.lock("implant", "k") as ours:
        assert not ours
    end.set()
    for _ in range(100):
        if not is_running(store, "implant", "k"):
            break
        time.sleep(0.05)
    with store.lock("implant", "k") as ours:
        assert ours


def test_a_killed_process_of_another_host_loses_its_lock_when_it_is_silent_for_long(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 1.5)
    process, _ = elsewhere(beat_s=0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = Store(tmp_path)
    assert is_running(store, "implant", "k")  # nothing on this host can tell yet
    time.sleep(1.7)
    assert not is_running(store, "implant", "k")
    assert not store.claims()["implant", "k"].alive
    with store.lock("implant", "k") as ours:
        assert ours


def test_the_clock_of_this_host_decides_nothing(tmp_path, elsewhere, monkeypatch):
    elsewhere(beat_s=0.1)
    true = time.time
    for hours in (-5, 5):
        monkeypatch.setattr(time, "time", lambda hours=hours: true() + hours * 3600)
        monkeypatch.setattr(lease, "_ahead", None)
        assert is_running(Store(tmp_path), "implant", "k")


def a_sleeper_gets_nothing(folder: Path, looked: lease.Claim | None, left: list[int], monkeypatch) -> None:
    """Who goes by what it saw, `looked`, takes no claim, and leaves those that are there."""
    with monkeypatch.context() as patch:
        patch.setattr(lease, "read", lambda _: looked)
        assert lease.take(folder) is None
    assert lease._numbers(folder) == left


def test_who_slept_between_looking_and_taking_does_not_take_a_living_claim(tmp_path, monkeypatch):
    folder = tmp_path / "implant-k"
    dead = lease.take(folder)
    assert dead
    lease._heart.remove(dead)
    os.utime(dead, (1, 1))
    monkeypatch.setattr(lease, "_started", lambda pid: "never")  # the owner of the first claim has died
    looked = lease.read(folder)
    assert looked
    assert not looked.alive
    second = lease.take(folder)  # another was faster
    assert second
    assert second.name == "2"
    a_sleeper_gets_nothing(folder, looked, [2], monkeypatch)
    lease.release(second, forget=False)


def test_who_slept_while_claims_came_and_went_has_nothing_though_its_number_is_free(tmp_path, monkeypatch):
    folder = tmp_path / "implant-k"
    first = lease.take(folder)
    assert first
    lease.release(first, forget=False)
    looked = lease.read(folder)
    second = lease.take(folder)
    assert second
    lease.release(second, forget=False)
    third = lease.take(folder)  # alive; 1 and 2 are gone
    assert third
    a_sleeper_gets_nothing(folder, looked, [3], monkeypatch)  # it saw 1, given back
    lease.release(third, forget=False)


def test_a_claim_that_changes_hands_while_it_is_read_is_not_taken_for_none(tmp_path, monkeypatch):
    folder = tmp_path / "implant-k"
    first = lease.take(folder)
    assert first
    lease.release(first, forget=False)
    listed = lease._numbers(folder)
    second = lease.take(folder)
    assert second
    answers = [listed]  # the listing is from before, and 1 is gone when it is opened
    numbers = lease._numbers
    monkeypatch.setattr(lease, "_numbers", lambda place: answers.pop() if answers else numbers(place))
    found = lease.read(folder)
    assert found
    assert (found.number, found.alive) == (2, True)
    lease.release(second, forget=False)


def test_a_request_that_nfs_repeated_is_not_taken_for_somebody_elses(tmp_path, monkeypatch):
    link = os.link

    def answer_lost(source, target):
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", answer_lost)
    path = lease.take(tmp_path / "implant-k")
    assert path is not None
    lease.release(path, forget=True)
    assert not (tmp_path / "implant-k").exists()


def _race(root: str, start, wins) -> None:
    store = Store(root)
    start.wait(30)
    for round_ in range(60):
        with store.lock("implant", f"{round_}") as ours:
            if ours:
                with wins.get_lock():
                    wins[round_] += 1
                time.sleep(0.02)
                with wins.get_lock():
                    wins[round_] -= 1
                    wins[60] = max(wins[60], wins[round_])


def test_of_many_processes_at_most_one_is_inside(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, inside = context.Event(), context.Array("i", 61)
    processes = [context.Process(target=_race, args=(str(tmp_path), start, inside)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(300)  # a hang, not a busy machine, is what this ends
        assert process.exitcode == 0
    # What was left inside when one came out: somebody else, if two ever were.
    assert inside[60] == 0


def test_a_full_disk_keeps_nobody_from_giving_back(tmp_path, monkeypatch):
    path = lease.take(tmp_path / "implant-k")
    assert path
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        lease.release(path, forget=False)
    claim = lease.read(tmp_path / "implant-k")
    assert claim
    assert claim.released
    assert not claim.alive


def _foreign(folder: Path, **changes: object) -> Path:
    """A claim of a process on another host, touched just now."""
    folder.mkdir(parents=True)
    owner = {"host": "node7", "machine": "node7 boot", "pid": 4711, "started": "1", "job": "", "since": time.time()}
    path = folder / "1"
    path.write_text(json.dumps({**owner, **changes}))
    return path


@pytest.mark.parametrize(
    ("seconds", "alive"), [(0, True), (-30, True), (30, True), (-3600, False), (3600, False), (10**9, False)]
)
def test_a_claim_is_alive_within_what_clocks_may_differ_in_both_directions(tmp_path, seconds, alive):
    path = _foreign(tmp_path / "locks" / "implant-k")
    stamp = time.time() + seconds
    os.utime(path, (stamp, stamp))
    store = Store(tmp_path)
    assert is_running(store, "implant", "k") is alive
    with store.lock("implant", "k") as ours:
        assert ours is not alive


def test_a_step_of_this_host_s_clock_takes_no_living_claim(tmp_path, monkeypatch):
    _foreign(tmp_path / "locks" / "implant-k")
    store, true = Store(tmp_path), time.time
    for hours in (0, -5, 5):  # the distance of the clocks is remembered from before the step
        monkeypatch.setattr(time, "time", lambda hours=hours: true() + hours * 3600)
        assert is_running(store, "implant", "k")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").touch()


DAMAGED = {
    "folder": _folder,
    "binary": lambda path: path.write_bytes(b"\xff\x00\x80"),
    "list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 50_000),
    "empty": lambda path: path.touch(),
    "wrong types": lambda path: path.write_text(
        '{"host": 1, "machine": 2, "pid": "x", "started": null, "job": [], "since": NaN}'
    ),
    "pipe": os.mkfifo,
    "broken link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("number", ["1", "5"])
def test_whatever_lies_in_a_claim_s_place_is_waited_for_no_longer_than_a_claim(tmp_path, monkeypatch, kind, number):
    folder = tmp_path / "locks" / "implant-k"
    folder.mkdir(parents=True)
    DAMAGED[kind](folder / number)
    store = Store(tmp_path)
    with store.lock("implant", "k") as ours:
        assert not ours  # it may be a claim that is being written
    (claim,) = store.claims().values()
    assert claim.owner is None
    monkeypatch.setattr(lease, "STALE_S", 0.1)
    time.sleep(0.3)
    for _ in range(2):
        with store.lock("implant", "k") as ours:
            assert ours
            with store.lock("implant", "k") as second:
                assert not second


@pytest.mark.parametrize("name", ["x", "07", "0", "\u00b2", "\u0663", "-1", "1.5", "1 ", "3.new"])
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_a_name_that_is_no_number_is_no_claim(tmp_path, name, make):
    folder = tmp_path / "locks" / "implant-k"
    folder.mkdir(parents=True)
    make(folder / name)
    store = Store(tmp_path)
    assert not is_running(store, "implant", "k")
    for _ in range(2):
        with store.lock("implant", "k") as ours:
            assert ours
