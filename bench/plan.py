"""What a grid will take: cells and stages, hours, disk, the critical path, and how many should run at once.

    python -m bench.plan [grid=NAME] [key=value ...]     the same settings as bench.run; computes nothing
    python -m bench.plan ... --width=64                  and how long it takes with 64 at once
    python -m bench.plan ... --assume=implant:600,defend:60,inspect:5,evaluate:10
                                                         seconds of the stages that were not measured on their data
                                                         set and architecture
    python -m bench.plan ... --job-seconds=12            what a Slurm job takes before its first trial

A stage's seconds and bytes are the medians of finished ones in the store, of the most similar kind that was measured:
the same cell at another seed; else the same method on the same data set and architecture, whatever its settings; else
what --assume says; else anything there; else the method elsewhere; else the stage. What was measured otherwise counts
times the ratio of the work: FLOPs of a pass, images and epochs (or updates, where a method counts them). The plan says
how much rests on which. A stage with a costly measure (AutoAttack, relearn, ...) is like none without it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from bench._command import duration, open_experiment, print_plan, run_command
from bench.dispatch.costs import (
    ALIKE,
    ASSUMED,
    NAMES,
    UNKNOWN,
    Estimate,
    Job,
    critical_path,
    estimated,
    jobs_of,
    simulated,
)
from bench.experiment.experiment import Experiment

NAMES |= {"evaluate": "evaluations"}


def main(arguments: list[str]) -> int:
    options = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
    width, job_seconds, assumed = _read(options)
    experiment = open_experiment([argument for argument in arguments if not argument.startswith("--")], dry=True)
    from bench.dispatch.tasks import pending
    from bench.storage.index import CachedStore

    store = CachedStore(experiment.store)
    tasks = pending(experiment.own, store, experiment.cfg.dispatch.max_tries)
    print_plan(experiment, tasks, store)
    estimate = estimated(experiment, assumed, store)
    store.index.keep()
    _print_costs(estimate)
    if tasks:
        packed = experiment.cfg.dispatch.trials_per_job if experiment.cfg.dispatch.kind == "slurm" else 1
        _print_time(experiment, jobs_of(tasks, estimate, job_seconds / packed), width)
    return 0


def _read(options: dict[str, str]) -> tuple[int | None, float, dict[str, float]]:
    """The options that are not settings of the grid."""
    from bench.engine.errors import UserError

    try:
        width = int(options.pop("width")) if "width" in options else None
        job_seconds = float(options.pop("job-seconds", 0))
        pairs = [pair.partition(":") for pair in options.pop("assume", "").split(",") if pair]
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
    ratios: dict[str, list[float]] = defaultdict(list)
    for cost, count in costs.items():
        basis[cost.basis] += count
        ratios[cost.basis].append(cost.ratio)
        if cost.basis == UNKNOWN:
            unknown[f"{NAMES[cost.name]} of {cost.subject}"] += count
    texts = [text for text in (*ALIKE, ASSUMED, UNKNOWN) if basis[text]]
    print("by what was measured on: " + ", ".join(f"{text} {basis[text]:,}{_range(ratios[text])}" for text in texts))
    if any(_range(measured) for measured in ratios.values()):
        print("x: the work of a stage to that of the measured one, by FLOPs of a pass, images and epochs or updates")
    for name, count in estimate.unsized.items():
        print(f"left out: {count:,} stages measured on {name}, which is not known here (dataset.cache, plugins)")
    if estimate.devices:
        print("with " + ", ".join(f"{name} ({count:,})" for name, count in estimate.devices.most_common()))
    if unknown:
        shown = "; ".join(name for name, _ in unknown.most_common(4)) + ("; ..." if len(unknown) > 4 else "")
        print(f"nothing is known of {sum(unknown.values()):,} stages, which count as 0 s ({shown})")
        print("compute one seed of the like first, or write --assume=" + ",".join(f"{name}:SECONDS" for name in NAMES))


def _range(ratios: list[float]) -> str:
    """From the least to the largest, unless all are 1."""
    least, most = f"{min(ratios):.3g}", f"{max(ratios):.3g}"
    if least == most:
        return "" if least == "1" else f" (x {least})"
    return f" (x {least} to {most})"


def _sum(parts: Iterable[tuple[float | None, int]]) -> float | None:
    """The sum of value times count over what is known; None if nothing of something is."""
    listed = list(parts)
    known = [value * count for value, count in listed if value is not None]
    return sum(known) if known or not listed else None


def _print_time(experiment: Experiment, jobs: list[Job], width: int | None) -> None:
    """The critical path, and how long it takes with so many at once."""
    work, path = sum(job.seconds for job in jobs), critical_path(jobs)
    longest = sum(job.seconds for job in path)
    if not longest:
        return
    unit = "GPU" if experiment.device.type == "cuda" else "core"
    print(f"\nwork: {work / 3600:.2f} {unit} hours")
    print(f"critical path: {duration(longest)}: {', then '.join(job.title for job in path)}")
    # With fewer than this, each one more shortens it in proportion; with more, the longest chain is what is waited for.
    suggested = max(1, min(math.ceil(work / longest), len(jobs)))
    for at_once in sorted({max(1, suggested // 4), suggested, 2 * suggested, *([width] if width else [])}):
        spent = simulated(jobs, at_once)
        mark = " (suggested)" if at_once == suggested else ""
        print(f"{at_once:>7,} at once: {duration(spent)}, {work / (spent * at_once):.0%} busy{mark}")
    dispatch = experiment.cfg.dispatch
    if dispatch.kind == "slurm":
        share = dispatch.trials_per_gpu * max(1, dispatch.slurm.gpus)
        print(f"for that: dispatch.slurm.array_parallelism={math.ceil(suggested / share)}")


if __name__ == "__main__":
    run_command(main, __doc__)
