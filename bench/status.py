"""How far a grid is: trials by state, what runs now, and why others failed.

python -m bench.status [grid=NAME] [key=value ...]     the same settings as bench.run
"""

from __future__ import annotations

from collections import Counter

from bench.door import enter, plan


def main(arguments: list[str]) -> int:
    opened = plan(arguments)
    from bench.reporting.table import STATES, trial_row
    from bench.store import STAGES

    rows = [trial_row(trial, opened.store) for trial in opened.trials]
    counts = Counter(row["status"] for row in rows)
    print(opened.title)
    print(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "no trial")
    stages = {
        (stage, key): f"{trial.title}: {stage}"
        for trial in opened.trials
        for stage, key in zip(STAGES, trial.keys(), strict=True)
        if key
    }
    running = [title for place, title in stages.items() if opened.store.is_running(*place)]
    for title in running:
        print(f"running: {title}")
    reasons = Counter((row["status"], row["reason"]) for row in rows if row["status"] in ("failed", "diverged"))
    for (state, reason), count in reasons.most_common():
        print(f"{state} ({count}): {reason}")
    return 0


if __name__ == "__main__":
    enter(main, __doc__)
