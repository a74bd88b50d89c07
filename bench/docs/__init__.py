"""Pages that are written from the code: what every column means, and every setting, of methods and of the harness."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from bench.engine.settings import declared

HERE = Path(__file__).parent
NOTE = "<!-- Written by `python -m bench.docs` from the code; change it there. -->"

HEADER = ["setting", "default", "range", "meaning"]
OURS = ("attacks", "baselines", "defenses")  # a plug-in has a documentation of its own
# Columns of `trials.csv` that are not figures.
PLACES = {
    "dataset": "data set, as `grid.datasets` names it",
    "model": "timm's name of the architecture",
    "variant": "the swept settings of this trial as a command line has them; empty where nothing is swept",
    "threat_model": "what the defender owns: `reserve` or `trainset`",
    "attack": "`none` is the clean model",
    "defense": "`no_defense` is the infected model, unchanged",
    "poison_rate": "poisoned / all training images, a share",
    "view_images": "number of images that the defender was given: of its reserve, or of the poisoned training set",
    "view_poisoned": "the number of poisoned images among them",
    "robust_images": "number of test images that robust accuracy is measured on",
    "implant_weights": "a digest of the infected model's weights; empty where an earlier version computed it",
    "seed": "the seed of data split, weights, poison and defense",
    "status": "`done`, `not applicable`, `wrecked`, `diverged`, `failed` or `missing`",
    "reason": "why the status is not `done`, in one line",
    "warnings": "suspicious observations of the evaluator, e.g. signs of masked gradients",
    "commit": "every commit that computed a stage of this trial",
    "clean": "whether the working trees of these commits were unchanged",
    "machine": "device and versions that its stages were computed with",
    "trial": "the key of the evaluation: its folder is `results/store/evaluate/<first two digits>/<key>/`",
}
STATES = {
    "done": "measured; counts",
    "not applicable": "the method has no meaning under this threat model or for this network; the reason says why",
    "wrecked": "measured, but more than 10 points of clean accuracy are lost; never averaged, worst rank",
    "diverged": "ended in NaN, or no better than naming the most common class; never averaged, worst rank",
    "failed": "an error, kept with its reason; the next run retries it; worst rank",
    "missing": "not computed yet; the defense is not ranked",
}

_COLUMNS = f"""# Columns
{NOTE}

Shares are in [0, 1] in files and in MLflow, and are printed in percent. Columns marked *shown* are printed by default
where the grid has them. The others are in the files, and on the page when switched on."""

_FILES = r"""## Files

- `trials.csv`: a row for each trial, with figures in full precision.
- `steps.csv`, where a method is progressive: a row for each step of each trial. `name`; `selected`, the number of
  images that the step trusted, `selected_poison`, their poisoned share, and `random_poison`, that of a random pick; the
  figures of the model after the step; `detection_` figures of its scores.
- `leaderboard.csv`: a row for each cell. `NAME_mean` and `NAME_std` (sample standard deviation) over the seeds that are
  done, `NAME_t95` half of the 95 % t-interval (the one to print), `NAME_low` and `NAME_high` those of the bootstrap, a
  count for each state, and the first reason of each. `kind` is `measured` or `reported`.
- `wide.csv`: a row for each defense. Means over attacks, `asr_median`, `asr_high` (the number of attacks above 10 %) of
  `asr_cells`, `rank`, and `ATTACK: NAME` for each attack.
- `leaderboard.md`, `leaderboard.tex` (`\input` it; needs `booktabs` and `textcomp`), `leaderboard.html` (one file).
- `connection.csv` (`python -m bench.connection`): a row for each model (`kind`: `infected`, `clean_control`, `noise` or
  `repaired`), radius and seed. `fooled`; `concentration`, the share of the fooled images that go to the target;
  `similarity` and `overlap`, how much closer than the clean image they are to the triggered one; each with `_low` and
  `_high`; `lift` over the concentration of the control; `top_is_target`; `classes`, the distribution over classes."""

_METHODS = f"""# Attacks and defenses
{NOTE}

Set a value with `attack.NAME.SETTING=VALUE` or `defense.NAME.SETTING=VALUE` on the command line, or sweep it with
`grid.sweep`. Defaults are the paper's unless *Differs* says otherwise."""


_SETTINGS = f"""# Harness settings
{NOTE}

Set a value with `NAME=VALUE` on the command line, or in the YAML file of a grid. The settings of attacks and defenses
are in [methods.md](methods.md). Of the groups below only `train`, `reserve` and `measure` may differ from cell to cell,
by a sweep or an exception."""


def pages() -> dict[str, str]:
    """File name -> text of every page that is written from the code."""
    from bench.experiment.load import load_methods

    load_methods([])
    return {"columns.md": _columns(), "methods.md": _methods(), "settings.md": _harness()}


# Columns -------------------------------------------------------------------------------------------------------------


def _columns() -> str:
    from bench.reporting.columns import COSTS, MEASURES

    def table(columns: Any) -> list[str]:
        better = {"higher": "higher", "lower": "lower", "": "–"}
        rows = [
            [c.heading, f"`{c.name}`", c.unit or "count", better[c.better], "yes" if c.shown else "", c.about]
            for c in columns
        ]
        return _table(["printed as", "in files and MLflow", "unit", "better", "shown", "meaning"], rows)

    lines = [
        *(_COLUMNS.splitlines()),
        "",
        "## Figures",
        "",
        *table(MEASURES),
        "",
        "## Cost",
        "",
        *table(COSTS),
        "",
        "## Other columns of `trials.csv`",
        "",
        *_table(["column", "meaning"], [[f"`{name}`", text] for name, text in PLACES.items()]),
        "",
        "## States",
        "",
        *_table(["state", "meaning"], [[f"`{name}`", text] for name, text in STATES.items()]),
        "",
        *(_FILES.splitlines()),
    ]
    return "\n".join(lines) + "\n"


# Methods -------------------------------------------------------------------------------------------------------------


def _methods() -> str:
    from attacks.base import Attack, attack
    from defenses.base import THREAT_MODELS, Defense, defense, offered

    def setting(name: str, cls: type) -> str:
        works = {threat_model: view.__name__ for threat_model in THREAT_MODELS if (view := offered(cls, threat_model))}
        return "; ".join(f"`{threat_model}` (sees `{view}`)" for threat_model, view in works.items())

    def label(name: str, cls: type) -> str:
        return ", ".join(mode.replace("_", "-") for mode in cls.label_modes)  # type: ignore[attr-defined]

    lines = [
        *(_METHODS.splitlines()),
        "",
        "## Settings of every attack",
        "",
        *_table(HEADER, _settings(Attack, object)),
        "",
        "## Attacks",
        "",
        "![clean image, triggered image and difference, for sixteen attacks](../../results/readme/gallery.png)",
        "",
        *_all(attack, Attack, "labels", label),
        "## Defenses",
        "",
        *_all(defense, Defense, "works in", setting),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _all(registry: dict[str, type], base: type, fact: str, of: Any) -> list[str]:
    lines: list[str] = []
    told: dict[str, str] = {}  # file -> the method that it was told for
    own_methods = {name: cls for name, cls in registry.items() if cls.__module__.partition(".")[0] in OURS}
    for name, cls in sorted(own_methods.items(), key=_place):
        file = _file(cls)
        lines += [f"### {name}", ""]
        if file in told:
            first = registry[told[file]]
            lines += [f"{_summary(cls)} {fact.capitalize()}: {of(name, cls)}.", ""]
            changed = [(f.name, _default(f)) for f in fields(cls) if _default(f) != _defaults(first).get(f.name)]
            lines += [f"As `{told[file]}`, but " + ", ".join(f"`{key}={value}`" for key, value in changed) + ".", ""]
            continue
        told[file] = name
        title, parts = _header(cls)
        lines += [title, ""]
        facts = [("Paper", parts.get("Paper", "none.")), ("Differs", parts.get("Differs", "none known."))]
        facts += [(fact.capitalize(), of(name, cls) + ".")]
        facts += [("Limits", parts["Limits"])] if "Limits" in parts else []
        lines += [f"- {key}: {text}" for key, text in facts] + [f"- Code: [{file}](../../{file})", ""]
        rows = _settings(cls, base)
        if rows:
            lines += [*_table(HEADER, rows), ""]
    return lines


def _harness() -> str:
    """Every group of the configuration but those of the methods."""
    from bench.experiment.schema import Config

    lines = _SETTINGS.splitlines()

    def group(prefix: str, cls: type) -> None:
        inner = {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}
        lines.extend(
            ["", f"## {prefix.rstrip('.') or 'General'}", "", *([_plain(cls.__doc__ or ""), ""] if prefix else [])]
        )
        lines.extend(_table(HEADER, _settings(cls, object, prefix)))
        for name, inner_class in inner.items():
            group(f"{prefix}{name}.", inner_class)  # type: ignore[arg-type]

    group("", Config)
    return "\n".join(lines) + "\n"


def _place(named: tuple[str, type]) -> tuple[Any, ...]:
    """This project's own methods first, each followed by its presets."""
    name, cls = named
    return _file(cls).startswith("baselines"), _file(cls), name != _stem(cls), name


def _file(cls: type) -> str:
    return cls.__module__.replace(".", "/") + ".py"


def _stem(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def _summary(cls: type) -> str:
    return _plain((cls.__doc__ or "").strip().split("\n\n")[0])


def _header(cls: type) -> tuple[str, dict[str, str]]:
    """The first line of a method's file, and what stands behind `Paper:`, `Differs:` and `Limits:`."""
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    title, _, rest = text.partition("\n\n")
    sections = re.split(r"^(Papers?|Differs|Limits): ", rest, flags=re.MULTILINE)
    parts = {
        key.rstrip("s") if key == "Papers" else key: value
        for key, value in zip(sections[1::2], sections[2::2], strict=True)
    }
    return _plain(title), {key: _plain(value) for key, value in parts.items()}


def _settings(cls: type, base: type, prefix: str = "") -> list[list[str]]:
    """Setting, default, range and meaning of what a class adds to its base, or changes."""
    usual = {} if base is object else _defaults(base)
    known = declared(cls)
    rows = []
    for each in fields(cls):
        setting = known[each.name]
        if setting is not None and usual.get(each.name) != _default(each):
            # The default of dataset.root is this machine's $BENCH_DATA.
            default = "data" if each.name == "root" else _default(each)
            rows.append([f"`{prefix}{each.name}`", f"`{default}`", setting.range, setting.about])
    return rows


def _defaults(cls: type) -> dict[str, str]:
    return {f.name: _default(f) for f in fields(cls)}


def _default(f: Field[Any]) -> str:
    """As a command line has it."""
    from bench.experiment.overrides import to_override

    value = f.default_factory() if f.default_factory is not MISSING else f.default
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float) and len(repr(value)) > 12:  # 6 / 255 is what was meant
        levels = 255 * value
        return f"{levels:.0f}/255" if abs(levels - round(levels)) < 1e-9 else f"{value:.4g}"
    return to_override(value)


# Markdown ------------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.split())


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]
