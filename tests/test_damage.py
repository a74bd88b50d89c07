"""No damage to a store gives a wrong figure or ends a run: the stage is named, set aside and computed again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench.experiment.experiment import load_experiment
from bench.reporting.trials import of_trials
from bench.run import main
from bench.status import main as status
from bench.storage.store import Damaged, Store, key_of
from tests.conftest import TINY

GRID = ["grid.attacks=[badnets,blended]", "grid.defenses=[spectral_signatures]", "grid.threat_models=[trainset]"]
GRID += ["defense.spectral_signatures.retrain=false"]
# Which stages are computed from which, read off the protocol by hand.
DEPENDENTS = {
    "implant": {"implant", "defend", "inspect", "evaluate"},
    "defend": {"defend", "evaluate"},
    "inspect": {"inspect", "evaluate"},
    "evaluate": {"evaluate"},
}
FILES = {
    "implant": ["config.json", "result.json", "model.safetensors", "trigger.safetensors"],
    "defend": ["config.json", "result.json", "model.safetensors", "findings.safetensors"],
    "inspect": ["config.json", "result.json"],
    "evaluate": ["config.json", "result.json"],
}
FIGURES = ["attack", "status", "clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy", "detection_auroc"]


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeroed_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = len(data) // 2 // 4096 * 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def bit_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0b0000_0100
    path.write_bytes(data)


def foreign_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe[1, 2, 3]\n")


def foreign_json(path: Path) -> None:
    path.write_text('["a list"]')


def absent(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [truncated, empty, zeroed_page, bit_flip, foreign_text, foreign_json, absent, folder]
EVERY = [(stage, name, damage) for stage, names in FILES.items() for name in names for damage in DAMAGES]
FEW = {("implant", "model.safetensors", bit_flip), ("defend", "findings.safetensors", absent)}
FEW |= {("evaluate", "result.json", truncated)}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[list[str], Path, pd.DataFrame]:
    """Settings without `results`, a finished store, and its table."""
    torch.set_num_threads(1)
    arguments = [*TINY, *GRID, f"dataset.cache={cache}"]
    results = tmp_path_factory.mktemp("computed") / "results"
    assert main([*arguments, f"results={results}"]) == 0
    experiment = load_experiment([*arguments, f"results={results}"])
    return arguments, results, of_trials(experiment.trials, experiment.store)


@pytest.fixture(scope="module")
def keys_of_one(computed) -> dict[str, str]:
    """The keys of the stages of one trial of two."""
    arguments, results, _ = computed
    trial = next(
        trial for trial in load_experiment([*arguments, f"results={results}"]).trials if trial.attack == "badnets"
    )
    implant, defend, evaluate = trial.keys
    return {"implant": implant, "defend": defend, "inspect": key_of(trial.inspect), "evaluate": evaluate}


@pytest.fixture
def copied_store(computed, keys_of_one, tmp_path: Path) -> tuple[Store, dict[str, str]]:
    """A copy of the store, and the keys of the stages of one of its trials."""
    shutil.copytree(computed[1] / "store", tmp_path / "results" / "store")
    return Store(tmp_path / "results" / "store"), keys_of_one


@pytest.fixture
def copied(computed, copied_store, tmp_path: Path) -> tuple[list[str], Store, dict[str, str]]:
    """The same, after the settings."""
    return [*computed[0], f"results={tmp_path / 'results'}"], *copied_store


def contents(store: Store) -> dict[str, dict[str, bytes]]:
    """The files of each stage, by its name and key."""
    return {
        f"{stage} {folder.name}": {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for stage in FILES
        for folder in (store.root / stage).glob("*/*")
    }


def history(store: Store) -> list[str]:
    return [" ".join(line.split()[1:3]) for line in (store.root / "history.log").read_text().splitlines()]


def silently(damage: Callable[[Path], None], path: Path) -> None:
    """Damage a file as a failing disk does: its time stamp stays."""
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def check_mended(copied, before: pd.DataFrame, stage: str, expected: set[str], capsys) -> None:
    """Run the grid on a damaged copy: the same figures, these stages named and computed again, the rest untouched."""
    arguments, store, keys = copied
    intact, done = contents(store), len(history(store))
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert f"{stage} {keys[stage]}" in printed.err
    experiment = load_experiment(arguments)
    after = of_trials(experiment.trials, store)
    pd.testing.assert_frame_equal(after[FIGURES], before[FIGURES], check_exact=True)
    again = {f"{name} {keys[name]}" for name in expected}
    assert sorted(history(store)[done:]) == sorted(again)
    whole = contents(store)
    assert {place: files for place, files in whole.items() if place not in again} == {
        place: files for place, files in intact.items() if place not in again
    }
    moved = {name.rpartition("-")[0].replace("-", " ") for name in store.aside()}
    assert f"{stage} {keys[stage]}" in moved <= again
    assert all(
        store.damage(*place, thorough=True) is None for trial in experiment.trials for place in trial.stage_keys()
    )


@pytest.mark.parametrize(("stage", "name", "damage"), EVERY)
def test_every_damage_to_every_file_is_seen_and_set_aside_with_what_depends_on_it(
    copied_store, capsys, stage, name, damage
):
    store, keys = copied_store
    intact = contents(store)
    damage(store.folder(stage, keys[stage]) / name)
    store.mend((name, key) for name in FILES for key in store.keys(name))
    assert f"{stage} {keys[stage]}" in capsys.readouterr().err
    expected = {f"{name} {keys[name]}" for name in DEPENDENTS[stage]}
    assert contents(store) == {place: files for place, files in intact.items() if place not in expected}
    assert {name.rpartition("-")[0].replace("-", " ") for name in store.aside()} == expected


@pytest.mark.parametrize(
    ("stage", "name", "damage"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2].__name__}", marks=[] if case in FEW else pytest.mark.slow)
        # Each file with two damages, each damage to three files: a real run for all of them takes ten minutes.
        for number, case in enumerate(EVERY)
        if case in FEW or (number // len(DAMAGES) + number % len(DAMAGES)) % 4 == 0
    ],
)
def test_a_damaged_stage_is_named_and_computed_again_with_what_depends_on_it(
    computed, copied, capsys, stage, name, damage
):
    _, store, keys = copied
    damage(store.folder(stage, keys[stage]) / name)
    assert not store.is_finished(stage, keys[stage])
    status(copied[0])
    assert f"{stage} {keys[stage]}" in capsys.readouterr().out
    check_mended(copied, computed[2], stage, DEPENDENTS[stage], capsys)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("implant", "model"),
        pytest.param("implant", "trigger", marks=pytest.mark.slow),
        pytest.param("defend", "model", marks=pytest.mark.slow),
        pytest.param("defend", "findings", marks=pytest.mark.slow),
    ],
)
def test_damage_without_a_trace_is_found_when_the_bytes_are_read(computed, copied, capsys, stage, name):
    _, store, keys = copied
    silently(bit_flip, store.folder(stage, keys[stage]) / f"{name}.safetensors")
    assert store.is_finished(stage, keys[stage])
    assert store.damage(stage, keys[stage], thorough=True)
    with pytest.raises(Damaged, match=keys[stage]):
        Store(store.root).tensors(stage, keys[stage], name)
    status([*copied[0], "--verify"])
    assert f"{stage} {keys[stage]}" in capsys.readouterr().out
    for other in DEPENDENTS[stage] - {stage} - ({"defend"} if name == "model" else set()):
        shutil.rmtree(store.folder(other, keys[other]))  # so that the bytes are needed
    check_mended(copied, computed[2], stage, DEPENDENTS[stage], capsys)


def test_a_changed_figure_is_not_printed(copied, capsys):
    arguments, store, keys = copied
    path = store.folder("evaluate", keys["evaluate"]) / "result.json"
    entries = json.loads(path.read_text())
    path.write_text(path.read_text().replace(f'"asr": {entries["figures"]["asr"]}', '"asr": 7.5', 1))
    assert json.loads(path.read_text())["figures"]["asr"] == 7.5
    from bench.report import main as report

    report(arguments)
    table = of_trials(load_experiment(arguments).trials, store)
    assert not (table.asr == 7.5).any()
    assert (table.status == "missing").sum() == 1
    assert "result.json" in table[table.status == "missing"].reason.item()


def test_a_record_has_size_and_sha256_of_every_other_file(copied_store):
    store, keys = copied_store
    for stage, key in keys.items():
        place = store.folder(stage, key)
        listed = json.loads((place / "result.json").read_text())["files"]
        others = {path for path in place.iterdir() if path.name != "result.json"}
        assert listed == {p.name: [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for p in others}


def test_a_copy_with_new_time_stamps_is_verified_once_and_not_computed_again(copied_store, monkeypatch):
    store, keys = copied_store
    for index, path in enumerate(sorted(store.root.rglob("*"))):
        os.utime(path, (2e9 + index, 2e9 + index))
    store.mend(keys.items())
    assert not store.aside()
    monkeypatch.setattr("bench.storage.store._sha256", lambda path: pytest.fail(f"{path} was hashed again"))
    assert all(Store(store.root).is_finished(stage, key) for stage, key in keys.items())


def earlier(store: Store) -> None:
    """Write the records as earlier versions did: without checksums."""
    for path in store.root.glob("*/*/*/result.json"):
        entries = json.loads(path.read_text())
        del entries["files"], entries["sha256"]
        path.write_text(json.dumps(entries, indent=1, sort_keys=True))


def test_a_store_of_an_earlier_version_gets_its_checksums_on_first_use(copied, computed, capsys):
    arguments, store, keys = copied
    earlier(store)
    done = len(history(store))
    assert main(arguments) == 0
    assert len([line for line in capsys.readouterr().err.splitlines() if "earlier version" in line]) == 1
    assert len(history(store)) == done
    silently(bit_flip, store.folder("implant", keys["implant"]) / "model.safetensors")
    assert store.damage("implant", keys["implant"], thorough=True)
    assert main(arguments) == 0
    assert "earlier version" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "name", "damage"),
    [
        ("implant", "model.safetensors", truncated),
        ("implant", "trigger.safetensors", absent),
        ("defend", "model.safetensors", empty),
        ("defend", "config.json", bit_flip),
        ("evaluate", "result.json", truncated),
        ("evaluate", "result.json", foreign_json),
        ("inspect", "result.json", foreign_text),
    ],
)
def test_what_was_damaged_before_there_were_checksums_is_set_aside(copied_store, capsys, stage, name, damage):
    store, keys = copied_store
    earlier(store)
    damage(store.folder(stage, keys[stage]) / name)
    store.mend((name, key) for name in FILES for key in store.keys(name))
    assert f"{stage} {keys[stage]}" in capsys.readouterr().err
    moved = {name.rpartition("-")[0] for name in store.aside()}
    assert moved == {f"{name}-{keys[name]}" for name in DEPENDENTS[stage]}


# Other files of a results folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncated, empty, foreign_text, foreign_json, folder])
def test_a_broken_record_of_a_failure_counts_for_nothing(tmp_path, capsys, damage):
    store = Store(tmp_path)
    store.fail("implant", "k", "ValueError: no", "traceback")
    damage(tmp_path / "failed" / "implant-k.json")
    assert store.failure("implant", "k") is None
    assert store.tries("implant", "k") == 0
    assert "implant-k.json" in capsys.readouterr().err
    store.fail("implant", "k", "ValueError: again", "traceback")
    assert store.failure("implant", "k") == "ValueError: again"


def test_foreign_files_in_a_results_folder_end_no_run(copied, computed, capsys):
    arguments, store, keys = copied
    shutil.rmtree(store.root / "evaluate")
    for path in [
        store.root / "implant" / "notes.txt",
        store.root / "defend" / "ab" / "foreign",
        store.root / "failed" / f"evaluate-{keys['evaluate']}.json",
        store.root / "locks" / "readme-x",
        store.root / "locks" / f"evaluate-{keys['evaluate']}" / "notes",
        store.root / "damaged" / "readme",
        store.root / "unfinished" / "readme",
        store.root.parent / "checkpoints" / "readme",
        store.root.parent / "checkpoints" / f"evaluate-{keys['evaluate']}" / "readme",
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xfe")
    (store.root / "evaluate" / "cd" / "empty").mkdir(parents=True)
    (store.root / "history.log").unlink()
    (store.root / "history.log").mkdir()
    status(arguments)
    assert main(arguments) == 0
    assert main([*arguments, "dry_run=true"]) == 0
    experiment = load_experiment(arguments)
    pd.testing.assert_frame_equal(of_trials(experiment.trials, store)[FIGURES], computed[2][FIGURES], check_exact=True)


# Publishing -----------------------------------------------------------------------------------------------------

IDENTITY = {"stage": "implant", "seed": 0}


def test_what_fails_after_the_rename_is_a_warning(tmp_path, monkeypatch, capsys):
    store, key = Store(tmp_path / "store"), key_of(IDENTITY)
    (store.root / "history.log").mkdir(parents=True)
    store.work("implant", key).mkdir(parents=True)
    remove = shutil.rmtree

    def refuse(path, *more, **options):
        if "checkpoints" in str(path):
            raise PermissionError(errno.EACCES, "not yours", str(path))
        return remove(path, *more, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    store.finish("implant", IDENTITY, {"status": "done"}, {"model": {"weight": torch.zeros(3)}})
    assert store.is_finished("implant", key)
    printed = capsys.readouterr().err
    assert "history.log" in printed
    assert "checkpoints" in printed
    monkeypatch.undo()
    store.sweep()
    assert not store.work("implant", key).exists()


def test_checkpoints_of_a_running_stage_are_not_swept(tmp_path):
    store = Store(tmp_path / "store")
    begun = store.work("implant", key_of(IDENTITY))
    begun.mkdir(parents=True)
    for name in ("implant.safetensors", "implant.0123", "implant.4567"):
        (begun / name).touch()
        os.utime(begun / name, (0, 0) if name != "implant.4567" else None)
    store.sweep()
    assert {path.name for path in begun.iterdir()} == {"implant.safetensors", "implant.4567"}


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EDQUOT, marks=pytest.mark.slow)])
def test_a_full_disk_is_no_try(run_grid, tiny, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    words = ["grid.attacks=[badnets]", "grid.defenses=[no_defense]", "dispatch.max_tries=1"]
    with monkeypatch.context() as patch:
        patch.setattr("bench.engine.files.save_file", full)
        code, trials = run_grid(*words)
    assert code == 1
    assert os.strerror(number) in trials.reason.item()
    assert run_grid(*words)[0] == 0  # a try that counted would have been the last


def test_an_error_of_the_disk_keeps_its_number_whatever_writes(tmp_path):
    from bench.engine.files import disk_is_full, save_tensors

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="large") as caught:
            save_tensors({"weight": torch.zeros(10_000)}, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not disk_is_full(caught.value)
    wrapped = RuntimeError("no room")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert disk_is_full(wrapped)


def test_a_surrogate_takes_the_implants_that_asked_for_it_along(tmp_path):
    store = Store(tmp_path)
    weights = {"model": {"weight": torch.ones(3)}}
    surrogate, implants = {"stage": "surrogate"}, [{"stage": "implant", "seed": seed} for seed in range(2)]
    store.finish("surrogate", surrogate, {"status": "done"}, weights)
    store.finish("implant", implants[0], {"status": "done", "surrogate": key_of(surrogate)}, weights)
    store.finish("implant", implants[1], {"status": "done"}, weights)
    truncated(store.folder("surrogate", key_of(surrogate)) / "model.safetensors")
    store.mend([("surrogate", key_of(surrogate))])
    assert store.keys("surrogate") == set()
    assert store.keys("implant") == {key_of(implants[1])}
    assert len(store.aside()) == 2
