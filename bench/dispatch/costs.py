"""What the stages of a grid take, from those that are measured."""

from __future__ import annotations

import heapq
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.experiment.experiment import Experiment

if TYPE_CHECKING:
    from bench.dispatch.tasks import Task
    from bench.engine.datasets import DatasetInfo
    from bench.engine.models import ModelSpec
    from bench.storage.store import Identity, StageKey, Store


Kind = tuple[str, ...]


SAMPLE = 25  # finished stages of one kind that are looked at


NAMES = {"implant": "infected models", "clean_control": "clean controls", "defend": "repairs", "inspect": "inspections"}


# How alike the stages are that an estimate rests on.
ALIKE = ("the same cell", "the same method there", "others there", "elsewhere")


METHOD = 2  # levels of these at which the method itself was measured, on this data set and architecture


# Options of a measurement that cost a multiple of the rest.
COSTLY = ("autoattack_images", "relearn", "reactivate", "connection")


ASSUMED, UNKNOWN = "assumed", "nothing"


# What stages cost ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """How much a stage computes, for its ratio to another of its kind.

    Attributes:
        network: without its normalisation, which costs nothing.
        images: a number proportional to the images that go through it, epochs counted; among stages of one method.
        trainset: images in the training set: among methods, which count their epochs each in a way of its own.
        method: the name of a defense; empty for stages of which all do the same.
    """

    network: ModelSpec
    images: float
    trainset: int
    method: str = ""

    def ratio(self, measured: Work) -> float:
        """Of the floating-point operations, to those of another stage."""
        alike = self.method == measured.method
        ratio = self.images / measured.images if alike else self.trainset / measured.trainset
        return ratio if self.network == measured.network else ratio * _flops(self.network) / _flops(measured.network)

    def ratio_of_weights(self, measured: Work) -> float:
        same = self.network == measured.network
        return 1.0 if same else _weights(self.network) / _weights(measured.network)


@cache
def _flops(network: ModelSpec) -> int:
    return network.flops()


@cache
def _weights(network: ModelSpec) -> int:
    import torch

    with torch.device("meta"):
        return sum(weight.numel() for weight in network.build(0).parameters())


@dataclass(frozen=True)
class Size:
    """Shape (C, H, W) and images of each class of a data set."""

    shape: tuple[int, ...]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]


def _work(stage: str, identity: Identity, implant: Identity, size: Size) -> Work:
    """What a stage computes.

    Args:
        identity: of the stage.
        implant: of the infected model that it trains or is about.
    """
    from bench.engine.counts import held_out_of
    from bench.engine.models import ModelSpec

    channels, pixels, _ = size.shape
    plain = (0.0,) * channels
    model = implant["model"]
    spec = ModelSpec(model["name"], len(size.train_counts), channels, pixels, plain, plain, model["stem"])
    trainset = sum(size.train_counts) - sum(held_out_of(implant["held_out"], size.train_counts))
    tests = sum(size.test_counts)
    if stage == "implant":
        images: float = _training(identity["train"], trainset)
    elif stage == "defend":
        images = _repair(identity, trainset, sum(size.train_counts))
    else:
        steps, attacked = identity.get("pgd_steps", 0), identity.get("pgd_images")
        images = 2 * tests + 2 * steps * (tests if attacked is None else min(attacked, tests))
    method = identity["defense"]["name"] if stage == "defend" else ""
    return Work(spec, max(1.0, images), trainset, method)


def _training(recipe: dict[str, Any], images: int) -> float:
    return float(recipe["updates"] * recipe["batch_size"] or recipe["epochs"] * images)


def _repair(identity: Identity, trainset: int, whole: int) -> float:
    """Images that a defense trains on, as far as its settings say: updates, or epochs over what it sees, and rounds."""
    settings = identity["defense"]
    seen = trainset if "train" in identity else identity.get("reserve", {}).get("size", 0.0) * whole
    epochs = sum(_total(value) for name, value in settings.items() if name.endswith("epochs"))
    if settings.get("updates"):
        images = _total(settings["updates"]) * settings.get("batch_size", 1)
    elif epochs:
        images = seen * epochs
    else:
        images = _training(identity["train"], trainset) if "train" in identity else seen
    return float(images * (_total(settings.get("rounds", 1)) or 1))


def _total(value: Any) -> float:
    """A number, or the sum of a list with one for each step."""
    return float(sum(value) if isinstance(value, list | tuple) else value or 0)


@dataclass(frozen=True)
class Cost:
    """What a stage takes; one for all stages that are alike.

    Attributes:
        name: what the stage is called, a key of NAMES.
        seconds, size: None where nothing is known; bytes.
        basis: what that rests on: one of ALIKE, ASSUMED, UNKNOWN.
        subject: data set, architecture and method.
        ratio: of its work to the work that was measured; 1 where nothing was.
    """

    name: str
    seconds: float | None
    size: float | None
    basis: str
    subject: str
    ratio: float = 1.0


@dataclass
class Estimate:
    """What the stages of a grid take.

    Attributes:
        costs: of each stage that is not finished.
        finished: how many are, by their names.
        devices: what those ran on that the costs rest on.
        unsized: finished stages that are left out, by their data sets or architectures, which are not known here.
    """

    costs: dict[StageKey, Cost]
    finished: Counter[str]
    devices: Counter[str]
    unsized: Counter[str]

    def seconds(self, places: Iterable[StageKey]) -> float:
        """Of these stages together, as far as they are known and not finished."""
        return sum(self.costs[stage].seconds or 0.0 for stage in places if stage in self.costs)


def estimated(experiment: Experiment, assumed: dict[str, float] | None = None, store: Store | None = None) -> Estimate:
    """Seconds and bytes of every stage of this grid's own trials that is not finished.

    Args:
        assumed: seconds by the stage's name, for what was not measured on its data set and architecture.
        store: the grid's, or a snapshot of it.
    """
    store = store or experiment.store
    measured, finished = _Measured(store, experiment), Counter[str]()
    finished_stages: set[StageKey] = set()
    todo: dict[StageKey, _Alike] = {}
    once: dict[tuple[str, ...], _Alike] = {}
    for trial in experiment.own:
        identities = dict(zip(trial.stage_keys(), trial.identities(), strict=True))
        for stage, identity in identities.items():
            if stage in todo or stage in finished_stages:
                continue
            is_own = stage[0] != "implant" or stage[1] == trial.keys.implant
            names = (
                stage[0] if is_own else "clean_control",
                trial.dataset,
                trial.model,
                trial.attack if is_own else "none",
            )
            cell = (*names, trial.defense, trial.threat_model, trial.variant)
            if cell not in once:
                # A row of the grid may be named for the settings of a defense.
                method = trial.defend["defense"]["name"]
                kinds = (cell, *_kinds(stage[0], *names[1:], method, _costly(identity)))
                work = _work(stage[0], identity, trial.implant, _size_of(experiment.infos[trial.dataset]))
                once[cell] = _Alike(names[0], kinds, work)
            if store.is_finished(*stage):
                finished_stages.add(stage)
                finished[names[0]] += 1
                measured.add(stage, once[cell].kinds, once[cell].work)
            else:
                todo[stage] = once[cell]
    if any(alike.kinds[1] not in measured.found for alike in set(todo.values())):
        measured.add_others(finished_stages)
    costs = {alike: _cost(alike, measured, (assumed or {}).get(alike.name)) for alike in set(todo.values())}
    return Estimate(
        {stage: costs[alike] for stage, alike in todo.items()}, finished, measured.devices, measured.unsized
    )


@dataclass(frozen=True)
class _Alike:
    """Stages that take the same: their name, what they are like (the most similar first), and their work."""

    name: str
    kinds: tuple[Kind, ...]
    work: Work


def _cost(alike: _Alike, measured: _Measured, assumed: float | None) -> Cost:
    name, kinds, work = alike.name, alike.kinds, alike.work
    subject = " ".join(kinds[1][2:])
    for level, kind in enumerate(kinds):
        if level == METHOD and assumed is not None:
            return Cost(name, assumed, None, ASSUMED, subject)
        if measurements := measured.found.get(kind):
            ratios = [work.ratio(one.work) for one in measurements]
            seconds = median(one.seconds * ratio for one, ratio in zip(measurements, ratios, strict=True))
            stores = kinds[1][0] in ("implant", "defend")
            size = median(one.size * (work.ratio_of_weights(one.work) if stores else 1.0) for one in measurements)
            return Cost(name, seconds, size, ALIKE[min(level, len(ALIKE) - 1)], subject, median(ratios))
    return Cost(name, None, None, UNKNOWN, subject)


def _kinds(stage: str, dataset: str, model: str, attack: str, defense: str, costly: tuple[str, ...]) -> list[Kind]:
    """What a stage is like, the most similar first: three levels, and then the stage itself."""
    of_network = (stage, "there", dataset, model)
    if stage == "implant":
        return [(*of_network, attack), of_network, (stage, attack), (stage,)]
    if stage == "defend":
        return [(*of_network, defense), of_network, (stage, defense), (stage,)]
    # The method does not matter: whatever was measured there was measured for it.
    return [(*of_network, *costly), (*of_network, *costly), (stage, *costly), (stage, *costly)]


def _costly(identity: Identity) -> tuple[str, ...]:
    return tuple(name for name in COSTLY if identity.get(name))


def _size_of(info: DatasetInfo) -> Size:
    return Size(info.shape, info.train_counts, info.test_counts)


@dataclass(frozen=True)
class _Found:
    """A finished stage: its seconds, bytes and work."""

    seconds: float
    size: int
    work: Work


class _Measured:
    """Finished stages by what they are like; a sample of each kind is read, not all."""

    def __init__(self, store: Store, experiment: Experiment) -> None:
        self.store = store
        self.found: dict[Kind, list[_Found]] = {}
        self.devices: Counter[str] = Counter()
        self.unsized: Counter[str] = Counter()
        self.infos, self.cache = experiment.infos, Path(experiment.cfg.dataset.cache)
        self.architectures = {trial.model for trial in experiment.trials}

    def add(self, stage: StageKey, kinds: Sequence[Kind], work: Work, cells: int = 1) -> None:
        """Note one finished stage, unless enough of its kind are noted; the first `cells` kinds are of its own cell."""
        if len(self.found.get(kinds[0], ())) >= SAMPLE:
            return
        result = self.store.brief(*stage)
        if result is None:
            return
        size = sum(entry.stat().st_size for entry in os.scandir(self.store.folder(*stage)))
        # What came to nothing tells about its own cell only.
        for kind in dict.fromkeys(kinds if result["status"] == "done" else kinds[:cells]):
            self.found.setdefault(kind, []).append(_Found(result["seconds"], size, work))
        self.devices[result.get("provenance", {}).get("device", "?")] += 1

    def add_others(self, known: set[StageKey]) -> None:
        """Note what other grids left in the store."""
        implants: dict[str, Identity] = {}
        defends: dict[str, Identity] = {}
        for stage in ("implant", "defend", "inspect", "evaluate"):
            for key, identity in self.store.identities(stage):
                try:
                    if stage == "implant":
                        implants[key], implant, defense = identity, identity, ""
                    elif stage == "evaluate":
                        repair = defends[identity["defend"]]
                        implant, defense = implants[repair["implant"]], repair["defense"]["name"]
                    else:
                        implant = implants[identity["implant"]]
                        defense = identity["defense"]["name"] if stage == "defend" else ""
                    if stage == "defend":
                        defends[key] = identity
                    if (stage, key) in known:
                        continue
                    data, model, attack = (implant[axis]["name"] for axis in ("dataset", "model", "attack"))
                    size = self._size(implant["dataset"])
                    if size is None or not self._is_architecture(model):
                        self.unsized[data if size is None else model] += 1
                        continue
                    kinds = _kinds(stage, data, model, attack, defense, _costly(identity))
                    self.add((stage, key), kinds, _work(stage, identity, implant, size), cells=0)
                except KeyError:  # what it belongs to was removed
                    continue

    def _is_architecture(self, model: str) -> bool:
        """Does timm know this architecture? It does know those of this grid, and importing it takes seconds."""
        if model in self.architectures:
            return True
        import timm

        return bool(timm.is_model(model))

    def _size(self, dataset: Identity) -> Size | None:
        """The size of the data set of a stored stage: this grid's, one in the cache, or the published one."""
        return self._sizes.get(dataset["digest"]) or self._published(dataset["name"])

    @cached_property
    def _sizes(self) -> dict[str, Size]:
        """By digest."""
        from bench.engine.datasets import facts_of

        sizes = {}
        for path in self.cache.glob("*/meta.json"):
            if facts := facts_of(path.parent):
                parts = (tuple(facts[name]) for name in ("shape", "train_counts", "test_counts"))
                sizes[facts["digest"]] = Size(*parts)
        return {**sizes, **{info.digest: _size_of(info) for info in self.infos.values()}}

    def _published(self, name: str) -> Size | None:
        from bench.engine.datasets import as_published

        with suppress(LookupError):
            info = as_published(name)
            return _size_of(info) if info else None
        return None


# How long that takes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something to be done at once by one worker.

    Attributes:
        seconds: that it takes.
        needs: indices of those that must be over before it starts.
    """

    title: str
    seconds: float
    needs: tuple[int, ...] = ()


def jobs_of(tasks: list[Task], estimate: Estimate, job_seconds: float = 0.0) -> list[Job]:
    """The tasks with what they take; the first repair of a model inspects it too.

    Args:
        job_seconds: what is added to each.
    """
    index: dict[str, int] = {}
    jobs: list[Job] = []
    seen: set[StageKey] = set()
    for task in tasks:
        repair = bool(task.needs)
        places = [stage for stage in task.trial.stage_keys() if stage[0] != "implant"] if repair else [task.stage_key]
        fresh = [stage for stage in places if stage not in seen]
        seen.update(fresh)
        needs = tuple(index[key] for key in task.needs if key in index)
        if not repair:
            index[task.stage_key[1]] = len(jobs)
        jobs.append(Job(task.title, estimate.seconds(fresh) + job_seconds, needs))
    return jobs


def critical_path(jobs: list[Job]) -> list[Job]:
    """The longest chain of jobs that must follow each other: no number of workers is faster."""
    longest: list[tuple[float, int]] = []  # until its end, and the one before
    for job in jobs:
        before, last = max(((longest[index][0], index) for index in job.needs), default=(0.0, -1))
        longest.append((before + job.seconds, last))
    chain = []
    at = max(range(len(jobs)), key=lambda index: longest[index][0], default=-1)
    while at >= 0:
        chain.append(jobs[at])
        at = longest[at][1]
    return chain[::-1]


def simulated(jobs: list[Job], width: int) -> float:
    """Seconds until the last job ends if `width` workers take those that are ready, in order."""
    waits = [len(job.needs) for job in jobs]
    unlocks: dict[int, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        for needed in job.needs:
            unlocks[needed].append(index)
    ready = deque(index for index, count in enumerate(waits) if not count)
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < width:
            index = ready.popleft()
            heapq.heappush(running, (now + jobs[index].seconds, index))
        now, ended = heapq.heappop(running)
        for index in unlocks[ended]:
            waits[index] -= 1
            if not waits[index]:
                ready.append(index)
    return now
