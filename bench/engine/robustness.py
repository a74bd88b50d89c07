"""AutoAttack over the radii that tell models apart, and signs that a model only hides its gradients.

Papers: Croce and Hein, ICML 2020, arXiv:2003.01690; the signs are those of Athalye et al., ICML 2018,
arXiv:1802.00420, and Carlini et al., 2019, arXiv:1902.06705.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adversarial import pgd
from .autoattack import ITERATIONS, QUERIES, autoattack, dlr_targeted
from .data import ImageSet, generator
from .inference import under_attack

# A model that was never trained on adversarial images is at 0 for 8/255: the small radii rank those.
LINF = tuple(radius / 255 for radius in (0.25, 0.5, 1, 2, 4, 8))
L2 = 0.5
TOLERANCE = 0.02  # an attack with random starts differs by less between two runs on a few hundred images
SQUARE_TOLERANCE = 0.002  # AutoAttack's own


def curve(
    model: nn.Module, data: ImageSet, *, seed: int, iterations: int = ITERATIONS, queries: int = QUERIES
) -> list[dict[str, Any]]:
    """AutoAttack at each radius of `LINF` and at `L2`.

    An image that was fooled within one radius is fooled within every larger one: no figure rises with the radius, and
    each image is attacked until it falls.

    Returns:
        A row for each: `norm`, `epsilon`, `accuracy`, and `behind`, what each attack left.
    """
    rows: list[dict[str, Any]] = []
    among = None
    for norm, epsilon in (*(("linf", radius) for radius in LINF), ("l2", L2)):
        among = None if norm == "l2" else among
        outcome = autoattack(
            model, data, norm=norm, epsilon=epsilon, seed=seed, among=among, iterations=iterations, queries=queries
        )
        among = outcome.robust
        accuracy = outcome.robust.double().mean().item()
        rows.append({"norm": norm, "epsilon": epsilon, "accuracy": accuracy, "behind": outcome.behind})
    return rows


def square_warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Where random search fools more than the gradients did, which then are not to be believed."""
    warnings_ = []
    for row in rows:
        gain = row["behind"]["fab_t"] - row["behind"]["square"]
        if gain > SQUARE_TOLERANCE:
            warnings_.append(
                f"Square, without gradients, fools another {gain:.1%} at {row['norm']} {row['epsilon']:.4f}: "
                "the attacks with gradients are too weak here"
            )
    return warnings_


def masking_warnings(
    model: nn.Module,
    data: ImageSet,
    *,
    infected: nn.Module,
    epsilon: float,
    step_size: float,
    steps: int,
    seed: int,
    batch_size: int = 512,
) -> list[str]:
    """Signs that the robust accuracy of a model is not what it seems; a line for each, none is the good case.

    Args:
        infected: the model before its repair: what fools it must not fool the repaired model better than that
            model's own gradients do.
        epsilon, step_size, steps: of the PGD that is reported.

    Five times the steps must not leave more than the steps do; one step, and images made for the infected model, must
    not leave less; a radius of 0.5, with which every image can be grey, must leave nothing.
    """
    parts = [chunk for start in range(0, len(data), batch_size) if len(chunk := data[start : start + batch_size])]
    shares: dict[str, Tensor] = {}
    flat = torch.zeros((), device=data.device)
    drift = torch.zeros((), device=data.device)
    alike = True
    source = {name: generator(seed, "masking", name, device=data.device) for name in ("pgd", "long", "other")}
    for chunk in parts:
        images, labels = chunk.batch(slice(None)).float() / 255, chunk.labels
        settings: dict[str, Any] = {"epsilon": epsilon, "step_size": step_size}
        made = {
            "pgd": pgd(model, images, labels, **settings, steps=steps, random_start=source["pgd"]),
            "long": pgd(model, images, labels, **settings, steps=5 * steps, random_start=source["long"]),
            "one": pgd(model, images, labels, epsilon=epsilon, step_size=epsilon, steps=1),
            "other": pgd(infected, images, labels, **settings, steps=steps, random_start=source["other"]),
            "far": pgd(model, images, labels, epsilon=0.5, step_size=0.1, steps=20),
        }
        with under_attack(model), torch.no_grad():
            logits = model(images)
            right = logits.argmax(1) == labels
            for name, points in made.items():
                shares[name] = shares.get(name, 0) + (right & (model(points).argmax(1) == labels)).sum()
            drift = torch.maximum(drift, (model(images) - logits).abs().max())
            alike &= bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all())
            leaf = images.detach().requires_grad_(True)
            with torch.enable_grad():
                second = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
                (slope,) = torch.autograd.grad(dlr_targeted(model(leaf), labels, second).sum(), leaf)
            flat = flat + (slope.flatten(1).abs().amax(1) == 0).sum()
    left = {name: share.item() / len(data) for name, share in shares.items()}
    warnings_ = []
    if left["long"] > left["pgd"] + TOLERANCE:
        warnings_.append(f"PGD leaves {left['pgd']:.1%} with {steps} steps and {left['long']:.1%} with {5 * steps}")
    if left["one"] < left["pgd"] - TOLERANCE:
        warnings_.append(f"one step leaves {left['one']:.1%}, PGD-{steps} {left['pgd']:.1%}")
    if left["other"] < left["pgd"] - TOLERANCE:
        warnings_.append(f"images made for the infected model leave {left['other']:.1%}, its own {left['pgd']:.1%}")
    if left["far"] > TOLERANCE:
        warnings_.append(f"PGD with a radius of 0.5, which can make every image grey, leaves {left['far']:.1%}")
    if flat > 0:
        warnings_.append(f"{int(flat)} of {len(data)} images have no gradient at all")
    if drift > 1e-3:
        warnings_.append(f"two passes over the same images differ by up to {drift:.2g}: the model is random")
    if alike:
        warnings_.append("the outputs are probabilities; the attacks need logits")
    return warnings_
