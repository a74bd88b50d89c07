"""One trial: implant -> defend -> evaluate. Each stage is computed once, whoever asks for it first.

Two more are computed by the first that asks for them: `surrogate`, the clean network that attacks optimise their
triggers on, shared by all attacks of a seed, and `inspect`, what is measured of the infected model, shared by all its
repairs.
"""

from __future__ import annotations

import functools
import math
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.base import POISON, Setup
from bench.engine import stopping
from bench.engine.counts import reserve_of
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.datasets import DatasetInfo
from bench.engine.devices import cpu_name, device_name
from bench.engine.files import digest_of, disk_is_full
from bench.engine.metrics import accuracy, detection, predict
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Diverged, Recipe, Tensors, TrainingLog, fit, make_optimizer, named, part_of
from bench.experiment.identity import attack_from, defense_from, spec_of
from bench.experiment.trial import Trial
from bench.measures import evaluation
from bench.measures.context import NEEDS_CONTROL, EvaluationContext
from bench.measures.evaluation import measured
from bench.pipeline.materials import FreshModel, flops_of, split_held_out
from bench.pipeline.provenance import PeakMemory, provenance
from bench.storage.store import STAGES, Damaged, Identity, Store, key_of
from defenses.base import THREAT_MODELS, DefenderView, Defense, NotApplicable, ReserveView, TrainsetView

SPREAD = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles


HELD = 2**29  # bytes of triggered test images that a process keeps


ATTEMPTS = 3  # at a stage whose inputs turn out to be damaged


class Busy(Exception):
    """Another process computes this stage now."""


@dataclass
class Runner:
    """Where and on what the stages of trials are computed.

    Attributes:
        infos: the data sets, by name.
        checkpoint_s: seconds between checkpoints of a training.
        origin: which code this is; taken when a sweep starts, since the files may change under it.
    """

    store: Store
    infos: dict[str, DatasetInfo]
    device: torch.device
    checkpoint_s: float = 60.0
    origin: dict[str, Any] = field(default_factory=provenance)
    _sets: dict[tuple[str, str], ImageSet] = field(default_factory=dict)
    _cases: dict[str, EvaluationContext] = field(default_factory=dict)

    def run(self, trial: Trial, stages: tuple[str, ...] = STAGES) -> None:
        """Compute the named stages of a trial that are not finished, in order.

        A clean control is an implant of its own (`trial.control_trial()`), which has to be there before an evaluation.

        Raises:
            Busy: another process computes one now.
            Stopped: the process is to stop; neither stage nor try is lost.
            Exception: whatever a method raised; it is kept as the reason of the failure.
        """
        for stage in stages:
            if not getattr(trial, stage):
                continue
            stopping.check()
            try:
                self._run_stage(trial, stage)
            except Busy:
                raise
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self.store.fail(
                    stage,
                    key_of(getattr(trial, stage)),
                    f"{stage}: {reason}",
                    traceback.format_exc(),
                    counts=not disk_is_full(error),
                )
                raise

    def _run_stage(self, trial: Trial, stage: str) -> None:
        """Compute a stage; an input that turns out to be damaged is computed again first."""
        for attempt in range(ATTEMPTS):
            try:
                return self._run_once(trial, stage)
            except Damaged as damaged:
                if attempt == ATTEMPTS - 1:  # the disk damages faster than we compute
                    raise
                self._renew(trial, damaged)
        return None

    def _run_once(self, trial: Trial, stage: str) -> None:
        identity: Identity = getattr(trial, stage)
        key = key_of(identity)
        if self.store.is_finished(stage, key):
            return
        with self.store.lock(stage, key) as acquired:
            if not acquired:
                raise Busy(f"{stage} {key}")
            if self.store.is_finished(stage, key):
                return  # finished while we came
            if reason := self.store.damage(stage, key):
                self.store.set_aside({(stage, key): reason})
            if stage == "evaluate":
                self._ask_for_inspection(trial)
            result, tensors = self._computed(stage, trial)
            self.store.finish(stage, identity, result, tensors)

    def _renew(self, trial: Trial, damaged: Damaged) -> None:
        """Set a damaged input aside, with everything that was computed from it, and compute it again.

        Raises:
            Busy: another process is at it.
        """
        stage, key = damaged.stage, damaged.key
        with self.store.lock(stage, key) as acquired:
            if not acquired:
                raise Busy(f"{stage} {key}")
            # Another process may have computed it again since.
            if reason := self.store.damage(stage, key, thorough=True):
                self.store.set_aside({(stage, key): reason})
        self._cases.clear()  # they hold what was read of it
        control = trial.clean_control and key == key_of(trial.clean_control)
        self.run(trial.control_trial() if control else trial, (stage,))

    def _ask_for_inspection(self, trial: Trial) -> None:
        """What an evaluation reads beside the repaired model: whoever comes first computes it."""
        if self.store.needed("defend", trial.evaluate["defend"])["status"] == "done":
            self.run(trial, ("inspect",))

    def _computed(self, stage: str, trial: Trial) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """One stage with its price: seconds, memory, images, and what it ran on."""
        compute = {
            "surrogate": self._surrogate,
            "implant": self._implant,
            "defend": self._defend,
            "inspect": self._inspect,
            "evaluate": self._evaluate,
        }[stage]
        # What a process does once is no stage's price: its clock and its memory start behind it.
        _warm_up(self.device, trial.threat_model == "trainset")
        for split in ("train", "test") if stage in ("implant", "surrogate", "defend") else ("test",):
            self._images(self.infos[trial.dataset], split)
        log = self.log(stage, trial)
        memory = PeakMemory(self.device)
        result, tensors = compute(trial, log)
        price = {
            "status": "done",
            "seconds": log.seconds,
            "peak_memory_mib": memory.mib(),
            "images": log.images,
            "updates": log.updates,
            "gflop": log.passes * flops_of(spec_of(self.infos[trial.dataset], trial.implant["model"])) / 1e9,
            # A value that is no number is a gap in the curve: JSON has no NaN.
            "curves": {
                name: [(step, value if math.isfinite(value) else None) for step, value in curve]
                for name, curve in log.curves.items()
            },
            # Of this process: a cluster's nodes differ from the machine that the sweep was started on.
            "provenance": {**self.origin, "device": device_name(self.device), "cpu": cpu_name()},
        }
        return {**price, **result}, tensors

    def log(self, stage: str, trial: Trial) -> TrainingLog:
        """Where a stage keeps its curves and checkpoints."""
        folder = self.store.work(stage, key_of(getattr(trial, stage)))
        return TrainingLog(folder, self.checkpoint_s, precision=trial.implant["train"]["precision"])

    # The three stages -----------------------------------------------------------------------------------------

    def _surrogate(self, trial: Trial, log: TrainingLog) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """Train the clean network that the attacker owns."""
        try:
            return {}, {"model": self._setup(trial, log).surrogate().state_dict()}
        except Diverged as error:
            return {"status": "diverged", "reason": str(error)}, {}

    def _stored_surrogate(self, trial: Trial) -> Classifier:
        self.run(trial, ("surrogate",))
        key = key_of(trial.surrogate)
        result = self.store.needed("surrogate", key)
        if result["status"] == "diverged":
            raise Diverged(f"surrogate: {result['reason']}")
        return self.stored(trial, "surrogate", key)

    def _implant(self, trial: Trial, log: TrainingLog) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """Train the infected model; keep its weights, the trigger's tensors and each image's role.

        A training that diverges does so each time: that is its outcome, and the outcome of all its repairs.
        """
        try:
            return self._trained(trial, log)
        except Diverged as error:
            return {"status": "diverged", "reason": str(error)}, {}

    def _trained(self, trial: Trial, log: TrainingLog) -> tuple[dict[str, Any], dict[str, Tensors]]:
        identity, info = trial.implant, self.infos[trial.dataset]
        attacker, seed = attack_from(identity), identity["seed"]
        asked: dict[str, Any] = {}

        def stored_surrogate() -> Classifier:
            asked["surrogate"] = key_of(trial.surrogate)
            return self._stored_surrogate(trial)

        setup = self._setup(trial, log, stored_surrogate)
        clean = setup.trainset
        tensors = attacker.prepare(setup)
        model = setup.fresh_model(seed)
        if attacker.regime == "per_batch":
            hooks = attacker.hooks(setup, tensors)
            shipped = clean
        else:
            hooks = None
            shipped, roles = attacker.poison(clean, tensors, info.num_classes, seed)
        fit(
            model,
            shipped,
            setup.recipe,
            seed=seed,
            augmentation=setup.augmentation,
            hooks=hooks,
            log=log,
            stream="implant",
        )
        if hooks is not None:
            # The training set as a defender would find it is made with the trigger as it was learned.
            tensors = {**tensors, **hooks.learned()}
            _, roles = attacker.poison(clean, tensors, info.num_classes, seed)
        return (
            {
                "poisoned": int((roles == POISON).sum()),
                "trained_on": len(clean),
                "notes": list(model.notes),
                # The same settings give other weights on another kind of device: figures are paired by this alone.
                "weights": digest_of(model.state_dict(), {})[:20],
                **asked,
            },
            {"model": model.state_dict(), "trigger": {**tensors, "roles": roles}},
        )

    def _setup(self, trial: Trial, log: TrainingLog, stored_surrogate: Callable[[], Classifier] | None = None) -> Setup:
        """What the attacker of a trial owns."""
        identity, info = trial.implant, self.infos[trial.dataset]
        return Setup(
            trainset=self._split(trial)[0],
            num_classes=info.num_classes,
            seed=identity["seed"],
            fresh_model=functools.partial(self._fresh, spec_of(info, identity["model"])),
            recipe=Recipe(**identity["train"]),
            augmentation=Augmentation(**identity["dataset"]["augmentation"]),
            log=log,
            stored_surrogate=stored_surrogate,
        )

    def _defend(self, trial: Trial, log: TrainingLog) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """Show the defender what is his, and keep what he returns."""
        implant = self.store.needed("implant", key_of(trial.implant))
        if implant["status"] == "diverged":
            return {"status": "diverged", "reason": f"implant: {implant['reason']}"}, {}
        method = defense_from(trial.defend)
        view = self._view(trial, method, log)
        try:
            with _global_sources_untouched(method.name):
                verdict = method.defend(view)
        except NotApplicable as error:
            return {"status": "not applicable", "reason": str(error)}, {}
        except Diverged as error:
            return {"status": "diverged", "reason": str(error)}, {}
        self._check_stored(trial, method, verdict.model)
        tensors: dict[str, Tensors] = {"model": verdict.model.state_dict()}
        roles = self._roles(trial) if trial.defend["view"] != DefenderView.__name__ else torch.empty(0)
        images = len(roles)
        findings = _findings(verdict.suspicion, verdict.flagged, images, method.name)
        if findings:
            tensors["findings"] = findings
        for index, step in enumerate(verdict.steps):
            findings = _findings(step.suspicion, step.selected, images, method.name)
            tensors[f"step_{index}"] = findings | named("model", step.weights or {})
        shown = {"view_images": images, "view_poisoned": int((roles == POISON).sum())} if images else {}
        return {"steps": [step.name for step in verdict.steps], **shown}, tensors

    def _check_stored(self, trial: Trial, method: Defense, model: Classifier) -> None:
        """Weights are all that is kept of a repaired model: one that is more than its weights is refused.

        Some toolkits store a model that lacks the layer its defense inserted, and measure the undefended one.
        """
        stored = self._fresh(spec_of(self.infos[trial.dataset], trial.implant["model"]), 0)
        advice = "return the architecture that the view held, changed in its weights only"
        try:
            stored.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{method.name} returned a model of another architecture; {advice}") from error
        images = self.test_set(trial.dataset).batch(slice(32)).float() / 255
        with torch.no_grad():
            one, two = model.eval()(images), stored.eval()(images)
        if not torch.allclose(one, two, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(f"{method.name} returned a model that is not what its weights say (a hook?); {advice}")

    def _evaluate(self, trial: Trial, log: TrainingLog) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """Measure the repaired model, loaded from the store as anybody would load it."""
        defend_key = trial.evaluate["defend"]
        repair = self.store.needed("defend", defend_key)
        if repair["status"] != "done":
            return {"status": repair["status"], "reason": repair["reason"]}, {}
        inspected = self.store.needed("inspect", trial.evaluate["inspect"])
        case, measure = self.case(trial), trial.evaluate
        model = self.stored(trial, "defend", defend_key)
        clean = predict(model, case.test)
        figures: dict[str, float | None] = {"clean_accuracy": accuracy(clean, case.test.labels)}
        counts = self.infos[trial.dataset].test_counts
        broken = not all(torch.isfinite(weight).all() for weight in model.state_dict().values())
        if broken or figures["clean_accuracy"] <= max(counts) / sum(counts):  # type: ignore[operator]
            reason = "weights are not finite" if broken else "no better than naming the most common class"
            return {"status": "diverged", "reason": reason, "figures": figures}, {}
        result = measured(model, case, measure, inspected, clean)
        figures |= result.pop("figures")
        steps = []
        if self.store.has("defend", defend_key, "findings") or repair.get("steps"):
            poisoned = self._roles(trial).cpu() == POISON
            if self.store.has("defend", defend_key, "findings"):
                figures |= detection(**self.store.tensors("defend", defend_key, "findings"), poisoned=poisoned)
            for index, name in enumerate(repair.get("steps", ())):
                step = self.store.tensors("defend", defend_key, f"step_{index}")
                steps.append({"name": name, **self._step(case, model, step, poisoned)})
        warnings = [*result["warnings"], *inspected.get("warnings", ())]
        return {**result, "warnings": warnings, "figures": figures, "steps": steps}, {}

    def _inspect(self, trial: Trial, log: TrainingLog) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """Measure the infected model, and its clean control where a measure asks for one: once for all repairs."""
        infected, control, warnings = self.stored(trial, "implant", key_of(trial.implant)), None, []
        if trial.clean_control:
            trained = self.store.needed("implant", key_of(trial.clean_control))
            if trained["status"] == "done":
                control = self.stored(trial, "implant", key_of(trial.clean_control))
            else:
                unmeasured = ", ".join(name for name in NEEDS_CONTROL if name in trial.inspect)
                warnings.append(f"without {unmeasured}: the clean control diverged: {trained['reason']}")
        return {**evaluation.inspected(infected, control, self.case(trial), trial.inspect), "warnings": warnings}, {}

    def case(self, trial: Trial) -> EvaluationContext:
        """A stored implant as the evaluator has it."""
        identity = trial.implant
        key = key_of(identity)
        if key in self._cases:
            self._cases[key] = self._cases.pop(key)  # the latest stands last
            return self._cases[key]
        # A case holds two triggered copies of the test set, and a grid takes turns between the seeds of a repair.
        test = self.test_set(trial.dataset)
        while self._cases and (len(self._cases) + 1) * 2 * test.images.nbytes > HELD:
            del self._cases[next(iter(self._cases))]
        self._cases[key] = EvaluationContext(
            attacker=attack_from(identity),
            tensors=self.trigger_of(trial),
            num_classes=self.infos[trial.dataset].num_classes,
            seed=identity["seed"],
            test=test,
            train=lambda: self._split(trial)[0],
            augmentation=Augmentation(**identity["dataset"]["augmentation"]),
            precision=identity["train"]["precision"],
            infected=functools.partial(self.stored, trial, "implant", key),
        )
        return self._cases[key]

    def stored(self, trial: Trial, stage: str, key: str) -> Classifier:
        """The model that a finished stage left, in eval mode."""
        model = self._fresh(spec_of(self.infos[trial.dataset], trial.implant["model"]), 0)
        model.load_state_dict(self.store.tensors(stage, key, "model", str(self.device)))
        return model.eval()

    def _step(self, case: EvaluationContext, model: Classifier, step: Tensors, poisoned: Tensor) -> dict[str, Any]:
        """One step of a progressive method, scored as the whole is; how its scores are spread, at `SPREAD`."""
        figures: dict[str, Any] = {}
        if "suspicion" in step:
            suspicion = step["suspicion"]
            figures |= detection(suspicion=suspicion, poisoned=poisoned)
            at = torch.tensor(SPREAD, dtype=torch.float64)
            figures["suspicion"] = {
                role: suspicion[these].double().quantile(at).tolist()
                for role, these in (("clean", ~poisoned), ("poison", poisoned))
                if these.any()
            }
        if "flagged" in step:
            chosen = step["flagged"]
            figures["selected"] = int(chosen.sum())
            figures["selected_poison"] = poisoned[chosen].double().mean().item() if chosen.any() else None
            # What as many images picked at random would hold: the measure of a selection.
            figures["random_poison"] = poisoned.double().mean().item()
        weights = part_of("model", step)
        if weights:
            model.load_state_dict(weights)
            figures["clean_accuracy"] = accuracy(predict(model, case.test), case.test.labels)
            figures["asr"] = case.success(model, case.test)
        return figures

    # What they are made of ------------------------------------------------------------------------------------

    def test_set(self, name: str) -> ImageSet:
        """The test images of a data set, on the device."""
        return self._images(self.infos[name], "test")

    def _images(self, info: DatasetInfo, split: str) -> ImageSet:
        split_of = (info.digest, split)
        if split_of not in self._sets:
            self._sets[split_of] = info.load(split).to(self.device)
        return self._sets[split_of]

    def _fresh(self, spec: ModelSpec, seed: int) -> Classifier:
        return spec.build(generator(seed, "weights").initial_seed()).to(self.device)

    def trigger_of(self, trial: Trial) -> Tensors:
        """The tensors of a stored implant's trigger, and each training image's role."""
        return self.store.tensors("implant", key_of(trial.implant), "trigger", str(self.device))

    def _split(self, trial: Trial) -> tuple[ImageSet, ImageSet]:
        """The training set before poisoning, and the held-out share that no model sees."""
        train = self._images(self.infos[trial.dataset], "train")
        rest, held_out = split_held_out(train.labels, trial.implant["held_out"], trial.implant["seed"])
        return train[rest], train[held_out]

    def _view(self, trial: Trial, method: Defense, log: TrainingLog) -> DefenderView:
        """Exactly what this defender could own: nothing of the attack goes along."""
        info, identity = self.infos[trial.dataset], trial.implant
        model_view = DefenderView(
            model=self.stored(trial, "implant", key_of(identity)),
            num_classes=info.num_classes,
            # Not the attacker's seed: with it, a defender could draw the poisoned indices again.
            seed=generator(identity["seed"], "defender").initial_seed(),
            device=self.device,
            log=log,
        )
        if trial.defend["view"] == DefenderView.__name__:
            return model_view
        augmentation = Augmentation(**identity["dataset"]["augmentation"])
        images = self._shown(trial)[0]
        if THREAT_MODELS[trial.threat_model] is TrainsetView:
            fresh = FreshModel(spec_of(info, identity["model"]), self.device)
            recipe = Recipe(**trial.defend["train"])
            return TrainsetView(
                **vars(model_view), trainset=images, augmentation=augmentation, fresh_model=fresh, recipe=recipe
            )
        return ReserveView(**vars(model_view), reserve=images, augmentation=augmentation)

    def _roles(self, trial: Trial) -> Tensor:
        """The role of each image of the defender's view, which is the evaluator's alone."""
        if THREAT_MODELS[trial.threat_model] is TrainsetView:
            # As the attack noted them: to poison the set again takes a generator as long as a repair.
            return self.trigger_of(trial)["roles"]
        return self._shown(trial)[1]

    def _shown(self, trial: Trial) -> tuple[ImageSet, Tensor]:
        """The images of the defender's view, and the role of each."""
        identity, classes = trial.implant, self.infos[trial.dataset].num_classes
        seed, attacker = identity["seed"], attack_from(identity)
        train, held_out = self._split(trial)
        if THREAT_MODELS[trial.threat_model] is TrainsetView:
            return attacker.poison(train, self.trigger_of(trial), classes, seed)
        share = trial.defend["reserve"]
        reserve = held_out[: reserve_of(share["size"], identity["held_out"], self.infos[trial.dataset].train_counts)]
        if not share["contamination"]:
            return reserve, torch.zeros(len(reserve), dtype=torch.uint8)
        tainted = generator(seed, "reserve").initial_seed()
        return attacker.poison(reserve, self.trigger_of(trial), classes, tainted, share["contamination"])


@functools.cache
def _warm_up(device: torch.device, detects: bool) -> None:
    """Import what networks, optimizers and measures import when they are first used, and start the device's libraries.

    Seconds of imports would stand as those of the first stage of each process: 5.6 for `no_defense`, which takes 0.04.

    Args:
        detects: will images be scored? Filters and the scores of what they find need scikit-learn.
    """
    import timm  # noqa: F401

    if detects:
        import sklearn.cluster
        import sklearn.decomposition
        import sklearn.metrics  # noqa: F401

    # The global source of random numbers is put back: a layer draws its weights from it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).to(device)
        for kind in ("sgd", "adamw"):
            optimizer = make_optimizer(Recipe(optimizer=kind), model)
            model(torch.zeros(2, 3, 8, 8, device=device)).sum().backward()
            optimizer.step()


@contextmanager
def _global_sources_untouched(name: str) -> Iterator[None]:
    """Refuse a method that draws from, or seeds, a global random source: what runs beside it would change its figures.

    Raises:
        ValueError: after the method, naming the source.
    """

    import rich.style  # noqa: F401  draws when it is first imported, which scikit-learn may do within a method

    def states() -> dict[str, bytes]:
        kind, keys, *rest = np.random.get_state()
        return {
            "torch": torch.random.get_rng_state().numpy().tobytes(),
            "numpy": repr((kind, np.asarray(keys).tobytes(), rest)).encode(),
            "random": repr(random.getstate()).encode(),
        }

    before = states()
    yield
    changed = [source for source, state in states().items() if state != before[source]]
    if changed:
        raise ValueError(
            f"{name} drew from the global random source of {' and '.join(changed)}; "
            "draw from bench.engine.data.generator(view.seed, 'what for'), so that a repeat gives the same figures (a "
            "library that draws when it is imported belongs at the top of the file)"
        )


def _findings(suspicion: Tensor | None, flagged: Tensor | None, images: int, name: str) -> Tensors:
    """What a method says of each image of its view, as it is stored.

    Raises:
        ValueError: it is not one value for each image, or the scores are no numbers.
    """
    findings = {}
    for key, value in (("suspicion", suspicion), ("flagged", flagged)):
        if value is None:
            continue
        if value.shape != (images,):
            raise ValueError(f"{name} gave {key} of shape {tuple(value.shape)}; ({images},) is due, one for each image")
        findings[key] = value.detach().cpu()
    if suspicion is not None and not torch.isfinite(suspicion).all():
        raise ValueError(f"{name} gave a suspicion score that is no number")
    if flagged is not None and flagged.dtype != torch.bool:
        raise ValueError(f"{name} flagged images with {flagged.dtype}; give torch.bool")
    return findings
