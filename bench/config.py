"""From the command line to a checked configuration; everything that can be refused is refused here or in the plan."""

from __future__ import annotations

import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import FloatNode

from attacks.base import Attack, attack
from bench.engine.registry import PluginError, Registry, load_folders, load_plugins
from bench.engine.training import Recipe, check_numbers
from bench.errors import UserError as UserError
from defenses.base import Defense, defense

GROUPS = ("grid", "dispatch", "tracking")
# The groups of settings that may differ from cell to cell.
PER_CELL = ("attack", "defense", "train", "reserve", "measure")
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
    """The modules of `plugins=[...]`: imported before the configuration is composed, since they add to it.

    Raises:
        UserError: an override cannot be read, or an interpolation in it has no value.
    """
    found: list[str] = []
    for argument in separated(arguments):
        key, _, text = argument.partition("=")
        if key.lstrip("+") == "plugins":
            value = _parsed(argument)
            node = OmegaConf.create({"plugins": as_list(value) if isinstance(value, str | list) else [text]})
            try:
                found += map(str, OmegaConf.to_container(node, resolve=True)["plugins"])  # type: ignore[index,call-overload]
            except OmegaConfBaseException as error:
                raise UserError(_located(error)) from error
    return found


# The command line -------------------------------------------------------------------------------------------------

# What people who know Hydra write, by how it begins, and what to write here.
_OPTIONS = {
    ("-m", "--multirun"): "for several values write 'grid.sweep=[{key: train.epochs, values: [1,2]}]', or name them on "
    "an axis, e.g. 'grid.attacks=[badnets,blended]'",
    ("--config-name", "-cn"): "write grid=NAME for a grid",
    ("--config-dir", "--config-path", "-cd", "-cp"): "write 'hydra.searchpath=[file:///my/folder]' and keep the grid "
    "as grid/NAME.yaml in that folder",
    ("--cfg", "-c", "--info", "-i", "--resolve"): "write dry_run=true for the plan; a run keeps all its settings in "
    "config.yaml beside its tables",
}
_HYDRA = {
    "hydra.run": "write results=DIR for the folder of all results",
    "hydra.sweep": "write results=DIR for the folder of all results",
    "hydra.sweeper": "write 'grid.sweep=[{key: train.epochs, values: [1,2]}]' for several values",
    "hydra.launcher": "write dispatch=slurm for a cluster, or dispatch.workers=N for local processes",
    "hydra.mode": "write 'grid.sweep=[{key: train.epochs, values: [1,2]}]' for several values",
}


def separated(arguments: list[str]) -> list[str]:
    """Overrides with one setting each: `train={epochs: 3}` becomes `train.epochs=3`.

    Everything that asks what the command line sets asks this list: however a setting is written, it counts the same.

    Raises:
        UserError: one is not an override of a setting; the line says what to write instead.
    """
    found: list[str] = []
    for position, argument in enumerate(arguments):
        if not _is_one_line(argument):
            raise UserError(f"{argument!r} has a line break or a control character; write it without")
        if argument.startswith("-"):
            option = argument.partition("=")[0]
            advice = next((text for names, text in _OPTIONS.items() if option in names), "")
            raise UserError(f"{argument!r} is not an option here; {advice or 'write key=value, e.g. grid.seeds=3'}")
        if argument.startswith("~"):
            raise UserError(
                f"{argument!r} would delete a setting, and each has a value; write key=value with the value it should "
                "have (null, false, 0 or [] turn most things off)"
            )
        if "=" not in argument:
            before = arguments[position - 1] if position else ""
            hint = ""
            if "=" in before:
                key, _, value = before.partition("=")
                hint = f"; if it belongs to the value before it, quote the two: '{key}={value} {argument}'"
            raise UserError(f"{argument!r} is not a setting; write key=value, e.g. grid=quick or grid.seeds=3{hint}")
        key = argument.partition("=")[0]
        path = key.lstrip("+")
        value = _parsed(argument)
        if path.replace("/", ".").partition(".")[0] == "hydra" and not isinstance(value, dict):
            _check_hydra(path.replace("/", "."))
        if "@" in path or (path in GROUPS and not isinstance(value, str | dict)):
            group = path.partition("@")[0]
            known = f" of {', '.join(options(group))}" if group in GROUPS else ""
            extra = "; tracking.enabled=false keeps no MLflow" if group == "tracking" else ""
            raise UserError(f"{argument}: write {group}=NAME, one{known}{extra}")
        if not isinstance(value, dict):
            found.append(argument)
            continue
        for setting, leaf in leaves(value, path):
            if setting.partition(".")[0] == "hydra":
                _check_hydra(setting)
            found.append(f"{key[: len(key) - len(path)]}{setting}={to_override(leaf)}")
    return found


def _parsed(argument: str) -> Any:
    """The value of an override, by Hydra's own grammar.

    Raises:
        UserError: it cannot be read, or holds several values.
    """
    key, _, text = argument.partition("=")
    quoted = to_override(text.strip("'\""), quote=True)
    try:
        override = OverridesParser.create().parse_override(argument)
        if not override.is_sweep_override():
            return override.value()
    except HydraException as error:
        raise UserError(
            f"{key}: {text!r} cannot be read; put a text with signs such as , ( ) [ ] {{ }} or quotes in double quotes "
            f"within single ones: '{key}={quoted}'"
        ) from error
    path = key.lstrip("+")
    if path in GROUPS:
        raise UserError(f"{argument}: write one {path}, e.g. {path}={text.partition(',')[0]}")
    advice = f"for a list write '{key}=[{text}]', for a text '{key}={quoted}'"
    if path.partition(".")[0] in PER_CELL:
        advice = f"to sweep over them write 'grid.sweep=[{{key: {path}, values: [{text}]}}]'"
    raise UserError(f"{key}: {text!r} is several values; {advice}")


def _check_hydra(path: str) -> None:
    """Only Hydra's search path has a meaning here; a setting that would do nothing is refused."""
    if path == "hydra.searchpath":
        return
    advice = next((text for name, text in _HYDRA.items() if f"{path}.".startswith(f"{name}.")), "leave it out")
    raise UserError(f"{path} has no effect here: of Hydra's own settings only hydra.searchpath is used; {advice}")


def explicit_in(arguments: list[str]) -> frozenset[str]:
    """The settings that a command line sets, by their dotted paths."""
    return frozenset(argument.partition("=")[0].lstrip("+") for argument in separated(arguments))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in a dictionary of dictionaries, by their dotted paths. An empty dictionary is a value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def to_override(value: Any, quote: bool = False) -> str:
    """A value as Hydra reads it on a command line, without a blank after the commas of a list.

    Args:
        quote: put a text in quotes also where it could stand without.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple | ListConfig):
        return "[" + ",".join(map(to_override, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{to_override(inner)}" for key, inner in value.items()) + "}"
    if not isinstance(value, str):
        return str(value)
    # What Hydra would read as something else than text keeps its quotes.
    bare = re.fullmatch(r"[A-Za-z_][\w./:-]*|\d+/\d+", value) and value.lower() not in _WORDS
    return value if bare and not quote else str(QuotedString(value, Quote.double).with_quotes())


_WORDS = ("true", "false", "null", "nan", "inf")


# The configuration ------------------------------------------------------------------------------------------------


def load(arguments: list[str]) -> DictConfig:
    """Compose the configuration of these command-line overrides; methods are typed nodes.

    Interpolations such as `${oc.env:NAME}` are resolved here, once, and every value is type-checked afterwards: what
    follows sees numbers, texts and lists only. A fraction such as 8/255 is a number.

    Raises:
        UserError: a key, a type or a grid is wrong; one line that names the near ones.
    """
    arguments = separated(arguments)
    load_methods(plugins_in(arguments))
    schema = _writable(OmegaConf.structured(Config))
    for registry, group in ((attack, "attack"), (defense, "defense")):
        schema[group] = _settings(registry)
    # Hydra composes values without types: a text may still become a number when it is resolved.
    untyped = OmegaConf.create(OmegaConf.to_container(schema, structured_config_mode=SCMode.DICT))
    OmegaConf.set_struct(untyped, True)
    for free in FREE:
        OmegaConf.set_struct(OmegaConf.select(untyped, free.rstrip(".")), False)
    ConfigStore.instance().store(name="schema", node=untyped)
    # These two hold whatever submitit and sbatch know: a key of them is new by nature.
    overrides = [f"++{argument}" if argument.startswith(FREE) else argument for argument in arguments]
    with initialize_config_module("bench.conf", version_base="1.3"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder of grids that is not there
        try:
            composed = compose("config", overrides=overrides)
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            values = _one_line_each(_flat_exceptions(numbers(values, schema)))
            cfg = OmegaConf.merge(schema, values)
        except (HydraException, OmegaConfBaseException, OSError, ValueError, UserWarning, yaml.YAMLError) as error:
            raise UserError(_one_line(error, arguments, schema)) from error
    assert isinstance(cfg, DictConfig)
    return cfg


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def numbers(value: Any, node: Any, path: str = "") -> Any:
    """The value with each fraction (`8/255`) as a number, where its typed node holds floats.

    Raises:
        ValueError: a single value stands in place of a group of settings.
    """
    if isinstance(node, DictConfig):
        if not isinstance(value, dict):
            raise ValueError(f"{path} is {value!r}, but it is a group of settings; write {path}.KEY=VALUE")
        below = f"{path}." if path else ""
        return {
            key: numbers(inner, node._get_node(key) if key in node else None, f"{below}{key}")
            for key, inner in value.items()
        }
    if isinstance(value, list) and isinstance(node, ListConfig) and node._metadata.element_type is float:
        return [numbers(inner, FloatNode()) for inner in value]
    if isinstance(value, str) and isinstance(node, FloatNode):
        fraction = re.fullmatch(rf"\s*({_NUMBER})\s*/\s*({_NUMBER})\s*", value)
        if fraction and float(fraction[2]):
            return float(fraction[1]) / float(fraction[2])
    return value


def update(cfg: DictConfig, path: str, value: Any) -> None:
    """Set one setting of a loaded configuration, by the same rules as on the command line.

    Raises:
        OmegaConfBaseException, ValueError: there is no such setting, or the value has another type.
    """
    group, _, name = path.rpartition(".")
    holder = OmegaConf.select(cfg, group) if group else cfg
    node = holder._get_node(name) if isinstance(holder, DictConfig) and name in holder else None
    OmegaConf.update(cfg, path, numbers(value, node, path), force_add=False)


def _flat_exceptions(values: Any) -> Any:
    """The settings of each exception by their dotted paths, however the grid wrote them."""
    for exception in values["grid"]["exceptions"] or ():
        if isinstance(exception, dict) and isinstance(exception.get("set"), dict):
            exception["set"] = dict(leaves(exception["set"])) if exception["set"] else {}
    return values


# Sentences: of these, YAML keeps the line breaks.
_PROSE = re.compile(r"grid\.purpose|grid\.exceptions\[\d+\]\.why")


def _one_line_each(value: Any, path: str = "") -> Any:
    """The values; sentences are joined to one line.

    Raises:
        ValueError: another text holds a control character, which a file name, a table or a job script would carry on.
    """
    if isinstance(value, dict):
        below = f"{path}." if path else ""
        return {
            _one_line_each(key, f"a name in {path or 'the settings'}"): _one_line_each(inner, f"{below}{key}")
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_one_line_each(inner, f"{path}[{index}]") for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    if _PROSE.fullmatch(path):
        value = " ".join(value.split())
    if not _is_one_line(value):
        raise ValueError(f"{path} is {value!r}; write it without line breaks and control characters")
    return value


def _is_one_line(text: str) -> bool:
    """Is it free of control characters, line and paragraph separators, and halves of a surrogate pair?"""
    return not any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in text)


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
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error
    text = " ".join(str(cause).split())
    if isinstance(error, UserWarning):
        folder = text.partition("path=")[2].removesuffix(" is not available.")
        return f"hydra.searchpath: there is no folder {folder!r}; write 'hydra.searchpath=[file:///my/folder]'"
    for group in GROUPS:
        chosen = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{group}=")]
        if chosen and f"Could not find '{group}/" in text:
            near = get_close_matches(chosen[0], options(group), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            return f"there is no {group} {chosen[0]!r}.{hint} Known: {', '.join(options(group))}."
    named = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    if getattr(cause, "full_key", None):  # a key of a grid in YAML
        named.append(str(cause.full_key))  # type: ignore[attr-defined]
    for path in named:
        if path not in (*GROUPS, "hydra.searchpath") and (unknown := _unknown(path, schema)):
            return unknown
    if isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or "")
        if "is not a ListConfig, list or tuple" in text:
            values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{key}=")]
            return f"{key} is a list; write '{key}=[{values[0] if values else '...'}]'"
        return _located(cause)
    return text


def _unknown(path: str, schema: DictConfig) -> str:
    """The line that refuses a path of which a part is not a setting; empty where each is."""
    node: Any = schema
    for part in re.sub(r"\[\w+\]", "", path).split("."):
        if not isinstance(node, DictConfig) or (not node and OmegaConf.get_type(node) is dict):
            return ""
        if part not in node:
            near = get_close_matches(part, list(node), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if path.count(".") == 1 and path.startswith(("attack.", "defense.")):
                group, _, name = path.partition(".")
                hint = hint or f" Write {group}.NAME.{name} for the setting of a method."
            known = ", ".join(sorted(map(str, node))) or "none (is its class a dataclass, and are they annotated?)"
            return f"{path}: there is no setting {part!r}.{hint} Known: {known}."
        node = node._get_node(part)
    return ""


def _located(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value, with the name of its setting in front."""
    text = " ".join(str(error.msg or error).partition("full_key:")[0].split())
    text = re.sub(r"^\w+ raised while resolving interpolation: \"?(.*?)\"?$", r"\1", text)
    if absent := re.fullmatch(r"Environment variable '(.+)' not found", text):
        text = f"the environment variable {absent[1]} is not set; set it, or write a default: ${{oc.env:{absent[1]},3}}"
    for odd, wanted in _WANTED.items():
        if re.search(odd, text):
            text = re.sub(rf"^Value (.*?) (of type '\w+' )?{odd}.*", rf"\1 is not valid; write {wanted}", text)
    return f"{error.full_key}: {text}"


_WANTED = {
    "could not be converted to Integer": "a whole number",
    "could not be converted to Float": "a number, or a fraction such as 8/255",
    "is not a valid bool": "true or false",
}


def as_list(value: Any) -> list[Any]:
    """One name, or a list of names, as a list."""
    return [value] if isinstance(value, str) else list(value)


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
