"""A store full of finished cells that nobody computed, to measure what the harness itself costs at scale.

    python results/scale.py SETTINGS...     the settings of bench.run; needs results=DIR, a folder of its own
    python results/scale.py --leaderboard SETTINGS...     the leaderboard as MLflow gives it, and the seconds it took
    python results/scale.py --page LEADERBOARD.html     how long sorts of a page take in Chromium (make test-browser)

Every stage of the grid is written through the store as a worker would write it, with made-up figures and curves and a
tensor of a few bytes for weights. Never mix it with results that mean anything.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch

from bench._command import run_command
from bench.experiment.experiment import load_experiment
from bench.reporting.columns import MEASURES


def leaderboard(arguments: list[str]) -> int:
    began = time.perf_counter(), time.process_time()
    from bench._command import show
    from bench.reporting import mlflow
    from bench.reporting.board import boards

    experiment = load_experiment(arguments)
    planned = time.perf_counter(), time.process_time()
    trials = mlflow.read(experiment.tracking_uri, str(experiment.cfg.grid.name), experiment.trials)
    read = time.perf_counter(), time.process_time()
    show(boards(trials, []))
    ended = time.perf_counter(), time.process_time()
    print(f"{len(trials)} trials from {experiment.tracking_uri}; seconds and CPU seconds:")
    for name, first, last in (("plan", began, planned), ("read", planned, read), ("table", read, ended)):
        print(f"{name:<6} {last[0] - first[0]:6.1f} {last[1] - first[1]:6.1f}")
    return 0


def page(file: str) -> int:
    from playwright.sync_api import sync_playwright

    click = """(column) => {
        const began = performance.now()
        document.querySelectorAll("#board [data-sort]")[column].click()
        document.body.offsetHeight  // laid out
        return performance.now() - began
    }"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for view in ("defenses", "cells"):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(f"file://{Path(file).resolve()}#view={view}")
            spent = sorted(tab.evaluate(click, column) for _ in range(9) for column in (0, 2, 3))
            print(f"{view}: {len(spent)} sorts in {spent[0]:.0f} to {spent[-1]:.0f} ms, median {median(spent):.0f}")
        browser.close()
    return 0


def main(arguments: list[str]) -> int:
    if "--page" in arguments:
        return page(arguments[-1])
    if "--leaderboard" in arguments:
        return leaderboard([argument for argument in arguments if argument != "--leaderboard"])
    experiment = load_experiment(arguments)
    if not any(argument.startswith("results=") for argument in arguments):
        sys.exit("write results=DIR, a folder that holds no results")
    seen: set[tuple[str, str]] = set()
    weights = {"model": {"weight": torch.zeros(10)}}
    files = {"implant": {**weights, "trigger": {"weight": torch.zeros(10)}}, "defend": weights}
    for trial in experiment.trials:
        for stage, key in trial.stage_keys():
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
            if stage == "implant":
                result["weights"] = f"{draw.getrandbits(80):020x}"
            if stage == "evaluate":
                result["figures"] = {
                    column.name: draw.random() for column in MEASURES if not column.name.startswith(("relearn", "reac"))
                }
                result["figures"]["clean_accuracy"] = 0.9 + draw.random() / 20
            identity = (
                trial.clean_control if key != trial.keys.implant and stage == "implant" else getattr(trial, stage)
            )
            experiment.store.finish(stage, identity, result, files.get(stage))
    print(f"{len(experiment.trials)} trials, {len(seen)} stages in {experiment.store.root}")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__ or "")
