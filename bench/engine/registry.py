"""A dictionary and a decorator: how attacks, defenses and data sets get their names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

M = TypeVar("M", bound=type[Any])

# The metadata of a setting that came after results had been computed: `field(default=..., metadata=LATER)`. At its
# default the method does what it did before, and its identity does not name it: what is stored stays found.
LATER = {"later": True}


def did_you_mean(word: str, known: list[str]) -> str:
    """The end of an error message: the nearest known name, if any, and all of them."""
    match = get_close_matches(word, known, n=1)
    hint = f" Did you mean {match[0]!r}?" if match else ""
    return f"{hint} Known: {', '.join(sorted(known))}."


class Registry(dict[str, type[Any]]):
    """Names to classes. `@registry("name")` above a class adds it and sets its `name`.

    Raises:
        ValueError: the name is taken (by the decorator).
        LookupError: nothing has that name (by `registry[name]`); the message lists the near names.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __call__(self, name: str) -> Callable[[M], M]:
        def add(cls: M) -> M:
            taken = self.get(name)
            # The same class again is a reload (a plug-in imported under two paths is still an error).
            if taken is not None and (taken.__module__, taken.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise ValueError(f"{self.kind} {name!r} is taken by {taken.__module__}; choose another name")
            cls.name = name
            self[name] = cls
            return cls

        return add

    def __missing__(self, name: str) -> type[Any]:
        raise LookupError(f"no {self.kind} is named {name!r}.{did_you_mean(str(name), list(self))}")


class PluginError(LookupError):
    """A module with methods cannot be found, or not be imported; the message has the file and the line."""


def load_folders(*packages: str) -> None:
    """Import every module of these packages once, so that their decorators run.

    Raises:
        PluginError: one of them cannot be imported.
    """
    for package in packages:
        module = importlib.import_module(package)
        for entry in pkgutil.iter_modules(module.__path__):
            name = f"{package}.{entry.name}"
            with _named(name):
                importlib.import_module(name)


def load_plugins(modules: list[str]) -> None:
    """Import methods of other packages: those named, and every entry point of group `backdoor_bench`.

    Raises:
        PluginError: one of them cannot be found or imported.
    """
    for entry in entry_points(group="backdoor_bench"):
        with _named(f"entry point {entry.name} = {entry.value}"):
            entry.load()
    for name in modules:
        with _named(f"plugins=[{name}]"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                    raise  # the plug-in was found; something that it imports was not
                raise PluginError(
                    f"no module is named {name!r} (from plugins=). Give a name that `python -c 'import {name}'` "
                    "accepts; for a file outside any package put its folder on PYTHONPATH."
                ) from error


@contextmanager
def _named(origin: str) -> Iterator[None]:
    """Say which module cannot be imported, and where in it.

    Raises:
        PluginError: whatever the module raised.
    """
    try:
        yield
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a script may exit when it is imported
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        raise PluginError(f"{origin}: {_place(error)}{type(error).__name__}: {text}") from error


def _place(error: BaseException) -> str:
    """The file and line of an error in a module: the innermost line beneath the folder of that module."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    lines = [
        (frame.f_code.co_filename, number)
        for frame, number in walk_tb(error.__traceback__)
        if frame.f_code.co_filename != __file__ and not frame.f_code.co_filename.startswith("<frozen ")
    ]
    lines = [line for line in lines if not Path(line[0]).is_relative_to(Path(importlib.__file__).parent)]
    if not lines:
        return ""
    folder = Path(lines[0][0]).parent
    file, number = [line for line in lines if Path(line[0]).is_relative_to(folder)][-1]
    return f"{file}, line {number}: "
