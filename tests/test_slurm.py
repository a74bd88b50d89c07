"""A sweep on a real Slurm survives what clusters do: nothing finished is lost or done twice, the rest says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from omegaconf import OmegaConf

from bench._command import open_experiment
from bench.experiment.experiment import load_experiment
from slurm import jobs
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600  # on a busy machine, importing torch in several jobs at once takes minutes
FIGURES = ["attack", "defense", "seed", "status", "clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy"]

PLUGIN = '''
"""Defenses that are slow, greedy or broken."""
import os
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.engine.training import Recipe, fit
from defenses.base import Defense, ReserveView, DefenseResult, defense


def steady(view, epochs, pause):
    def note(_, epoch):
        with open(os.environ["EPOCHS"], "a") as log:
            log.write(f"{epoch}\\n")
        time.sleep(pause)
    recipe = Recipe(epochs=epochs, lr=0.01)
    return DefenseResult(fit(view.model, view.reserve, recipe, seed=view.seed, log=view.log, after_epoch=note))


@defense("steady")
@dataclass(frozen=True)
class Steady(Defense):
    """Train for a while, with a checkpoint after each epoch."""
    paper: ClassVar[str] = "none"
    epochs: int = 8
    pause: float = 1.0

    def defend(self, view: ReserveView) -> DefenseResult:
        return steady(view, self.epochs, self.pause)


@defense("broken")
@dataclass(frozen=True)
class Broken(Defense):
    """Raise."""
    paper: ClassVar[str] = "none"

    def defend(self, view: ReserveView) -> DefenseResult:
        raise ValueError("this cell is poisoned")


@defense("greedy")
@dataclass(frozen=True)
class Greedy(Defense):
    """Take more memory than the job has."""
    paper: ClassVar[str] = "none"
    gib: int = 3

    def defend(self, view: ReserveView) -> DefenseResult:
        taken = [torch.ones(2**28) for _ in range(self.gib)]
        time.sleep(30)
        return DefenseResult(view.model) if taken else None


for name, factor in (("halved", 0.5), ("doubled", 2.0)):
    @defense(name)
    @dataclass(frozen=True)
    class Scaled(Defense):
        """Scale the head."""
        paper: ClassVar[str] = "none"
        factor: float = factor

        def defend(self, view: ReserveView) -> DefenseResult:
            with torch.no_grad():
                view.model.head.weight.mul_(self.factor)
            return DefenseResult(view.model)
'''


@pytest.fixture(scope="session")
def bed() -> Iterator[Callable[..., None]]:
    """The one-machine cluster; calling it with `node1`, `kill` does that to a node."""
    script = ROOT / "slurm" / "testbed" / "testbed.sh"
    place = {"TESTBED": f"/tmp/slurm-testbed-{os.getpid()}", "TESTBED_PORT": "17200", "TESTBED_CPUS": "2"}
    environment = {**os.environ, **place}

    def do(*words: str) -> None:
        subprocess.run([str(script), *words], env=environment, check=True, stdout=subprocess.DEVNULL)

    checked = subprocess.run([str(script), "check"], env=environment, capture_output=True, text=True)
    if checked.returncode:
        pytest.skip(checked.stderr.strip())
    before = os.environ.get("SLURM_CONF")
    try:
        do("up")
        os.environ["SLURM_CONF"] = f"{place['TESTBED']}/etc/slurm.conf"
        yield do
    finally:
        do("down")
        os.environ.pop("SLURM_CONF")
        if before:
            os.environ["SLURM_CONF"] = before


class Sweep:
    """A grid in a folder of its own, driven by processes that can be killed."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        (folder / "testing_defenses.py").write_text(PLUGIN)
        self.epochs = folder / "epochs"
        self.drivers: list[subprocess.Popen[str]] = []
        self.common = [
            *(setting for setting in TINY if not setting.startswith("dispatch.workers")),
            f"dataset.cache={cache}",
            "plugins=[testing_defenses]",
            "grid.attacks=[badnets]",
            "dispatch.checkpoint_s=0",
            "dispatch.poll_s=0.5",
            "dispatch.slurm.memory_gb=2",
            "dispatch.slurm.array_parallelism=2",
        ]
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "EPOCHS": str(self.epochs)}

    def start(self, *more: str, module: str = "bench.run", results: str = "results") -> subprocess.Popen[str]:
        words = [sys.executable, "-m", module, *self.common, f"results={self.folder / results}", *more]
        driver = subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.drivers.append(driver)
        return driver

    def run(self, *more: str, module: str = "bench.run", results: str = "results", status: int = 0) -> str:
        driver = self.start(*more, module=module, results=results)
        out, _ = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == status, out
        return out

    def table(self, results: str = "results") -> pd.DataFrame:
        return pd.read_csv(self.folder / results / "quick" / "trials.csv")

    def history(self) -> Counter[str]:
        """How often each stage was computed, the inspection of each infected model included."""
        lines = (self.results / "store" / "history.log").read_text().splitlines()
        return Counter(" ".join(line.split()[1:3]) for line in lines)

    def assert_once(self, stages: int) -> None:
        found = self.history()
        assert len(found) == stages
        assert set(found.values()) == {1}

    def running(self, stage: str = "defend") -> jobs.Element:
        """Wait until a job computes such a stage, and give it."""
        from bench.storage.store import Store

        store = Store(self.results / "store")
        for _ in range(5 * PATIENCE_S):
            owners = [claim.owner for (at, _), claim in store.claims().items() if at == stage and claim.alive]
            found = [element for element in jobs.queue(self.results / "slurm") if element.state == "RUNNING"]
            for element in found:
                if any(owner and owner.job == element.job for owner in owners):
                    return element
            time.sleep(0.2)
        raise AssertionError(f"no job computes {stage}")

    def trained(self, epochs: int = 2) -> None:
        """Wait until the slow defense has a checkpoint."""
        for _ in range(10 * PATIENCE_S):
            if self.epochs.exists() and len(self.epochs.read_text().split()) >= epochs:
                return
            time.sleep(0.1)
        raise AssertionError("the slow defense did not start")

    def batches(self) -> int:
        return len(list((self.results / "slurm").iterdir()))


@pytest.fixture
def sweep(bed, tmp_path, cache) -> Iterator[Sweep]:
    sweep = Sweep(tmp_path, cache)
    yield sweep
    for driver in sweep.drivers:
        driver.kill()
    with suppress(jobs.QueueError):
        jobs.slurm("scancel", "--user=root")
    for _ in range(100):
        if not jobs.slurm("squeue", "-h").strip():
            break
        time.sleep(0.2)


STEADY = ["dispatch=slurm", "grid.defenses=[no_defense,steady]"]

slurm = pytest.mark.slurm


@slurm
def test_a_grid_through_slurm_equals_the_same_grid_here(sweep):
    grid = [
        "grid.attacks=[none,badnets,blended]",
        "grid.defenses=[no_defense,fine_tuning,fine_pruning,aft,halved,doubled]",
        "grid.seeds=2",
    ]
    sweep.run(*grid, "dispatch.workers=2", results="here")
    sweep.run(*grid, "dispatch=slurm", "dispatch.trials_per_job=3", "dispatch.max_jobs=9")
    here, there = (sweep.table(name)[FIGURES] for name in ("here", "results"))
    assert len(there) == 36
    assert set(there.status) <= {"done", "wrecked"}  # a model of one epoch may lose its accuracy to a repair
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    sweep.assert_once(6 + 6 + 36 + 36)
    before = sweep.batches()
    sweep.run(*grid, "dispatch=slurm")
    assert sweep.batches() == before


@slurm
def test_a_clean_control_is_one_job_that_all_repairs_wait_for(sweep):
    grid = ["grid.attacks=[badnets,blended]", "grid.defenses=[no_defense]"]
    grid += ["measure.relearn=true", "measure.relearn_poisoned=[5]"]
    sweep.run(*grid, "dispatch.workers=1", results="here")
    sweep.run(*grid, "dispatch=slurm")
    here, there = (sweep.table(name)[[*FIGURES, "relearn_asr", "relearn_gain"]] for name in ("here", "results"))
    assert there.relearn_gain.notna().all()
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    sweep.assert_once(3 + 2 + 2 + 2)
    scripts = [path.read_text() for path in (sweep.results / "slurm").glob("*/log/*_submission.sh")]
    after = [line.partition("dependency=")[2] for script in scripts for line in script.splitlines() if "--dep" in line]
    assert len(after) == 1  # both repairs are one array
    assert [word.partition(":")[0] for word in after[0].split(",")] == ["aftercorr", "afterany"]


@slurm
def test_several_trials_share_one_gpu(sweep):
    packed = ["dispatch.slurm.gpus=1", "dispatch.trials_per_gpu=2", "dispatch.slurm.memory_gb=4"]
    sweep.run("dispatch=slurm", "grid.defenses=[no_defense,fine_tuning]", *packed)
    assert set(sweep.table().status) == {"done"}
    sweep.assert_once(1 + 1 + 2 + 2)
    histories = [line.split()[-1] for line in (sweep.results / "store" / "history.log").read_text().splitlines()]
    assert len(set(histories)) == 3  # one process had the implant, two the repairs
    script = next((sweep.results / "slurm").glob("*/log/*_submission.sh")).read_text()
    assert "--gpus-per-node=1" in script
    assert "--cpus-per-task=2" in script


@slurm
def test_a_cancelled_job_is_reported_and_computed_by_the_next_run(sweep):
    driver = sweep.start(*STEADY)
    sweep.trained()
    job = sweep.running().job
    jobs.cancel([job])
    out, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1, out
    table = sweep.table().set_index("defense")
    assert f"job {job}" in table.reason["steady"]
    assert "CANCELLED" in table.reason["steady"]
    assert job in sweep.run(*STEADY, module="bench.status")
    sweep.run(*STEADY)
    assert set(sweep.table().status) == {"done"}
    sweep.assert_once(1 + 1 + 2 + 2)


@slurm
def test_a_job_whose_time_is_up_goes_on_from_its_checkpoint(sweep):
    ask = ["dispatch.slurm.timeout_min=2", "dispatch.slurm.signal_delay_s=30", "dispatch.slurm.max_timeouts=10"]
    sweep.run(*STEADY, "defense.steady.epochs=55", "defense.steady.pause=2", *ask)
    assert set(sweep.table().status) == {"done"}
    sweep.assert_once(1 + 1 + 2 + 2)
    logs = [path.read_text() for path in (sweep.results / "slurm").glob("*/log/*_log.out")]
    assert any("timed-out" in log and "Requeued job" in log for log in logs)
    epochs = [int(line) for line in sweep.epochs.read_text().split()]
    assert sorted(set(epochs)) == list(range(1, 56))
    assert len(epochs) <= 55 + 11  # the epoch that each end of time broke off, and no more


@slurm
def test_a_dead_node_costs_no_finished_stage(sweep, bed):
    driver = sweep.start(*STEADY, "defense.steady.epochs=30")
    sweep.trained()
    node = sweep.running().node
    bed(node, "kill")
    try:
        out, _ = driver.communicate(timeout=PATIENCE_S)
    finally:
        bed(node, "up")
    assert driver.returncode == 0, out
    assert set(sweep.table().status) == {"done"}
    sweep.assert_once(1 + 1 + 2 + 2)
    epochs = [int(line) for line in sweep.epochs.read_text().split()]
    assert sorted(set(epochs)) == list(range(1, 31))
    assert len(epochs) <= 30 + 2
    for _ in range(150):
        if "down" not in jobs.slurm("sinfo", "-h", "-o", "%T"):
            return
        time.sleep(0.2)
    raise AssertionError("the node did not come back")


@slurm
def test_a_killed_driver_leaves_its_jobs_and_the_next_attaches_to_them(sweep):
    driver = sweep.start(*STEADY)
    sweep.trained()
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = sweep.batches()
    assert jobs.queue(sweep.results / "slurm")
    sweep.run(*STEADY)
    assert sweep.batches() == before
    assert set(sweep.table().status) == {"done"}
    sweep.assert_once(1 + 1 + 2 + 2)
    assert [int(line) for line in sweep.epochs.read_text().split()] == list(range(1, 9))


@slurm
def test_two_drivers_submit_each_task_once(sweep):
    drivers = [sweep.start(*STEADY, "defense.steady.epochs=3", "grid.seeds=2") for _ in range(2)]
    for driver in drivers:
        out, _ = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 0, out
    assert set(sweep.table().status) == {"done"}
    sweep.assert_once(2 + 2 + 4 + 4)
    assert sum(len(jobs.Batch.read(path).packs) for path in (sweep.results / "slurm").iterdir()) == 2 + 4


@slurm
def test_a_cell_that_raises_stops_nobody_and_is_not_tried_for_ever(sweep):
    grid = ["dispatch=slurm", "grid.defenses=[no_defense,broken,fine_tuning]", "dispatch.trials_per_job=3"]
    limit = "dispatch.max_tries=2"
    for _ in range(2):
        sweep.run(*grid, limit, status=1)
    before = sweep.batches()
    out = sweep.run(*grid, limit, status=1)
    assert sweep.batches() == before
    table = sweep.table().set_index("defense")
    assert list(table.status[["no_defense", "broken", "fine_tuning"]]) == ["done", "failed", "done"]
    assert "ValueError: this cell is poisoned" in table.reason["broken"]
    assert "this cell is poisoned" in out
    sweep.assert_once(1 + 1 + 2 + 2)


@slurm
def test_a_cell_that_takes_too_much_memory_is_named_and_its_neighbours_are_computed(sweep):
    # In one job: the greedy one takes it down before the last has begun.
    grid = ["dispatch=slurm", "grid.defenses=[no_defense,greedy,fine_tuning]", "dispatch.trials_per_job=3"]
    sweep.run(*grid, status=1)
    table = sweep.table().set_index("defense")
    assert list(table.status[["no_defense", "greedy", "fine_tuning"]]) == ["done", "failed", "done"]
    assert "OUT_OF_MEMORY" in table.reason["greedy"] or "memory" in table.reason["greedy"]
    sweep.assert_once(1 + 1 + 2 + 2)


@slurm
def test_cancel_ends_the_jobs_of_a_grid_and_of_no_other(sweep):
    endless = [*STEADY, "defense.steady.epochs=9000"]
    mine, other = sweep.start(*endless), sweep.start(*STEADY)
    sweep.trained(12)  # more than the other grid's: ours is at work
    assert "1 running" in sweep.run(*endless, module="bench.cancel")
    out, _ = mine.communicate(timeout=PATIENCE_S)
    assert mine.returncode == 1, out
    out, _ = other.communicate(timeout=PATIENCE_S)
    assert other.returncode == 0, out


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A tracking server, stopped at the end of the block; the same folder goes on with the same runs."""
    import urllib.request

    uri = f"http://127.0.0.1:{port}"
    words = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words, "--host", "127.0.0.1", "--port", str(port), "--workers=1"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(PATIENCE_S):
            with suppress(OSError):
                urllib.request.urlopen(f"{uri}/health", timeout=5)
                break
            time.sleep(1)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@slurm
def test_a_tracking_server_that_goes_away_gets_what_it_missed_later(sweep, tmp_path):
    from bench.reporting import mlflow

    grid = ["dispatch=slurm", "tracking.enabled=true", "dispatch.trials_per_job=2"]
    with mlflow_server(tmp_path, 17391) as uri:
        sweep.run(*grid, "grid.defenses=[no_defense]", f"tracking.uri={uri}")
    more = [*grid, "grid.defenses=[no_defense,fine_tuning]", f"tracking.uri={uri}"]
    out = sweep.run(*more)
    assert any(line.startswith("warning: MLflow") and uri in line for line in out.splitlines())
    assert uri in sweep.run(*more, module="bench.sync", status=2)
    with mlflow_server(tmp_path, 17391):
        assert "1 trials sent" in sweep.run(*more, module="bench.sync")
        assert "0 trials sent" in sweep.run(*more, module="bench.sync")
        there = mlflow.read(uri, "quick").sort_values("defense").reset_index(drop=True)
    here = sweep.table().sort_values("defense").reset_index(drop=True)
    assert len(there) == 2
    pd.testing.assert_frame_equal(there[FIGURES], here[FIGURES], check_dtype=False)
    sweep.assert_once(1 + 1 + 2 + 2)


@slurm
def test_a_silent_controller_is_an_error_and_no_empty_queue(sweep, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
        with pytest.raises(jobs.QueueError):
            jobs.queue(sweep.results)


# Without Slurm ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """Programs of Slurm's names that know sbatch's help and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "srun"):
        program = folder / name
        program.write_text("#!/bin/sh\necho '  --reservation=name  --mail-type=type  -A, --account=name'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dispatch.slurm.additional.reservaton=x", ["no --reservaton", "'reservation'", "mail-type"]),
        ("dispatch.slurm.submitit.slurm_partitoin=x", ["partitoin", " partition"]),
        ("dispatch.slurm.submitit.mem_gb=8", ["dispatch.slurm.memory_gb"]),
        ("dispatch.slurm.gpu=1", ["no setting 'gpu'", "'gpus'"]),
        ("dispatch.trials_per_job=0", ["at least 1"]),
        ("dispatch.slurm.timeout_min=-5", ["dispatch.slurm.timeout_min", "-5"]),
        ("dispatch.slurm.cpus=0", ["dispatch.slurm.cpus", "0"]),
        ("dispatch=slrum", ["there is no dispatch 'slrum'", "'slurm'", "university"]),
    ],
)
def test_a_wrong_parameter_is_refused_with_the_right_ones(fake_slurm, tiny, setting, words):
    from bench.engine.errors import UserError
    from slurm import dispatch

    dispatch._sbatch_options.cache_clear()
    arguments = [*tiny, "dispatch=slurm", setting] if not setting.startswith("dispatch=") else [*tiny, setting]
    with pytest.raises(UserError) as error:
        open_experiment(arguments)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# What a driver finds its jobs by, or what our own settings say: option of sbatch, and what to write instead.
OWNED = {
    "job_name": "leave it out",
    "job-name": "leave it out",
    "array": "leave it out",
    "output": "leave it out",
    "error": "leave it out",
    "open_mode": "leave it out",
    "dependency": "leave it out",
    "ntasks": "leave it out",
    "ntasks_per_node": "leave it out",
    "nodes": "leave it out",
    "clusters": "leave it out",
    "parsable": "leave it out",
    "wait": "leave it out",
    "time": "dispatch.slurm.timeout_min",
    "mem": "dispatch.slurm.memory_gb",
    "cpus-per-task": "dispatch.slurm.cpus",
    "gpus_per_node": "dispatch.slurm.gpus",
    "partition": "dispatch.slurm.partition",
    "account": "dispatch.slurm.account",
    "qos": "dispatch.slurm.qos",
    "constraint": "dispatch.slurm.constraint",
    "signal": "dispatch.slurm.signal_delay_s",
}


@pytest.fixture(scope="module")
def slurm_settings(tmp_path_factory):
    """The settings under `dispatch` of a grid, with one more for submitit or sbatch."""
    folder = tmp_path_factory.mktemp("settings")
    cfg = load_experiment(
        [*TINY, "dispatch=slurm", f"dataset.cache={folder}", f"results={folder / 'results'}"], True
    ).cfg

    def of(key: str, value: object):
        changed = cfg.copy()
        OmegaConf.update(changed, f"dispatch.slurm.{key}", value, force_add=True)
        return changed.dispatch

    return of


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("key", OWNED)
def test_an_option_that_the_dispatcher_sets_is_refused(fake_slurm, slurm_settings, monkeypatch, key, dry):
    from bench.engine.errors import UserError
    from slurm import dispatch

    monkeypatch.setattr(dispatch, "_sbatch_options", list)  # a cluster whose help cannot be read
    with pytest.raises(UserError, match=key) as error:
        dispatch.check(slurm_settings(f"additional.{key}", 3), dry)
    assert OWNED[key] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dry", [False, True])
def test_and_that_before_anything_is_submitted(fake_slurm, tiny, monkeypatch, dry):
    from bench.engine.errors import UserError
    from slurm import dispatch

    monkeypatch.setattr(dispatch, "_sbatch_options", list)
    with pytest.raises(UserError, match="array"):
        open_experiment([*tiny, "dispatch=slurm", "dispatch.slurm.additional.array=3"], dry=dry)


@pytest.mark.parametrize(
    "key", ["name", "slurm_time", "slurm_mem", "slurm_job_name", "slurm_partition", "slurm_setup", "slurm_dependency"]
)
def test_and_so_is_a_parameter_of_submitit_by_either_of_its_names(fake_slurm, slurm_settings, monkeypatch, key):
    from bench.engine.errors import UserError
    from slurm import dispatch

    monkeypatch.setattr(dispatch, "_sbatch_options", list)
    with pytest.raises(UserError, match=f"submitit.{key}"):
        dispatch.check(slurm_settings(f"submitit.{key}", 3))


@pytest.mark.parametrize("key", ["additional.mem-per-cpu", "additional.mem_per_gpu", "submitit.slurm_mem_per_cpu"])
def test_memory_is_asked_for_in_one_way(fake_slurm, tiny, monkeypatch, key):
    from bench.engine.errors import UserError
    from slurm import dispatch

    monkeypatch.setattr(dispatch, "_sbatch_options", list)
    arguments = [*tiny, "dispatch=slurm", f"dispatch.slurm.{key}=2G"]
    with pytest.raises(UserError, match=r"memory_gb=null"):
        open_experiment(arguments)
    experiment = open_experiment([*arguments, "dispatch.slurm.memory_gb=null"])
    executor = dispatch._executor(experiment.cfg.dispatch, fake_slurm, "name", "", workers=1)
    lines = executor._executor._make_submission_file_text("true", "x").splitlines()
    asked = [line for line in lines if line.startswith("#SBATCH --mem")]
    assert asked == [f"#SBATCH --{key.rpartition('.')[2].removeprefix('slurm_').replace('_', '-')}=2G"]


def test_without_scontrol_arrays_have_slurm_s_default_size_and_a_silent_controller_is_asked_again(monkeypatch):
    from slurm import dispatch

    said = {"": "scontrol: No such file or directory"}

    def scontrol(*words: str) -> str:
        if "" in said:
            raise jobs.QueueError(said[""])
        return "MaxArraySize            = 77"

    monkeypatch.setattr(jobs, "slurm", scontrol)
    dispatch._configuration.cache_clear()
    assert dispatch._max_array() == 1000
    said[""] = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)"
    with pytest.raises(jobs.QueueError):
        dispatch._max_array()
    del said[""]
    assert dispatch._max_array() == 77
    dispatch._configuration.cache_clear()


def test_a_dry_run_prints_the_job_script_where_there_is_no_slurm(tiny, monkeypatch, tmp_path, capsys):
    from bench.run import main

    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    grid = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense]", "grid.seeds=3", "dispatch=slurm"]
    ask = ["dispatch.slurm.partition=night", "dispatch.slurm.memory_gb=6", "dispatch.slurm.timeout_min=90"]
    ask += ["dispatch.slurm.gpus=2", "dispatch.slurm.array_parallelism=4", "dispatch.slurm.additional.reservation=mine"]
    assert main([*tiny, *grid, *ask, "dry_run=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
    wanted = {"array=0-2%3", "partition=night", "mem=6GB", "time=90", "gpus-per-node=2", "cpus-per-task=2"}
    assert wanted | {"reservation=mine", "requeue", "kill-on-invalid-dep=yes", "signal=USR2@90"} <= asked
    assert any(line.startswith("srun ") and "submitit.core._submit" in line for line in lines)
    assert not (tmp_path / "results" / "slurm").exists()  # nothing is submitted, and no batch is made


@pytest.mark.parametrize("profile", ["university", "cloud"])
def test_a_profile_is_a_file_of_settings_and_the_command_line_wins(fake_slurm, tiny, profile):
    from slurm import dispatch

    dispatch._sbatch_options.cache_clear()
    experiment = open_experiment(
        [*tiny, f"dispatch={profile}", "dispatch.slurm.partition=mine", "dispatch.slurm.additional.reservation=x"]
    )
    assert experiment.cfg.dispatch.kind == "slurm"
    assert experiment.cfg.dispatch.slurm.partition == "mine"
    assert experiment.cfg.dispatch.slurm.gpus == 1
    executor = dispatch._executor(experiment.cfg.dispatch, fake_slurm, "name", "aftercorr:12", workers=1)
    script = executor._executor._make_submission_file_text("true", "x")
    for line in ("--partition=mine", "--reservation=x", "--dependency=aftercorr:12", "--kill-on-invalid-dep=yes"):
        assert line in script


def test_where_there_is_no_slurm_it_says_so(tiny, monkeypatch, tmp_path):
    from bench.engine.errors import UserError

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs sbatch.*dispatch=local"):
        open_experiment([*tiny, "dispatch=slurm"])


def test_a_batch_comes_back_from_its_file_as_it_was(tiny, tmp_path):

    from bench.dispatch.tasks import pending

    experiment = open_experiment(tiny)
    tasks = pending(experiment.trials, experiment.store)
    infos = {name: info.to_json() for name, info in experiment.infos.items()}
    made = jobs.Batch.new(tmp_path / "slurm", {"infos": infos}, [tasks[:3], tasks[3:]])
    read = jobs.Batch.read(made.folder)
    assert read.infos == experiment.infos
    assert [[task.stage_key for task in pack] for pack in read.packs] == [[t.stage_key for t in p] for p in made.packs]
    for index, pack in enumerate(made.packs):  # as a job reads it
        alone = jobs.Batch.read(made.folder, index)
        assert alone.settings == read.settings
        assert [task.stage_key for task in alone.packs[0]] == [task.stage_key for task in pack]


def driver_of(experiment, root: Path, tasks=None):
    """A driver of these tasks, of all that is left by default, which shows nothing."""
    from bench.dispatch.tasks import pending
    from slurm import dispatch

    tasks = pending(experiment.trials, experiment.store) if tasks is None else tasks
    settings = experiment.cfg.dispatch
    return dispatch._Driver(
        tasks, experiment.store, experiment.infos, experiment.device, settings, [], root, lambda progress: None
    )


def test_a_driver_submits_nothing_of_what_was_called_off_after_it_began(tiny, tmp_path, monkeypatch):
    from slurm import dispatch

    experiment = open_experiment([*tiny, "grid.attacks=[none,badnets]"])
    root, submitted = tmp_path / "slurm", []
    monkeypatch.setattr(jobs, "queue", lambda _: [])
    monkeypatch.setattr(dispatch._Driver, "_submit", lambda self, tasks: submitted.append([t.stage_key for t in tasks]))
    root.mkdir()

    first = driver_of(experiment, root)
    first._look()
    badnets = {key for trial in experiment.trials if trial.attack == "badnets" for _, key in trial.stage_keys()}
    jobs.call_off(root, badnets)
    first._look()
    # Asked for again behind it: wanted again.
    driver_of(experiment, root)._look()
    assert submitted[0] == submitted[2]
    assert [place for place in submitted[0] if place[1] not in badnets] == submitted[1]
    assert first.progress.failed == len(submitted[0]) - len(submitted[1]) > 0


def test_what_failed_too_often_is_left_alone_and_with_an_infected_model_all_that_needs_it(tiny):
    from bench.dispatch.tasks import IMPLANT, pending

    experiment = open_experiment([*tiny, "grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning]"])
    first = experiment.trials[0].keys
    last = experiment.trials[-1].keys
    for _ in range(2):
        experiment.store.fail("implant", first[0], "implant: no", "")
        experiment.store.fail("evaluate", last[2], "evaluate: no", "")
    assert len(pending(experiment.trials, experiment.store, 3)) == 2 + 4
    left = pending(experiment.trials, experiment.store, 2)
    assert [(task.stages == IMPLANT, task.trial.attack, task.trial.defense) for task in left] == [
        (True, "badnets", "no_defense"),
        (False, "badnets", "no_defense"),
    ]
    experiment.store.fail("implant", last[0], "implant: cancelled", "", counts=False)
    assert experiment.store.tries("implant", last[0]) == 0


class Cluster:
    """A queue in a list: what is submitted is pending, until a test says what became of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, array: int = 1000) -> None:
        from slurm import dispatch

        self.root, self.arrays, self.elements = root, [], {}
        root.mkdir()
        monkeypatch.setattr(dispatch, "_executor", self._executor)
        monkeypatch.setattr(dispatch, "_max_array", lambda: array)
        monkeypatch.setattr(jobs, "queue", lambda _: list(self.elements.values()))
        monkeypatch.setattr(jobs, "slurm", self._refuse)

    def _refuse(self, *words: str) -> str:
        raise jobs.QueueError("accounting is off")

    def _executor(self, settings: object, log: Path, name: str, after: str, workers: int) -> Cluster:
        self.name, self.after, self.made = name.removeprefix(jobs.PREFIX), after, []
        return self

    @contextmanager
    def batch(self) -> Iterator[None]:
        yield
        self.arrays.append((self.after, [job.job_id for job in self.made]))

    def submit(self, pack: object) -> SimpleNamespace:
        job = SimpleNamespace(job_id=f"{len(self.arrays) + 1}_{len(self.made)}")
        self.made.append(job)
        self.elements[job.job_id] = jobs.Element(job.job_id, "PENDING", self.name, len(self.made) - 1)
        return job

    def driver(self, experiment, tasks=None):
        return driver_of(experiment, self.root, tasks)


def test_arrays_stay_within_the_cluster_s_limit_and_each_repair_waits_for_its_own_model(tiny, tmp_path, monkeypatch):
    from bench.dispatch.tasks import IMPLANT, pending

    cluster = Cluster(monkeypatch, tmp_path / "slurm", array=2)
    left = Counter({"badnets": 3, "blended": 1, "sig": 2, "ftrojan": 1, "bpp": 1})
    experiment = open_experiment(
        [*tiny, f"grid.attacks=[{','.join(left)}]", "grid.defenses=[no_defense,fine_tuning,aft]"]
    )
    tasks = []
    for task in pending(experiment.trials, experiment.store):
        if task.stages == IMPLANT or left[task.trial.attack]:
            left[task.trial.attack] -= task.stages != IMPLANT
            tasks.append(task)
    driver = cluster.driver(experiment, tasks)
    driver._look()
    attack_of = {}
    for element in cluster.elements.values():
        (task,) = driver._pack(element)
        attack_of[element.job] = task.trial.attack
    assert Counter(attack_of.values()) == {"badnets": 4, "blended": 2, "sig": 3, "ftrojan": 2, "bpp": 2}
    assert all(1 <= len(made) <= 2 for _, made in cluster.arrays)
    size = {made[0].partition("_")[0]: len(made) for _, made in cluster.arrays}
    for after, made in cluster.arrays:
        for place, job in enumerate(made):
            how, _, parent = after.partition(":")
            if how == "aftercorr":
                assert attack_of[f"{parent}_{place}"] == attack_of[job]
            elif how:
                assert (how, len(made)) == ("afterok", 1)
                # One of an array is waited for, and not all of it.
                assert parent.endswith("_0") == (size[parent.partition("_")[0]] > 1)
                assert attack_of[parent if "_" in parent else f"{parent}_0"] == attack_of[job]


def test_repairs_whose_models_are_there_wait_for_nothing_in_arrays_within_the_limit(tiny, tmp_path, monkeypatch):
    cluster = Cluster(monkeypatch, tmp_path / "slurm", array=2)
    experiment = open_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning,aft]"])
    finished = {experiment.trials[0].keys.implant}
    monkeypatch.setattr(type(experiment.store), "is_finished", lambda self, stage, key: key in finished)
    driver = cluster.driver(experiment)
    driver._look()
    assert [(after, len(made)) for after, made in cluster.arrays] == [("", 2), ("", 1)]


def test_without_accounting_a_job_that_vanishes_is_failed_with_that_reason_and_tried_by_the_next_run(
    tiny, tmp_path, monkeypatch
):
    cluster = Cluster(monkeypatch, tmp_path / "slurm")
    experiment = open_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense]"])
    implant = experiment.trials[0].keys.implant
    for tries in (1, 2):
        driver = cluster.driver(experiment)
        driver._look()
        assert len(driver.left) == 2
        cluster.elements.clear()  # all that was submitted is gone, and nothing says how
        driver._look()
        assert not driver.left
        assert driver.progress.failed == 2  # the model, and what needs it
        assert "ended as UNKNOWN" in experiment.store.failure("implant", implant)
        assert experiment.store.tries("implant", implant) == tries


@pytest.mark.parametrize("there", [False, True])
def test_repairs_of_a_model_whose_job_died_are_blamed_for_nothing_and_sent_again_if_the_model_is_there(
    tiny, tmp_path, monkeypatch, there
):
    cluster = Cluster(monkeypatch, tmp_path / "slurm")
    experiment = open_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]"])
    driver = cluster.driver(experiment)
    driver._look()
    (model,) = (job for after, made in cluster.arrays for job in made if not after)
    repairs, submitted = cluster.elements.keys() - {model}, len(cluster.arrays)
    implant = experiment.trials[0].keys.implant
    if there:  # killed after its last write, say
        monkeypatch.setattr(type(experiment.store), "is_finished", lambda self, stage, key: key == implant)
        monkeypatch.setattr(
            type(experiment.store), "keys", lambda self, stage: {implant} if stage == "implant" else set()
        )
        monkeypatch.setattr(type(experiment.store), "result", lambda self, stage, key: None)
    for job, element in cluster.elements.items():
        state, reason = ("OUT_OF_MEMORY", "") if job == model else ("CANCELLED", "DependencyNeverSatisfied")
        cluster.elements[job] = replace(element, state=state, reason=reason)
    driver._look()
    assert not any(
        experiment.store.failure(stage, key) for trial in experiment.trials for stage, key in trial.stage_keys()[1:]
    )
    if there:
        assert {place[0] for place in driver.left} == {"evaluate"}
        assert driver.progress.failed == 0
        assert sum(len(made) for _, made in cluster.arrays[submitted:]) == len(repairs)
    else:
        assert not driver.left
        assert driver.progress.failed == 1 + len(repairs)
        assert "ended as OUT_OF_MEMORY" in experiment.store.failure("implant", implant)
        assert len(cluster.arrays) == submitted  # and nothing is sent again


def test_a_job_whose_infected_model_is_not_there_computes_nothing_and_says_so(tiny, tmp_path, capsys):
    from bench.dispatch.tasks import IMPLANT, pending
    from slurm.worker import Pack

    experiment = open_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense]"])
    repairs = [task for task in pending(experiment.trials, experiment.store) if task.stages != IMPLANT]
    root = tmp_path / "slurm"
    batch = jobs.Batch.new(root, driver_of(experiment, root, repairs).settings, [repairs])
    Pack(str(batch.folder), 0)()
    assert f"left out: {repairs[0].title}: its infected model" in capsys.readouterr().out
    assert not any(
        experiment.store.is_finished(stage, key) for trial in experiment.trials for stage, key in trial.stage_keys()
    )
