"""Finished stages on disk, found again by a hash of everything that can change their figures.

A stage is a folder that appears by one rename: `config.json` (its identity), weights as safetensors, and `result.json`,
its record. Nothing that is loaded is a pickle, and a half-written folder has another name.

The record protects the stage. Its last two lines are `files`, the size and SHA-256 of every other file of the stage,
and `sha256`, the digest of every byte of the record before that line. A stage is finished if its record is whole and
the files have the sizes that it states; a file whose time stamp is later than the record's was written to after
publication, and is hashed as well. That is cheap enough to list thousands of stages. Where weights are read, they are
hashed once per process. A stage that fails is damaged: it is moved to `damaged/`, with everything that was computed
from it, and computed again. Records of earlier versions have neither line, and get both on first use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.storage import lease

if TYPE_CHECKING:
    from torch import Tensor


Identity = dict[str, Any]


StageKey = tuple[str, str]  # name and key of a stage


STAGES = ("implant", "defend", "evaluate")


RECORD = "result.json"


# Entries of a result that are curves and series; the rest are some thirty figures.
LONG = ("curves", "steps", "relearn", "autoattack", "connection", "asr_by_class")


DAY_S = 86_400.0


# Every stage, before those that are computed from it, and the weights without which it is not complete.
_WEIGHTS = {"surrogate": ["model"], "implant": ["model", "trigger"], "defend": ["model"], "inspect": [], "evaluate": []}


_FILES, _DIGEST = b'\n "files": ', b',\n "sha256": "'


# Other errors (too many open files, a file server that is away) say nothing about the stage.
_UNREADABLE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EIO, errno.ELOOP)


# Made once: a grid of 100,000 trials asks for 300,000 keys.
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def key_of(identity: Identity) -> str:
    """20 hexadecimal digits: the same for the same resolved inputs, whatever their order."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()[:20]


def brief_of(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its curves and series; `without` has the names of those that it had."""
    brief = {name: value for name, value in result.items() if name not in LONG}
    return brief | {"without": [name for name in LONG if result.get(name)]}


class Damaged(Exception):
    """A stage that is needed is not complete on the disk, or not there."""

    def __init__(self, stage: str, key: str, reason: str) -> None:
        super().__init__(f"{stage} {key}: {reason}")
        self.stage, self.key, self.reason = stage, key, reason


@dataclass(frozen=True)
class _Record:
    """`result.json` as it was read.

    Attributes:
        text: the bytes of the file; its own digest matches.
        files: size in bytes and SHA-256 of each other file, by name; None if an earlier version wrote the record.
        written_ns: when, by the clock that stamps the files.
    """

    text: bytes
    files: dict[str, tuple[int, str]] | None
    written_ns: int

    def result(self) -> dict[str, Any]:
        entries: dict[str, Any] = json.loads(self.text)
        entries.pop("files", None)
        entries.pop("sha256", None)
        return entries


class Store:
    """Stages under one folder; any number of processes may share it.

    `history.log` gets one line for each stage that was computed: time, stage, key, seconds, process.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._verified: set[tuple[str, int, int, int]] = set()  # files that this process has hashed, as stat saw them
        self._warned: set[str] = set()

    @property
    def name(self) -> str:
        """Which store this is, also beside another machine's at the same path; made at the first asking."""
        path = self.root / "name"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            temporary_path = self.root / f"name.{uuid.uuid4().hex}"
            temporary_path.write_text(uuid.uuid4().hex)
            with suppress(FileExistsError):
                os.link(temporary_path, path)
            temporary_path.unlink()
        return f"{path.read_text()} {self.root.resolve()}"  # a copy has the same file, and lies elsewhere

    def folders(self) -> list[Path]:
        """Those that a run writes to."""
        return [*(self.root / name for name in ("unfinished", "locks", "failed")), self.root.parent / "checkpoints"]

    def check_readable(self) -> None:
        """Look into the folders of the results that are there.

        Raises:
            OSError: one of them may not be read, or is a file.
        """
        for folder in (self.root.parent, self.root, *(self.root / stage for stage in STAGES), *self.folders()):
            with suppress(FileNotFoundError):
                os.listdir(folder)

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    # What is finished -----------------------------------------------------------------------------------------

    def result(self, stage: str, key: str) -> dict[str, Any] | None:
        """The figures of a stage, from a record that is whole; None if there is none.

        Weights may be missing: the figures that were computed from them are still right.
        """
        try:
            record = self._read(stage, key)
        except Damaged:
            return None
        return None if record is None else record.result()

    def brief(self, stage: str, key: str) -> dict[str, Any] | None:
        """The same without what is long, which `without` names: all that tables and plans ask for."""
        result = self.result(stage, key)
        return None if result is None else brief_of(result)

    def needed(self, stage: str, key: str) -> dict[str, Any]:
        """The result of a stage that another one is about to be computed from.

        Raises:
            Damaged: it is not finished.
        """
        record = self._check(stage, key)
        if record is None:
            raise Damaged(stage, key, "it is not there")
        return record.result()

    def is_finished(self, stage: str, key: str) -> bool:
        """Is the stage complete? Reads the record and asks for the sizes of the other files; see the module."""
        try:
            return self._check(stage, key) is not None
        except Damaged:
            return False

    def damage(self, stage: str, key: str, *, thorough: bool = False) -> str | None:
        """Why a stage that is there is not finished; None if it is finished, or was never computed.

        Args:
            thorough: hash every file, and not only those that were written to since the stage was published.
        """
        try:
            self._check(stage, key, thorough)
        except Damaged as damaged:
            return damaged.reason
        return None

    def path(self, stage: str, key: str, name: str) -> Path:
        """A safetensors file of a finished stage, verified once per process.

        Raises:
            Damaged: the stage is not finished, or its bytes are not those that were written.
            FileNotFoundError: it has no such file.
        """
        record = self._check(stage, key)
        if record is None:
            raise Damaged(stage, key, "it is not there")
        files = self._adopt(stage, key, record).files
        assert files is not None, "an adopted record lists its files"
        if f"{name}.safetensors" not in files:
            raise FileNotFoundError(f"{stage} {key} has no {name}.safetensors")
        self._hash(stage, key, f"{name}.safetensors", files[f"{name}.safetensors"][1])
        return self.folder(stage, key) / f"{name}.safetensors"

    def tensors(self, stage: str, key: str, name: str, device: str = "cpu") -> dict[str, Tensor]:
        """Read a safetensors file of a finished stage; raises what `path` raises."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(stage, key, name)
        try:
            return load_file(path, device=device)
        except (SafetensorError, FileNotFoundError) as error:  # moved aside by another process in this moment
            raise Damaged(stage, key, f"{path.name}: {error}") from error

    def has(self, stage: str, key: str, name: str) -> bool:
        """Does a stage list this safetensors file, whatever its state on the disk?"""
        try:
            record = self._read(stage, key)
        except Damaged:
            return False
        if record is None or record.files is None:
            return (self.folder(stage, key) / f"{name}.safetensors").exists()
        return f"{name}.safetensors" in record.files

    def usable(self, stage: str, key: str, *names: str) -> bool:
        """Can these files be read? For a report, which does without them; a damaged one is named."""
        try:
            for name in names:
                self.path(stage, key, name)
        except FileNotFoundError:
            return False
        except Damaged as damaged:
            self._warn(f"{stage}/{key}", f"{damaged}; bench.run with the same settings computes it again")
            return False
        return True

    def _read(self, stage: str, key: str) -> _Record | None:
        """The record of a stage; None if there is no such stage.

        Raises:
            Damaged: there is one, and its record is not whole.
        """
        folder = f"{self.root}/{stage}/{key[:2]}/{key}"
        try:
            with open(f"{folder}/{RECORD}", "rb") as file:
                written_ns = os.fstat(file.fileno()).st_mtime_ns
                text = file.read()
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            if not os.path.lexists(folder):
                return None
            raise Damaged(stage, key, f"{RECORD}: {error.strerror}") from error
        try:
            return _Record(text, _listed_files(text), written_ns)
        except ValueError as error:
            raise Damaged(stage, key, f"{RECORD} {error}") from error

    def _check(self, stage: str, key: str, thorough: bool = False) -> _Record | None:
        """The record of a complete stage; None if there is no such stage.

        Raises:
            Damaged: there is one, and it is not complete.
        """
        record = self._read(stage, key)
        if record is None:
            return None
        if record.files is None:
            weights = _WEIGHTS.get(stage, []) if record.result()["status"] == "done" else []
            for name in ["config.json", *(f"{name}.safetensors" for name in weights)]:
                if not self._stat(stage, key, name).st_size:
                    raise Damaged(stage, key, f"{name} is empty")
            return record
        newest = record.written_ns
        for name, (size, digest) in record.files.items():
            status = self._stat(stage, key, name)
            if status.st_size != size:
                raise Damaged(stage, key, f"{name} has {status.st_size} bytes in place of {size}")
            if thorough or status.st_mtime_ns > record.written_ns:
                self._hash(stage, key, name, digest)
            newest = max(newest, status.st_mtime_ns)
        if newest > record.written_ns:
            # A copy that did not preserve time stamps: what was hashed now need not be hashed by every command.
            with suppress(OSError):
                os.utime(self.folder(stage, key) / RECORD, ns=(newest, newest))
        return record

    def _stat(self, stage: str, key: str, name: str) -> os.stat_result:
        try:
            status = os.stat(f"{self.root}/{stage}/{key[:2]}/{key}/{name}")
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            raise Damaged(stage, key, f"{name}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(stage, key, f"{name} is not a file")
        return status

    def _hash(self, stage: str, key: str, name: str, digest: str) -> None:
        """Compare a file with its SHA-256, once per process.

        Raises:
            Damaged: it is another.
        """
        status, path = self._stat(stage, key, name), self.folder(stage, key) / name
        seen = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if seen in self._verified:
            return
        try:
            actual = _sha256(path)
        except OSError as error:
            raise Damaged(stage, key, f"{name}: {error.strerror}") from error
        if actual != digest:
            raise Damaged(stage, key, f"{name} has changed since it was written")
        self._verified.add(seen)

    def _adopt(self, stage: str, key: str, record: _Record) -> _Record:
        """Give a record of an earlier version its checksums; what cannot be stored serves this process.

        Raises:
            Damaged: weights are not readable.
        """
        if record.files is not None:
            return record
        from safetensors import SafetensorError, safe_open

        folder, files = self.folder(stage, key), {}
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name == "config.json" or entry.name.endswith(".safetensors"):
                try:
                    if entry.name != "config.json":
                        with safe_open(entry.path, "pt"):  # reads the header, which says how long the file must be
                            pass
                    elif key_of(json.loads(Path(entry.path).read_bytes())) != key:
                        raise ValueError("is not the identity of this key")
                    files[entry.name] = (os.stat(entry.path).st_size, _sha256(entry.path))
                except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
                    raise Damaged(stage, key, f"{entry.name}: {error}") from error
        self._warn("adopted", f"{self.root} was written by an earlier version: its stages get checksums on first use")
        text = _sealed(record.result(), files)
        temporary = self.root / "unfinished" / uuid.uuid4().hex
        try:
            temporary.parent.mkdir(exist_ok=True)
            _write(temporary, text)
            os.replace(temporary, folder / RECORD)
        except OSError:  # somebody else's results, or a full disk
            with suppress(OSError):
                temporary.unlink()
        return _Record(text, files, record.written_ns)

    def _warn(self, what: str, text: str) -> None:
        """Say something about a file once."""
        if what not in self._warned:
            self._warned.add(what)
            print(f"warning: {text}", file=sys.stderr)

    # What is damaged ------------------------------------------------------------------------------------------

    def mend(self, places: Iterable[StageKey]) -> None:
        """Set aside what is damaged among these stages, so that it is computed again; give older ones checksums."""
        with ExitStack() as stack:
            damaged: dict[StageKey, str] = {}
            for stage, key in dict.fromkeys(places):
                if self._defect(stage, key) is None:
                    continue
                try:
                    acquired = stack.enter_context(self.lock(stage, key))
                except OSError:  # whoever computes it meets the same, and keeps it as the reason
                    continue
                # Look again under its lock: another process may have just computed it.
                if acquired and (reason := self._defect(stage, key)):
                    damaged[stage, key] = reason
            self.set_aside(damaged)

    def _defect(self, stage: str, key: str) -> str | None:
        try:
            record = self._check(stage, key)
            if record is not None:
                self._adopt(stage, key, record)
        except Damaged as damaged:
            return damaged.reason
        return None

    def set_aside(self, damaged: Mapping[StageKey, str]) -> None:
        """Move damaged stages to `damaged/`, and everything that was computed from them.

        Args:
            damaged: the reason for each. The caller holds their locks.
        """
        if not damaged:
            return
        for (stage, key), reason in {**self._dependents(damaged), **damaged}.items():
            target = self.root / "damaged" / f"{stage}-{key}-{uuid.uuid4().hex[:8]}"
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.folder(stage, key), target)
            except FileNotFoundError:  # never computed, or moved by another process
                continue
            except OSError as error:
                print(f"warning: {stage} {key} is damaged ({reason}) and cannot be moved: {error}", file=sys.stderr)
                continue
            print(f"warning: {stage} {key}: {reason}; moved to {target}, to be computed again", file=sys.stderr)
            with suppress(OSError):
                (target / "reason.txt").write_text(f"{reason}\n")

    def _dependents(self, damaged: Iterable[StageKey]) -> dict[StageKey, str]:
        """The stages that were computed from these, directly or through others, each with the reason."""
        origins = {key: f"{stage} {key}" for stage, key in damaged}
        dependents: dict[StageKey, str] = {}
        for stage in _WEIGHTS:
            for key, identity in self.identities(stage):
                inputs = [value for name, value in identity.items() if name in ("control", *_WEIGHTS)]
                if stage == "implant":  # which of them asked for the surrogate is not in their identities
                    inputs.append((self.result(stage, key) or {}).get("surrogate"))
                origin = next((origins[value] for value in inputs if isinstance(value, str) and value in origins), None)
                if origin is not None and key not in origins:
                    origins[key] = origin
                    dependents[stage, key] = f"computed from {origin}, which is damaged"
        return dependents

    def aside(self) -> dict[str, str]:
        """Folders of the stages that were set aside, by name, each with the reason."""
        reasons = {}
        for path in sorted((self.root / "damaged").glob("*")):
            try:
                reasons[path.name] = (path / "reason.txt").read_text(errors="replace").strip()
            except OSError:
                reasons[path.name] = ""
        return reasons

    # Publishing -----------------------------------------------------------------------------------------------

    def finish(
        self,
        stage: str,
        identity: Identity,
        result: dict[str, Any],
        tensors: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Publish a stage by one rename, and forget its failure and its checkpoints."""
        key = key_of(identity)
        temporary_folder = self.root / "unfinished" / uuid.uuid4().hex
        temporary_folder.mkdir(parents=True)
        final = self.folder(stage, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            for name, named in (tensors or {}).items():
                from bench.engine.files import save_tensors

                # Channels-last weights are the same numbers in another order; the format wants one order.
                on_cpu = {k: v.detach().cpu().contiguous().clone() for k, v in named.items()}
                save_tensors(on_cpu, temporary_folder / f"{name}.safetensors")
            _write(temporary_folder / "config.json", _dumped(identity).encode())
            files = {path.name: (path.stat().st_size, _sha256(path)) for path in sorted(temporary_folder.iterdir())}
            _write(temporary_folder / RECORD, _sealed(result, files))  # last: no file may be newer than the record
            if reason := self.damage(stage, key):
                self.set_aside({(stage, key): reason})
            os.rename(temporary_folder, final)
        except BaseException as error:
            shutil.rmtree(temporary_folder, ignore_errors=True)
            if not isinstance(error, OSError) or not self.is_finished(stage, key):
                raise
            return  # somebody was faster, with the same figures
        # The stage is published. What fails from here on is not its failure.
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {stage} {key} {result.get('seconds', 0):.1f}s {os.getpid()}\n"
        try:
            with (self.root / "history.log").open("a") as log:
                log.write(line)
        except OSError as error:
            self._warn("history.log", f"{stage} {key} is finished, and history.log cannot say so: {error}")
        try:
            self._failure(stage, key).unlink(missing_ok=True)
            if (work := self.work(stage, key)).exists():
                shutil.rmtree(work)
        except OSError as error:
            self._warn(f"{stage}-{key}", f"{stage} {key} is finished; what it no longer needs stays: {error}")

    def keys(self, stage: str) -> set[str]:
        """Keys of the stages of this name that have a folder: all finished ones, and what a power cut left."""
        keys: set[str] = set()
        for folder in (self.root / stage).glob("??"):
            with suppress(OSError):  # a file in the place of a folder
                keys.update(os.listdir(folder))
        return keys

    def identities(self, stage: str) -> Iterator[tuple[str, Identity]]:
        """Key and identity of each stage of this name whose `config.json` is whole: the key is its hash."""
        for folder in sorted((self.root / stage).glob("*/*")):
            try:
                identity = json.loads((folder / "config.json").read_bytes())
                whole = isinstance(identity, dict) and key_of(identity) == folder.name
            except (OSError, ValueError, RecursionError):
                whole = False
            if whole:
                yield folder.name, identity
            elif os.path.lexists(folder):
                self._warn(str(folder), f"{folder}/config.json is not the identity of its stage, and is skipped")

    def sweep(self) -> None:
        """Remove what killed processes left: half-written files a day old, and checkpoints of finished stages."""
        temporary = [*(self.root / "unfinished").glob("*"), *(self.root / "failed").glob("*")]
        checkpoints = self.root.parent / "checkpoints"
        for path in [*temporary, *checkpoints.glob("*/*")]:
            if path.suffix in (".json", ".safetensors"):
                continue
            with suppress(OSError):  # published in this moment, or not ours
                if time.time() - path.stat().st_mtime > DAY_S:
                    _remove(path)
        for path in checkpoints.glob("*-*"):
            stage, _, key = path.name.partition("-")
            if stage in _WEIGHTS and self.is_finished(stage, key):
                with suppress(OSError):
                    _remove(path)

    def work(self, stage: str, key: str) -> Path:
        """Where a running stage keeps its checkpoints."""
        # Beside the store, not in it: a defender is handed this place, and the store holds the trigger.
        return self.root.parent / "checkpoints" / f"{stage}-{key}"

    # What failed ----------------------------------------------------------------------------------------------

    def fail(self, stage: str, key: str, error: str, details: str, *, job: str = "", counts: bool = True) -> None:
        """Keep the reason why a stage failed; the next run tries it again.

        Args:
            job: the Slurm job that it failed in; empty takes this process's.
            counts: is it a try that `dispatch.max_tries` counts? One that a person stopped, or a full disk, is not.
        """
        path = self._failure(stage, key)
        temporary_path = path.with_suffix(f".{uuid.uuid4().hex}")
        record = {
            "error": error,
            "details": details,
            "time": time.time(),
            "tries": self.tries(stage, key) + counts,
            "job": job or lease.slurm_job(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # a file cannot replace it
                shutil.rmtree(path)
            _write(temporary_path, _dumped(record).encode())
            os.replace(temporary_path, path)
        except OSError as full:  # the reason of the reason: a full disk has no room for it either
            with suppress(OSError):
                temporary_path.unlink(missing_ok=True)
            print(f"{stage} {key} failed ({error}), and that could not be kept: {full}", file=sys.stderr)

    def failure(self, stage: str, key: str) -> str | None:
        """One line: why the last try of this stage failed."""
        record = self.failure_record(stage, key)
        return None if record is None else str(record["error"])

    def tries(self, stage: str, key: str) -> int:
        """How often this stage was tried and failed."""
        record = self.failure_record(stage, key)
        return 0 if record is None else int(record["tries"])

    def failure_record(self, stage: str, key: str) -> dict[str, Any] | None:
        """All that is known of the last failure: error, details (a traceback), time, tries, job."""
        path = f"{self.root}/failed/{stage}-{key}.json"
        try:
            with open(path, "rb") as file:
                record = json.load(file)
            types = {"error": str, "details": str, "time": int | float, "tries": int, "job": str}
            record = {"details": "", "time": 0.0, "tries": 1, "job": "", **record}
            if not all(isinstance(record.get(name), kind) for name, kind in types.items()):
                raise ValueError("its entries are others")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._warn(path, f"{path} is not the record of a failure, and is skipped: {error}")
            return None
        return dict(record)

    def _failure(self, stage: str, key: str) -> Path:
        return self.root / "failed" / f"{stage}-{key}.json"

    def _lock(self, stage: str, key: str) -> Path:
        return self.root / "locks" / f"{stage}-{key}"

    @contextmanager
    def lock(self, stage: str, key: str) -> Iterator[bool]:
        """True if this process may compute the stage now. A killed process loses its lock: storage/lease.py."""
        path = lease.take(self._lock(stage, key))
        if path is None:
            yield False
            return
        try:
            yield True
        finally:
            # Who takes the lock of a finished stage finds it finished: nobody needs it any more.
            lease.release(path, forget=self.is_finished(stage, key))

    def claim(self, stage: str, key: str) -> lease.Claim | None:
        """Who computes this stage, or did so last; None if it was never begun, or is finished."""
        return lease.read(self._lock(stage, key))

    def claims(self) -> dict[tuple[str, str], lease.Claim]:
        """The locks that were taken and not given back: of living processes, and of those that died with them."""
        claim_of = {}
        for path in (self.root / "locks").glob("*-*"):
            stage, _, key = path.name.partition("-")
            claim = lease.read(path)
            if claim is not None and not claim.released:
                claim_of[stage, key] = claim
        return claim_of


def _dumped(value: Any) -> str:
    # NaN is not JSON, and no figure: a measure that has no value is None.
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False)


def _sealed(result: dict[str, Any], files: Mapping[str, tuple[int, str]]) -> bytes:
    """A record: the result, then the checksums of the other files, then the digest of all of that."""
    entries = _dumped(result)[:-1].rstrip() + ("," if result else "")
    body = entries.encode() + _FILES + json.dumps(files).encode()
    return body + _DIGEST + hashlib.sha256(body).hexdigest().encode() + b'"\n}'


def _listed_files(text: bytes) -> dict[str, tuple[int, str]] | None:
    """What a record says of the other files, without parsing the rest; None if an earlier version wrote it.

    Raises:
        ValueError: the record is damaged.
    """
    body, _, digest = text.rpartition(_DIGEST)
    if digest == hashlib.sha256(body).hexdigest().encode() + b'"\n}':
        listed: dict[str, tuple[int, str]] = json.loads(body[body.rindex(_FILES) + len(_FILES) :])
        return listed
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("is not JSON") from error
    if not isinstance(entries, dict) or "files" in entries or "sha256" in entries:
        raise ValueError("has changed since it was written")
    kinds = {"status": str, "seconds": int | float, "peak_memory_mib": int | float, "images": int, "provenance": dict}
    if not all(isinstance(entries.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("is not the record of a stage")
    if not {"commit", "clean"} <= entries["provenance"].keys():
        raise ValueError("does not say which code made it")
    return None


def _sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: bytes) -> None:
    with path.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
