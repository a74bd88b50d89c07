"""From command-line overrides to a checked configuration."""

from __future__ import annotations

import functools
import re
import warnings
from difflib import get_close_matches
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from attacks.base import attack
from bench.engine.errors import UserError
from bench.engine.registry import PluginError, load_folders, load_plugins
from bench.experiment.overrides import FREE, GROUPS, leaves, numbers, one_line_each, options, parsed, separated
from bench.experiment.schema import Config
from defenses.base import defense


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
    modules: list[str] = []
    for argument in separated(arguments):
        key, _, text = argument.partition("=")
        if key.lstrip("+") == "plugins":
            value = parsed(argument)
            node = OmegaConf.create({"plugins": as_list(value) if isinstance(value, str | list) else [text]})
            try:
                modules += map(str, OmegaConf.to_container(node, resolve=True)["plugins"])  # type: ignore[index,call-overload]
            except OmegaConfBaseException as error:
                raise UserError(_located(error)) from error
    return modules


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
    schema, untyped = _schema(tuple(attack.items()), tuple(defense.items()))
    ConfigStore.instance().store(name="schema", node=untyped)
    # These two hold whatever submitit and sbatch know: a key of them is new by nature.
    overrides = [f"++{argument}" if argument.startswith(FREE) else argument for argument in arguments]
    with initialize_config_module("bench.conf", version_base="1.3"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder of grids that is not there
        try:
            composed = compose("config", overrides=overrides)
            values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            _check_references(OmegaConf.to_container(composed), values["grid"])
            values = one_line_each(_flat_exceptions(numbers(values, schema)))
            cfg = OmegaConf.merge(schema, values)
        except (HydraException, OmegaConfBaseException, OSError, ValueError, UserWarning, yaml.YAMLError) as error:
            raise UserError(_one_line(error, arguments, schema)) from error
    assert isinstance(cfg, DictConfig)
    return cfg


def _check_references(unresolved: Any, grid: dict[str, Any]) -> None:
    """Refuse a value that refers to a setting that differs from cell to cell: references are resolved once, before.

    Raises:
        ValueError: with both settings.
    """

    def parts(key: str, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in grid[key] or () if isinstance(entry, dict) and isinstance(entry.get(kind), dict)]

    varying = {
        str(entry["key"]): "grid.sweep" for entry in grid["sweep"] or () if isinstance(entry, dict) and "key" in entry
    }
    varying |= {
        str(path): "grid.exceptions" for entry in parts("exceptions", "set") for path, _ in leaves(entry["set"])
    }
    for entry in parts("ablations", "set"):
        varying |= {f"defense.{entry.get('defense')}.{key}": "grid.ablations" for key in entry["set"]}
    for path, value in leaves(unresolved):
        for name in re.findall(r"\$\{([\w.]+)\}", str(value)):
            target = f"{path.rpartition('.')[0]}{name}" if name.startswith(".") else name
            head, *rest = target.split(".")
            # `attack.poison_rate` is the setting of each attack.
            changed_by = varying.get(target) or (head in ("attack", "defense") and varying.get(f"{head}.{rest[-1]}"))
            if changed_by:
                raise ValueError(
                    f"{path} is {value!r}, and {changed_by} changes {target} from cell to cell, but a reference is "
                    f"resolved once; write a value for {path}, or set it in {changed_by} too"
                )


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


@functools.lru_cache(maxsize=1)  # building it takes as long as composing; a plug-in makes it another
def _schema(*methods: tuple[tuple[str, type], ...]) -> tuple[DictConfig, DictConfig]:
    """The configuration with its types, and without them as Hydra composes it; neither is written to."""
    schema = _writable(OmegaConf.structured(Config))
    for group, classes in zip(("attack", "defense"), methods, strict=True):
        schema[group] = OmegaConf.create({name: _writable(OmegaConf.structured(cls)) for name, cls in classes})
    # Hydra composes values without types: a text may still become a number when it is resolved.
    untyped = OmegaConf.create(OmegaConf.to_container(schema, structured_config_mode=SCMode.DICT))
    assert isinstance(untyped, DictConfig)
    OmegaConf.set_struct(untyped, True)
    for free in FREE:
        OmegaConf.set_struct(OmegaConf.select(untyped, free.rstrip(".")), False)
    return schema, untyped


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
