"""What is measured of a repaired model, and once of the infected model that it came from.

The definitions of the figures are in bench/engine; here they meet an attack, its trigger and the test set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.engine import connection, reactivation, robustness
from bench.engine.counts import images_of
from bench.engine.data import ImageSet, generator, to_uint8
from bench.engine.inference import inference_model
from bench.engine.metrics import (
    accuracy,
    accuracy_by_class,
    attack_figures,
    defense_effectiveness,
    predict,
    robust_accuracy,
    success_by_class,
)
from bench.engine.models import Classifier
from bench.engine.training import Diverged
from bench.measures.context import PROBE_IMAGES, RELEARN_TABLE, EvaluationContext, fixed_part
from bench.storage.store import Identity


def measured(
    model: Classifier, case: EvaluationContext, measure: Identity, inspected: dict[str, Any], clean: Tensor
) -> dict[str, Any]:
    """All that is measured of a repaired model.

    Args:
        measure: the settings under `measure`.
        inspected: what `inspected` gave for the infected model.
        clean: (N,) int64, the model's classes for the test set.
    """
    test, target_labels, eligible = (
        case.test,
        case.target_labels(case.test.labels),
        case.attacker.eligible(case.test.labels),
    )
    # A clean model has no triggered images; its figures are None, as where no image can be judged.
    triggered = case.predict_triggered(model, test) if eligible.any() else clean
    figures = attack_figures(
        clean=clean, triggered=triggered, true=test.labels, target_labels=target_labels, eligible=eligible
    )
    classes = [value for value in accuracy_by_class(clean, test.labels, case.num_classes) if value is not None]
    figures |= {"min_class_accuracy": min(classes)} | _against_infected(figures, clean, test, inspected["figures"])
    figures["cross_trigger_accuracy"] = _under_wrong_trigger(model, case) if eligible.any() else None
    attacked = fixed_part(test, measure["pgd_images"])
    figures["robust_accuracy"] = robust_accuracy(
        model,
        attacked,
        epsilon=measure["pgd_epsilon"],
        step_size=measure["pgd_step_size"],
        steps=measure["pgd_steps"],
        seed=case.seed,
    )
    result: dict[str, Any] = {
        "asr_by_class": success_by_class(triggered, target_labels, test.labels, eligible, case.num_classes),
        "warnings": [],
        "robust_images": len(attacked),
    }
    if measure["autoattack_images"]:
        images = fixed_part(test, measure["autoattack_images"])
        result["autoattack_images"] = len(images)
        result["autoattack"] = rows = robustness.curve(model, images, seed=case.seed)
        figures |= {"autoattack_accuracy": rows[-2]["accuracy"], "autoattack_l2_accuracy": rows[-1]["accuracy"]}
        result["warnings"] = robustness.square_warnings(rows) + robustness.masking_warnings(
            model,
            images,
            infected=case.infected(),
            epsilon=measure["pgd_epsilon"],
            step_size=measure["pgd_step_size"],
            steps=measure["pgd_steps"],
            seed=case.seed,
        )
    if "relearn" in inspected:
        rows = relearned(model, case, measure["relearn_poisoned"])
        result["relearn"] = [
            row | {f"{key}_clean_control": control.get(key) for key in ("asr", "steps", "clean_accuracy", "course")}
            for row, control in zip(rows, inspected["relearn"], strict=True)
        ]
        shown = next(row for row in result["relearn"] if row["poisoned"] == RELEARN_TABLE)
        figures |= _with_gain("relearn_asr", shown["asr"], shown["asr_clean_control"])
    if "reactivate" in inspected:
        figures |= _with_gain("reactivate_asr", reactivated(model, case), inspected["reactivate"])
    if "connection" in inspected:
        after = still_connected(model, case) if inspected["connection"] else []
        result["connection"] = [
            row | {"repaired": repaired} for row, repaired in zip(inspected["connection"], after, strict=True)
        ]
    return result | {"figures": figures}


def inspected(
    infected: Classifier, control: Classifier | None, case: EvaluationContext, asked: Identity
) -> dict[str, Any]:
    """All that is measured of the infected model and of its clean control.

    Args:
        asked: the identity of the stage: what it names of `relearn`, `reactivate` and `connection` is measured.
    """
    figures = {
        "infected_accuracy": accuracy(predict(infected, case.test), case.test.labels),
        "infected_asr": case.success(infected, case.test),
    }
    result: dict[str, Any] = {"figures": figures}
    if control is None:
        return result
    if "connection" in asked:
        result["connection"] = connected(infected, control, case)
    if "reactivate" in asked:
        result["reactivate"] = reactivated(control, case)
    if "relearn" in asked:
        result["relearn"] = relearned(control, case, asked["relearn"])
    return result


def _against_infected(
    figures: dict[str, float | None], clean: Tensor, test: ImageSet, before: dict[str, float | None]
) -> dict[str, float | None]:
    """The infected model's own figures, and what the defense made of them."""
    rating = None
    if figures["asr"] is not None and before["infected_asr"] is not None and before["infected_accuracy"] is not None:
        rating = defense_effectiveness(
            accuracy=(before["infected_accuracy"], accuracy(clean, test.labels)),
            asr=(before["infected_asr"], figures["asr"]),
        )
    return {**before, "der": rating}


@torch.no_grad()
def _under_wrong_trigger(model: Classifier, case: EvaluationContext) -> float | None:
    """Accuracy on test images with a trigger that must not work; None for attacks that have no such thing."""
    if not case.attacker.has_wrong_trigger:
        return None
    if case.attacker.quantise:
        return accuracy(predict(model, case.wrongly_triggered), case.test.labels)
    source = generator(case.seed, "wrong trigger", device=case.test.device)
    fast = inference_model(model)
    predictions = [
        fast(case.attacker.wrong_trigger(images, case.tensors, source)).argmax(1) for images, _ in case.test.chunks()
    ]
    return accuracy(torch.cat(predictions), case.test.labels)


def _with_gain(name: str, value: float | None, control: float | None) -> dict[str, float | None]:
    """A figure, that of the clean control, and what is left of it when what any model does is taken off."""
    gain = value - control if value is not None and control is not None else None
    return {name: value, f"{name}_clean_control": control, f"{name.removesuffix('_asr')}_gain": gain}


# Re-activation and connection --------------------------------------------------------------------------------------


def relearned(model: Classifier, case: EvaluationContext, counts: list[int]) -> list[dict[str, Any]]:
    """Retune copies of a model with so many poisoned images each: ASR behind it, and the course to there.

    The images are drawn from the training split, the same ones for a repaired model and its control, and each smaller
    number of poisoned ones is a part of the larger. A number beyond what the split has is all of them, and `poisoned`
    says how many that is; the same number is measured once. A copy that diverges has no figures.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train = case.train()
    order = torch.randperm(len(train), generator=generator(case.seed, "relearn images")).to(train.device)
    size = max(1, images_of(reactivation.CLEAN_SHARE, len(train)))
    rest = order[size:]
    clean, victims = train[order[:size]], train[rest[case.attacker.eligible(train.labels[rest])][: max(counts)]]
    stamped = torch.cat([to_uint8(case.trigger(images)) for images, _ in victims.chunks()])
    poisoned = ImageSet(stamped, case.target_labels(victims.labels))
    # A case of its own keeps its triggered images, which are looked at in every step.
    probe = replace(case, test=fixed_part(case.eligible(case.test), PROBE_IMAGES))
    rows = []
    for count in dict.fromkeys(min(count, len(victims)) for count in counts):
        try:
            done = reactivation.relearn(
                model,
                clean,
                poisoned[:count],
                success=lambda candidate: probe.success(candidate, probe.test) or 0.0,
                augmentation=case.augmentation,
                seed=generator(case.seed, "relearn").initial_seed(),
                precision=case.precision,
            )
            rows.append(
                {
                    "poisoned": count,
                    "asr": case.success(model, case.test),
                    "steps": done.steps,
                    "clean_accuracy": accuracy(predict(model, case.test), case.test.labels),
                    "course": done.course,
                }
            )
        except Diverged:  # the retuned copy did, not the model that is measured
            rows.append({"poisoned": count, **dict.fromkeys(("asr", "steps", "clean_accuracy", "course"))})
        model.load_state_dict(weights)
    return rows


def reactivated(model: Classifier, case: EvaluationContext) -> float | None:
    """ASR on the test images under the perturbation of the trigger that was best on training images."""
    data = fixed_part(case.eligible(case.train()), PROBE_IMAGES)
    target_labels, trigger = case.target_labels(data.labels), case.trigger
    if case.attacker.quantise:  # stamped once, not in every step
        data, trigger = replace(case, test=data).triggered, lambda images: images
    shift = reactivation.reactivate(model, data, target_labels, trigger, seed=case.seed)
    return case.success(model, case.test, shift)


def connected(infected: Classifier, control: Classifier, case: EvaluationContext) -> list[dict[str, Any]]:
    """The connection of adversarial and triggered images, for each radius; empty if no image can show it."""
    data = _right(case, infected, control)
    if not len(data):
        return []
    rows = []
    for epsilon in connection.EPSILONS:
        noise = generator(case.seed, "connection noise", device=data.device)
        traces = [
            connection.trace(model, data, case.trigger, epsilon=epsilon, noise=source)
            for model, source in ((infected, None), (control, None), (infected, noise))
        ]
        rows.append({"epsilon": epsilon, **connection.compare(*traces, **_seen(case, data))})
    return rows


def still_connected(model: Classifier, case: EvaluationContext) -> list[dict[str, Any] | None]:
    """The same of a repaired model, on images that it has right; None for each radius if there is none."""
    data = _right(case, model)
    if not len(data):
        return [None for _ in connection.EPSILONS]
    traces = [connection.trace(model, data, case.trigger, epsilon=epsilon) for epsilon in connection.EPSILONS]
    return [connection.describe(traced, **_seen(case, data)) for traced in traces]


def _right(case: EvaluationContext, *models: Classifier) -> ImageSet:
    """Judged test images that the models classify correctly: the finding is about images that are right before.

    In one order for all models, so that the sets of two models differ by their errors only.
    """
    data = fixed_part(case.eligible(case.test), len(case.test))
    right = torch.ones_like(data.labels, dtype=torch.bool)
    for model in models:
        right &= predict(model, data) == data.labels
    return data[right.nonzero().flatten()[:PROBE_IMAGES]]


def _seen(case: EvaluationContext, data: ImageSet) -> dict[str, Any]:
    return {
        "labels": data.labels,
        "target_labels": case.target_labels(data.labels),
        "num_classes": case.num_classes,
        "seed": case.seed,
    }
