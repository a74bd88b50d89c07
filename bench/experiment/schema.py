"""Every setting of the harness with its default."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from bench.engine.models import STEMS
from bench.engine.settings import choice, count, number, pixels, plain, share
from bench.engine.training import Recipe


@dataclass
class GridConfig:
    """What is crossed with what."""

    name: str = plain("custom", "name of the grid's folder under results/ and of its MLflow experiment")
    purpose: str = plain("", "one line, printed above the table")
    datasets: list[str] = plain(["digits"], "names of data sets; python -m bench.list shows them")
    models: list[str] = plain(["test_resnet"], "names of timm architectures")
    attacks: list[str] = plain(["none", "badnets", "blended"], "names of attacks; `none` is the clean model")
    defenses: list[str] = plain(
        ["no_defense", "fine_tuning"],
        "names of defenses and of `ablations`; `no_defense` is the infected model, unchanged",
    )
    threat_models: list[str] = plain(["reserve"], "what the defender owns: reserve, trainset")
    seeds: Any = plain(3, "a number n (seeds 0 to n - 1) or a list")
    sweep: list[Any] = plain([], "one more axis each, e.g. {key: reserve.size, values: [0.01, 0.05]}")
    ablations: list[Any] = plain(
        [],
        "defenses with other settings as rows of their own, e.g. {name: fixed, defense: pbe, set: {selection: false}}",
    )
    exceptions: list[Any] = plain(
        [], 'other settings for some cells, e.g. {attack: sig, set: {attack.poison_rate: 0.05}, why: "..."}'
    )


@dataclass
class AugmentationConfig:
    """How training images are augmented; null is the data set's own choice, for an image folder no mirroring."""

    crop: float | None = number(
        None,
        "largest shift as a share of the width: 0.125 is four pixels of 32",
        at_least=0,
        at_most=0.5,
    )
    flip: bool | None = plain(None, "mirror half of the images")
    rotation: float | None = number(None, "largest angle in degrees", at_least=0, at_most=180)


@dataclass
class DatasetConfig:
    """Where data sets lie, and how large their images are made."""

    root: str = plain(
        lambda: os.environ.get("BENCH_DATA", "data"), "folder of the data sets; $BENCH_DATA where that is set"
    )
    cache: str = plain("data/cache", "folder of the decoded images")
    size: int | None = count(
        None,
        "pixels a side; null is the data set's own; other shapes are stretched to a square",
        at_least=1,
    )
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class ModelConfig:
    """How an architecture is fitted to small images."""

    stem: str = choice(
        "small",
        "first layers: `small` (stride one up to 48 pixels), `half` (no pooling) or `stock` (as timm has them)",
        STEMS,
    )


@dataclass
class ReserveConfig:
    """The defender's clean images."""

    held_out: float = share(
        0.05,
        "share of the training split cut off before poisoning; nobody trains on it",
        above=0,
        below=1,
    )
    size: float = share(
        0.05,
        "share of the training split that the defender gets, a part of the held-out share",
        above=0,
        below=1,
    )
    contamination: float = share(0.0, "share of the reserve that is poisoned")


@dataclass
class MeasureConfig:
    """What is measured of each repaired model. All that is off costs a multiple of the rest, and says so here."""

    pgd_epsilon: float = pixels(8 / 255, "L-infinity radius of PGD, by which robust accuracy is measured")
    pgd_step_size: float = pixels(2 / 255, "size of a PGD step", above=0)
    pgd_steps: int = count(20, "number of PGD steps")
    pgd_images: int | None = count(
        None, "number of test images, always the same ones, for robust accuracy; null is all", at_least=1
    )
    autoattack_images: int = count(
        0,
        "number of test images, always the same ones, for AutoAttack and checks for masked gradients; 0 is none. An "
        "image that survives everything costs about 10,000 passes for each of seven radii: far more than all the rest",
    )
    relearn: bool = plain(
        False,
        "fine-tune the repaired model on 2 % clean and a few poisoned images; costs about one fine-tuning for each "
        "number of images, and trains a clean control",
    )
    relearn_poisoned: list[int] = count(
        [1, 5, 10, 50], "numbers of poisoned images; the table shows 5, the paper's", at_least=1
    )
    reactivate: bool = plain(
        False,
        "ASR under the best universal perturbation of the trigger within 4/255, found in 100 steps; trains a clean "
        "control",
    )
    connection: bool = plain(
        False,
        "compare adversarial with triggered images, on 1,000 images at most: 200 passes for each infected model, 100 "
        "for each repair; trains a clean control; python -m bench.connection draws it",
    )


@dataclass
class SlurmConfig:
    """What each Slurm job asks for; a profile (bench/conf/dispatch/*.yaml) sets these for one cluster."""

    partition: str | None = plain(None, "sbatch --partition")
    account: str | None = plain(None, "sbatch --account")
    qos: str | None = plain(None, "sbatch --qos")
    constraint: str | None = plain(None, "sbatch --constraint")
    gpus: int = count(0, "GPUs of each job; with none, trials are computed on CPUs")
    cpus: int | None = count(
        None, "CPUs of each job; null takes dispatch.threads for each trial that runs at once", at_least=1
    )
    memory_gb: float | None = number(
        8.0,
        "memory of each job; null asks for none, for clusters that give it by CPU or want mem-per-cpu",
        above=0,
    )
    timeout_min: int = count(
        240,
        "minutes of each job; one that needs longer is requeued and continues from its checkpoint",
        at_least=1,
    )
    max_timeouts: int = count(3, "how many times a job is requeued for its time")
    signal_delay_s: int = count(90, "seconds before the end of a job at which it is told to stop")
    array_parallelism: int = count(256, "most elements of one array that run at once", at_least=1)
    setup: list[str] = plain([], "shell lines before Python starts, e.g. module load ...")
    python: str | None = plain(None, "the command that starts Python, e.g. apptainer exec --nv bench.sif python")
    submitit: dict[str, Any] = plain({}, "any other parameter of submitit, e.g. slurm_mail_type=END")
    additional: dict[str, Any] = plain({}, "any other option of sbatch, e.g. reservation=night")


@dataclass
class DispatchConfig:
    """Where the work is done; none of it changes a figure beyond rounding."""

    kind: str = choice("local", "where trials are computed", ("local", "slurm"))
    workers: int | None = count(
        None, "worker processes of a local run; null is one for each GPU or core, 0 runs in this process"
    )
    threads: int = count(
        1,
        "threads of each worker on a CPU; more of them sum in another order, and the last bits of figures differ",
        at_least=1,
    )
    device: str = plain("auto", "`auto`, `cpu` or `cuda`")
    checkpoint_s: float = number(60.0, "seconds between checkpoints", at_least=0)
    max_tries: int = count(5, "a stage that failed this many times is not tried again", at_least=1)
    trials_per_job: int = count(1, "trials that one Slurm job computes, one after the other", at_least=1)
    trials_per_gpu: int = count(
        1, "trials that one Slurm job computes at once, on its GPU, or on its CPUs if it has none", at_least=1
    )
    max_jobs: int = count(1000, "most Slurm jobs in the queue at once; elements of arrays count", at_least=1)
    poll_s: float = number(10.0, "seconds between looks at the queue", at_least=0)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class TrackingConfig:
    """Where MLflow keeps its view of the results."""

    uri: str | None = plain(None, "any MLflow URI; null is a sqlite file under results/")
    enabled: bool = plain(True, "whether MLflow gets the results; bench.sync sends later what is stored")


@dataclass
class ReportConfig:
    """What a report holds; nothing here changes a figure."""

    reported: str | None = plain(None, "a CSV of figures that others report, with their provenance")
    plots: bool = plain(True, "whether plots are drawn, which takes most of a report's time")


@dataclass
class Config:
    """All settings; `attack.NAME` and `defense.NAME` hold those of each method, from its own dataclass."""

    grid: GridConfig = field(default_factory=GridConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: Recipe = field(default_factory=Recipe)
    reserve: ReserveConfig = field(default_factory=ReserveConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    attack: dict[str, Any] = field(default_factory=dict)
    defense: dict[str, Any] = field(default_factory=dict)
    plugins: list[str] = plain([], "modules with your own methods")
    reuse: list[str] = plain([], "trials.csv files whose rows are not computed again")
    results: str = plain("results", "the folder of the store and of every table")
    dry_run: bool = plain(False, "print the plan and stop")
