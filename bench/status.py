"""How far a grid is: trials by state, what runs and where, what failed and why, and the time that is left.

python -m bench.status [grid=NAME] [key=value ...]     the same settings as bench.run
python -m bench.status ... --watch                     again every ten seconds, until nothing is left to do or a
                                                       minute has passed in which nothing ran or waited
python -m bench.status ... --verify                    also read every file of the grid's finished stages, and compare
                                                       it with the checksum in its record
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from bench._command import duration, open_experiment, run_command
from bench.experiment.experiment import Experiment

if TYPE_CHECKING:
    from bench.experiment.trial import Trial
    from slurm.jobs import Element

WATCH_S = 10.0
STILL = 6  # looks at which nothing runs: between two stages, or when a job has begun and says nothing yet


def main(arguments: list[str]) -> int:
    experiment = open_experiment([argument for argument in arguments if argument not in ("--watch", "--verify")])
    still = 0
    while True:
        left, active = _show(experiment, "--verify" in arguments)
        still = 0 if active else still + 1
        if not left or still > STILL or "--watch" not in arguments:
            break
        time.sleep(WATCH_S)
        print(f"\n{time.strftime('%H:%M:%S')}")
    return 0


def _show(experiment: Experiment, thorough: bool = False) -> tuple[bool, bool]:
    """Print one report; is anything left to do, and does anything run or wait for it?

    Args:
        thorough: read every file of the finished stages.
    """
    from bench.dispatch.costs import estimated
    from bench.reporting.cells import groups_of
    from bench.reporting.trials import STATES, of_trials
    from bench.storage.index import CachedStore
    from slurm import jobs

    store, root = CachedStore(experiment.store), Path(experiment.cfg.results) / "slurm"
    # As the leaderboard has them: which model is wrecked is seen beside the undefended one.
    table = of_trials(experiment.trials, store, experiment.reused)
    counts = Counter(table.status)
    titles: dict[tuple[str, str], str] = {}
    for trial in experiment.trials:
        for place in trial.stage_keys():
            titles.setdefault(place, _title(trial, *place))
    claims = {place: claim for place, claim in store.claims().items() if place in titles}
    running = {place: claim for place, claim in claims.items() if claim.alive}
    alive = _jobs(experiment, root)
    going = {element.job for element in alive}
    queued = [element for element in alive if element.state == "PENDING"]

    print(experiment.title)
    states = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    states += [f"{len(running)} stages running"] if running else []
    states += [f"{len(queued)} jobs waiting in the queue"] if queued else []
    print(", ".join(states) or "no trial")
    estimate = estimated(experiment, store=store)
    left = estimate.seconds(estimate.costs) / max(1, len(running))
    if left:
        print(f"about {duration(left)} left, at {max(1, len(running))} at once")
    for reason, count in Counter(element.reason for element in queued).most_common():
        print(f"waiting ({count} jobs): {reason}")
    for (stage, key), claim in running.items():
        owner = claim.owner
        where = f"{owner.host} {owner.pid}" if owner else "?"
        since = duration(time.time() - owner.since) if owner else "?"
        print(f"running: {titles[stage, key]}: {stage}, {since}, {_job(owner.job) if owner else ''}{where}")
        if owner and owner.job and (line := jobs.last_line(jobs.find_log(root, owner.job))):
            print(f"    {line}")
    for place in claims.keys() - running.keys():
        owner = claims[place].owner
        if owner and owner.job in going:
            continue  # requeued: it goes on by itself
        print(f"lost: {titles[place]}: {place[0]}, {_job(owner.job) if owner else ''}its process died; run it again")
    for place, title in titles.items():
        record = None if store.is_finished(*place) else store.failure_record(*place)
        if record is None:
            continue
        tries = record.get("tries", 1)
        job = _job(record.get("job", ""))
        print(f"failed: {title}: {record['error']} ({job}{tries} {'tries' if tries != 1 else 'try'})")
        if job and (line := jobs.last_line(jobs.find_log(root, record["job"]))):
            print(f"    {line}")
    damaged = False
    for place, title in titles.items():
        if defect := store.damage(*place, thorough=thorough):
            damaged = True
            print(f"damaged: {title}: {place[0]} {place[1]}: {defect}; bench.run computes it again")
    store.index.keep()
    if aside := store.aside():
        print(f"{len(aside)} damaged stages were moved to {store.root / 'damaged'}/, which you can delete")
    for state in ("diverged", "wrecked"):
        for (defense, attack), lost in groups_of(table[table.status == state], ["defense", "attack"]):
            print(f"{state} ({len(lost)} trials): {defense} against {attack}: {lost.reason.iloc[0]}")
    return damaged or counts["missing"] + counts["failed"] > 0, bool(running or alive)


def _job(job: str) -> str:
    return f"job {job}, " if job else ""


def _jobs(experiment: Experiment, root: Path) -> list[Element]:
    """Jobs of this grid that wait or run."""
    from slurm import jobs

    if shutil.which("squeue") is None or not root.is_dir():
        return []
    try:
        return jobs.of_grid(root, experiment.trials)
    except jobs.QueueError as error:
        print(f"warning: Slurm does not answer: {error}")
        return []


def _title(trial: Trial, stage: str, key: str) -> str:
    if stage in ("defend", "evaluate"):
        return trial.title
    shown = trial.control_trial() if stage == "implant" and key != trial.keys.implant else trial
    return f"{shown.dataset}/{shown.model}/{shown.attack}/{shown.seed}"


if __name__ == "__main__":
    run_command(main, __doc__)
