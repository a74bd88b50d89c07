"""From the command line to a checked configuration; everything that can be refused is refused here or in the plan."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, dataclass, field
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attacks.base import Attack, attack
from bench.engine.registry import PluginError, Registry, load_folders, load_plugins
from bench.engine.training import Recipe, check_numbers
from bench.errors import UserError as UserError
from defenses.base import Defense, defense

GROUPS = ("grid", "dispatch", "tracking")
# Settings whose keys are another program's.
FREE = ("dispatch.slurm.submitit.", "dispatch.slurm.additional.")


def said(error: Exception) -> str:
    """What an error says, without its type or number; a KeyError would put it in quotes."""
    return str(error.args[0]) if len(error.args) == 1 else str(error)


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
    settings: list[str] = field(default_factory=lambda: ["reserve"])  # what the defender owns: reserve, trainset
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

    pool: float = 0.05  # share of the training split cut off before poisoning; nobody trains on it
    size: float = 0.05  # share of the training split that the defender gets, a part of the pool
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
    # The next three also train a clean twin of each infected model (or find the one of the attack `none`).
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
    published: list[str] = field(default_factory=list)  # trials.csv files; what stands there is not computed again
    results: str = "results"  # the folder of the store and of every table
    dry_run: bool = False  # print the plan and end


def load_methods(plugins: list[str]) -> None:
    """Fill the registries with our methods and everybody else's.

    Raises:
        UserError: a plug-in cannot be found or imported, or takes a name that is taken.
    """
    try:
        load_folders("attacks", "defenses", "baselines")
        load_plugins(plugins)
    except PluginError as error:
        raise UserError(str(error)) from error


def plugins_in(arguments: list[str]) -> list[str]:
    """The modules of `plugins=[...]`: imported before the configuration is composed, since they add to it."""
    values = [argument.partition("=")[2] for argument in arguments if argument.lstrip("+").startswith("plugins=")]
    return [name.strip(" '\"") for value in values for name in value.strip("[]").split(",") if name.strip(" '\"")]


def load(arguments: list[str]) -> DictConfig:
    """Compose the configuration of these command-line overrides; methods are typed nodes.

    Raises:
        UserError: a key, a type or a grid is wrong; one line that names the near ones.
    """
    load_methods(plugins_in(arguments))
    schema = _writable(OmegaConf.structured(Config))
    for registry, group in ((attack, "attack"), (defense, "defense")):
        schema[group] = _settings(registry)
    ConfigStore.instance().store(name="schema", node=schema)
    for argument in arguments:
        if "=" not in argument:
            raise UserError(f"{argument!r} is no setting; write key=value, e.g. grid=quick or grid.seeds=3")
    # These two hold whatever submitit and sbatch know: a key of them is new by nature.
    arguments = [f"++{argument}" if argument.startswith(FREE) else argument for argument in arguments]
    with initialize_config_module("bench.conf", version_base="1.3"):
        try:
            return compose("config", overrides=arguments)
        except (HydraException, OmegaConfBaseException, OSError) as error:
            raise UserError(_one_line(error, arguments, schema)) from error


def _settings(registry: Registry) -> DictConfig:
    """Each registered class as a typed node: attack.badnets.patch_size and so on."""
    return OmegaConf.create({name: _writable(OmegaConf.structured(cls)) for name, cls in registry.items()})


def _writable(node: Any) -> DictConfig:
    # A frozen dataclass arrives read-only, and would refuse every override.
    OmegaConf.set_readonly(node, None)
    for key in node:
        value = node._get_node(key)
        if isinstance(value, DictConfig):
            _writable(value)
    return node


def _one_line(error: Exception, arguments: list[str], schema: DictConfig) -> str:
    """What came, what was wanted, what to write instead."""
    for argument in arguments:
        path = argument.partition("=")[0].lstrip("+~")
        if path in (*GROUPS, "hydra.searchpath"):
            continue
        node: Any = schema
        for part in path.split("."):
            if not isinstance(node, DictConfig):
                break
            if part not in node:
                near = get_close_matches(part, list(node), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                if path.count(".") == 1 and path.startswith(("attack.", "defense.")):
                    group, _, name = path.partition(".")
                    hint = hint or f" Write {group}.NAME.{name} for the setting of a method."
                known = ", ".join(sorted(map(str, node))) or "none (is its class a dataclass, and are they annotated?)"
                return f"{path}: there is no setting {part!r}.{hint} Known: {known}."
            node = node[part]
    text = " ".join(str(error.__cause__ or error).split())
    for argument in arguments:
        key, _, value = argument.partition("=")
        if "is not a ListConfig, list or tuple" in text and f"full_key: {key} " in f"{text} ":
            return f"{key} is a list; write '{key}=[{value}]'"
    for group in GROUPS:
        chosen = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{group}=")]
        if chosen and f"Could not find '{group}/" in text:
            near = get_close_matches(chosen[0], options(group), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            return f"there is no {group} {chosen[0]!r}.{hint} Known: {', '.join(options(group))}."
    return text.replace(" object_type=", ", in ").replace(" full_key: ", ": ")


def grids() -> list[str]:
    """The names of the grids that ship with the project."""
    return options("grid")


def options(group: str) -> list[str]:
    """The names of the files of a group (one of GROUPS) that ship with the project."""
    from importlib.resources import files

    folder = files("bench.conf").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def attack_of(cfg: DictConfig, name: str) -> Attack:
    """The settings of one attack as its dataclass; a wrong value is refused by the class itself."""
    return _method(cfg, "attack", attack, name)


def defense_of(cfg: DictConfig, name: str) -> Defense:
    return _method(cfg, "defense", defense, name)


def _method(cfg: DictConfig, group: str, registry: Registry, name: str) -> Any:
    try:
        cls = registry[name]  # first: an unknown name gets the list of known ones
        found = OmegaConf.to_object(cfg[group][name])
        check_numbers(f"{group}.{name}.", vars(found))
        return found
    except FrozenInstanceError as error:  # a key was added with +, which typed nodes accept
        raise UserError(f"{group}.{name}: {error}: {cls.__name__} has no such setting") from error
    except (LookupError, ValueError, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from error
