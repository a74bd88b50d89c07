"""Slurm dispatch: job arrays through submitit, and a driver that may die at any moment.

The driver looks at the store and at the queue, submits what is in neither, and looks again. It remembers nothing that
the next driver would need: running the same command again attaches to the jobs that are there, and two drivers at once
share the work. An infected model's repairs are submitted with it and wait in the queue, each for its own model.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from submitit import AutoExecutor, SlurmExecutor

from bench.dispatch.tasks import IMPLANT, Progress, Task
from bench.engine.datasets import DatasetInfo
from bench.engine.errors import UserError
from bench.engine.registry import did_you_mean
from bench.storage import lease
from bench.storage.store import STAGES, StageKey, Store
from slurm import jobs
from slurm.jobs import Batch, Element, QueueError
from slurm.worker import Pack, environment

# A job can vanish without a fault of its task (preempted, or killed while it computed another): so often in one run.
RESUBMITS = 3


def check(dispatch: DictConfig, dry: bool = False) -> None:
    """Refuse wrong parameters before anything is computed.

    Args:
        dry: nothing will be submitted, so that Slurm's programs need not be here.

    Raises:
        UserError: Slurm is not there, or it or submitit has no such parameter (the message lists those it has), or the
            dispatcher sets the parameter itself.
    """
    missing = [name for name in ("sbatch", "squeue", "scancel", "srun") if shutil.which(name) is None]
    if missing and not dry:
        raise UserError(f"dispatch=slurm needs {', '.join(missing)} on PATH: log in to the cluster, or dispatch=local")
    ask = dispatch.slurm
    options = _sbatch_options()
    for key in ask.additional:
        option = _option(key)
        if options and option not in options:
            raise UserError(
                f"dispatch.slurm.additional.{key}: sbatch has no --{option}.{did_you_mean(option, options)} "
                f"Known: {', '.join(options)}."
            )
        _refuse_ours(f"dispatch.slurm.additional.{key}", [p for p in PARAMETERS if p.option == option])
    for key in ask.submitit:
        option = _option(str(key).removeprefix("slurm_"))
        owned = [p for p in PARAMETERS if key == p.submitit or option == p.option]
        _refuse_ours(f"dispatch.slurm.submitit.{key}", owned)
    for group in ("additional", "submitit"):
        for key in ask[group]:
            if _option(str(key).removeprefix("slurm_")).startswith("mem-per-") and ask.memory_gb is not None:
                raise UserError(
                    f"dispatch.slurm.{group}.{key}: sbatch refuses it beside --mem; write dispatch.slurm.memory_gb=null"
                )
    with tempfile.TemporaryDirectory() as folder:
        _executor(dispatch, Path(folder), "check", "", workers=1)


@cache
def _sbatch_options() -> list[str]:
    """The long options of this cluster's sbatch; empty if its help cannot be read."""
    with suppress(QueueError):
        return sorted(set(re.findall(r"--([a-z][a-z-]+)", jobs.slurm("sbatch", "--help"))))
    return []


def _option(key: Any) -> str:
    """A key as sbatch spells it; submitit writes dashes for underscores."""
    return str(key).replace("_", "-")


class Parameter(NamedTuple):
    """One thing that the dispatcher asks for.

    Attributes:
        option: of sbatch, without the dashes; empty where it is none.
        submitit: what submitit calls it; empty where it sets the option by itself or has no such parameter.
        setting: ours, under `dispatch.slurm`; empty where it is no one's to choose.
    """

    option: str
    submitit: str = ""
    setting: str = ""


PARAMETERS = (
    Parameter("time", "timeout_min", "timeout_min"),
    Parameter("mem", "mem_gb", "memory_gb"),
    Parameter("cpus-per-task", "cpus_per_task", "cpus"),
    Parameter("gpus-per-node", "gpus_per_node", "gpus"),
    Parameter("partition", "slurm_partition", "partition"),
    Parameter("account", "slurm_account", "account"),
    Parameter("qos", "slurm_qos", "qos"),
    Parameter("constraint", "slurm_constraint", "constraint"),
    Parameter("signal", "slurm_signal_delay_s", "signal_delay_s"),
    Parameter("", "slurm_array_parallelism", "array_parallelism"),
    Parameter("", "slurm_setup", "setup"),
    Parameter("", "slurm_python", "python"),
    Parameter("", "slurm_max_num_timeout", "max_timeouts"),
    Parameter("", "slurm_additional_parameters", "additional"),
    # A driver finds its jobs by their name, number and index, and their logs by submitit's file names.
    Parameter("job-name", "name"),
    Parameter("array"),
    Parameter("dependency", "slurm_dependency"),
    Parameter("nodes", "nodes"),
    Parameter("ntasks-per-node", "tasks_per_node"),
    Parameter("ntasks"),
    Parameter("output"),
    Parameter("error", "stderr_to_stdout"),
    Parameter("open-mode"),
    Parameter("", "slurm_stderr_to_stdout"),
    # submitit reads the job's number from what sbatch prints, and squeue asks this cluster alone.
    *map(Parameter, ("clusters", "cluster", "parsable", "quiet", "test-only", "wait", "wrap")),
)


def _refuse_ours(key: str, owned: list[Parameter]) -> None:
    if owned:
        advice = f"write dispatch.slurm.{owned[0].setting} instead" if owned[0].setting else "leave it out"
        raise UserError(f"{key} is set by the dispatcher; {advice}")


class _Unchecked(SlurmExecutor):
    """An executor that is made also where there is no Slurm: a job can be shown there."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(dispatch: DictConfig, folder: Path, name: str, dependency: str, workers: int) -> Any:
    """submitit's executor for one array.

    Raises:
        UserError: a parameter is wrong; submitit's own message, which lists the valid ones.
    """
    ask: dict[str, Any] = OmegaConf.to_container(dispatch.slurm, resolve=True)  # type: ignore[assignment]
    ask["cpus"] = ask["cpus"] or dispatch.threads * workers
    ask["gpus"] = ask["gpus"] or None
    ask["setup"] = [*environment(dispatch.threads), *ask["setup"]]
    # A job whose infected model will never come must not wait for ever.
    ask["additional"] = {"requeue": True, "kill-on-invalid-dep": "yes", **ask["additional"]}
    values = {parameter.submitit: ask[parameter.setting] for parameter in PARAMETERS if parameter.setting}
    # Made as `debug`, since `slurm` asks for srun at once.
    executor = AutoExecutor(folder, cluster="debug")
    executor.cluster, executor._executor = "slurm", _Unchecked(folder, values.pop("slurm_max_num_timeout"))
    executor._executor.python = values.pop("slurm_python") or executor._executor.python
    try:
        executor.update_parameters(
            name=name,
            stderr_to_stdout=True,
            slurm_dependency=dependency or None,
            **values,
            **ask["submitit"],
        )
    except (NameError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"dispatch.slurm.submitit: {' '.join(str(error).split())}") from error
    return executor


def _workers(dispatch: DictConfig) -> int:
    """Trials that one job computes at once."""
    return int(dispatch.trials_per_gpu * max(1, dispatch.slurm.gpus))


def _packs(tasks: list[Task], dispatch: DictConfig) -> list[list[Task]]:
    """The tasks of each job."""
    size = dispatch.trials_per_job * _workers(dispatch)
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def run(
    tasks: list[Task],
    store: Store,
    infos: dict[str, DatasetInfo],
    *,
    device: torch.device,
    dispatch: DictConfig,
    plugins: list[str],
    root: Path,
    show: Callable[[Progress], None],
) -> None:
    """Have all tasks computed by Slurm jobs; a failed one is kept in the store and stops nobody else.

    Args:
        root: folder of the batches, beside the store.
        show: called at each look at the queue.

    Raises:
        UserError: Slurm refuses the first jobs.
    """
    if tasks:
        _Driver(tasks, store, infos, device, dispatch, plugins, root.resolve(), show).drive()


def rehearsed(
    tasks: list[Task],
    store: Store,
    infos: dict[str, DatasetInfo],
    *,
    device: torch.device,
    dispatch: DictConfig,
    plugins: list[str],
    root: Path,
) -> list[str]:
    """The scripts that sbatch would be given first if nothing were in the queue, in order; nothing is submitted.

    Dependencies name an array by its place in this list, from 1; the name of a batch, which is made when it is
    submitted, is BATCH.
    """
    driver = _Rehearsal(tasks, store, infos, device, dispatch, plugins, root.resolve(), lambda progress: None)
    driver._submit(tasks)
    return driver.scripts


class _Driver:
    """One look after another, until every task is done or has failed."""

    def __init__(
        self,
        tasks: list[Task],
        store: Store,
        infos: dict[str, DatasetInfo],
        device: torch.device,
        dispatch: DictConfig,
        plugins: list[str],
        root: Path,
        show: Callable[[Progress], None],
    ) -> None:
        self.store, self.dispatch, self.root, self.show = store, dispatch, root, show
        self.left = {task.stage_key: task for task in tasks}
        self.workers = _workers(dispatch)
        self.settings = {
            "store": str(store.root.resolve()),
            "infos": {name: info.to_json() for name, info in infos.items()},
            "device": device.type,
            "threads": dispatch.threads,
            "workers": self.workers,
            "checkpoint_s": dispatch.checkpoint_s,
            "plugins": plugins,
        }
        self.progress = Progress(total=len(tasks))
        self.batches: dict[str, Batch] = {}
        self.elements: dict[str, Element] = {}  # by job: those that were alive when we last looked
        self.ended: list[Element] = []  # and since then ended
        self.holder: dict[StageKey, Element] = {}  # the living job that has a task
        self.lost: Counter[StageKey] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.silent = False
        self.buried = False
        self.earlier = frozenset(jobs.called_off(root))

    def drive(self) -> None:
        while True:
            try:
                self._look()
            except QueueError as error:
                # Nothing is known of the jobs then, and a guess would submit them twice.
                if not self.silent:
                    print(f"warning: Slurm does not answer, and is asked again ({error})", file=sys.stderr, flush=True)
                self.silent = True
            self._report()
            if not self.left:
                return
            time.sleep(self.dispatch.poll_s)

    def _look(self) -> None:
        """See what became of the jobs, and submit what is in no job."""
        with self.store.lock("driver", "slurm") as acquired:
            # Within the lock: another driver's jobs are in the queue before we read it.
            queued = {element.job: element for element in jobs.queue(self.root)}
            self.silent = False
            self.ended += [
                queued.get(job, element) for job, element in self.elements.items() if not _alive(queued, job)
            ]
            self.elements = {job: element for job, element in queued.items() if element.is_alive}
            self.holder = {}
            for element in self.elements.values():
                for task in self._pack(element):
                    self.holder[task.stage_key] = element
            self._collect()
            if not acquired:
                return  # another driver is at this very point: what it submits we find in the queue
            if not self.buried:
                self._bury()
                self.buried = True
            for element in self.ended:
                self._judge(element)
            self.ended = []
            for keys in jobs.called_off(self.root, self.earlier).values():
                for task in [task for stage, task in self.left.items() if stage[1] in keys]:
                    if task.stage_key in self.left and task.stage_key not in self.holder:
                        self._failed(task)
            self._submit([task for stage, task in self.left.items() if stage not in self.holder])

    def _pack(self, element: Element) -> list[Task]:
        if element.batch not in self.batches:
            self.batches[element.batch] = Batch.read(self.root / element.batch)
        return self.batches[element.batch].packs[element.index]

    # What became of the tasks ---------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Note what is finished, of the jobs that run or have just ended."""
        for element in [*self.elements.values(), *self.ended]:
            if element.state == "PENDING":
                continue
            for task in self._pack(element):
                if task.stage_key in self.left and task.is_finished(self.store):
                    self._done(task)
        # Done without a job: by a local run on the same store, or by one that came and went between two looks.
        # Thousands may be left, and a file server lists folders much faster than it answers for each.
        stored = {stage: self.store.keys(stage) for stage in (STAGES[0], STAGES[-1])}
        for place, task in list(self.left.items()):
            listed = place[1] in stored[place[0]] and place not in self.holder
            if listed and task.is_finished(self.store):
                self._done(task)

    def _done(self, task: Task) -> None:
        del self.left[task.stage_key]
        self.progress.done += 1
        for stage, key in zip(STAGES, task.trial.keys, strict=True):
            result = self.store.result(stage, key) if stage in task.stages else None
            if result:
                self.seconds[stage].append(result["seconds"])

    def _failed(self, task: Task) -> None:
        """A task that has failed in this run; with an infected model or a clean control, all that needs it."""
        del self.left[task.stage_key]
        self.progress.failed += 1
        if task.stages == IMPLANT:
            implant = task.trial.keys.implant
            for stage, other in list(self.left.items()):
                if implant in other.needs and stage not in self.holder:
                    del self.left[stage]
                    self.progress.failed += 1

    def _judge(self, element: Element) -> None:
        """A job has ended: keep the reason for each task of it that is not finished, or submit it again."""
        unfinished = [task for task in self._pack(element) if task.stage_key in self.left]
        unfinished = [task for task in unfinished if task.stage_key not in self.holder]
        if not unfinished:
            return
        failed = [task for task in unfinished if self._failed_in(task, element.job)]
        for task in failed:
            self._failed(task)
        rest = []
        for task in unfinished:
            if task.stage_key not in self.left or task in failed:
                continue
            missing = [("implant", key) for key in task.needs if not self.store.is_finished("implant", key)]
            if not missing:
                rest.append(task)
            elif any(stage not in self.left for stage in missing):
                self._failed(task)  # its infected model or clean control has failed, and says why
            # Else that is on its way again, and this is submitted with it.
        if not rest:
            return
        state = element.state if not element.is_alive else jobs.ended_as(element.job)
        if state == "CANCELLED" and "Dependency" in element.reason:
            return  # its infected model's job died; the model is there all the same
        held = {stage for stage, claim in self.store.claims().items() if claim.owner and claim.owner.job == element.job}
        blamed = [task for task in rest if held & set(_stages(task))]
        if state in ("CANCELLED", "COMPLETED") or (not blamed and not failed and state != "PREEMPTED"):
            blamed = rest
        for task in rest:
            self.lost[task.stage_key] += 1
            if task not in blamed and self.lost[task.stage_key] <= RESUBMITS:
                continue
            # The last line says that it was killed, and the one before why.
            last = jobs.last_line(jobs.log_of(self.root, element.batch, element.job), 2)
            where = f" on {element.node}" if element.node else ""
            self._keep(task, held, element.job, f"job {element.job}{where} ended as {state}: {last}", state)
            self._failed(task)

    def _keep(self, task: Task, held: Iterable[StageKey], job: str, reason: str, state: str) -> None:
        places = _stages(task)
        open_ = [stage_key for stage_key in places if not self.store.is_finished(*stage_key)]
        stage, key = next((stage_key for stage_key in open_ if stage_key in set(held)), open_[0])
        # Who cancels a job knows why; that is no try.
        counts = state not in ("CANCELLED", "PREEMPTED")
        self.store.fail(stage, key, f"{stage}: {' '.join(reason.split())}", "", job=job, counts=counts)

    def _failed_in(self, task: Task, job: str) -> bool:
        records = [self.store.failure_record(*stage) for stage in _stages(task)]
        return any(record is not None and record.get("job") == job for record in records)

    def _bury(self) -> None:
        """Keep the reasons of the jobs that died while no driver was there to see it."""
        wanted = {place for task in self.left.values() for place in _stages(task)}
        for (stage, key), claim in self.store.claims().items():
            job = claim.owner.job if claim.owner else ""
            if claim.alive or not job or (stage, key) not in wanted or job in self.elements:
                continue
            state = jobs.ended_as(job)
            if state in jobs.ENDED - {"COMPLETED", "CANCELLED", "PREEMPTED"}:
                last = jobs.last_line(jobs.find_log(self.root, job), 2)
                self.store.fail(stage, key, f"{stage}: job {job} ended as {state}: {last}", "", job=job)
            lease.release(claim.path, forget=False)

    # What is submitted ----------------------------------------------------------------------------------------

    def _submit(self, tasks: list[Task]) -> None:
        """Put these tasks into arrays, as many as the queue has room for."""
        room = self.dispatch.max_jobs - len(self.elements)
        implants = [task for task in tasks if task.stages == IMPLANT]
        coming = {task.trial.keys.implant for task in implants}
        repairs_of: dict[str, list[Task]] = defaultdict(list)
        ready: list[Task] = []
        attached: dict[str, list[Task]] = defaultdict(list)
        controls: set[str] = set()
        for task in tasks:
            if task.stages == IMPLANT:
                continue
            implant, *control = task.needs
            controls.update(control)
            if any(key not in coming and self._is_lost(key) for key in task.needs):
                self._failed(task)
            elif implant in coming:
                repairs_of[implant].append(task)
            elif ("implant", implant) in self.holder:
                attached[self.holder["implant", implant].job.partition("_")[0]].append(task)
            else:
                ready.append(task)
        # Clean controls first, in arrays of their own: what is submitted behind them waits for all of an array.
        for wanted in (True, False):
            group = [task for task in implants if (task.trial.keys.implant in controls) is wanted]
            families = []
            for pack in _packs(group, self.dispatch):
                repairs = _packs(
                    [task for first in pack for task in repairs_of[first.trial.keys.implant]], self.dispatch
                )
                families.append((pack, repairs))
            room = self._families(families, room)
        for job, waiting in attached.items():
            # Slurm lets it start however its model's job ends: the job looks whether the model is there.
            room = self._arrays(_packs(waiting, self.dispatch), f"afterany:{job}", room)
        self._arrays(_packs(ready, self.dispatch), "", room)

    def _families(self, families: list[tuple[list[Task], list[list[Task]]]], room: int) -> int:
        """Submit packs of models, each with the packs of its repairs behind it; gives the room that is left."""
        # Those with most repairs first, so that each further array is a prefix of the models' array.
        families = sorted(families, key=lambda family: -len(family[1]))
        while room > 0 and families:
            chunk: list[tuple[list[Task], list[list[Task]]]] = []
            while families and room > 0 and len(chunk) < _max_array():
                first, repairs = families.pop(0)
                chunk.append((first, repairs[: room - 1]))
                room -= 1 + len(chunk[-1][1])
            parent = self._sbatch([first for first, _ in chunk], "")
            if parent is None:
                return 0
            for wave in range(max(len(repairs) for _, repairs in chunk)):
                packs = [repairs[wave] for _, repairs in chunk if len(repairs) > wave]
                if len(packs) > 1:
                    after = f"aftercorr:{parent}"
                else:
                    after = f"afterok:{parent}" + ("_0" if len(chunk) > 1 else "")
                if self._sbatch(packs, after) is None:
                    return 0
        return room

    def _is_lost(self, implant: str) -> bool:
        """Is this model neither there nor in any job?"""
        return ("implant", implant) not in self.holder and not self.store.is_finished("implant", implant)

    def _arrays(self, packs: list[list[Task]], after: str, room: int) -> int:
        packs = packs[: max(0, room)]
        for start in range(0, len(packs), _max_array()):
            if self._sbatch(packs[start : start + _max_array()], after) is None:
                return 0
        return room - len(packs)

    def _sbatch(self, packs: list[list[Task]], after: str) -> str | None:
        """Submit one array; gives its job's number, or None if Slurm has no room for it now.

        Raises:
            QueueError: Slurm does not answer.
            UserError: it refuses, and nothing of ours is in its queue that could make room.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        # What waits for a clean control starts however that one's job ends, and looks whether it is there.
        controls = {("implant", key) for pack in packs for task in pack for key in task.needs[1:]}
        jobs_of_controls = {self.holder[stage].job.partition("_")[0] for stage in controls & self.holder.keys()}
        after = ",".join(filter(None, [after, *(f"afterany:{job}" for job in sorted(jobs_of_controls))]))
        batch = Batch.new(self.root, self.settings, packs)
        name = f"{jobs.PREFIX}{batch.folder.name}"
        executor = _executor(self.dispatch, batch.folder / "log", name, after, self.workers)
        try:
            with executor.batch():
                made = [executor.submit(Pack(str(batch.folder), index)) for index in range(len(packs))]
        except (FailedJobError, FailedSubmissionError) as error:
            shutil.rmtree(batch.folder, ignore_errors=True)
            lines = [line for line in str(error).splitlines() if "sbatch:" in line or "rror" in line]
            reason = " ".join(" ".join(lines[-3:] or [str(error)]).split())
            if _is_away(reason):
                raise QueueError(reason) from error  # the controller is away: that is no refusal
            if not self.elements:
                raise UserError(f"Slurm refuses the job: {reason}") from error
            print(f"warning: Slurm takes no more jobs now: {reason}", file=sys.stderr, flush=True)
            return None
        self.batches[batch.folder.name] = batch
        for index, job in enumerate(made):
            element = Element(job.job_id, "PENDING", batch.folder.name, index)
            self.elements[element.job] = element
            for task in packs[index]:
                self.holder[task.stage_key] = element
        return made[0].job_id.partition("_")[0]

    def _report(self) -> None:
        running = [element for element in self.elements.values() if element.state == "RUNNING"]
        progress = self.progress
        titles = []
        for element in running:
            first = next((task for task in self._pack(element) if task.stage_key in self.left), None)
            if first:
                titles.append(first.title)
        progress.running = tuple(titles)
        progress.waiting = len(self.left) - len(titles)
        every = [value for values in self.seconds.values() for value in values]
        if every and running:
            mean = {stage: sum(values) / len(values) for stage, values in self.seconds.items()}
            usual = sum(every) / len(every)
            todo = sum(mean.get(stage, usual) for task in self.left.values() for stage in task.stages)
            progress.seconds_left = todo / (len(running) * self.workers)
        self.show(progress)


class _Rehearsal(_Driver):
    """Keeps the scripts of the arrays in place of submitting them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scripts: list[str] = []

    def _sbatch(self, packs: list[list[Task]], after: str) -> str:
        folder, name = self.root / "BATCH" / "log", f"{jobs.PREFIX}BATCH"
        executor = _executor(self.dispatch, folder, name, after, self.workers)._executor
        if len(packs) > 1:
            executor.parameters["map_count"] = len(packs)  # as submitit does for an array
        self.scripts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
        return str(len(self.scripts))


def _alive(queued: dict[str, Element], job: str) -> bool:
    return job in queued and queued[job].is_alive


def _stages(task: Task) -> list[StageKey]:
    return [stage for stage in zip(STAGES, task.trial.keys, strict=True) if stage[0] in task.stages]


def _max_array() -> int:
    """How many elements this cluster's arrays may have; Slurm's default where it cannot be asked.

    Raises:
        QueueError: Slurm does not answer now.
    """
    try:
        match = re.search(r"MaxArraySize\s*=\s*(\d+)", _configuration())
    except QueueError as error:
        if _is_away(str(error)):
            raise
        match = None  # no scontrol here, or not for this user; where arrays are smaller, sbatch says so
    return max(1, int(match.group(1))) if match else 1000


@cache
def _configuration() -> str:
    return jobs.slurm("scontrol", "show", "config")


def _is_away(reason: str) -> bool:
    """Is the controller away, which passes, by what one of Slurm's programs says?"""
    return "contact" in reason or "timed out" in reason
