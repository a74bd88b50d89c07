"""A benchmark of the hot paths, each as a ratio against its own roofline in one run. Never a timed test.

    python -m bench.perf [model=test_resnet] [size=32] [batch=256] [rounds=10] [threads=1] [stem=small] \
        [attacks=wanet,bpp,input_aware] [triggers=badnets,blended,sig,ftrojan,bpp,wanet]

The roofline of a training step is the same model and optimizer fed one batch of synthetic tensors that is there
already; that of an attack's step is the plain step, and that of an evaluation (clean and triggered
accuracy, PGD) its passes through the network. Both are timed in turns, so that a busy machine slows both.
Triggers are also shown as seconds for 50,000 images. `attacks=` and `triggers=` (empty) leave these out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from bench.door import enter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attacks.base import Attack
    from bench.engine.training import Tensors

DEFAULTS = {"model": "test_resnet", "size": "32", "batch": "256", "rounds": "10", "threads": "1", "stem": "small"}
DEFAULTS |= {"attacks": "wanet,bpp,input_aware", "triggers": "badnets,blended,sig,ftrojan,bpp,wanet"}
STEPS = 4  # of training in one timing: what happens once in a training is no part of a step


def main(arguments: list[str]) -> int:
    from bench.config import UserError

    settings = dict(DEFAULTS)
    for argument in arguments:
        key, found, value = argument.partition("=")
        if not found or key not in settings:
            raise UserError(f"{argument!r}: write one of {', '.join(f'{k}=...' for k in settings)}")
        settings[key] = value
    try:
        size, batch, rounds, threads = (int(settings[key]) for key in ("size", "batch", "rounds", "threads"))
    except ValueError as error:
        raise UserError(f"size, batch, rounds and threads are whole numbers: {error}") from error
    import torch

    from bench.pipeline import pick_device, provenance

    torch.set_num_threads(threads)
    device = pick_device("auto")
    known = provenance()
    print(f"{settings['model']}, stem {settings['stem']}, {size}x{size}, batch {batch}, {device}, {threads} threads")
    print(f"commit {known['commit'][:10]}{'' if known['clean'] else ' (changed)'}, torch {known['torch']}\n")
    print(f"{'path':<46} {'ms':>9} {'roofline ms':>12} {'ratio':>7}")
    for name, path, roofline in _paths(settings["model"], settings["stem"], size, batch, device):
        ours, ideal = _in_turns(path, roofline, rounds)
        print(_line(name, ours, ideal))
    evaluation, passes = _evaluation(settings["model"], settings["stem"], size, max(1, batch // 4), device)
    print(_line("evaluation, against its passes", *_in_turns(evaluation, passes, rounds)))
    for line in _attacks(settings, size, batch, rounds, device):
        print(line)
    return 0


def _attacks(settings: dict[str, str], size: int, batch: int, rounds: int, device: torch.device) -> Iterator[str]:
    """A line for each attack that owns the training, and one for each trigger."""
    import torch

    from attacks.base import Setup, attack
    from bench.config import UserError, load_methods
    from bench.engine.data import Augmentation, ImageSet
    from bench.engine.models import ModelSpec
    from bench.engine.training import Hooks, Journal, Recipe, fit

    load_methods([])
    spec = ModelSpec(settings["model"], 10, 3, size, (0.5,) * 3, (0.25,) * 3, settings["stem"])
    images = torch.randint(0, 256, (8 * batch, 3, size, size), dtype=torch.uint8, device=device)
    data = ImageSet(images, torch.arange(8 * batch, device=device) % 10)
    recipe, augmentation = Recipe(updates=STEPS, batch_size=batch), Augmentation(crop=1 / 8, flip=True)
    setup = Setup(data, 10, 0, lambda seed: spec.build(seed).to(device), recipe, augmentation, Journal())
    names = {key: [name for name in settings[key].split(",") if name] for key in ("attacks", "triggers")}
    for name in (*names["attacks"], *names["triggers"]):
        try:
            attack[name]
        except LookupError as error:
            raise UserError(str(error)) from error
    for name in names["attacks"]:
        attacker = attack[name](regime="per_batch")
        hooks = attacker.hooks(setup, attacker.prepare(setup))
        model = spec.build(0).to(device)

        def steps(with_hooks: Hooks | None, model: nn.Module = model) -> None:
            fit(model, data, recipe, seed=0, augmentation=augmentation, hooks=with_hooks)

        yield _line(f"training steps under {name}", *_in_turns(partial(steps, hooks), partial(steps, None), rounds))
    if names["triggers"]:
        yield f"\n{'trigger':<46} {'s for 50,000 images':>22}"
    for name in names["triggers"]:
        attacker = attack[name]()
        tensors = attacker.prepare(setup)

        def stamp(attacker: Attack = attacker, tensors: Tensors = tensors) -> None:
            for start in range(0, 8 * batch, 1024):
                attacker.trigger(images[start : start + 1024].float() / 255, tensors)

        seconds, _ = _in_turns(stamp, lambda: None, rounds)
        yield f"{name:<46} {seconds * 50_000 / (8 * batch):>22.2f}"


def _line(name: str, ours: float, ideal: float) -> str:
    return f"{name:<46} {1000 * ours:>9.2f} {1000 * ideal:>12.2f} {ours / ideal:>7.3f}"


def _in_turns(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of both, one after the other in each round, after two rounds of warming up."""
    import torch

    spent: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 2):
        for function, kept in zip((first, second), spent, strict=True):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= 2:
                kept.append(time.perf_counter() - started)
    return median(spent[0]), median(spent[1])


def _paths(
    model_name: str, stem: str, size: int, batch: int, device: torch.device
) -> list[tuple[str, Callable[[], None], Callable[[], None]]]:
    """(name, what we do, the least that has to be done)."""
    import torch
    import torch.nn.functional as F

    from bench.engine.adversarial import pgd
    from bench.engine.data import Augmentation, ImageSet, generator
    from bench.engine.models import ModelSpec
    from bench.engine.training import Recipe, autocast, fit, make_optimizer

    spec = ModelSpec(model_name, 10, 3, size, (0.5,) * 3, (0.25,) * 3, stem)
    images = torch.randint(0, 256, (8 * batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (8 * batch,), device=device)
    data = ImageSet(images, labels)
    recipe = Recipe(updates=STEPS, batch_size=batch)

    ours = spec.build(0).to(device)
    theirs = spec.build(0).to(device)
    optimizer = make_optimizer(recipe, theirs)
    synthetic = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = labels[:batch]

    def train_step() -> None:
        fit(ours, data, recipe, seed=0, augmentation=Augmentation(crop=1 / 8, flip=True))

    def synthetic_step() -> None:
        theirs.train()
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            with autocast(recipe.precision, synthetic.device):
                loss = F.cross_entropy(theirs(synthetic), target)
            loss.backward()
            optimizer.step()

    def attack() -> None:
        pgd(theirs, synthetic, target, epsilon=8 / 255, step_size=2 / 255, steps=7)

    def seven_passes() -> None:
        theirs.eval().requires_grad_(False)
        for _ in range(7):
            leaf = synthetic.detach().clone().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(theirs(leaf), target), leaf)
        theirs.requires_grad_(True)

    source = generator(0, "perf", device=synthetic.device)
    augmentation = Augmentation(crop=1 / 8, flip=True)
    chosen = torch.randperm(len(data))[:batch].to(synthetic.device)

    def load() -> None:
        for _ in range(STEPS):
            augmentation(data.images[chosen], source)

    return [
        ("training steps with data and augmentation", train_step, synthetic_step),
        ("data and augmentation alone, against steps", load, synthetic_step),
        ("PGD-7, against seven forward/backward passes", attack, seven_passes),
    ]


def _evaluation(
    model_name: str, stem: str, size: int, count: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What every cell measures, and the passes of it: clean, triggered, 20 forward and backward, and the last look."""
    import torch
    import torch.nn.functional as F

    from attacks.base import Setup, attack
    from bench.config import MeasureConfig, load_methods
    from bench.engine.data import Augmentation, ImageSet
    from bench.engine.metrics import predict
    from bench.engine.models import ModelSpec
    from bench.engine.training import Journal, Recipe
    from bench.evaluation import Case, measured

    load_methods([])
    spec = ModelSpec(model_name, 10, 3, size, (0.5,) * 3, (0.25,) * 3, stem)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
    data, model = ImageSet(images, torch.arange(count, device=device) % 10), spec.build(0).to(device).eval()
    attacker, augmentation = attack["badnets"](), Augmentation()
    setup = Setup(data, 10, 0, lambda seed: spec.build(seed).to(device), Recipe(), augmentation, Journal())
    tensors = attacker.prepare(setup)
    case = Case(attacker, tensors, 10, 0, data, lambda: data, augmentation, "float32", lambda: model)
    before = {"figures": {"infected_accuracy": 0.9, "infected_asr": 0.9}}
    measure, floats = vars(MeasureConfig()), images.float() / 255

    def evaluate() -> None:
        measured(model, case, measure, before, predict(model, data))

    def passes() -> None:
        with torch.no_grad():
            for _ in range(3):
                model(floats)
        model.requires_grad_(False)
        for _ in range(measure["pgd_steps"]):
            leaf = floats.detach().clone().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(model(leaf), data.labels), leaf)
        model.requires_grad_(True)

    return evaluate, passes


if __name__ == "__main__":
    enter(main, __doc__)
