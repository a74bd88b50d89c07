from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.abl import AntiBackdoorLearning, Ascent, Flooding, losses_of, share_of
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.metrics import detection
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Hooks, Recipe, TrainingLog
from defenses import base
from defenses.base import THREAT_MODELS, TrainsetView, offered

SPEC = ModelSpec("test_efficientnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3)
HOW = Augmentation(crop=1 / 8, flip=True)


def images(count: int) -> ImageSet:
    drawn = torch.randint(0, 256, (count, 3, 16, 16), generator=generator(0, "train"), dtype=torch.uint8)
    return ImageSet(drawn, torch.arange(count) % 4)


def view(data: ImageSet, recipe: Recipe | None = None, seed: int = 0, spec: ModelSpec = SPEC) -> TrainsetView:
    return TrainsetView(
        *(spec.build(0).eval(), 4, seed, torch.device("cpu"), TrainingLog()),
        trainset=data,
        augmentation=HOW,
        fresh_model=partial(ModelSpec.build, spec),
        recipe=recipe or Recipe(epochs=2, batch_size=32),
    )


def watched(monkeypatch) -> list[dict]:
    """Every training as it was asked for; the model stays as it is, in eval mode."""
    calls: list[dict] = []

    def watch(model: Classifier, data: ImageSet, recipe: Recipe, **more) -> Classifier:
        calls.append({"data": data, "recipe": recipe, "weights": copy.deepcopy(model.state_dict()), **more})
        return model.eval()

    monkeypatch.setattr(base, "fit", watch)
    return calls


@pytest.mark.parametrize(("count", "isolated"), [(100, 1), (199, 1), (230, 2), (2900, 29)])
def test_one_percent_is_isolated_rounded_down(monkeypatch, count, isolated):
    # 0.01 * 2900 is 28.999... in floating point.
    watched(monkeypatch)
    verdict = AntiBackdoorLearning().defend(view(images(count)))
    assert int(verdict.flagged.sum()) == isolated
    assert verdict.flagged.shape == verdict.suspicion.shape == (count,)


def test_the_isolated_are_those_of_lowest_loss_in_eval_mode_without_augmentation(monkeypatch):
    calls, data = watched(monkeypatch), images(150)
    verdict = AntiBackdoorLearning(isolation_ratio=0.1).defend(view(data))
    model = SPEC.build(0).eval()
    with torch.no_grad():
        probabilities = torch.stack([model(image[None] / 255)[0].double().softmax(0) for image in data.images])
    by_hand = -probabilities[torch.arange(150), data.labels].log()
    torch.testing.assert_close(-verdict.suspicion.double(), by_hand, atol=1e-5, rtol=1e-4)
    assert set(verdict.flagged.nonzero().flatten().tolist()) == set(by_hand.argsort()[:15].tolist())
    # The second phase trains on the others and the third on these, without augmentation.
    first, second, third = calls
    assert [len(call["data"]) for call in calls] == [150, 135, 15]
    assert torch.equal(third["data"].images, data.images[verdict.flagged])
    assert torch.equal(second["data"].images, data.images[~verdict.flagged])
    assert second["augmentation"] == HOW
    assert first.get("augmentation") is third.get("augmentation") is None


def test_isolation_and_unlearning_see_the_images_as_they_are(monkeypatch):
    # What the network is given, against the pixels of the training set: the released scripts turn both phases' images
    # into tensors and do nothing else.
    data = images(60)
    known = {(image.float() / 255).numpy().tobytes() for image in data.images}
    seen: dict[str, list[bool]] = {}

    def note(phase: str, hooks: Hooks) -> None:
        whole = hooks.augmented

        def augmented(model, batch, labels, step, source):
            seen.setdefault(phase, []).extend(image.contiguous().numpy().tobytes() in known for image in batch)
            return whole(model, batch, labels, step, source)

        hooks.augmented = augmented  # type: ignore[method-assign]

    train = base.fit

    def watch(model, *given, hooks=None, stream="train", **more):
        hooks = hooks or Hooks()
        note(stream, hooks)
        return train(model, *given, hooks=hooks, stream=stream, **more)

    monkeypatch.setattr(base, "fit", watch)
    AntiBackdoorLearning(isolation_ratio=0.1, unlearning_updates=2).defend(view(data))
    first, second, third = seen.values()
    assert all(first)
    assert len(first) == 60  # one epoch
    assert not all(second)
    assert all(third)


def test_the_phases_have_the_papers_shares_of_the_usual_recipe(monkeypatch):
    calls = watched(monkeypatch)
    usual = Recipe(epochs=100, lr=0.1, schedule="cosine", label_smoothing=0.1, batch_size=64)
    AntiBackdoorLearning().defend(view(images(200), usual))
    first, second, third = (call["recipe"] for call in calls)
    assert (first.epochs, first.schedule, first.lr, first.label_smoothing) == (20, "constant", 0.1, 0.0)
    assert (second.epochs, second.schedule, second.lr, second.label_smoothing) == (60, "cosine", 0.1, 0.1)
    assert (third.updates, third.schedule) == (40, "constant")
    assert third.lr == pytest.approx(5e-4)


def test_a_short_recipe_keeps_one_epoch_of_each_phase_and_counts_updates_if_the_recipe_does():
    assert share_of(Recipe(epochs=2), 0.2).epochs == 1
    assert share_of(Recipe(epochs=6), 0.6).epochs == 4
    assert share_of(Recipe(updates=500), 0.2).updates == 100


class Logits(nn.Module):
    """Logits that are the weights themselves: the mean loss of a batch is theirs to set."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(margin))

    def forward(self, given: Tensor) -> Tensor:
        return torch.stack([self.margin.expand(len(given)), torch.zeros(len(given))], dim=1)


@pytest.mark.parametrize(("margin", "direction"), [(2.0, -1), (1.0, -1), (0.0, 1), (-2.0, 1)])
def test_isolation_descends_above_gamma_and_ascends_below_as_local_gradient_ascent_does(margin, direction):
    # The loss is log(1 + exp(-margin)): 0.5 at a margin of 0.43; its slope is -sigmoid(-margin).
    model, labels = Logits(margin), torch.zeros(4, dtype=torch.int64)
    Flooding(0.5).loss(model, torch.zeros(4, 1), labels, 0.0).backward()
    slope = -torch.sigmoid(torch.tensor(-margin))
    torch.testing.assert_close(model.margin.grad, direction * slope)
    plain = F.cross_entropy(model(torch.zeros(4, 1)), labels)
    (local,) = torch.autograd.grad(torch.sign(plain - 0.5) * plain, model.margin)
    torch.testing.assert_close(model.margin.grad, local)


def test_the_threshold_applies_to_the_mean_of_a_batch():
    # Losses log 2 and 0.049 of two images: one above, one below gamma, their mean 0.37 below it.
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))

        def forward(self, given: Tensor) -> Tensor:
            return self.logits

    model = Two()
    Flooding(0.5).loss(model, torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 0.0).backward()
    assert (model.logits.grad[:, 0] > 0).all()  # both climb


def test_unlearning_climbs_the_loss():
    model, labels = Logits(1.0), torch.zeros(4, dtype=torch.int64)
    Ascent().loss(model, torch.zeros(4, 1), labels, 0.0).backward()
    assert model.margin.grad.item() == pytest.approx(torch.sigmoid(torch.tensor(-1.0)).item())


def test_unlearning_raises_the_loss_of_the_isolated():
    settings, spec = {"isolation_ratio": 0.1, "unlearning_lr": 0.1, "tuning": 0.0}, replace(SPEC, name="test_vit")
    without = AntiBackdoorLearning(**settings, unlearning_updates=0).defend(view(images(40), spec=spec))
    done = AntiBackdoorLearning(**settings, unlearning_updates=10).defend(view(images(40), spec=spec))
    assert torch.equal(done.flagged, without.flagged)
    isolated = images(40)[done.flagged]
    assert losses_of(done.model, isolated).mean() > losses_of(without.model, isolated).mean() + 0.1


def test_what_is_learnt_at_a_glance_is_isolated():
    # A tenth of the images is white and labelled 0; the others are noise whose labels nothing tells.
    data = images(200)
    data.images[:20], data.labels[:20] = 255, 0
    settings = AntiBackdoorLearning(isolation_ratio=0.05, isolation=1.0, tuning=0.0, unlearning_updates=0)
    verdict = settings.defend(view(data, Recipe(epochs=8, batch_size=50, lr=0.02)))
    poisoned = torch.arange(200) < 20
    assert (
        detection(suspicion=verdict.suspicion, flagged=verdict.flagged, poisoned=poisoned)["detection_precision"] == 1
    )


def test_it_repeats_under_a_seed_and_trains_a_network_of_its_own():
    one, two, other = (
        AntiBackdoorLearning(isolation_ratio=0.1, unlearning_updates=2).defend(view(images(60), seed=seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, two.model.state_dict()[key]) for key, value in one.model.state_dict().items())
    assert not torch.equal(one.model.head.weight, other.model.head.weight)


def test_it_needs_the_training_set():
    assert offered(AntiBackdoorLearning, "trainset") is TrainsetView
    assert offered(AntiBackdoorLearning, "reserve") is None
    assert THREAT_MODELS["trainset"] is TrainsetView


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"unlearning_updates": -1}, r"defense\.abl\.unlearning_updates is -1"),
    ],
)
def test_a_wrong_setting_says_what_to_write(setting, message):
    with pytest.raises(ValueError, match=message):
        AntiBackdoorLearning(**setting)


def test_a_training_set_too_small_to_isolate_from_is_refused_in_words():
    with pytest.raises(ValueError, match=r"isolates 0\.01 of 99 images, which is none; raise defense\.abl"):
        AntiBackdoorLearning().defend(view(images(99)))


@pytest.mark.slow
def test_on_digits_the_backdoor_goes_where_the_isolated_are_the_poisoned(run_grid):
    """Digits are learnt as fast as a patch, so that isolation succeeds under some seeds only."""
    status, trials = run_grid(
        *("train.epochs=30", "train.batch_size=64", "model.stem=half", "grid.attacks=[badnets]", "grid.seeds=[0,1]"),
        *("grid.defenses=[abl]", "grid.threat_models=[trainset]"),
    )
    assert status == 0
    isolated = trials[trials.detection_precision > 0.9]
    assert len(isolated)
    assert (isolated.asr < 0.2).all()
    assert (trials.detection_fpr < 0.02).all()  # it takes one percent, whatever it is
