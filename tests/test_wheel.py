"""The benchmark away from its repository, and the commands with wrong words."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from bench._command import _status
from bench.engine.packages import shipped

ROOT = Path(__file__).parents[1]
OURS = ("bench", "attacks", "defenses", "baselines", "slurm")


def test_what_ships_is_found_in_any_folder_and_a_users_own_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["claims.yaml", *(f"reported/{path.name}" for path in (ROOT / "results" / "reported").glob("*.csv"))]
    assert len(names) > 1
    for name in names:
        path = Path("results", name)
        assert shipped(path).read_bytes() == (ROOT / path).read_bytes()
    mine = Path("results/claims.yaml")
    mine.parent.mkdir()
    mine.write_text("mine")
    assert shipped(mine) == mine
    assert shipped(Path("results/nothing.csv")) == Path("results/nothing.csv")
    assert shipped(Path("engine/files.py")) == Path("engine/files.py")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare", []),
        ("compare", ["a"]),
        ("compare", ["a", "b", "c"]),
        ("compare", ["a", "b", "tolerance=x"]),
        ("compare", ["a", "b", "tolerance=2"]),
        ("compare", ["a", "b", "significant=perhaps"]),
        ("compare", ["a", "b", "colour=red"]),
        ("compare", ["--x", "--y"]),
        ("claims", ["--foo"]),
        ("claims", ["nowhere.csv"]),
        ("data", []),
        ("data", ["--x"]),
        ("data", ["="]),
        ("perf", ["x"]),
        ("perf", ["size=a"]),
        ("perf", ["size=0"]),
        ("perf", ["only=zz"]),
        ("perf", ["against=nowhere"]),
        ("list", ["x"]),
        ("cancel", ["--x"]),
        ("report", ["table=nowhere.csv"]),
        ("gallery", ["x"]),
        ("connection", ["="]),
        ("sync", ["grid"]),
    ],
)
def test_wrong_words_are_one_line_and_status_two(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"bench.{command}")
    assert _status(module.main, module.__doc__, words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(tmp_path):
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    kept = ["pyproject.toml", "README.md", "LICENSE", "results", *OURS]
    source.mkdir()
    empty.mkdir()
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in kept), str(source)], check=True)
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert not [name for name in archive.namelist() if name.startswith(("results/", "tests/"))]
    # What is installed for development is left out: only its other packages are seen.
    environment = {**os.environ, "PYTHONPATH": f"{site}:{sysconfig.get_paths()['purelib']}"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-S", "-m", "bench", *words]
        return subprocess.run(line, cwd=empty, env=environment, capture_output=True, text=True, check=False)

    for words in (["list"], ["run", "grid=quick", "dry_run=true"]):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    reported = "results/reported/backdoorbench_gtsrb.csv"
    done = run("compare", reported, reported)
    assert "rank correlation" in done.stdout, done.stderr
    done = run("compare", "results/reported/nowhere.csv", reported)
    assert done.returncode == 2
    assert (site / "bench" / "docs" / "protocol.md").is_file()
    assert done.stderr.count("\n") == 1
