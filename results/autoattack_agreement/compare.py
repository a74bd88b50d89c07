"""Our PGD and AutoAttack beside independent implementations, on the same weights and images of digits.

    pip install torchattacks pyautoattack     # pyautoattack is the authors' released code, as a package
    python results/autoattack_agreement/compare.py [images=360] [queries=5000]     # queries=0: PGD alone

Three models: trained as usual, trained on adversarial images, and infected with BadNets and repaired by AFT.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.base import Setup, attack
from bench.engine.adversarial import pgd
from bench.engine.autoattack import ITERATIONS, NORMS, QUERIES, autoattack
from bench.engine.data import Augmentation, ImageSet
from bench.engine.datasets import prepare
from bench.engine.metrics import accuracy, predict
from bench.engine.models import Classifier
from bench.engine.training import Hooks, Recipe, TrainingLog, fit
from bench.experiment.load import load_methods
from bench.pipeline.materials import split_held_out
from defenses.base import ReserveView, defense

# Where each model has lost about half of its accuracy: an agreement at 0 or at 100 % would show nothing.
RADII = {
    "standard": {"linf": 16 / 255, "l2": 0.5},
    "adversarial training": {"linf": 40 / 255, "l2": 0.75},
    "badnets, then aft": {"linf": 24 / 255, "l2": 0.75},
}


class OnAdversarialImages(Hooks):
    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return pgd(model, images, labels, epsilon=0.2, step_size=0.1, steps=3, random_start=source), labels


def small(seed: int) -> Classifier:
    """A network of two convolutions: what is compared are the attacks, which run for thousands of passes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
    return Classifier(net, (0.5,), (0.25,))


def models(cache: str = "data/cache") -> tuple[dict[str, Classifier], ImageSet]:
    """The three models and the test images, in random order."""
    load_methods([])
    info = prepare("digits", Path("data"), Path(cache), None)
    train, test = info.load("train"), info.load("test")
    recipe = Recipe(epochs=20, batch_size=64, optimizer="adam", lr=2e-3, weight_decay=0.0)
    rest, pool = split_held_out(train.labels, 0.1, 0)
    badnets = attack["badnets"]()
    setup = Setup(train[rest], 10, 0, small, recipe, Augmentation(), TrainingLog())
    shipped, _ = badnets.poison(train[rest], badnets.prepare(setup), 10, 0)
    infected = fit(small(0), shipped, recipe, seed=0)
    view = ReserveView(infected, 10, 0, torch.device("cpu"), TrainingLog(), train[pool], Augmentation())
    aft = defense["aft"](epsilon=0.1, updates=300, adversarial_updates=100)
    found = {
        "standard": fit(small(0), train, recipe, seed=0),
        "adversarial training": fit(small(0), train, recipe, seed=0, hooks=OnAdversarialImages()),
        "badnets, then aft": aft.defend(view).model,
    }
    return found, test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]


def ours(model: Classifier, data: ImageSet, norm: str, epsilon: float, queries: int) -> dict[str, float]:
    return autoattack(model, data, norm=norm, epsilon=epsilon, seed=0, queries=queries).behind


def theirs(model: Classifier, data: ImageSet, norm: str, epsilon: float, queries: int) -> dict[str, float]:
    """The released AutoAttack, standard."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=0)
    attack.square.n_queries = queries
    images = data.images.float() / 255
    robust = torch.ones(len(data), dtype=torch.bool)
    behind = {}
    names = {"apgd-ce": "apgd_ce", "apgd-t": "apgd_t", "fab-t": "fab_t", "square": "square"}
    for name in names:
        attack.attacks_to_run = [name]
        left = robust.nonzero().flatten()
        if len(left):
            found, _ = attack.run_standard_evaluation(images[left], data.labels[left], batch_size=250)
            with torch.no_grad():
                robust[left] = model(found).argmax(1) == data.labels[left]
        behind[names[name]] = robust.double().mean().item()
    return behind


def pgd_of_both(model: Classifier, data: ImageSet, epsilon: float) -> tuple[float, float]:
    """PGD-20, ours and that of torchattacks, from the images themselves: a random start would differ by its draws."""
    import torchattacks

    images, labels = data.images.float() / 255, data.labels
    settings = {"epsilon": epsilon, "step_size": epsilon / 4, "steps": 20}
    peer = torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=20, random_start=False)
    both = pgd(model, images, labels, **settings), peer(images, labels)
    with torch.no_grad():
        clean = model(images).argmax(1) == labels
        mine, other = (clean & (model(found).argmax(1) == labels) for found in both)
    return mine.double().mean().item(), other.double().mean().item()


def main(arguments: list[str]) -> None:
    settings = {"images": 360, "queries": QUERIES} | {
        key: int(value) for key, _, value in (word.partition("=") for word in arguments)
    }
    torch.set_num_threads(1)
    found, data = models()
    data = data[: settings["images"]]
    for name, model in found.items():
        print(f"{name}: {accuracy(predict(model, data), data.labels):.2%} of clean images")
    print(f"{len(data)} test images of digits, {ITERATIONS} iterations, {settings['queries']} queries; in percent\n")
    print("| model | attack | radius | ours | theirs | difference | CPU s, ours | CPU s, theirs |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, model in found.items():
        mine, other = pgd_of_both(model, data, RADII[name]["linf"])
        print(_row(name, "PGD-20, L∞", RADII[name]["linf"], mine, other), flush=True)
    if not settings["queries"]:
        return
    for norm, name in ((norm, name) for norm in NORMS for name in found):
        epsilon, started = RADII[name][norm], time.process_time()
        mine_all = ours(found[name], data, norm, epsilon, settings["queries"])
        middle = time.process_time()
        theirs_all = theirs(found[name], data, norm, epsilon, settings["queries"])
        spent = middle - started, time.process_time() - middle
        for step in theirs_all:
            last = f" {spent[0]:.0f} | {spent[1]:.0f} |" if step == "square" else "  |  |"
            label = f"AutoAttack {norm}, behind {step}"
            print(_row(name, label, epsilon, mine_all[step], theirs_all[step], last), flush=True)


def _row(model: str, attack: str, epsilon: float, mine: float, other: float, last: str = "  |  |") -> str:
    figures = f"{100 * mine:.2f} | {100 * other:.2f} | {100 * (mine - other):+.2f} |"
    return f"| {model} | {attack} | {epsilon:.4f} | {figures}{last}"


if __name__ == "__main__":
    main(sys.argv[1:])
