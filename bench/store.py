"""Finished stages on disk, found again by a hash of everything that can change their figures.

A stage is a folder that appears by one rename: `config.json` (its identity), `result.json`, weights as safetensors.
Nothing that is loaded is a pickle, and a half-written folder has another name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import lease

if TYPE_CHECKING:
    from torch import Tensor

Identity = dict[str, Any]
STAGES = ("implant", "defend", "evaluate")


# Made once: a grid of 100,000 trials asks for 300,000 keys.
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def key_of(identity: Identity) -> str:
    """20 hexadecimal digits: the same for the same resolved inputs, whatever their order."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()[:20]


class Store:
    """Stages under one folder; any number of processes may share it.

    `history.log` gets one line for each stage that was computed: time, stage, key, seconds, process.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def name(self) -> str:
        """Which store this is, also beside another machine's at the same path; made at the first asking."""
        path = self.root / "name"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            beside = self.root / f"name.{uuid.uuid4().hex}"
            beside.write_text(uuid.uuid4().hex)
            with suppress(FileExistsError):
                os.link(beside, path)
            beside.unlink()
        return f"{path.read_text()} {self.root.resolve()}"  # a copy has the same file, and lies elsewhere

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    def result(self, stage: str, key: str) -> dict[str, Any] | None:
        """What a finished stage left; None if it is not finished."""
        try:
            found: dict[str, Any] = json.loads((self.folder(stage, key) / "result.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # an empty file is what a power cut leaves
            return None
        return found

    def is_finished(self, stage: str, key: str) -> bool:
        """Is there a result? Asks for a file's size and reads nothing."""
        try:
            return os.stat(f"{self.root}/{stage}/{key[:2]}/{key}/result.json").st_size > 0
        except OSError:
            return False

    def tensors(self, stage: str, key: str, name: str, device: str = "cpu") -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder(stage, key) / f"{name}.safetensors", device=device)

    def has(self, stage: str, key: str, name: str) -> bool:
        return (self.folder(stage, key) / f"{name}.safetensors").exists()

    def finish(
        self,
        stage: str,
        identity: Identity,
        result: dict[str, Any],
        tensors: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Publish a stage by one rename, and forget its failure and its checkpoints."""
        key = key_of(identity)
        beside = self.root / "unfinished" / uuid.uuid4().hex
        beside.mkdir(parents=True)
        final = self.folder(stage, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            for name, named in (tensors or {}).items():
                from bench.engine.files import save_tensors

                # Channels-last weights are the same numbers in another order; the format wants one order.
                kept = {k: v.detach().cpu().contiguous().clone() for k, v in named.items()}
                save_tensors(kept, beside / f"{name}.safetensors")
            _write(beside / "config.json", identity)
            _write(beside / "result.json", result)
            if self.result(stage, key) is None and final.exists():
                shutil.rmtree(final)  # what a power cut left
            os.rename(beside, final)
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not isinstance(error, OSError) or self.result(stage, key) is None:
                raise
            return  # somebody was faster, with the same figures
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {stage} {key} {result.get('seconds', 0):.1f}s {os.getpid()}\n"
        with (self.root / "history.log").open("a") as log:
            log.write(line)
        self._failure(stage, key).unlink(missing_ok=True)
        shutil.rmtree(self.work(stage, key), ignore_errors=True)

    def keys(self, stage: str) -> set[str]:
        """Keys of the stages of this name that have a folder: all finished ones, and what a power cut left."""
        found: set[str] = set()
        for folder in (self.root / stage).glob("??"):
            found.update(os.listdir(folder))
        return found

    def identities(self, stage: str) -> Iterator[tuple[str, Identity]]:
        """Key and identity of each finished stage of this name."""
        for folder in sorted((self.root / stage).glob("*/*")):
            try:
                yield folder.name, json.loads((folder / "config.json").read_text())
            except (OSError, json.JSONDecodeError):  # what a power cut left
                continue

    def sweep(self) -> None:
        """Remove what killed processes left half-written, a day and more ago."""
        for path in (self.root / "unfinished").glob("*"):
            with suppress(FileNotFoundError):  # published in this moment
                if time.time() - path.stat().st_mtime > 86_400:
                    shutil.rmtree(path, ignore_errors=True)

    def work(self, stage: str, key: str) -> Path:
        """Where a running stage keeps its checkpoints."""
        # Beside the store, not in it: a defender is handed this place, and the store holds the trigger.
        return self.root.parent / "checkpoints" / f"{stage}-{key}"

    def fail(self, stage: str, key: str, error: str, details: str, *, job: str = "", counts: bool = True) -> None:
        """Keep the reason why a stage failed; the next run tries it again.

        Args:
            job: the Slurm job that it failed in; empty takes this process's.
            counts: is it a try that `dispatch.max_tries` counts? One that a person stopped is not.
        """
        path = self._failure(stage, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{uuid.uuid4().hex}")
        record = {
            "error": error,
            "details": details,
            "time": time.time(),
            "tries": self.tries(stage, key) + counts,
            "job": job or lease.slurm_job(),
        }
        try:
            _write(beside, record)
            os.replace(beside, path)
        except OSError as full:  # the reason of the reason: a full disk has no room for it either
            beside.unlink(missing_ok=True)
            print(f"{stage} {key} failed ({error}), and that could not be kept: {full}", file=sys.stderr)

    def failure(self, stage: str, key: str) -> str | None:
        """One line: why the last try of this stage failed."""
        found = self.failure_record(stage, key)
        return None if found is None else str(found["error"])

    def tries(self, stage: str, key: str) -> int:
        """How often this stage was tried and failed."""
        found = self.failure_record(stage, key)
        return 0 if found is None else int(found.get("tries", 1))

    def failure_record(self, stage: str, key: str) -> dict[str, Any] | None:
        """All that is known of the last failure: error, details (a traceback), time, tries, job."""
        try:
            with open(f"{self.root}/failed/{stage}-{key}.json") as file:
                found: dict[str, Any] = json.load(file)
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def _failure(self, stage: str, key: str) -> Path:
        return self.root / "failed" / f"{stage}-{key}.json"

    def _lock(self, stage: str, key: str) -> Path:
        return self.root / "locks" / f"{stage}-{key}"

    @contextmanager
    def lock(self, stage: str, key: str) -> Iterator[bool]:
        """True if this process may compute the stage now. A killed process loses its lock: see bench/lease.py."""
        path = lease.take(self._lock(stage, key))
        if path is None:
            yield False
            return
        try:
            yield True
        finally:
            # Who takes the lock of a finished stage finds it finished: nobody needs it any more.
            lease.release(path, forget=self.result(stage, key) is not None)

    def is_running(self, stage: str, key: str) -> bool:
        """Does some process compute this stage now?"""
        claim = lease.read(self._lock(stage, key))
        return claim is not None and claim.alive

    def claims(self) -> dict[tuple[str, str], lease.Claim]:
        """The locks that were taken and not given back: of living processes, and of those that died with them."""
        found = {}
        for path in (self.root / "locks").glob("*-*"):
            stage, _, key = path.name.partition("-")
            claim = lease.read(path)
            if claim is not None and not claim.released:
                found[stage, key] = claim
        return found


def _write(path: Path, value: Any) -> None:
    # NaN is not JSON, and no figure: a measure that has no value is None.
    with path.open("w") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))
        file.flush()
        os.fsync(file.fileno())
