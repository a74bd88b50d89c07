r"""Robust accuracy by every iterate of PGD and by the last one alone: how far apart, and at what cost.

python results/robust_accuracy/compare.py [data=digits] [root=DIR] [stem=half] [epochs=20] [train=10000] \
    [images=1000]

Three networks of one architecture: standard training, AFT of it on 2,500 of the training images or a twentieth of
them if that is less, and adversarial training. Both measures take the same number of steps from a random start; CPU
seconds are of one thread, in one run, one after the other.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from bench.engine.adversarial import pgd
from bench.engine.data import generator
from bench.engine.datasets import prepare
from bench.engine.devices import cpu_name
from bench.engine.metrics import accuracy, predict, robust_accuracy
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, TrainingLog, fit
from bench.measures.context import fixed_part
from defenses.aft import AdversarialFineTuning, AdversarialStart
from defenses.base import ReserveView

PGD = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 20}
SETTINGS = {"data": "digits", "root": "data", "stem": "half", "epochs": "20", "train": "10000", "images": "1000"}

SPLITS = {"train": "train", "test": "images"}


def by_last_iterate(model: Classifier, data) -> float:
    """What was measured before: all steps for all images, unfolded, and the last iterate is judged."""
    source = generator(0, "last iterate")
    right = 0
    for images, labels in data.chunks(512):
        # A hook keeps the network as it is, batch norm unfolded.
        handle = model.net.register_forward_hook(lambda *_: None)
        adversarial = pgd(model, images, labels, **PGD, random_start=source)
        handle.remove()
        with torch.inference_mode():
            right += int(((model(adversarial).argmax(1) == labels) & (model(images).argmax(1) == labels)).sum())
    return right / len(data)


def timed(function, *given, **more):
    started = time.process_time()
    return function(*given, **more), time.process_time() - started


def main() -> None:
    settings = SETTINGS | dict(word.split("=", 1) for word in sys.argv[1:])
    torch.set_num_threads(1)
    info = prepare(settings["data"], Path(settings["root"]), Path("data/cache"))
    train, test = (fixed_part(info.load(split), int(settings[count])) for split, count in SPLITS.items())
    augmentation = info.augmentation
    spec = ModelSpec(
        "test_resnet", info.num_classes, *info.shape[:2], tuple(info.mean), tuple(info.std), settings["stem"]
    )
    recipe = Recipe(epochs=int(settings["epochs"]), schedule="one_cycle", lr=0.1)
    standard = fit(spec.build(0), train, recipe, seed=0, augmentation=augmentation)
    repaired = spec.build(0)
    repaired.load_state_dict(standard.state_dict())
    order = torch.randperm(len(train), generator=generator(0, "reserve"))
    reserve = train[order[: min(2500, len(train) // 20 + 1)]]
    log = TrainingLog()
    aft = AdversarialFineTuning()
    aft.defend(ReserveView(repaired, info.num_classes, 0, torch.device("cpu"), log, augmentation, reserve))
    hooks = AdversarialStart(aft, 10**9)
    hardened = fit(spec.build(0), train, recipe, seed=0, augmentation=augmentation, hooks=hooks)
    print(f"{settings}, {len(test)} test images, {cpu_name()}, torch {torch.__version__}")
    print("| network | accuracy | last iterate | every iterate | CPU s, last | CPU s, every | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, model in (("standard", standard), ("AFT", repaired), ("adversarially trained", hardened)):
        clean = accuracy(predict(model, test), test.labels)
        last, one = timed(by_last_iterate, model, test)
        every, two = timed(robust_accuracy, model, test, **PGD, seed=0)
        print(
            f"| {name} | {clean:.1%} | {last:.1%} | {every:.1%} | {one:.2f} | {two:.2f} | {two / one:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
