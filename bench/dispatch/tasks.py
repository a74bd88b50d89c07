"""What is still to be computed, each stage once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bench.experiment.trial import Trial
from bench.storage.store import STAGES, StageKey, Store

IMPLANT, REPAIR = STAGES[:1], STAGES[1:]


@dataclass(frozen=True)
class Task:
    """Some stages of one trial; `title` is for people."""

    trial: Trial
    stages: tuple[str, ...]

    @property
    def stage_key(self) -> StageKey:
        """Its last stage and that one's key: no two tasks have the same."""
        return self.stages[-1], self.trial.keys[STAGES.index(self.stages[-1])]

    def is_finished(self, store: Store) -> bool:
        """Are all of its stages there? An earlier one can be gone: folders of the store may be deleted."""
        keys = zip(STAGES, self.trial.keys, strict=True)
        return all(store.is_finished(stage, key) for stage, key in keys if stage in self.stages)

    @property
    def needs(self) -> tuple[str, ...]:
        """The keys of the models that must be there before it starts."""
        return () if self.stages == IMPLANT else self.trial.implants()

    @property
    def title(self) -> str:
        trial = self.trial
        if self.stages == IMPLANT:
            return f"{trial.dataset}/{trial.model}/{trial.attack}/{trial.seed}: implant"
        return trial.title


@dataclass
class Progress:
    """What a display shows.

    Attributes:
        waits: for each stage that a process of another driver computes, while nothing else is to do: which, and whose.
    """

    total: int
    done: int = 0
    failed: int = 0
    waiting: int = 0
    running: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    seconds_left: float | None = None


def pending(trials: list[Trial], store: Store, max_tries: int | None = None) -> list[Task]:
    """What is still to be computed, each stage once: infected models and clean controls, then what is done to them.

    Args:
        max_tries: a stage that failed so often is left alone, and with a model all that needs it.
    """
    implants: dict[str, Task | None] = {}
    repairs: dict[str, Task] = {}
    lost: set[str] = set()

    @functools.cache
    def is_there(implant: str) -> bool:
        return store.is_finished("implant", implant)

    def hopeless(stage: str, key: str) -> bool:
        return max_tries is not None and store.tries(stage, key) >= max_tries

    for trial in trials:
        _, defend, evaluate = trial.keys
        repair = Task(trial, REPAIR)
        if not evaluate or evaluate in repairs:
            continue
        if repair.is_finished(store) and is_there(trial.keys.implant):
            continue
        needed = trial.implants()
        for index, key in enumerate(needed):
            if key not in implants:
                implants[key] = None if is_there(key) else Task(trial.control_trial() if index else trial, IMPLANT)
                if not is_there(key) and hopeless("implant", key):
                    lost.add(key)
        if lost.isdisjoint(needed) and not hopeless("defend", defend) and not hopeless("evaluate", evaluate):
            repairs[evaluate] = repair
    wanted = {key for task in repairs.values() for key in task.needs}
    return [*(task for key, task in implants.items() if task and key in wanted), *repairs.values()]
