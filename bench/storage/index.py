"""What was read of finished stages, kept in one file, so that thousands of records need not be read again.

The index is never the record. An entry counts only while the files of its stage have the sizes and time stamps that it
was made with; a stage without such an entry is read from its folder, and noted. The file can be deleted at any time.
Each line has a digest of its own: what is torn or damaged is skipped. Nothing that is loaded is a pickle.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.storage.store import RECORD, Damaged, Store, brief_of

VERSION = 1


BLOCK = 2000  # stages in one line: a file in one line would be in memory several times while it is read


SPARE = 20  # lines beyond those that the stages need, after which the file is written anew


RECENT = 1024  # whole results that are kept: many trials share an infected model


class Index:
    """Briefs of the finished stages of a store, by stage and key.

    A line of the file has some of them: a digest, a blank, and JSON. Of a stage that was noted twice, the last counts.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "index.jsonl"
        self._lines = 0
        self._fresh: list[str] = []
        self._shared: dict[str, Any] = {}

    @functools.cached_property
    def _entries(self) -> dict[str, tuple[tuple[str, ...], str, dict[str, Any]]]:
        """Names of the other files, signature and brief of each stage."""
        entries: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {}
        try:
            with self.path.open("rb") as file:
                for line in filter(None, map(bytes.strip, file)):
                    self._lines += 1
                    digest, _, text = line.partition(b" ")
                    if digest != _digest(text):
                        continue
                    block = json.loads(text)
                    if block["version"] != VERSION:
                        continue
                    files = [self._once(tuple(names)) for names in block["names"]]
                    origins = [self._once(origin) for origin in block["origins"]]
                    for stage_key, (names, signature, origin, brief) in block["stages"].items():
                        brief["provenance"] = origins[origin]
                        entries[stage_key] = (files[names], signature, brief)
        except OSError:
            pass
        return entries

    def _once(self, value: Any) -> Any:
        """The first of the values that are equal: most stages were computed by few programs."""
        return self._shared.setdefault(json.dumps(value, sort_keys=True), value)

    def find(self, stage: str, key: str) -> dict[str, Any] | None:
        """The brief of a stage whose files are as they were when it was noted."""
        entry = self._entries.get(f"{stage}/{key}")
        if entry is None:
            return None
        names, signature, brief = entry
        return brief if signature == self._signature(stage, key, names) else None

    def note(self, stage: str, key: str, names: tuple[str, ...], brief: dict[str, Any]) -> None:
        """Keep the brief of a stage that was found complete.

        Args:
            names: of its other files.
        """
        if signature := self._signature(stage, key, names):
            brief["provenance"] = self._once(brief["provenance"])
            self._entries[f"{stage}/{key}"] = (self._once(names), signature, brief)
            self._fresh.append(f"{stage}/{key}")

    def keep(self) -> None:
        """Write what was noted; a store that cannot be written to does without."""
        if not self._fresh:
            return
        anew = self._lines > SPARE + len(self._entries) // BLOCK
        places = list(self._entries if anew else dict.fromkeys(self._fresh))
        lines = [self._line(places[start : start + BLOCK]) for start in range(0, len(places), BLOCK)]
        try:
            if anew:
                temporary = self.root / "unfinished" / uuid.uuid4().hex
                temporary.parent.mkdir(exist_ok=True)
                try:
                    temporary.write_bytes(b"".join(lines))
                    os.replace(temporary, self.path)
                finally:
                    temporary.unlink(missing_ok=True)
            else:
                with self.path.open("ab") as file:
                    file.write(b"\n" + b"".join(lines))  # what was torn before ends here
        except OSError:
            return
        self._lines = len(lines) + (0 if anew else self._lines)
        self._fresh = []

    def _line(self, places: list[str]) -> bytes:
        names: dict[tuple[str, ...], int] = {}
        origins: dict[int, tuple[int, Any]] = {}  # by the object: equal ones are one
        stages = {}
        for stage_key in places:
            files, signature, brief = self._entries[stage_key]
            origin = brief["provenance"]
            number, _ = origins.setdefault(id(origin), (len(origins), origin))
            rest = {name: value for name, value in brief.items() if name != "provenance"}
            stages[stage_key] = [names.setdefault(files, len(names)), signature, number, rest]
        block = {
            "version": VERSION,
            "names": list(names),
            "origins": [origin for _, origin in origins.values()],
            "stages": stages,
        }
        text = json.dumps(block, separators=(",", ":"), allow_nan=False).encode()
        return _digest(text) + b" " + text + b"\n"

    def _signature(self, stage: str, key: str, names: tuple[str, ...]) -> str:
        """Sizes and times of the files of a stage; empty if one is missing."""
        folder = f"{self.root}/{stage}/{key[:2]}/{key}/"
        try:
            status = os.stat(folder + RECORD)
            # The time of the last change of the record's inode: a program that alters bytes may put the other one back.
            signature = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            for name in names:
                status = os.stat(folder + name)
                signature += f" {status.st_size} {status.st_mtime_ns}"
        except OSError:
            return ""
        return signature


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


class CachedStore(Store):
    """A store that is read once, and whose finished stages are looked up in its index.

    For whoever asks for all stages of a grid: what was found finished stays so, until something is set aside here.
    """

    def __init__(self, store: Store, index: Index | None = None) -> None:
        super().__init__(store.root)
        self._verified, self._warned = store._verified, store._warned
        self.index = index or Index(store.root)
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        recent: Callable[[str, str], dict[str, Any] | None] = functools.lru_cache(RECENT)(super().result)
        self.result = recent  # type: ignore[method-assign, assignment]

    def _finished(self, stage: str, key: str) -> dict[str, Any] | None:
        """The brief of a complete stage; None also for one that an earlier version wrote, without checksums."""
        if (brief := self._known.get((stage, key))) is not None:
            return brief
        brief = self.index.find(stage, key)
        if brief is None:
            with suppress(Damaged):
                record = self._check(stage, key)
                if record is not None and record.files is not None:
                    brief = brief_of(record.result())
                    self.index.note(stage, key, tuple(record.files), brief)
        if brief is not None:
            self._known[stage, key] = brief
        return brief

    def set_aside(self, damaged: Mapping[tuple[str, str], str]) -> None:
        super().set_aside(damaged)
        if damaged:
            self._known.clear()

    def brief(self, stage: str, key: str) -> dict[str, Any] | None:
        return self._finished(stage, key) or super().brief(stage, key)

    def is_finished(self, stage: str, key: str) -> bool:
        return self._finished(stage, key) is not None or super().is_finished(stage, key)

    def damage(self, stage: str, key: str, *, thorough: bool = False) -> str | None:
        if not thorough and self._finished(stage, key) is not None:
            return None
        return super().damage(stage, key, thorough=thorough)

    def _defect(self, stage: str, key: str) -> str | None:
        return None if self._finished(stage, key) is not None else super()._defect(stage, key)
