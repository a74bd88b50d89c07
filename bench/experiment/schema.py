"""Every setting of the harness with its default."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from bench.engine.training import Recipe


@dataclass
class GridConfig:
    """What is crossed with what."""

    name: str = "custom"  # of its folder under results/, and of its experiment in MLflow
    purpose: str = ""  # one line, printed above the table
    datasets: list[str] = field(default_factory=lambda: ["digits"])  # python -m bench.list names them
    models: list[str] = field(default_factory=lambda: ["test_resnet"])  # any of timm's
    attacks: list[str] = field(default_factory=lambda: ["none", "badnets", "blended"])  # `none` is the clean model
    # Registered ones, and the names of `ablations`; `no_defense` is the infected model as it is.
    defenses: list[str] = field(default_factory=lambda: ["no_defense", "fine_tuning"])
    threat_models: list[str] = field(default_factory=lambda: ["reserve"])  # what the defender owns: reserve, trainset
    seeds: Any = 3  # a number n (seeds 0 to n - 1) or a list
    sweep: list[Any] = field(default_factory=list)  # {key: reserve.size, values: [0.01, 0.05]}: one more axis each
    # {name: fixed, defense: pbe, set: {selection: false}}: a defense with other settings as a row of its own
    ablations: list[Any] = field(default_factory=list)
    exceptions: list[Any] = field(default_factory=list)  # {attack: sig, set: {attack.poison_rate: 0.05}, why: "..."}


@dataclass
class AugmentationConfig:
    """How training images are augmented; null is the data set's own choice, for an image folder no mirroring."""

    crop: float | None = None  # largest shift as a share of the width: 0.125 is four pixels of 32
    flip: bool | None = None  # mirror half of the images
    rotation: float | None = None  # largest angle in degrees


@dataclass
class DatasetConfig:
    """Where data sets lie, and how large their images are made."""

    root: str = field(default_factory=lambda: os.environ.get("BENCH_DATA", "data"))  # $BENCH_DATA, or data/
    cache: str = "data/cache"  # where decoded images are kept
    size: int | None = None  # pixels a side; null is the data set's own. Other shapes are stretched to a square.
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class ModelConfig:
    """How an architecture is fitted to small images."""

    stem: str = "small"  # small (stride one up to 48 pixels) | half (no pooling) | stock (as timm has it)


@dataclass
class ReserveConfig:
    """The defender's clean images."""

    held_out: float = 0.05  # share of the training split cut off before poisoning; nobody trains on it
    size: float = 0.05  # share of the training split that the defender gets, a part of the held-out share
    contamination: float = 0.0  # share of the reserve that is poisoned


@dataclass
class MeasureConfig:
    """What is measured of each repaired model. All that is off costs a multiple of the rest, and says so here."""

    pgd_epsilon: float = 8 / 255  # of the accuracy under PGD: the L-infinity ball ...
    pgd_step_size: float = 2 / 255  # ... the steps in it ...
    pgd_steps: int = 20  # ... and how many
    pgd_images: int | None = None  # a fixed random part of the test set; null is all of it
    # AutoAttack and checks for masked gradients on that many fixed test images; 0 is none. An image that survives
    # everything costs about 10,000 passes for each of seven radii: far more than all the rest.
    autoattack_images: int = 0
    # The next three also train a clean control of each infected model (or find the one of the attack `none`).
    relearn: bool = False  # fine-tune on 2 % clean and a few poisoned images; about one fine-tuning for each number
    relearn_poisoned: list[int] = field(default_factory=lambda: [1, 5, 10, 50])  # 5, the paper's, is in the table
    reactivate: bool = False  # the best universal perturbation of the trigger within 4/255; 100 steps
    # Adversarial against triggered images, on 1,000 images at most: 200 passes for each infected model, 100 for each
    # repair; python -m bench.connection draws them.
    connection: bool = False


@dataclass
class SlurmConfig:
    """What each Slurm job asks for; a profile (bench/conf/dispatch/*.yaml) sets these for one cluster."""

    partition: str | None = None  # this and the next three as sbatch has them
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 0  # of each job; with none, trials are computed on CPUs
    cpus: int | None = None  # null: dispatch.threads for each trial that runs at once
    memory_gb: float | None = 8.0  # null asks for none: for clusters that give it by CPU, or want mem-per-cpu
    timeout_min: int = 240  # a job that needs longer is requeued, and goes on from its checkpoint ...
    max_timeouts: int = 3  # ... so often
    signal_delay_s: int = 90  # the warning before the end of the time
    array_parallelism: int = 256  # elements of one array that run at once
    setup: list[str] = field(default_factory=list)  # shell lines before Python starts: module load ...
    python: str | None = None  # the command that starts Python: apptainer exec --nv bench.sif python
    submitit: dict[str, Any] = field(default_factory=dict)  # any other parameter of submitit: slurm_mail_type=END
    additional: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch: reservation=night


@dataclass
class DispatchConfig:
    """Where the work is done; none of it changes a figure beyond rounding."""

    kind: str = "local"  # local | slurm
    workers: int | None = None  # local: processes; null is one for each GPU or core, 0 runs in this one
    threads: int = 1  # of each worker on a CPU; more sum in another order, and the last bits of figures differ
    device: str = "auto"  # auto | cpu | cuda
    checkpoint_s: float = 60.0  # seconds between checkpoints
    max_tries: int = 5  # a stage that failed so often is not tried again
    trials_per_job: int = 1  # Slurm: trials that one job computes, one after the other ...
    trials_per_gpu: int = 1  # ... or so many at once, which share its GPU (without GPUs: its CPUs)
    max_jobs: int = 1000  # Slurm: most jobs in the queue at once, elements of arrays counted
    poll_s: float = 10.0  # seconds between looks at the queue
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class TrackingConfig:
    """Where MLflow keeps its view of the results."""

    uri: str | None = None  # null: a sqlite file under results/; any MLflow URI
    enabled: bool = True  # false keeps none; bench.sync sends later what is stored


@dataclass
class ReportConfig:
    """What a report holds; nothing here changes a figure."""

    reported: str | None = None  # a CSV of figures that others report, with their provenance
    plots: bool = True  # they take most of a report's seconds


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
    plugins: list[str] = field(default_factory=list)  # modules with methods of yours
    reuse: list[str] = field(default_factory=list)  # trials.csv files; what stands there is not computed again
    results: str = "results"  # the folder of the store and of every table
    dry_run: bool = False  # print the plan and end
