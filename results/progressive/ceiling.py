"""What an architecture can reach against adversarial images: trained on nothing else, from the start, on clean data.

    BENCH_DATA=DIR python results/progressive/ceiling.py [model=test_efficientnet] [epochs=12] [epsilon=0.0235]

The recipe of cifar10_small on its split of seed 0, every batch replaced by the adversarial images of PUD's teacher
stage (PGD-7 of radius 6/255 on the model as it is). Prints clean accuracy and accuracy under the PGD-20 of the tables:
the price of robustness without any backdoor or defense in it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from bench.engine.data import generator
from bench.engine.datasets import prepare
from bench.engine.metrics import accuracy, predict, robust_accuracy
from bench.engine.training import Recipe, fit
from bench.experiment.identity import spec_of
from bench.experiment.load import load_methods
from bench.measures.context import fixed_part
from bench.pipeline.materials import split_held_out
from defenses.aft import AdversarialFineTuning, AdversarialStart


def main(name: str = "test_efficientnet", epochs: int = 12, epsilon: float = 6 / 255) -> None:
    torch.set_num_threads(1)
    load_methods([])
    info = prepare("cifar10_jpeg", Path(os.environ.get("BENCH_DATA", "data")), Path("data/cache"), None)
    train, test = info.load("train"), info.load("test")
    rest, _ = split_held_out(train.labels, 0.05, 0)
    model = spec_of(info, {"name": name, "stem": "half"}).build(generator(0, "weights").initial_seed())
    recipe = Recipe(epochs=epochs, lr=0.2, schedule="one_cycle")
    every = AdversarialStart(AdversarialFineTuning(epsilon=epsilon), recipe.steps(len(rest)))
    begun = time.perf_counter()
    fit(model, train[rest], recipe, seed=0, augmentation=info.augmentation, hooks=every)
    clean = accuracy(predict(model, test), test.labels)
    robust = robust_accuracy(model, fixed_part(test, 1000), epsilon=8 / 255, step_size=2 / 255, steps=20, seed=0)
    weights = sum(weight.numel() for weight in model.parameters())
    print(
        f"{name} ({weights / 1e6:.2f} M weights), {epochs} epochs, radius {255 * epsilon:.3g}/255: "
        f"ACC {100 * clean:.1f}, PGD-20 {100 * robust:.1f}, {time.perf_counter() - begun:.0f} s"
    )


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    main(
        given.get("model", "test_efficientnet"),
        int(given.get("epochs", 12)),
        float(given.get("epsilon", 6 / 255)),
    )
