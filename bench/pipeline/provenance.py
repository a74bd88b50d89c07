"""Which code, machine and device made a figure, and what it cost."""

from __future__ import annotations

import functools
import platform
import resource
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import bench


@functools.cache
def provenance() -> dict[str, Any]:
    """Which code made a figure, and on what: commit, whether the tree was clean, versions, machine."""
    here = Path(bench.__file__).parents[1]

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        except OSError:  # there is no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # Results and notes may change while a sweep runs; the code may not.
    changed = git("status", "--porcelain", "--", "bench", "attacks", "baselines", "defenses", "slurm", "pyproject.toml")
    commit = git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "clean": bool(commit) and not changed,
        "bench": bench.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "numpy")},
        "machine": platform.machine(),
    }


class PeakMemory:
    """The most memory in use since now: on a GPU what is allocated beyond now, elsewhere the whole process.

    A process does not give freed memory back, so that a difference would show almost nothing there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; Linux only
        if device.type == "cuda":
            self.before = self._peak()

    def mib(self) -> float:
        return self._peak() - self.before

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
