"""Do the papers' claims hold in this table? Answers for each: reproduced, not reproduced, or not tested.

    python -m bench.claims [grid=NAME] [key=value ...]      the same settings as bench.run
    python -m bench.claims results/NAME/trials.csv          a published table

`results/claims.yaml` lists the claims with their sources. The exit status is 1 if a tested claim does not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.door import enter

if TYPE_CHECKING:
    import pandas as pd

CLAIMS = Path("results/claims.yaml")
KEYS = {"figure", "of", "minus", "at_most", "at_least", "attacks"}
ROWS = {"defense", "setting", "reserve"}  # what `of` and `minus` choose rows by


@dataclass
class Answer:
    """What a table says of one claim.

    Attributes:
        verdict: `reproduced`, `not reproduced` or `not tested`.
        evidence: the figures behind it, one line for each check.
    """

    claim: dict[str, Any]
    verdict: str
    evidence: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    from omegaconf import OmegaConf

    claims = load(CLAIMS)
    if len(arguments) == 1 and arguments[0].endswith(".csv"):
        from bench.reporting.table import read_trials

        trials = read_trials(Path(arguments[0]))
        settings = Path(arguments[0]).with_name("config.yaml")  # a report leaves it there
        tainted = OmegaConf.load(settings).reserve.contamination if settings.exists() else 0.0
    else:
        from bench.door import plan
        from bench.reporting.table import of_trials

        opened = plan(arguments)
        trials = of_trials(opened.trials, opened.store, opened.published)
        tainted = opened.cfg.reserve.contamination
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

    from bench.config import UserError

    if not path.exists():
        raise UserError(f"{path} is not here; run from the folder that holds results/")
    claims: list[dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    for claim in claims:
        for check in claim.get("checks", ()):
            chosen = {"of": check.get("of") or {}, "minus": check.get("minus") or {}}
            wrong = set(check) - KEYS | {f"{key}.{name}" for key in chosen for name in set(chosen[key]) - ROWS}
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
    own = trials.variant.str.extract(r"(?:^|, )reserve\.contamination=([\d.e-]+)", expand=False)
    return own.astype(float).fillna(usual)


def answer(claim: dict[str, Any], trials: pd.DataFrame) -> Answer:
    """Judge one claim: it holds if every check does, and is not tested if a check finds no rows."""
    verdicts, evidence = [], []
    for check in claim["checks"]:
        verdict, line = judge(check, trials)
        verdicts.append(verdict)
        evidence.append(line)
    if False in verdicts:
        return Answer(claim, "not reproduced", evidence)
    return Answer(claim, "not tested" if None in verdicts else "reproduced", evidence)


def judge(check: dict[str, Any], trials: pd.DataFrame) -> tuple[bool | None, str]:
    """One check against a table of trials: its verdict (None without figures) and the figures in a line.

    A cell counts with the mean of its seeds, each variant of a sweep for itself. A cell of which a trial failed,
    diverged or was wrecked does not hold.
    """
    figure, minus = check["figure"], check.get("minus")
    values = _means(trials, check["of"], figure)
    if minus is not None:
        others = _means(trials, minus, figure)
        values = {place: value - others[place] for place, value in values.items() if place in others}
    bounds = [f"at most {100 * check['at_most']:g}"] if "at_most" in check else []
    bounds += [f"at least {100 * check['at_least']:g}"] if "at_least" in check else []
    wanted = check.get("attacks", "every")
    what = f"{figure} of {_name(check['of'])}" + (f" minus {_name(minus)}" if minus else "")
    line = f"{what}, {' and '.join(bounds)} on {wanted} attack{'s' if wanted != 'every' else ''}"
    if not values:
        return None, f"{line}: no such rows"
    holds = {
        place: check.get("at_least", -math.inf) <= value <= check.get("at_most", math.inf)  # not a number: does not
        for place, value in values.items()
    }
    told = ", ".join(
        f"{' '.join(place)} {'wrecked or not done' if math.isnan(value) else f'{100 * value:.1f}'}"
        + ("" if holds[place] else " (!)")
        for place, value in values.items()
    )
    # With fewer attacks than the claim asks for, nothing can be said unless it holds or fails already.
    by_data: dict[tuple[str, ...], list[bool]] = {}
    for place, good in holds.items():
        by_data.setdefault(place[:-1], []).append(good)
    verdicts: list[bool | None] = []
    for found in by_data.values():
        if wanted == "every":
            verdicts.append(all(found))
        else:
            decided = sum(found) >= wanted or len(found) > wanted
            verdicts.append(sum(found) >= wanted if decided else None)
    verdict = False if False in verdicts else None if None in verdicts else True
    return verdict, f"{line}: {told}"


def _means(trials: pd.DataFrame, of: dict[str, str], figure: str) -> dict[tuple[str, ...], float]:
    """(data set, network, variant if any, attack) -> mean over seeds; NaN where one failed, diverged or was wrecked."""
    if figure not in trials:
        return {}
    part = trials[trials.poison_rate > 0]
    for key, value in of.items():
        part = part[(part.contamination > 0) == (value == "tainted") if key == "reserve" else part[key] == value]
    part = part[~part.status.isin(["missing", "not applicable"])]
    found = {}
    for place, group in part.groupby(["dataset", "model", "variant", "attack"], sort=False):
        whole = (group.status == "done").all()
        if whole and group[figure].isna().all():
            continue  # the table does not have this figure
        found[tuple(str(name) for name in place if name)] = float(group[figure].mean()) if whole else math.nan
    return found


def _name(of: dict[str, str]) -> str:
    return " ".join(of.values())


def markdown(answers: list[Answer]) -> str:
    """The answers as a list, with the figures behind each."""
    lines = []
    for found in answers:
        lines.append(f"- **{found.verdict}**: {found.claim['says']} ({found.claim['source']}; `{found.claim['id']}`)")
        lines += [f"  - {line}" for line in found.evidence]
    return "\n".join(lines)


if __name__ == "__main__":
    enter(main, __doc__)
