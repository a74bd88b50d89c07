"""What a grid will take: cells and stages, hours, disk, the critical path, and how many should run at once.

    python -m bench.plan [grid=NAME] [key=value ...]     the same settings as bench.run; computes nothing
    python -m bench.plan ... --width=64                  and how long it takes with 64 at once
    python -m bench.plan ... --assume=implant:600,defend:60,inspect:5,evaluate:10
                                                         seconds of the stages that nothing was measured for
    python -m bench.plan ... --job-seconds=12            what a Slurm job takes before its first trial

A stage's seconds and bytes are the medians of finished ones in the store, of the most similar kind that was measured:
the same cell at another seed; else the same method on the same data set and architecture, whatever its settings; else
anything there; else the method elsewhere; else the stage. The plan says how much rests on which.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from bench.door import Plan, duration, enter, plan

if TYPE_CHECKING:
    from bench.dispatch import Task
    from bench.grid import Trial
    from bench.store import Store

Kind = tuple[str, ...]
Place = tuple[str, str]
SAMPLE = 25  # finished stages of one kind that are looked at
NAMES = {"implant": "infected models", "twin": "clean twins", "defend": "repairs", "inspect": "inspections"}
NAMES |= {"evaluate": "evaluations"}
# How alike the stages are that an estimate rests on.
ALIKE = ("the same cell", "the same method there", "others there", "elsewhere")
ASSUMED, UNKNOWN = "assumed", "nothing"


def main(arguments: list[str]) -> int:
    options = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
    width, job_seconds, assumed = _read(options)
    opened = plan([argument for argument in arguments if not argument.startswith("--")], dry=True)
    from bench.dispatch import pending

    tasks = pending(opened.own, opened.store, opened.cfg.dispatch.max_tries)
    summary(opened, tasks)
    estimate = estimated(opened.own, opened.store, assumed)
    _print_costs(estimate)
    if tasks:
        packed = opened.cfg.dispatch.trials_per_job if opened.cfg.dispatch.kind == "slurm" else 1
        _print_time(opened, jobs_of(tasks, estimate, job_seconds / packed), width)
    return 0


def _read(options: dict[str, str]) -> tuple[int | None, float, dict[str, float]]:
    """The options that are not settings of the grid."""
    from bench.config import UserError

    try:
        width = int(options.pop("width")) if "width" in options else None
        job_seconds = float(options.pop("job-seconds", 0))
        pairs = [part.partition(":") for part in options.pop("assume", "").split(",") if part]
        assumed = {stage: float(seconds) for stage, _, seconds in pairs}
        numbers = [job_seconds, *assumed.values(), 1 if width is None else width - 1]
        if options or not set(assumed) <= set(NAMES) or not all(0 <= number < math.inf for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(
            "options are --width=N, --job-seconds=S and --assume=STAGE:S,...; N is at least 1, S are seconds, and "
            f"STAGE is one of {', '.join(NAMES)}"
        ) from None
    return width, job_seconds, assumed


def summary(opened: Plan, tasks: list[Task]) -> None:
    """What there is, and what is to be computed, in a few lines."""
    from bench.dispatch import IMPLANT, Task
    from bench.store import STAGES

    trials = opened.trials
    applicable = [trial for trial in trials if trial.defend]
    there = sum(
        trial.keys()[2] in opened.published or Task(trial, STAGES).is_finished(opened.store) for trial in applicable
    )
    print(opened.title)
    for name, how in opened.missing.items():
        print(f"planned by the published size of {name}, and without what is stored of it: {how}")
    print(f"trials: {len(trials)}, of them {there} finished, {len(trials) - len(applicable)} not applicable")
    own = {trial.keys()[0] for trial in applicable}
    implants = [task.trial.keys()[0] for task in tasks if task.stages == IMPLANT]
    infected = sum(key in own for key in implants)
    twins = len(implants) - infected
    beside = f", {twins} clean twins to measure them by" if twins else ""
    repairs = f"{len(tasks) - len(implants)} repairs with their measures{beside}"
    print(f"to compute: {infected} infected models, {repairs}")


# What stages cost ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a stage takes; one for all stages that are alike.

    Attributes:
        name: what the stage is called, a key of NAMES.
        seconds, size: None where nothing is known; bytes.
        basis: what that rests on: one of ALIKE, ASSUMED, UNKNOWN.
        subject: data set, architecture and method.
    """

    name: str
    seconds: float | None
    size: float | None
    basis: str
    subject: str


@dataclass
class Estimate:
    """What the stages of a grid take.

    Attributes:
        costs: of each stage that is not finished.
        finished: how many are, by their names.
        devices: what those ran on that the costs rest on.
    """

    costs: dict[Place, Cost]
    finished: Counter[str]
    devices: Counter[str]

    def seconds(self, places: Iterable[Place]) -> float:
        """Of these stages together, as far as they are known and not finished."""
        return sum(self.costs[place].seconds or 0.0 for place in places if place in self.costs)


def estimated(trials: list[Trial], store: Store, assumed: dict[str, float] | None = None) -> Estimate:
    """Seconds and bytes of every stage of these trials that is not finished.

    Args:
        assumed: seconds by the stage's name where nothing was measured.
    """
    measured, finished = _Measured(store), Counter[str]()
    there: set[Place] = set()
    todo: dict[Place, tuple[str, tuple[Kind, ...]]] = {}
    once: dict[tuple[str, ...], tuple[str, tuple[Kind, ...]]] = {}
    for trial in trials:
        for place in trial.places():
            if place in todo or place in there:
                continue
            own = place[0] != "implant" or place[1] == trial.keys()[0]
            names = (place[0] if own else "twin", trial.dataset, trial.model, trial.attack if own else "none")
            cell = (*names, trial.defense, trial.setting, trial.variant)
            if cell not in once:
                # A row of the grid may be named for the settings of a defense.
                method = trial.defend["defense"]["name"]
                once[cell] = names[0], (cell, *_kinds(place[0], *names[1:], method))
            if store.is_finished(*place):
                there.add(place)
                finished[names[0]] += 1
                measured.add(place, once[cell][1])
            else:
                todo[place] = once[cell]
    if any(kinds[1] not in measured.seconds for _, kinds in set(todo.values())):
        measured.add_others(there)
    costs = {
        (name, kinds): _cost(name, kinds, measured, (assumed or {}).get(name)) for name, kinds in set(todo.values())
    }
    return Estimate({place: costs[alike] for place, alike in todo.items()}, finished, measured.devices)


def _cost(name: str, kinds: tuple[Kind, ...], measured: _Measured, assumed: float | None) -> Cost:
    subject = " ".join(kinds[1][2:])
    for level, kind in enumerate(kinds):
        if kind in measured.seconds:
            seconds, size = median(measured.seconds[kind]), median(measured.size[kind])
            return Cost(name, seconds, size, ALIKE[min(level, len(ALIKE) - 1)], subject)
    return Cost(name, assumed, None, UNKNOWN if assumed is None else ASSUMED, subject)


def _kinds(stage: str, dataset: str, model: str, attack: str, defense: str) -> list[Kind]:
    """What a stage is like, the most similar first: three levels, and then the stage itself."""
    there = (stage, "there", dataset, model)
    if stage == "implant":
        return [(*there, attack), there, (stage, attack), (stage,)]
    if stage == "defend":
        return [(*there, defense), there, (stage, defense), (stage,)]
    return [there, there, (stage,), (stage,)]


class _Measured:
    """Seconds and bytes of finished stages by what they are like; a sample of each kind is read, not all."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seconds: dict[Kind, list[float]] = defaultdict(list)
        self.size: dict[Kind, list[int]] = defaultdict(list)
        self.devices: Counter[str] = Counter()

    def add(self, place: Place, kinds: Sequence[Kind], cells: int = 1) -> None:
        """Note one finished stage, unless enough of its kind are noted; the first `cells` kinds are of its own cell."""
        if len(self.seconds.get(kinds[0], ())) >= SAMPLE:
            return
        result = self.store.result(*place)
        if result is None:
            return
        size = sum(entry.stat().st_size for entry in os.scandir(self.store.folder(*place)))
        # What came to nothing tells about its own cell only.
        for kind in dict.fromkeys(kinds if result["status"] == "done" else kinds[:cells]):
            self.seconds[kind].append(result["seconds"])
            self.size[kind].append(size)
        self.devices[result.get("provenance", {}).get("device", "?")] += 1

    def add_others(self, known: set[Place]) -> None:
        """Note what other grids left in the store."""
        implants: dict[str, tuple[str, str, str]] = {}
        defends: dict[str, tuple[str, str]] = {}
        for stage in ("implant", "defend", "inspect", "evaluate"):
            for key, identity in self.store.identities(stage):
                try:
                    if stage == "implant":
                        names = [identity["dataset"]["name"], identity["model"]["name"], identity["attack"]["name"]]
                        implants[key] = (names[0], names[1], names[2])
                        defense, implant = "", key
                    elif stage == "defend":
                        defense, implant = identity["defense"]["name"], identity["implant"]
                        defends[key] = (defense, implant)
                    elif stage == "inspect":
                        defense, implant = "", identity["implant"]
                    else:
                        defense, implant = defends[identity["defend"]]
                    kinds = _kinds(stage, *implants[implant], defense)
                except KeyError:  # what it belongs to was removed
                    continue
                if (stage, key) not in known:
                    self.add((stage, key), kinds, cells=0)


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
    seen: set[Place] = set()
    for task in tasks:
        repair = bool(task.needs)
        places = [place for place in task.trial.places() if place[0] != "implant"] if repair else [task.place]
        fresh = [place for place in places if place not in seen]
        seen.update(fresh)
        needs = tuple(index[key] for key in task.needs if key in index)
        if not repair:
            index[task.place[1]] = len(jobs)
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


# What is printed -----------------------------------------------------------------------------------------------------


def _print_costs(estimate: Estimate) -> None:
    """Stages and hours, what they rest on, and disk."""
    costs = Counter(estimate.costs.values())
    print(f"\n{'stage':<16} {'there':>9} {'to compute':>11} {'hours':>10} {'GB':>9}")
    for name, title in NAMES.items():
        mine = {cost: count for cost, count in costs.items() if cost.name == name}
        if not mine and not estimate.finished[name]:
            continue
        hours = _sum((cost.seconds, count) for cost, count in mine.items())
        size = _sum((cost.size, count) for cost, count in mine.items())
        print(
            f"{title:<16} {estimate.finished[name]:>9,} {sum(mine.values()):>11,} "
            f"{'?' if hours is None else f'{hours / 3600:.2f}':>10} {'?' if size is None else f'{size / 1e9:.2f}':>9}"
        )
    if not costs:
        return
    basis: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for cost, count in costs.items():
        basis[cost.basis] += count
        if cost.basis == UNKNOWN:
            unknown[f"{NAMES[cost.name]} of {cost.subject}"] += count
    print(
        "by what was measured on: "
        + ", ".join(f"{text} {basis[text]:,}" for text in (*ALIKE, ASSUMED, UNKNOWN) if basis[text])
    )
    if estimate.devices:
        print("with " + ", ".join(f"{name} ({count:,})" for name, count in estimate.devices.most_common()))
    if unknown:
        shown = "; ".join(name for name, _ in unknown.most_common(4)) + ("; ..." if len(unknown) > 4 else "")
        print(f"nothing is known of {sum(unknown.values()):,} stages, which count as 0 s ({shown})")
        print("compute one seed of the like first, or write --assume=" + ",".join(f"{name}:SECONDS" for name in NAMES))


def _sum(parts: Iterable[tuple[float | None, int]]) -> float | None:
    """The sum of value times count over what is known; None if nothing of something is."""
    listed = list(parts)
    known = [value * count for value, count in listed if value is not None]
    return sum(known) if known or not listed else None


def _print_time(opened: Plan, jobs: list[Job], width: int | None) -> None:
    """The critical path, and how long it takes with so many at once."""
    work, path = sum(job.seconds for job in jobs), critical_path(jobs)
    longest = sum(job.seconds for job in path)
    if not longest:
        return
    unit = "GPU" if opened.device.type == "cuda" else "core"
    print(f"\nwork: {work / 3600:.2f} {unit} hours")
    print(f"critical path: {duration(longest)}: {', then '.join(job.title for job in path)}")
    # With fewer than this, each one more shortens it in proportion; with more, the longest chain is what is waited for.
    suggested = max(1, min(math.ceil(work / longest), len(jobs)))
    for at_once in sorted({max(1, suggested // 4), suggested, 2 * suggested, *([width] if width else [])}):
        spent = simulated(jobs, at_once)
        mark = " (suggested)" if at_once == suggested else ""
        print(f"{at_once:>7,} at once: {duration(spent)}, {work / (spent * at_once):.0%} busy{mark}")
    dispatch = opened.cfg.dispatch
    if dispatch.kind == "slurm":
        share = dispatch.trials_per_gpu * max(1, dispatch.slurm.gpus)
        print(f"for that: dispatch.slurm.array_parallelism={math.ceil(suggested / share)}")


if __name__ == "__main__":
    enter(main, __doc__)
