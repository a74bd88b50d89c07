"""A picture of every trigger: clean image, triggered image, the difference made visible, and how large it is.

    python -m bench.gallery [grid=NAME] [key=value ...]     the same settings as bench.run

Drawn from the infected models that are in the store, with the tensors of the trigger that they were trained with;
computes nothing else. Writes gallery.png and gallery.csv beside the leaderboard. The scores are means over 100 test
images: L0 (share of pixels changed), L2 (norm, pixels in [0, 1]), L-infinity (levels of 255) and SSIM (1: no
difference). Where the grid has the clean model (attack `none`) of the same seed, `clean_model_asr` is the ASR of the
trigger on it, `clean_model_recovery` the share of the same images that it still knows, and `clean_model_floor` the ASR
without any trigger: a trigger far above its floor moves every model, and its ASR is not that of a backdoor alone. Where
another seed is stored, `other_seed_asr` is the infected model's ASR under that seed's trigger: has it learned this
trigger or any of the kind?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.door import Plan, enter, plan

if TYPE_CHECKING:
    from torch import Tensor

    from bench.grid import Trial
    from bench.pipeline import Bench

IMAGES = 100  # of each attack, for the scores


def main(arguments: list[str]) -> int:
    opened = plan(arguments)
    import pandas as pd

    from bench.config import UserError
    from bench.reporting.page import swept
    from bench.reporting.plots import gallery
    from bench.reporting.spreadsheet import write_csv

    bench = _bench(opened)
    drawn: dict[str, tuple[Tensor, Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for trial, images, triggered in stamped(opened, bench, IMAGES):
        drawn[title_of(opened, trial)] = images[:3], triggered[:3]
        place = {"attack": trial.attack, "dataset": trial.dataset, "model": trial.model}
        place |= {"variant": swept(trial.variant)} if swept(trial.variant) else {}
        figures = on_clean_model(opened, bench, trial) | with_another_trigger(opened, bench, trial)
        rows.append({**place, **scores(images, triggered), **figures})
    if not rows:
        raise UserError(f"no infected model of grid {opened.cfg.grid.name} is stored yet; run it with bench.run first")
    opened.folder.mkdir(parents=True, exist_ok=True)
    write_csv(pd.DataFrame(rows), opened.folder / "gallery.csv")
    path: Path = gallery(drawn, rows, opened.folder)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))
    print(f"Gallery: {path}")
    return 0


def pictures(opened: Plan) -> list[Path]:
    """`trigger_*.png` in the grid's folder, one image for each stored trigger, which the page shows behind its cells.

    Returns:
        `triggers.png`, the figure of all of them, with a PDF beside it; nothing if no trigger is stored.
    """
    import torch

    from bench.reporting.page import picture_of
    from bench.reporting.plots import trigger_picture, triggers

    for path in (*opened.folder.glob("trigger_*.png"), *opened.folder.glob("triggers.*")):
        path.unlink()  # of other settings
    # What is swept need not change the trigger: the figure shows each once.
    found: dict[tuple[str, str], list[tuple[Trial, Tensor, Tensor]]] = defaultdict(list)
    for trial, images, triggered in stamped(opened, _bench(opened), 1):
        opened.folder.mkdir(parents=True, exist_ok=True)
        name = picture_of(trial.dataset, trial.model, trial.attack, trial.variant)
        trigger_picture(images[0], triggered[0], opened.folder / name)
        alike = found[trial.attack, trial.dataset]
        if not any(torch.equal(triggered[0], shown) for _, _, shown in alike):
            alike.append((trial, images[0], triggered[0]))
    drawn = {
        title_of(opened, trial, len(alike) > 1): (image, triggered)
        for alike in found.values()
        for trial, image, triggered in alike
    }
    return [triggers(drawn, opened.folder, f"Grid {opened.cfg.grid.name}")] if drawn else []


def _bench(opened: Plan) -> Bench:
    import torch

    from bench.pipeline import Bench

    return Bench(opened.store, opened.infos, torch.device("cpu"))


def title_of(opened: Plan, trial: Trial, apart: bool = True) -> str:
    from bench.reporting.page import swept

    # Whose setting it is stands in front of it.
    variant = swept(trial.variant).replace("attack.", "") if apart else ""
    model = trial.model if apart and len(opened.cfg.grid.models) > 1 else ""
    parts = [trial.attack, *([trial.dataset] if len(opened.infos) > 1 else []), model, variant]
    return ", ".join(part for part in parts if part)


def stamped(opened: Plan, bench: Bench, count: int) -> Iterator[tuple[Trial, Tensor, Tensor]]:
    """A trial of each stored trigger of a grid, with test images (count, C, H, W) in [0, 1] before and behind it."""
    from bench.pipeline import attack_from
    from bench.reporting.page import picture_of

    seen: set[str] = set()
    for trial in opened.trials:
        attacker = attack_from(trial.implant)
        name = picture_of(trial.dataset, trial.model, trial.attack, trial.variant)
        implant = opened.store.result("implant", trial.keys()[0])
        if name in seen or not attacker.poison_rate or implant is None or implant["status"] != "done":
            continue
        if not opened.store.usable("implant", trial.keys()[0], "trigger"):
            continue  # deleted for its room, or damaged, which is said: the figures are still there
        seen.add(name)
        test = bench.test_set(trial.dataset)
        chosen = test[attacker.judged(test.labels).nonzero().flatten()[:count]]
        images = chosen.images.float() / 255
        yield trial, images, attacker.trigger(images, bench.trigger_of(trial))


def on_clean_model(opened: Plan, bench: Bench, trial: Trial) -> dict[str, float | None]:
    """`clean_model_asr`, `_recovery` and `_floor` of a trigger; nothing if no clean model of its seed is stored."""
    from bench.engine.metrics import attack_figures, predict

    axes = ("dataset", "model", "seed")
    for clean in opened.trials:
        alike = all(getattr(clean, axis) == getattr(trial, axis) for axis in axes)
        if alike and clean.attack == "none" and opened.store.usable("implant", clean.keys()[0], "model"):
            break
    else:
        return {}
    case, model = bench.case(trial), bench.stored(clean, "implant", clean.keys()[0])
    true = case.test.labels
    figures = attack_figures(
        clean=predict(model, case.test),
        triggered=case.predict_triggered(model, case.test),
        true=true,
        wanted=case.wanted(true),
        judged=case.attacker.judged(true),
    )
    names = {"asr": "asr", "recovery": "recovery_accuracy", "floor": "false_target_rate"}
    return {f"clean_model_{name}": figures[figure] for name, figure in names.items()}


def with_another_trigger(opened: Plan, bench: Bench, trial: Trial) -> dict[str, float | None]:
    """`other_seed_asr`: of the infected model, under the trigger of the next stored seed; nothing if there is none.

    It is low where a network has learned this trigger and not its kind (WaNet's field, a generator's pattern), and the
    ASR itself where the trigger is the same for every seed (a white patch).
    """
    axes = ("dataset", "model", "attack", "variant")
    for other in opened.trials:
        alike = all(getattr(other, axis) == getattr(trial, axis) for axis in axes) and other.seed != trial.seed
        stored = opened.store.usable
        if alike and stored("implant", other.keys()[0], "trigger") and stored("implant", trial.keys()[0], "model"):
            case, model = bench.case(other), bench.stored(trial, "implant", trial.keys()[0])
            return {"other_seed_asr": case.success(model, case.test)}
    return {}


def scores(images: Tensor, triggered: Tensor) -> dict[str, float]:
    """How far triggered images (N, C, H, W) in [0, 1] are from the clean ones, means over images.

    Returns:
        `l0`: share of pixels that differ in any channel; `l2`: Euclidean norm; `linf`: levels of 255; `ssim`.
    """
    difference = triggered - images
    return {
        "l0": (difference.abs() > 1e-6).any(dim=1).double().mean().item(),
        "l2": difference.flatten(1).norm(dim=1).double().mean().item(),
        "linf": 255 * difference.flatten(1).abs().amax(dim=1).double().mean().item(),
        "ssim": ssim(images, triggered).double().mean().item(),
    }


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """(N,): structural similarity with a Gaussian window of 11 pixels and sigma 1.5, borders reflected.

    Without the border, as some libraries have it, a patch in the corner would hardly count.

    Paper: Wang et al., IEEE Transactions on Image Processing 13(4), 2004.
    """
    import torch
    import torch.nn.functional as F

    size = min(11, first.shape[-1], first.shape[-2])
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(first.shape[1], 1, size, size)

    def mean(images: Tensor) -> Tensor:
        before, after = (size - 1) // 2, size // 2
        padded = F.pad(images, (before, after, before, after), mode="reflect")
        return F.conv2d(padded, window, groups=images.shape[1])

    x, y = first.double(), second.double()
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean(dim=(1, 2, 3))


if __name__ == "__main__":
    enter(main, __doc__)
