"""A command as a process: output that goes away, signals, folders that cannot be written, and what is not installed."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import run
from bench.dispatch.local import _Pool
from bench.engine import files, stopping
from bench.engine.errors import UserError
from bench.experiment.experiment import load_experiment
from bench.storage.store import Store

ROOT = Path(run.__file__).parents[1]
# A command that needs no package: it prints, works, and leaves a file when its work is done.
COMMAND = """
import sys, time
from pathlib import Path
from bench._command import run_command as enter
from bench.engine import stopping

def main(arguments):
    {body}

enter(main, "usage")
"""
PRINTS = """
    for index in range(2000):
        print("a line of output", index, flush=index % 2 == 0)
        print("a line of diagnostics", file=sys.stderr)
    Path("done").touch()
    return int(arguments[0])
"""
STEPS = """
    with stopping.patiently():
        for step in range(1000):
            Path("step").write_text(str(step))
            time.sleep(0.7)
            Path("safe").write_text(str(step))
            stopping.check()
"""


@pytest.fixture
def script(tmp_path):
    """Starts a command of this body in a shell line in which `$command` stands for it."""

    def start(body: str, line: str = "exec $command", **more) -> subprocess.Popen[str]:
        (tmp_path / "command.py").write_text(COMMAND.format(body=body.strip()))
        line = line.replace("$command", f"{sys.executable} {tmp_path / 'command.py'}")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=environment, **{**streams, **more})

    return start


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("$command EXIT | head -1; exit ${PIPESTATUS[0]}", False),
        ("$command EXIT | true; exit ${PIPESTATUS[0]}", False),
        ("$command EXIT 2>&1 | head -1; exit ${PIPESTATUS[0]}", False),
        ("$command EXIT 2>/dev/full >/dev/null", False),
        ("$command EXIT >&-", False),
        ("$command EXIT >&- 2>&- <&-", False),
        ("$command EXIT >/dev/full", True),
        ("$command EXIT >/dev/full 2>/dev/full", True),
    ],
)
def test_work_goes_on_where_its_output_goes_nowhere(script, tmp_path, line, lost, status):
    process = script(PRINTS, line.replace("EXIT", str(status)))
    _, errors = process.communicate(timeout=60)
    assert (tmp_path / "done").exists()
    assert process.returncode == (status or int(lost))
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    if lost and "2>" not in line:
        assert os.strerror(errno.ENOSPC) in errors.splitlines()[-1]


def test_a_character_that_the_output_lacks_is_written_as_an_escape(script):
    process = script("""print("76.1 \u00b1 0.2")""", "PYTHONIOENCODING=ascii $command")
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert out == "76.1 \\xb1 0.2\n"


def _told(process: subprocess.Popen[str], folder: Path, *signals: tuple[float, signal.Signals]) -> float:
    """Send signals, each after some seconds; gives the seconds from the first to the end."""
    while not (folder / "step").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    began = time.monotonic()
    for pause, number in signals:
        time.sleep(pause)
        process.send_signal(number)
    process.communicate(timeout=60)
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_waits_for_a_safe_point_and_says_so_by_the_exit_status(script, tmp_path, number):
    process = script("stopping.TOGETHER_S = 30.0" + STEPS)  # two signals may be far apart on a loaded machine
    _told(process, tmp_path, (0, number), (0, number))  # as `timeout` does: the child, then its group
    assert process.returncode == 128 + number
    assert (tmp_path / "safe").read_text() == (tmp_path / "step").read_text()


def test_a_second_signal_ends_at_once(script, tmp_path):
    process = script(STEPS.replace("0.7", "30"))
    assert _told(process, tmp_path, (0, signal.SIGTERM), (0.8, signal.SIGTERM)) < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "safe").exists()


def test_what_has_no_safe_point_within_the_grace_ends_as_by_a_second_signal(script, tmp_path):
    process = script("stopping.GRACE_S = 1.0" + STEPS.replace("0.7", "30"))
    assert _told(process, tmp_path, (0, signal.SIGTERM)) < 10
    assert process.returncode == 128 + signal.SIGTERM


def test_elsewhere_the_first_signal_ends_at_once_without_a_traceback(script, tmp_path):
    process = script("""Path("step").touch(); time.sleep(30)""")
    assert _told(process, tmp_path, (0, signal.SIGTERM)) < 10
    assert process.returncode == 128 + signal.SIGTERM


def test_what_was_started_with_nohup_goes_on_when_the_terminal_is_closed(script, tmp_path):
    process = script("""Path("step").touch(); time.sleep(1); Path("done").touch(); return 0""", "trap '' HUP; $command")
    _told(process, tmp_path, (0, signal.SIGHUP))
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


def test_every_worker_starts_with_the_signals_blocked_that_end_a_job(tmp_path):
    """Also the first, with which Python starts a process of its own; and again after that one was killed."""
    resource_tracker._resource_tracker._stop()
    pool = _Pool(Store(tmp_path), {}, torch.device("cpu"), 1, 60.0, [])
    try:
        for index in range(3):
            if index == 2:
                os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
                time.sleep(0.1)
            pool.start(index)
            state = Path(f"/proc/{pool.processes[index][0].pid}/status").read_text()
            blocked = int(re.search(r"SigBlk:\s*(\w+)", state)[1], 16)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                assert blocked >> (number - 1) & 1, (index, number.name)
    finally:
        pool.stop()


@pytest.fixture
def listening():
    """This process answers signals as a command does."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


TRAINING = ["grid.attacks=[badnets]", "grid.defenses=[fine_tuning]", "train.epochs=4"]


@pytest.mark.slow
def test_a_training_that_is_told_to_stop_leaves_a_checkpoint_and_goes_on_to_the_same_bits(
    tiny, tmp_path, monkeypatch, listening
):
    straight, broken = ([*tiny, *TRAINING, f"results={tmp_path / name}"] for name in ("straight", "broken"))
    assert run.main(straight) == 0
    done, step = 0, torch.optim.SGD.step

    def told(self, closure=None):
        nonlocal done
        done += 1
        if done == 30:  # of 22 steps an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", told)
        with pytest.raises(stopping.Stopped):
            run.main(broken)
    assert done == 44  # the epoch was finished
    assert list((tmp_path / "broken" / "checkpoints").rglob("implant.safetensors"))
    experiment = load_experiment(broken)
    assert not list((experiment.store.root / "failed").glob("*"))
    assert not experiment.store.claims()
    assert run.main(broken) == 0
    key = experiment.trials[0].keys.implant
    one, two = (load_experiment(words).store.tensors("implant", key, "model") for words in (straight, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


RUN = [
    "grid=quick",
    "grid.exceptions=[]",
    "grid.attacks=[badnets]",
    "grid.seeds=2",
    "grid.defenses=[no_defense,fine_tuning]",
    "model.stem=stock",
    "train.epochs=60",
    "defense.fine_tuning.epochs=1",
    "measure.pgd_steps=1",
    "measure.pgd_images=50",
    "tracking.enabled=false",
    "report.plots=false",
    "dispatch.device=cpu",
    "dispatch.workers=2",
]


def _started(line: list[str], results: Path, **more) -> subprocess.Popen[str]:
    """A run that has begun to train with both workers."""
    driver = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **more)
    end = time.monotonic() + 120
    while len(list(results.glob("store/locks/implant-*/1"))) < 2:
        assert time.monotonic() < end
        assert driver.poll() is None
        time.sleep(0.1)
    return driver


def _children(pid: int) -> list[int]:
    """The workers of a driver."""
    listed = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "group", "killed", "killed, then SIGTERM to the workers"])
def test_a_driver_that_ends_takes_its_workers_with_it_and_loses_nothing(tmp_path, cache, how):
    results = tmp_path / "results"
    line = [sys.executable, "-m", "bench.run", *RUN, f"dataset.cache={cache}", f"results={results}"]
    driver = _started(line, results, start_new_session=True)
    workers = _children(driver.pid)
    assert len(workers) == 2
    if how.startswith("killed"):
        driver.kill()
        if "workers" in how:
            driver.wait()
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
        assert _gone(workers, 60)
        driver.wait()
    else:
        number = signal.Signals[how] if how != "group" else signal.SIGTERM
        os.killpg(driver.pid, number) if how == "group" else os.kill(driver.pid, number)
        _, errors = driver.communicate(timeout=90)
        assert driver.returncode == 128 + number
        assert "Traceback" not in errors
        assert _gone(workers, 1)
    if "workers" not in how:
        assert len(list((results / "checkpoints").rglob("implant.safetensors"))) == 2
    assert not list((results / "store" / "failed").glob("*"))
    assert subprocess.run(line, stdout=subprocess.DEVNULL, check=False).returncode == 0
    trials = pd.read_csv(results / "quick" / "trials.csv")
    assert set(trials.status) == {"done"}


@pytest.mark.slow
def test_a_run_whose_reader_went_away_computes_all_of_it(tmp_path, cache):
    words = [*RUN, "train.epochs=2", f"dataset.cache={cache}", f"results={tmp_path / 'results'}"]
    line = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m bench.run {line} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert set(pd.read_csv(tmp_path / "results" / "quick" / "trials.csv").status) == {"done"}


def _file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not a folder")


@pytest.mark.parametrize(
    ("place", "at"),
    [
        (".", "results"),
        (".", "results/store"),
        (".", "results/store/implant"),
        (".", "results/store/locks"),
        (".", "results/store/unfinished"),
        (".", "results/store/failed"),
        (".", "results/checkpoints"),
        (".", "results/quick"),
        ("above/it", "results/above"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named_before_anything_is_computed(tiny, tmp_path, place, at):
    _file(tmp_path / at)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "results"))) as caught:
        run.main([*tiny, f"results={tmp_path / 'results' / place}"])
    message = str(caught.value)
    assert str(tmp_path / at) in message
    assert "\n" not in message
    assert "bfloat16" not in message


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_results_that_cannot_be_written_are_named_with_the_cause(tiny, tmp_path, monkeypatch, number, call):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "results"))

    target = (Path, "mkdir") if call == "mkdir" else (files.tempfile, "NamedTemporaryFile")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "quick").mkdir()
    (tmp_path / "results" / "quick" / "leaderboard.md").touch()  # of an earlier run, with other settings
    words = [*tiny, f"results={tmp_path / 'results'}"]
    load_experiment(words)  # decodes the data set
    monkeypatch.setattr(*target, fails)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "results"))) as caught:
        run.main(words)
    assert os.strerror(number) in str(caught.value)
    assert "bfloat16" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_results_of_somebody_else_are_one_line_and_exit_status_2(script, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    body = """
    import os
    from bench.engine.files import check_writable
    os.setuid(65534)
    check_writable(Path("theirs") / arguments[0])
    """
    for name in (".", "new"):
        process = script(body, f"$command {name}")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors.count("\n") == 1
        assert os.strerror(errno.EACCES) in errors
        assert "theirs" in errors


def _python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_the_package_lists_its_commands_without_any_other_package():
    done = _python("-S", "-m", "bench")
    assert done.returncode == 0
    files = {path.stem for path in (ROOT / "bench").glob("*.py") if "\n    run_command(main" in path.read_text()} - {
        "__main__"
    }
    listed = [line.split()[2].removeprefix("bench.") for line in done.stdout.splitlines() if " -m bench." in line]
    assert set(listed) == files
    assert len(listed) == len(files)
    done = _python("-S", "-m", "bench", "statsu")
    assert done.returncode == 2
    assert "'statsu'" in done.stderr
    assert "'status'" in done.stderr


@pytest.mark.parametrize("words", [["list", "--help"], ["compare"], ["report", "table=nowhere.csv"]])
def test_a_command_is_the_same_by_its_module_and_by_its_name(words):
    name, *more = words
    one, other = _python("-m", f"bench.{name}", *more), _python("-m", "bench", name, *more)
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


@pytest.mark.parametrize("name", ["attacks", "slurm"])
def test_a_folder_of_the_users_that_hides_a_package_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    line = [sys.executable, "-m", "bench.list"]
    # A folder without Python code hides nothing.
    assert subprocess.run(line, capture_output=True, env=environment, cwd=tmp_path, check=False).returncode == 0
    (tmp_path / name / "__init__.py").touch()
    done = subprocess.run(line, capture_output=True, env=environment, cwd=tmp_path, check=False, text=True)
    assert done.returncode == 2
    assert str(tmp_path / name) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "list", "status", "claims", "data", "report"])
def test_without_the_virtual_environment_a_command_says_what_to_do(command):
    done = _python("-S", "-m", f"bench.{command}", "grid=quick")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "make setup" in done.stderr or ".venv/bin/activate" in done.stderr


@pytest.mark.slow
def test_a_run_that_waits_says_for_whom(tiny, tmp_path, monkeypatch, capsys):
    from bench.storage import lease

    experiment = load_experiment([*tiny, *TRAINING])
    store, (trial,) = experiment.store, experiment.trials
    theirs = lease.Owner("node7", "node7 boot", 4711, "1", "", time.time() - 3600)
    folder = store.root / "locks" / f"implant-{trial.keys.implant}"
    folder.mkdir(parents=True)
    (folder / "1").write_text(files_of(theirs))
    monkeypatch.setattr(run._Display, "plain_every_s", 0.0)
    shown = []
    show = run._Display.show

    def gives_up(self, progress):
        show(self, progress)
        shown.append(progress.waits)
        if len(shown) == 4:
            (folder / "1").unlink()

    monkeypatch.setattr(run._Display, "show", gives_up)
    assert run.main([*tiny, *TRAINING]) == 0
    out = capsys.readouterr().out
    since = time.strftime("%H:%M:%S", time.localtime(theirs.since))
    assert all(word in out for word in ("node7", "4711", since))
    assert shown[-1] == ()


def files_of(owner) -> str:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(owner))
