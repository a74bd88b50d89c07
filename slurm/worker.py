"""What runs inside a Slurm job: the local dispatcher, on one pack of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.dispatch.tasks import Progress


@dataclass
class Pack:
    """One job. A path and a number are all that travels in submitit's pickle; nothing of ours loads one."""

    folder: str
    index: int
    _ending: bool = field(default=False, repr=False)

    def __call__(self) -> None:
        """Compute what is not finished; a task that fails leaves its reason in the store."""
        # Here and not above: unpickling must be quick, and must not fail where a method's package is missing.
        import torch

        from bench.dispatch.local import run
        from bench.dispatch.tasks import IMPLANT
        from bench.experiment.load import load_methods
        from bench.storage.store import Store
        from slurm.jobs import Batch

        batch = Batch.read(Path(self.folder), self.index)
        settings = batch.settings
        device = torch.device(settings["device"])
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("the job has no GPU that torch can use; dispatch.device=cpu, or ask for another node")
        load_methods(settings["plugins"])
        store = Store(settings["store"])
        tasks = [task for task in batch.packs[0] if not task.is_finished(store)]
        coming = {task.trial.keys.implant for task in tasks if task.stages == IMPLANT}
        ready = []
        for task in tasks:
            if all(key in coming or store.is_finished("implant", key) for key in task.needs):
                ready.append(task)
            else:
                # Slurm counts a dependency on a job that it has forgotten as met, however that one ended.
                print(f"left out: {task.title}: its infected model or its clean control is not there", flush=True)
        self._last: Any = None
        run(
            ready,
            store,
            batch.infos,
            device=device,
            workers=0 if settings["workers"] == 1 else settings["workers"],
            threads=settings["threads"],
            checkpoint_s=settings["checkpoint_s"],
            plugins=settings["plugins"],
            show=self._show,
        )

    def _show(self, progress: Progress) -> None:
        if self._ending:
            raise SystemExit("the time is up, for the last time")
        news = (progress.running, progress.done, progress.failed)
        if news != self._last:
            self._last = news
            running = ", ".join(progress.running) or "nothing"
            print(f"{progress.done}/{progress.total} done, {progress.failed} failed, running {running}", flush=True)

    def checkpoint(self) -> Any:
        """Called by submitit before the time is up, or before a preemption: the same again, from the checkpoints.

        Trainings write theirs at intervals, since many clusters kill without a warning.
        """
        from submitit.helpers import DelayedSubmission

        # If submitit does not requeue, it raises into the task that runs, which thereby fails with the reason. The
        # next task must not start then, with seconds left.
        self._ending = True
        return DelayedSubmission(Pack(self.folder, self.index))


def environment(threads: int) -> list[str]:
    """Shell lines that every job starts with."""
    # OpenMP reads this once, before any of our code runs.
    return [f"export OMP_NUM_THREADS={threads}"]
