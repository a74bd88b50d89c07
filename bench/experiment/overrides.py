"""Overrides of the command line: split into single settings, parsed, and written back."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.nodes import FloatNode

from bench.engine.errors import UserError

GROUPS = ("grid", "budget", "dispatch", "tracking")


# The groups of settings that may differ from cell to cell.
PER_CELL = ("attack", "defense", "train", "reserve", "measure")


# Settings whose keys are another program's.
FREE = ("dispatch.slurm.submitit.", "dispatch.slurm.additional.")


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
    settings: list[str] = []
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
        value = parsed(argument)
        if path.replace("/", ".").partition(".")[0] == "hydra" and not isinstance(value, dict):
            _check_hydra(path.replace("/", "."))
        if "@" in path or (path in GROUPS and not isinstance(value, str | dict)):
            group = path.partition("@")[0]
            known = f" of {', '.join(options(group))}" if group in GROUPS else ""
            extra = "; tracking.enabled=false keeps no MLflow" if group == "tracking" else ""
            raise UserError(f"{argument}: write {group}=NAME, one{known}{extra}")
        if not isinstance(value, dict):
            settings.append(argument)
            continue
        for setting, leaf in leaves(value, path):
            if setting.partition(".")[0] == "hydra":
                _check_hydra(setting)
            settings.append(f"{key[: len(key) - len(path)]}{setting}={to_override(leaf)}")
    return settings


def parsed(argument: str) -> Any:
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


# Sentences: of these, YAML keeps the line breaks.
_PROSE = re.compile(r"grid\.purpose|grid\.exceptions\[\d+\]\.why")


def one_line_each(value: Any, path: str = "") -> Any:
    """The values; sentences are joined to one line.

    Raises:
        ValueError: another text holds a control character, which a file name, a table or a job script would carry on.
    """
    if isinstance(value, dict):
        below = f"{path}." if path else ""
        return {
            one_line_each(key, f"a name in {path or 'the settings'}"): one_line_each(inner, f"{below}{key}")
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [one_line_each(inner, f"{path}[{index}]") for index, inner in enumerate(value)]
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


def options(group: str) -> list[str]:
    """The names of the files of a group (one of GROUPS) that ship with the project."""
    from importlib.resources import files

    folder = files("bench.conf").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
