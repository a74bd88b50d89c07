r"""A benchmark of the hot paths, each as a ratio against its own roofline in one run. Never a timed test.

    python -m bench.perf [model=test_resnet] [stem=small] [size=32] [batch=256] [rounds=10] [threads=1] \
        [only=training,variants,adversarial,evaluation,attacks,triggers,methods,data,start,cells,pairs] \
        [attacks=wanet,bpp,input_aware] [triggers=badnets,blended,sig,ftrojan,bpp,wanet] \
        [out=FILE.csv] [against=FILE.csv]

The roofline of a training step is the same model and optimizer fed one batch of synthetic tensors that is there
already; that of an adversarial step, of PGD, of ANP and of an evaluation is its passes through the network; that of an
attack's step the plain step; that of triggered accuracy the clean one. Path and roofline are timed in turns, so that a
busy machine slows both, and the fastest round counts. What has no roofline is shown in milliseconds alone: triggers and
decoding for 50,000 images of 32x32, SPECTRE for a class of 5,500, starting a command, what the harness adds to a cell.
`pairs` runs two trainings of one thread side by side, the roofline being one after the other: half of it would be twice
the throughput. `variants` (not among the default; needs a C++ compiler) asks whether bfloat16 and torch.compile pay.

`out` writes the table with commit, versions and machine; `against` shows the ratios of an earlier one beside it.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._command import run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attacks.base import Attack, Setup
    from bench.engine.data import ImageSet
    from bench.engine.models import Classifier, ModelSpec
    from bench.engine.training import Recipe

DEFAULTS = {
    "model": "test_resnet",
    "stem": "small",
    "size": "32",
    "batch": "256",
    "rounds": "10",
    "threads": "1",
    "only": "training,adversarial,evaluation,attacks,triggers,methods,data,start,cells,pairs",
    "attacks": "wanet,bpp,input_aware",
    "triggers": "badnets,blended,sig,ftrojan,bpp,wanet",
    "out": "",
    "against": "",
}
STEPS = 4  # of training in one timing: what happens once in a training is no part of a step
PGD: dict[str, Any] = {"epsilon": 8 / 255, "step_size": 2 / 255}


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        ideal: the least that has to be done; None if there is no such thing.
        scale: what one call is multiplied by, to give what the name says.
        rounds: how often it is timed; 0 takes the settings'.
    """

    name: str
    ours: Callable[[], object]
    ideal: Callable[[], object] | None = None
    scale: float = 1.0
    rounds: int = 0


def main(arguments: list[str]) -> int:
    from bench.engine.errors import UserError
    from bench.experiment.load import load_methods

    settings = dict(DEFAULTS)
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in settings:
            raise UserError(f"{argument!r}: write one of {', '.join(f'{k}=...' for k in settings)}")
        settings[key] = value
    try:
        size, batch, rounds, threads = (int(settings[key]) for key in ("size", "batch", "rounds", "threads"))
    except ValueError as error:
        raise UserError(f"size, batch, rounds and threads are whole numbers: {error}") from error
    if min(size, batch, rounds, threads) < 1:
        raise UserError("size, batch, rounds and threads are at least 1")
    if settings["out"] and not Path(settings["out"]).absolute().parent.is_dir():
        raise UserError(f"out={settings['out']}: there is no such folder; make it first")
    sections = [name for name in settings["only"].split(",") if name]
    if not set(sections) <= set(SECTIONS):
        raise UserError(f"only={settings['only']}: write any of {', '.join(SECTIONS)}")
    earlier = _read(Path(settings["against"])) if settings["against"] else {}
    load_methods([])
    import torch

    from bench.engine.devices import pick_device
    from bench.pipeline.provenance import provenance
    from bench.reporting.spreadsheet import neutral

    torch.set_num_threads(threads)
    bench = Workbench(settings, size, batch, pick_device("auto"))
    try:  # what is wrong is found before anything is timed
        bench.spec.check()
        bench.named("triggers")
        for cls in bench.named("attacks"):
            cls(regime="per_batch")
    except (LookupError, ValueError) as error:
        raise UserError(str(error.args[0])) from error
    known = provenance()
    where = {"model": settings["model"], "stem": settings["stem"], "size": size, "batch": batch, "threads": threads}
    where |= {"device": bench.device_name, "commit": f"{known['commit'][:10]}{'' if known['clean'] else ' (changed)'}"}
    where |= {name: known[name] for name in ("python", "torch", "timm")}
    print(", ".join(f"{key} {value}" for key, value in where.items()) + "\n")
    heading = f"{'path':<50} {'ms':>10} {'roofline ms':>12} {'ratio':>7}"
    print(heading + (f" {'earlier':>8}" if earlier else ""))
    rows = []
    for section in sections:
        for path in SECTIONS[section](bench):
            seconds, ideal = _in_turns(path, path.rounds or rounds)
            row = {"path": path.name, "ms": 1000 * seconds, "roofline_ms": 1000 * ideal, "ratio": seconds / ideal}
            rows.append({key: "" if value != value else value for key, value in row.items()} | where)
            print(_line(row, earlier), flush=True)
    if settings["out"]:
        with open(settings["out"], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["path", "ms", "roofline_ms", "ratio", *where])
            writer.writeheader()
            writer.writerows({key: neutral(value) for key, value in row.items()} for row in rows)
    return 0


def _read(file: Path) -> dict[str, dict[str, str]]:
    from bench.engine.errors import UserError
    from bench.reporting.spreadsheet import literal

    try:
        with open(file, newline="", encoding="utf-8") as experiment:
            rows = [{key: literal(value) for key, value in row.items()} for row in csv.DictReader(experiment)]
            return {row["path"]: row for row in rows}
    except (OSError, KeyError) as error:
        raise UserError(f"against={file}: write a file that `out=` of an earlier run made ({error})") from error


def _line(row: dict[str, Any], earlier: dict[str, dict[str, str]]) -> str:
    alone = row["ratio"] != row["ratio"]
    text = f"{row['path']:<50} {row['ms']:>10.2f}"
    text += f" {'':>12} {'':>7}" if alone else f" {row['roofline_ms']:>12.2f} {row['ratio']:>7.3f}"
    if row["path"] in earlier:
        before = earlier[row["path"]]
        text += f" {float(before['ms']):>6.0f}ms" if alone else f" {float(before['ratio']):>8.3f}"
    return text


def _in_turns(path: Timed, rounds: int) -> tuple[float, float]:
    """Seconds of a path and its roofline, one after the other in each round, after two rounds of warming up.

    The fastest round counts, as in timeit: what slows the others is the machine's other work.
    """
    import torch

    spent: tuple[list[float], list[float]] = ([], [])
    warm = min(2, rounds - 1)
    for index in range(rounds + warm):
        for function, seconds in zip((path.ours, path.ideal), spent, strict=True):
            if function is None:
                continue
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= warm:
                seconds.append(time.perf_counter() - started)
    ideal = path.scale * min(spent[1]) if path.ideal else float("nan")
    return path.scale * min(spent[0]), ideal


class Workbench:
    """What the paths share: a data set of noise on the device, a network, and the passes through it."""

    def __init__(self, settings: dict[str, str], size: int, batch: int, device: torch.device) -> None:
        import torch

        from bench.engine.data import ImageSet

        self.settings, self.size, self.batch, self.device = settings, size, batch, device
        images = torch.randint(0, 256, (8 * batch, 3, size, size), dtype=torch.uint8, device=device)
        self.data: ImageSet = ImageSet(images, torch.arange(8 * batch, device=device) % 10)
        self.labels = self.data.labels[:batch]
        floats = torch.rand(batch, 3, size, size, device=device)
        self.floats: Tensor = floats.contiguous(memory_format=torch.channels_last)

    @property
    def device_name(self) -> str:
        from bench.engine.devices import device_name

        return device_name(self.device)

    @property
    def spec(self) -> ModelSpec:
        from bench.engine.models import ModelSpec

        return ModelSpec(self.settings["model"], 10, 3, self.size, (0.5,) * 3, (0.25,) * 3, self.settings["stem"])

    def named(self, key: str) -> list[type[Attack]]:
        from attacks.base import attack

        return [attack[name] for name in self.settings[key].split(",") if name]

    def model(self) -> Classifier:
        return self.spec.build(0).to(self.device)

    @cached_property
    def recipe(self) -> Recipe:
        from bench.engine.training import Recipe

        return Recipe(updates=STEPS, batch_size=self.batch)

    @cached_property
    def augmentation(self) -> Any:
        from bench.engine.data import Augmentation

        return Augmentation(crop=1 / 8, flip=True)

    @cached_property
    def setup(self) -> Setup:
        from attacks.base import Setup
        from bench.engine.training import TrainingLog

        return Setup(self.data, 10, 0, lambda seed: self.model(), self.recipe, self.augmentation, TrainingLog())

    def synthetic_steps(self, slopes: int = 0, precision: str = "", compiled: bool = False) -> Callable[[], None]:
        """Training steps on one batch that is there already, behind so many gradients to the images each."""
        import torch
        import torch.nn.functional as F

        from bench.engine.modes import autocast
        from bench.engine.training import make_optimizer

        model = self.model()
        if compiled:
            model.net = torch.compile(model.net)
        optimizer = make_optimizer(self.recipe, model)

        def steps() -> None:
            for _ in range(STEPS):
                self.slopes(model, slopes)
                model.train()
                optimizer.zero_grad(set_to_none=True)
                with autocast(precision or self.recipe.precision, self.device):
                    loss = F.cross_entropy(model(self.floats), self.labels)
                loss.backward()
                optimizer.step()

        return steps

    def slopes(self, model: Classifier, count: int, images: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Gradients of the loss in the images, and in nothing else."""
        import torch
        import torch.nn.functional as F

        images, labels = self.floats if images is None else images, self.labels if labels is None else labels
        if count:
            model.eval().requires_grad_(False)
            for _ in range(count):
                leaf = images.detach().clone().requires_grad_(True)
                torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
            model.requires_grad_(True)

    def case(self, name: str, data: ImageSet, model: Classifier) -> Any:
        from attacks.base import attack
        from bench.engine.data import Augmentation
        from bench.measures.context import EvaluationContext

        attacker = attack[name]()
        tensors = attacker.prepare(self.setup)
        return EvaluationContext(attacker, tensors, 10, 0, data, lambda: data, Augmentation(), "float32", lambda: model)


def _training(bench: Workbench) -> Iterator[Timed]:
    from bench.engine.data import generator
    from bench.engine.training import fit

    model, ideal = bench.model(), bench.synthetic_steps()
    source = generator(0, "perf", device=bench.device)

    def load() -> None:
        for _ in range(STEPS):
            bench.augmentation(bench.data.images[: bench.batch], source)

    steps = partial(fit, model, bench.data, bench.recipe, seed=0, augmentation=bench.augmentation)
    yield Timed("training steps with data and augmentation", steps, ideal)
    yield Timed("data and augmentation alone, against steps", load, ideal)


def _variants(bench: Workbench) -> Iterator[Timed]:
    """What the engine might do by default, if it paid."""
    bfloat, single = bench.synthetic_steps(precision="bfloat16"), bench.synthetic_steps(precision="float32")
    yield Timed("training steps in bfloat16, against float32", bfloat, single)
    yield Timed("training steps compiled, against eager", bench.synthetic_steps(compiled=True), bench.synthetic_steps())


def _adversarial(bench: Workbench) -> Iterator[Timed]:
    from bench.engine.adversarial import pgd
    from bench.engine.metrics import robust_accuracy
    from bench.engine.training import TrainingLog
    from defenses.base import ReserveView, defense

    aft = defense["aft"](updates=STEPS, adversarial_updates=STEPS, batch_size=bench.batch)
    model = bench.model()

    def steps() -> None:
        aft.defend(ReserveView(model, 10, 0, bench.device, TrainingLog(), bench.augmentation, bench.data))

    yield Timed("adversarial steps of AFT, against their passes", steps, bench.synthetic_steps(slopes=7))
    attacked = bench.model().eval()
    attack = partial(pgd, attacked, bench.floats, bench.labels, **PGD, steps=7)
    yield Timed("PGD-7, against seven passes", attack, partial(bench.slopes, attacked, 7))
    images = bench.data[: bench.batch]

    def passes() -> None:
        import torch

        floats = images.images.float() / 255
        bench.slopes(attacked, 20, floats, images.labels)
        with torch.inference_mode():  # which images hold, and which were right before
            attacked(floats), attacked(floats)

    robust = partial(robust_accuracy, attacked, images, **PGD, steps=20, seed=0)
    yield Timed("robust accuracy by PGD-20, against every step of every image", robust, passes)


def _evaluation(bench: Workbench) -> Iterator[Timed]:
    """What every cell measures, and the passes of it: clean, triggered, 20 forward and backward, and the last look."""
    import torch

    from bench.engine.metrics import predict
    from bench.experiment.schema import MeasureConfig
    from bench.measures.evaluation import measured

    model = bench.model().eval()
    for name in ("badnets", "blended", "sig", "wanet"):
        case = bench.case(name, bench.data, model)
        clean = partial(predict, model, bench.data)
        yield Timed(
            f"triggered accuracy, {name}, against the clean one",
            partial(case.predict_triggered, model, bench.data),
            clean,
        )
    images = bench.data[: max(1, bench.batch // 4)]
    case = bench.case("badnets", images, model)
    before = {"figures": {"infected_accuracy": 0.9, "infected_asr": 0.9}}
    measure, floats = vars(MeasureConfig()), images.images.float() / 255

    def passes() -> None:
        with torch.no_grad():
            for _ in range(3):
                model(floats)
        bench.slopes(model, measure["pgd_steps"], floats, images.labels)

    def evaluate() -> None:
        measured(model, case, measure, before, predict(model, images))

    yield Timed("evaluation of a cell, against its passes", evaluate, passes)


def _attacks(bench: Workbench) -> Iterator[Timed]:
    from bench.engine.training import fit

    for cls in bench.named("attacks"):
        attacker = cls(regime="per_batch")
        hooks = attacker.hooks(bench.setup, attacker.prepare(bench.setup))
        steps = partial(fit, bench.model(), bench.data, bench.recipe, seed=0, augmentation=bench.augmentation)
        yield Timed(f"training steps under {cls.name}", partial(steps, hooks=hooks), steps)


def _triggers(bench: Workbench) -> Iterator[Timed]:
    for cls in bench.named("triggers"):
        attacker = cls()
        tensors = attacker.prepare(bench.setup)

        def stamp(attacker: Attack = attacker, tensors: dict[str, Tensor] = tensors) -> None:
            for images, _ in bench.data.chunks():
                attacker.trigger(images, tensors)

        yield Timed(f"trigger {cls.name}, 50,000 images", stamp, scale=50_000 / len(bench.data))


def _methods(bench: Workbench) -> Iterator[Timed]:
    import torch

    from bench.engine.data import ImageSet
    from bench.engine.training import TrainingLog
    from defenses.base import ReserveView, TrainsetView, defense

    def repair(name: str, **settings: Any) -> Callable[[], object]:
        def run() -> None:
            owned = (bench.model(), 10, 0, bench.device, TrainingLog())
            defense[name](**settings).defend(ReserveView(*owned, bench.augmentation, bench.data))

        return run

    yield Timed("ANP, 16 updates and its threshold", repair("anp", updates=16, batch_size=bench.batch), rounds=3)
    yield Timed("I-BAU, one round of 8 batches", repair("i_bau", rounds=1, batch_size=bench.batch), rounds=3)
    images = torch.randint(0, 256, (5500, 3, bench.size, bench.size), dtype=torch.uint8, device=bench.device)
    one_class = ImageSet(images, torch.zeros(5500, dtype=torch.int64, device=bench.device))
    model = bench.model().eval()

    def filtered() -> None:
        view = TrainsetView(
            model,
            1,
            0,
            bench.device,
            TrainingLog(),
            bench.augmentation,
            one_class,
            lambda seed: bench.model(),
            bench.recipe,
        )
        defense["spectre"](retrain=False).defend(view)

    yield Timed("SPECTRE, a class of 5,500 images", filtered, rounds=1)


def _data(bench: Workbench) -> Iterator[Timed]:
    import numpy as np
    import torch
    from PIL import Image

    from bench.engine.datasets import _decode

    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
        files = [Path(folder, f"{index}.jpg") for index in range(len(noise))]
        for file, image in zip(files, noise, strict=True):
            Image.fromarray(image).save(file)
        yield Timed("decode 50,000 JPEG files, all cores", partial(_decode, files, 32), scale=50_000 / len(files))
        cached = Path(folder, "images.npy")
        np.save(cached, np.zeros((60_000, 3, 32, 32), np.uint8))

        def load() -> None:
            torch.from_numpy(np.load(cached, mmap_mode="c")).to(bench.device, copy=True)  # every byte is read

        yield Timed("load 60,000 cached images", load)


def _start(bench: Workbench) -> Iterator[Timed]:
    def command(*words: str) -> None:
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        away = [f"results={folder}", "tracking.enabled=false"]
        yield Timed("start: bench.run --help", partial(command, "bench.run", "--help"), rounds=3)
        yield Timed("start: bench.list", partial(command, "bench.list"), rounds=3)
        yield Timed("start: bench.run dry_run=true", partial(command, "bench.run", "dry_run=true", *away), rounds=3)


def _cells(bench: Workbench) -> Iterator[Timed]:
    """What a cell costs beyond its stages: one on digits that trains nothing and measures almost nothing."""
    from bench._command import open_experiment
    from bench.pipeline.runner import Runner as Pipeline

    with tempfile.TemporaryDirectory() as folder:
        words = [f"results={folder}", "grid.seeds=1", "grid.attacks=[badnets]", "grid.defenses=[no_defense]"]
        experiment = open_experiment([*words, "train.epochs=0", "measure.pgd_steps=0", "measure.pgd_images=1"])
        seed = iter(range(10**6))

        def cell() -> None:
            from dataclasses import replace

            from bench.storage.store import key_of

            pipeline = Pipeline(experiment.store, experiment.infos, bench.device)
            trial = experiment.trials[0]
            implant = {**trial.implant, "seed": next(seed)}
            inspect = {**trial.inspect, "implant": key_of(implant)}
            defend = {**trial.defend, "implant": key_of(implant)}
            evaluate = {**trial.evaluate, "defend": key_of(defend), "inspect": key_of(inspect)}
            pipeline.run(replace(trial, implant=implant, defend=defend, evaluate=evaluate, inspect=inspect))

        yield Timed("a cell that computes nothing", cell, rounds=5)


def _pairs(bench: Workbench) -> Iterator[Timed]:
    """Two processes of one thread each, as two workers of a grid: at once, and one after the other."""
    code = (
        "import sys; from bench import perf;"
        "path = perf.worker(*sys.argv[1:]); path();"
        "[print(path() and 'done', flush=True) for _ in iter(sys.stdin.readline, '')]"
    )
    words = [bench.settings["model"], bench.settings["stem"], str(bench.size), str(bench.batch), str(bench.device)]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(2)
    ]

    def begin(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")

    def end(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        process.stdout.readline()

    def together() -> None:
        for step in (begin, end):
            for process in pair:
                step(process)

    def in_turn() -> None:
        for process in pair:
            begin(process)
            end(process)

    try:
        in_turn()  # after their start
        yield Timed("two trainings side by side, against in turn", together, in_turn)
    finally:
        for process in pair:
            process.kill()


def worker(model: str, stem: str, size: str, batch: str, device: str) -> Callable[[], object]:
    """A training for one of two processes."""
    import torch

    from bench.experiment.load import load_methods

    load_methods([])
    torch.set_num_threads(1)
    settings = DEFAULTS | {"model": model, "stem": stem}
    return next(_training(Workbench(settings, int(size), int(batch), torch.device(device)))).ours


SECTIONS: dict[str, Callable[[Workbench], Iterator[Timed]]] = {
    "training": _training,
    "variants": _variants,
    "adversarial": _adversarial,
    "evaluation": _evaluation,
    "attacks": _attacks,
    "triggers": _triggers,
    "methods": _methods,
    "data": _data,
    "start": _start,
    "cells": _cells,
    "pairs": _pairs,
}

if __name__ == "__main__":
    run_command(main, __doc__)
