"""A store full of finished cells that nobody computed, to measure what the harness itself costs at scale.

    python results/scale.py SETTINGS...     the settings of bench.run; needs results=DIR, a folder of its own
    python results/scale.py --leaderboard SETTINGS...     the leaderboard as MLflow gives it, and the seconds it took

Every stage of the grid is written through the store as a worker would write it, with made-up figures and curves and a
tensor of a few bytes for weights. Never mix it with results that mean anything.
"""

from __future__ import annotations

import random
import sys
import time

import torch

from bench.door import enter, plan
from bench.reporting.columns import MEASURES


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
