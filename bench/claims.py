"""Do the papers' claims hold in this table? Answers for each: reproduced, not reproduced, not tested, or not testable.

    python -m bench.claims [grid=NAME] [key=value ...]      the same settings as bench.run
    python -m bench.claims results/NAME/trials.csv          a published table

`results/claims.yaml` lists the claims with their sources. The exit status is 1 if a tested claim does not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._command import run_command

if TYPE_CHECKING:
    import pandas as pd

CLAIMS = Path("results/claims.yaml")
KEYS = {"figure", "of", "minus", "same", "otherwise", "at_most", "at_least", "attacks"}
CELL = ["dataset", "model", "variant", "attack"]
ROWS = {"defense", "threat_model", "reserve"}  # what `of` and `minus` choose rows by


@dataclass
class Answer:
    """What a table says of one claim.

    Attributes:
        verdict: `reproduced`, `not reproduced`, `not tested` (no such rows) or `not testable` (rows that may not be
            held against each other).
        evidence: the figures behind it, one line for each check.
    """

    claim: dict[str, Any]
    verdict: str
    evidence: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    from omegaconf import OmegaConf

    from bench.engine.packages import shipped

    claims = load(shipped(CLAIMS))
    if len(arguments) == 1 and arguments[0].endswith(".csv"):
        from bench.reporting.trials import read_trials

        trials = read_trials(Path(arguments[0]))
        settings = Path(arguments[0]).with_name("config.yaml")  # a report leaves it there
        tainted = OmegaConf.load(settings).reserve.contamination if settings.exists() else 0.0
    else:
        from bench._command import open_experiment
        from bench.reporting.trials import of_trials

        experiment = open_experiment(arguments)
        trials = of_trials(experiment.trials, experiment.store, experiment.reused)
        tainted = experiment.cfg.reserve.contamination
    trials["contamination"] = contamination(trials, tainted)
    answers = [answer(claim, trials) for claim in claims]
    print(markdown(answers))
    return int(any(found.verdict == "not reproduced" for found in answers))


def load(path: Path) -> list[dict[str, Any]]:
    """The claims of a file.

    Raises:
        UserError: there is no such file, or a claim lacks what it needs.
    """
    from omegaconf import OmegaConf

    from bench.engine.errors import UserError

    if not path.exists():
        raise UserError(f"{path} is not here; write the path of a file with claims")
    claims: list[dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    for claim in claims:
        for check in claim.get("checks", ()):
            chosen = {"of": check.get("of") or {}, "minus": check.get("minus") or {}}
            wrong = set(check) - KEYS | {f"{key}.{name}" for key in chosen for name in set(chosen[key]) - ROWS}
            if "same" in check and not {"minus", "otherwise"} <= set(check):
                raise UserError(f"{path}, {claim.get('id')}: same needs minus, and otherwise: what to compute instead")
            if wrong or not {"figure", "of"} <= set(check) or not {"at_most", "at_least"} & set(check):
                raise UserError(
                    f"{path}, {claim.get('id')}: a check needs figure, of, and at_most or at_least"
                    + (f", and has no {', '.join(sorted(wrong))}" if wrong else "")
                )
            for rows in chosen.values():
                if rows.get("reserve", "clean") not in ("clean", "tainted"):
                    raise UserError(
                        f"{path}, {claim.get('id')}: reserve is {rows['reserve']!r}; write clean or tainted"
                    )
        if not {"id", "source", "says", "checks"} <= set(claim):
            raise UserError(f"{path}, {claim.get('id', claim)}: a claim needs id, source, says and checks")
    return claims


def contamination(trials: pd.DataFrame, usual: float) -> pd.Series:
    """The poisoned share of each trial's reserve: its own where the table sweeps it, else the grid's."""
    swept = trials.variant.str.extract(r"(?:^|, )reserve\.contamination=([\d.e-]+)", expand=False)
    return swept.astype(float).fillna(usual)


def answer(claim: dict[str, Any], trials: pd.DataFrame) -> Answer:
    """Judge one claim: it holds if every check does, and is not tested if a check finds no rows."""
    verdicts, evidence, testable = [], [], True
    for check in claim["checks"]:
        verdict, line = judge(check, trials)
        verdicts.append(verdict)
        evidence.append(line)
        if reason := unfair(check, trials):
            evidence.append(reason)
            testable = False
    if False in verdicts:
        return Answer(claim, "not reproduced", evidence)
    if not testable:
        return Answer(claim, "not testable", evidence)
    return Answer(claim, "not tested" if None in verdicts else "reproduced", evidence)


def judge(check: dict[str, Any], trials: pd.DataFrame) -> tuple[bool | None, str]:
    """One check against a table of trials: its verdict (None without figures) and the figures in a line.

    A cell counts with the mean of its seeds, each variant of a sweep for itself. A cell of which a trial failed,
    diverged or was wrecked does not hold.
    """
    figure, minus = check["figure"], check.get("minus")
    if minus is None:
        values = _means(trials, check["of"], figure)
    else:
        values = {cell: value for cell, value in _differences(check, trials).items() if value is not None}
    bounds = [f"at most {100 * check['at_most']:g}"] if "at_most" in check else []
    bounds += [f"at least {100 * check['at_least']:g}"] if "at_least" in check else []
    wanted = check.get("attacks", "every")
    what = f"{figure} of {_name(check['of'])}" + (f" minus {_name(minus)}" if minus else "")
    line = f"{what}, {' and '.join(bounds)} on {wanted} attack{'s' if wanted != 'every' else ''}"
    if not values:
        return None, f"{line}: no such rows"
    holds = {
        cell: check.get("at_least", -math.inf) <= value <= check.get("at_most", math.inf)  # not a number: does not
        for cell, value in values.items()
    }
    told = ", ".join(
        f"{' '.join(cell)} {'wrecked or not done' if math.isnan(value) else f'{100 * value:.1f}'}"
        + ("" if holds[cell] else " (!)")
        for cell, value in values.items()
    )
    # With fewer attacks than the claim asks for, nothing can be said unless it holds or fails already.
    by_data: dict[tuple[str, ...], list[bool]] = {}
    for cell, good in holds.items():
        by_data.setdefault(cell[:-1], []).append(good)
    verdicts: list[bool | None] = []
    for holding in by_data.values():
        if wanted == "every":
            verdicts.append(all(holding))
        else:
            decided = sum(holding) >= wanted or len(holding) > wanted
            verdicts.append(sum(holding) >= wanted if decided else None)
    verdict = False if False in verdicts else None if None in verdicts else True
    return verdict, f"{line}: {told}"


def unfair(check: dict[str, Any], trials: pd.DataFrame) -> str:
    """What cannot be held against each other in a check, and what to compute instead; empty if nothing."""
    differences = _differences(check, trials) if "minus" in check else {}
    places = [" ".join(cell) for cell, value in differences.items() if value is None]
    if not places:
        return ""
    what = f"with the same {check['same']} and " if "same" in check else ""
    advice = f"; {check['otherwise']}" if "same" in check else "; compute both on one kind of device"
    return f"not testable: no {_name(check['of'])} {what}of the same infected models on {', '.join(places)}{advice}"


def _differences(check: dict[str, Any], trials: pd.DataFrame) -> dict[tuple[str, ...], float | None]:
    """The figure of `of` less that of `minus` in each place that has both; None where the two are no pair.

    A pair is of the same infected models and, where the check asks for it, of the same figure `same`: the first of the
    defenses that `of` names which is.
    """
    figure, same = check["figure"], check.get("same")
    others = _means(trials, check["minus"], figure)
    theirs = _models(trials, check["minus"])
    due = _means(trials, check["minus"], same) if same else {}
    differences: dict[tuple[str, ...], float | None] = {}
    names = check["of"].get("defense")
    for name in names if isinstance(names, list) else [names]:
        rows = check["of"] | ({"defense": name} if name else {})
        models, price = _models(trials, rows), _means(trials, rows, same) if same else {}
        for cell, value in _means(trials, rows, figure).items():
            if cell not in others or differences.get(cell) is not None:
                continue
            seeds = models.get(cell, {}).keys() & theirs.get(cell, {}).keys()
            alike = all(models[cell][seed] == theirs[cell][seed] for seed in seeds)
            paid = not same or (cell in price and price[cell] == due.get(cell))
            # What is lost does not hold, whatever it cost; a control that is lost is none.
            lost = math.isnan(others[cell]) or (not same and math.isnan(value))
            differences[cell] = value - others[cell] if (alike and paid) or lost else None
    return differences


def _models(trials: pd.DataFrame, of: dict[str, Any]) -> dict[tuple[str, ...], dict[int, str]]:
    """(data set, network, variant if any, attack) -> seed -> which infected model its figures are about."""
    from bench.reporting.trials import infected

    chosen = _chosen(trials, of)
    models_of: dict[tuple[str, ...], dict[int, str]] = {}
    if {"implant_weights", "infected_accuracy", "infected_asr"} <= set(chosen):
        models = infected(chosen)
        for cell, seed, model in zip(chosen[CELL].itertuples(index=False), chosen.seed, models, strict=True):
            if model:
                models_of.setdefault(tuple(str(name) for name in cell if name), {})[seed] = model
    return models_of


def _chosen(trials: pd.DataFrame, of: dict[str, Any]) -> pd.DataFrame:
    """The rows of poisoned models that `of` or `minus` names."""
    chosen = trials[trials.poison_rate > 0]
    for key, value in of.items():
        chosen = chosen[
            (chosen.contamination > 0) == (value == "tainted") if key == "reserve" else chosen[key] == value
        ]
    return chosen[~chosen.status.isin(["missing", "not applicable"])]


def _means(trials: pd.DataFrame, of: dict[str, str], figure: str) -> dict[tuple[str, ...], float]:
    """(data set, network, variant if any, attack) -> mean over seeds; NaN where one failed, diverged or was wrecked."""
    if figure not in trials:
        return {}
    chosen = _chosen(trials, of)
    means = {}
    for cell, group in chosen.groupby(CELL, sort=False):
        whole = (group.status == "done").all()
        if whole and group[figure].isna().all():
            continue  # the table does not have this figure
        means[tuple(str(name) for name in cell if name)] = float(group[figure].mean()) if whole else math.nan
    return means


def _name(of: dict[str, Any]) -> str:
    return " ".join(" or ".join(value) if isinstance(value, list) else value for value in of.values())


def markdown(answers: list[Answer]) -> str:
    """The answers as a list, with the figures behind each."""
    lines = []
    for answer in answers:
        lines.append(
            f"- **{answer.verdict}**: {answer.claim['says']} ({answer.claim['source']}; `{answer.claim['id']}`)"
        )
        lines += [f"  - {line}" for line in answer.evidence]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, __doc__)
