"""What the triggers of stored implants look like, and how far they change an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.experiment.experiment import Experiment

if TYPE_CHECKING:
    from torch import Tensor

    from bench.experiment.trial import Trial
    from bench.pipeline.runner import Runner


def pictures(experiment: Experiment) -> list[Path]:
    """`trigger_*.png` in the grid's folder, one image for each stored trigger, which the page shows behind its cells.

    Returns:
        `triggers.png`, the figure of all of them, with a PDF beside it; nothing if no trigger is stored.
    """
    import torch

    from bench.reporting.figures.triggers import trigger_picture, triggers
    from bench.reporting.page import picture_of

    for path in (*experiment.folder.glob("trigger_*.png"), *experiment.folder.glob("triggers.*")):
        path.unlink()  # of other settings
    # What is swept need not change the trigger: the figure shows each once.
    samples: dict[tuple[str, str], list[tuple[Trial, Tensor, Tensor]]] = defaultdict(list)
    for trial, images, triggered in stamped(experiment, runner_of(experiment), 1):
        experiment.folder.mkdir(parents=True, exist_ok=True)
        name = picture_of(trial.dataset, trial.model, trial.attack, trial.variant)
        trigger_picture(images[0], triggered[0], experiment.folder / name)
        alike = samples[trial.attack, trial.dataset]
        if not any(torch.equal(triggered[0], shown) for _, _, shown in alike):
            alike.append((trial, images[0], triggered[0]))
    drawn = {
        title_of(experiment, trial, len(alike) > 1): (image, triggered)
        for alike in samples.values()
        for trial, image, triggered in alike
    }
    return [triggers(drawn, experiment.folder, f"Grid {experiment.cfg.grid.name}")] if drawn else []


def runner_of(experiment: Experiment) -> Runner:
    import torch

    from bench.pipeline.runner import Runner

    return Runner(experiment.store, experiment.infos, torch.device("cpu"))


def title_of(experiment: Experiment, trial: Trial, apart: bool = True) -> str:
    from bench.reporting.page import swept

    # Whose setting it is stands in front of it.
    variant = swept(trial.variant).replace("attack.", "") if apart else ""
    model = trial.model if apart and len(experiment.cfg.grid.models) > 1 else ""
    parts = [trial.attack, *([trial.dataset] if len(experiment.infos) > 1 else []), model, variant]
    return ", ".join(word for word in parts if word)


def stamped(experiment: Experiment, bench: Runner, count: int) -> Iterator[tuple[Trial, Tensor, Tensor]]:
    """A trial of each stored trigger of a grid, with test images (count, C, H, W) in [0, 1] before and behind it."""
    from bench.experiment.identity import attack_from
    from bench.reporting.page import picture_of

    seen: set[str] = set()
    for trial in experiment.trials:
        attacker = attack_from(trial.implant)
        name = picture_of(trial.dataset, trial.model, trial.attack, trial.variant)
        implant = experiment.store.result("implant", trial.keys.implant)
        if name in seen or not attacker.poison_rate or implant is None or implant["status"] != "done":
            continue
        if not experiment.store.usable("implant", trial.keys.implant, "trigger"):
            continue  # deleted for its room, or damaged, which is said: the figures are still there
        seen.add(name)
        test = bench.test_set(trial.dataset)
        chosen = test[attacker.eligible(test.labels).nonzero().flatten()[:count]]
        images = chosen.images.float() / 255
        yield trial, images, attacker.trigger(images, bench.trigger_of(trial))


def on_clean_model(experiment: Experiment, bench: Runner, trial: Trial) -> dict[str, float | None]:
    """`clean_model_asr`, `_recovery` and `_floor` of a trigger; nothing if no clean model of its seed is stored."""
    from bench.engine.metrics import attack_figures, predict

    axes = ("dataset", "model", "seed")
    for clean in experiment.trials:
        alike = all(getattr(clean, axis) == getattr(trial, axis) for axis in axes)
        if alike and clean.attack == "none" and experiment.store.usable("implant", clean.keys.implant, "model"):
            break
    else:
        return {}
    case, model = bench.case(trial), bench.stored(clean, "implant", clean.keys.implant)
    true = case.test.labels
    figures = attack_figures(
        clean=predict(model, case.test),
        triggered=case.predict_triggered(model, case.test),
        true=true,
        target_labels=case.target_labels(true),
        eligible=case.attacker.eligible(true),
    )
    names = {"asr": "asr", "recovery": "recovery_accuracy", "floor": "false_target_rate"}
    return {f"clean_model_{name}": figures[figure] for name, figure in names.items()}


def with_another_trigger(experiment: Experiment, bench: Runner, trial: Trial) -> dict[str, float | None]:
    """`other_seed_asr`: of the infected model, under the trigger of the next stored seed; nothing if there is none.

    It is low where a network has learned this trigger and not its kind (WaNet's field, a generator's pattern), and the
    ASR itself where the trigger is the same for every seed (a white patch).
    """
    axes = ("dataset", "model", "attack", "variant")
    for other in experiment.trials:
        alike = all(getattr(other, axis) == getattr(trial, axis) for axis in axes) and other.seed != trial.seed
        stored = experiment.store.usable
        if (
            alike
            and stored("implant", other.keys.implant, "trigger")
            and stored("implant", trial.keys.implant, "model")
        ):
            case, model = bench.case(other), bench.stored(trial, "implant", trial.keys.implant)
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
