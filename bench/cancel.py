"""End the Slurm jobs of a grid, running and waiting; what is finished stays, and bench.run goes on from there.

python -m bench.cancel [grid=NAME] [key=value ...]     the same settings as bench.run

A bench.run that is at work on the grid submits no more of it, and ends.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bench._command import open_experiment, run_command


def main(arguments: list[str]) -> int:
    experiment = open_experiment(arguments)
    from bench.engine.errors import UserError
    from slurm import jobs

    root = Path(experiment.cfg.results) / "slurm"
    if shutil.which("scancel") is None or not root.is_dir():
        raise UserError(f"no Slurm job was submitted from {experiment.cfg.results}/; a local run is stopped by Ctrl-C")
    try:
        # First: a driver that sees its jobs ended has more to submit.
        jobs.call_off(root, {key for trial in experiment.trials for _, key in trial.stage_keys()})
        elements = jobs.of_grid(root, experiment.trials)
        jobs.cancel(element.job for element in elements)
    except jobs.QueueError as error:
        raise UserError(f"Slurm does not answer: {error}") from error
    running = sum(element.state == "RUNNING" for element in elements)
    print(f"{experiment.title}: {running} running and {len(elements) - running} waiting jobs cancelled")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
