"""What there is to cross: attacks, defenses, data sets and grids, each with its paper and one line.

python -m bench.list [plugins=[my_package.my_defense]]
"""

from __future__ import annotations

import inspect

from bench._command import run_command


def main(arguments: list[str]) -> int:
    from attacks.base import attack
    from bench.engine.datasets import dataset
    from bench.engine.errors import UserError
    from bench.experiment.load import grids, load_methods, plugins_in
    from defenses.base import THREAT_MODELS, defense, offered

    if odd := [argument for argument in arguments if not argument.startswith("plugins=")]:
        raise UserError(f"{odd[0]!r} is no word of bench.list; it takes plugins=[...] and nothing else")
    load_methods(plugins_in(arguments))
    print("attacks")
    for name, cls in sorted(attack.items()):
        _line(name, cls.paper, _first(cls))
    print("\ndefenses and baselines (with the settings they work in)")
    for name, cls in sorted(defense.items()):
        works = [threat_model for threat_model in THREAT_MODELS if offered(cls, threat_model)]
        _line(name, cls.paper, f"{_first(cls)} [{', '.join(works)}]")
    print("\ndata sets (and folder:NAME for any image folder)")
    for name, cls in sorted(dataset.items()):
        _line(name, cls.title, _first(cls))
    print("\ngrids")
    for name in grids():
        _line(name, "", _purpose(name))
    return 0


def _line(name: str, source: str, text: str) -> None:
    print(f"  {name:<18} {source:<18} {text}")


def _first(cls: type) -> str:
    """The first line of a class's own docstring, or of its file's."""
    text = cls.__dict__.get("__doc__") or ""
    if not text or text.startswith(f"{cls.__name__}("):  # a dataclass without one gets its signature
        text = inspect.getdoc(inspect.getmodule(cls)) or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def _purpose(name: str) -> str:
    from importlib.resources import files

    text = files("bench.conf").joinpath("grid", f"{name}.yaml").read_text()
    lines = [line.removeprefix("# Purpose: ") for line in text.splitlines() if line.startswith("# Purpose: ")]
    return lines[0] if lines else ""


if __name__ == "__main__":
    run_command(main, __doc__)
