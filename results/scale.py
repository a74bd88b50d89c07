"""A store full of finished cells that nobody computed, to measure what the harness itself costs at scale.

    python results/scale.py SETTINGS...     the settings of bench.run; needs results=DIR, a folder of its own
    python results/scale.py --leaderboard SETTINGS...     the leaderboard as MLflow gives it, and the seconds it took

    python results/scale.py --overhead      what a cell takes beside imports, training, defense and measures

Every stage of the grid is written through the store as a worker would write it, with made-up figures and curves and a
tensor of a few bytes for weights. Never mix it with results that mean anything.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch

from bench.door import enter, plan
from bench.reporting.columns import MEASURES


def overhead(cells: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a cell outside of training, defense and measures, a model of its own for each."""
    import tempfile
    from contextlib import ExitStack
    from functools import wraps
    from typing import Any
    from unittest.mock import patch

    from bench import dispatch, pipeline
    from bench.config import load_methods
    from bench.door import plan
    from defenses.base import defense

    inside = [0.0, 0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timing(*arguments: Any, **named: Any) -> Any:
            before = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                inside[0] += time.perf_counter() - before[0]
                inside[1] += time.process_time() - before[1]

        return timing

    def run(folder: str, seeds: list[int]) -> None:
        settings = ["grid.attacks=[badnets]", "grid.defenses=[no_defense]", "train.updates=1", f"grid.seeds={seeds}"]
        opened = plan([*settings, f"results={folder}", f"dataset.cache={folder}/cache"])
        tasks = dispatch.pending(opened.trials, opened.store)
        before[:] = time.perf_counter(), time.process_time()
        inside[:] = 0.0, 0.0
        options: dict[str, Any] = {"workers": 0, "threads": 1, "checkpoint_s": 60.0, "plugins": []}
        dispatch.run(tasks, opened.store, opened.infos, device=opened.device, show=lambda _: None, **options)

    before = [0.0, 0.0]
    load_methods([])
    places: list[tuple[Any, str]] = [(pipeline, "fit"), (pipeline, "predict"), (pipeline.evaluation, "measured")]
    places += [(pipeline.evaluation, "inspected"), (defense["no_defense"], "defend")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        run(folder, [cells])  # what is loaded once
        run(folder, list(range(cells)))
        ended = time.perf_counter(), time.process_time()
    return (ended[0] - before[0] - inside[0]) / cells, (ended[1] - before[1] - inside[1]) / cells


def leaderboard(arguments: list[str]) -> int:
    began = time.perf_counter(), time.process_time()
    from bench import tracking
    from bench.door import show
    from bench.reporting.table import boards

    opened = plan(arguments)
    planned = time.perf_counter(), time.process_time()
    trials = tracking.read(opened.tracking_uri, str(opened.cfg.grid.name), opened.trials)
    read = time.perf_counter(), time.process_time()
    show(boards(trials, []))
    ended = time.perf_counter(), time.process_time()
    print(f"{len(trials)} trials from {opened.tracking_uri}; seconds and CPU seconds:")
    for name, first, last in (("plan", began, planned), ("read", planned, read), ("table", read, ended)):
        print(f"{name:<6} {last[0] - first[0]:6.1f} {last[1] - first[1]:6.1f}")
    return 0


def main(arguments: list[str]) -> int:
    if "--overhead" in arguments:
        wall, cpu = overhead(10)
        print(f"the harness adds to a cell: {wall:.2f} s, {cpu:.2f} s of them computing (mean of 10 cells on digits)")
        return 0
    if "--leaderboard" in arguments:
        return leaderboard([argument for argument in arguments if argument != "--leaderboard"])
    opened = plan(arguments)
    if not any(argument.startswith("results=") for argument in arguments):
        sys.exit("write results=DIR, a folder that holds no results")
    seen: set[tuple[str, str]] = set()
    weights = {"model": {"weight": torch.zeros(10)}}
    for trial in opened.trials:
        for stage, key in trial.places():
            if (stage, key) in seen:
                continue
            seen.add((stage, key))
            draw = random.Random(key)
            result = {
                "status": "done",
                "seconds": draw.uniform(1, 9),
                "peak_memory_mib": 100.0,
                "images": 1000,
                "curves": {name: [(step, draw.random()) for step in range(30)] for name in (f"{stage}/loss", "lr")},
                "provenance": {"commit": "0" * 40, "clean": True, "device": "none", "torch": "0", "python": "0"},
            }
            if stage == "evaluate":
                result["figures"] = {
                    column.name: draw.random() for column in MEASURES if not column.name.startswith(("relearn", "reac"))
                }
                result["figures"]["clean_accuracy"] = 0.9 + draw.random() / 20
            identity = trial.control if key != trial.keys()[0] and stage == "implant" else getattr(trial, stage)
            opened.store.finish(stage, identity, result, weights if stage in ("implant", "defend") else None)
    print(f"{len(opened.trials)} trials, {len(seen)} stages in {opened.store.root}")
    return 0


if __name__ == "__main__":
    enter(main, __doc__ or "")
