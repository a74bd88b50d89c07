import copy
import math

import pytest
import torch
from torch import Tensor, nn

from baselines.fine_tuning import FineTuning
from bench.engine.adversarial import pgd
from bench.engine.data import Augmentation, ImageSet, equal_batches, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses import aft
from defenses.aft import AdversarialFineTuning, AdversarialStart, ReleasedAFT
from defenses.base import DefenderView, ReserveView, offered

HOW = Augmentation(crop=1 / 8, flip=True, rotation=5)


def model(name: str = "test_efficientnet") -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def reserve(count: int = 50) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator(0, "reserve"), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4)


def view(infected: Classifier, data: ImageSet, seed: int = 0, how: Augmentation = HOW) -> ReserveView:
    return ReserveView(
        copy.deepcopy(infected), 4, seed, torch.device("cpu"), TrainingLog(), reserve=data, augmentation=how
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    right = other.state_dict()
    return all(torch.equal(value, right[key]) for key, value in one.state_dict().items())


SHARED = {"lr": 0.02, "batch_size": 16, "momentum": 0.8, "weight_decay": 1e-3}


def tuned(count: int, epochs: int, seed: int = 0) -> Classifier:
    return FineTuning(epochs=epochs, **SHARED).defend(view(model(), reserve(count), seed)).model


@pytest.mark.parametrize("without", [{"epsilon": 0.0}, {"adversarial_updates": 0}])
@pytest.mark.parametrize(("count", "seed"), [(50, 0), (64, 3)])
def test_without_an_adversarial_step_it_is_fine_tuning_bit_for_bit(without, count, seed):
    updates = 3 * equal_batches(count, 16)[0]
    settings = AdversarialFineTuning(updates=updates, **SHARED, **{"adversarial_updates": 5, **without})
    assert same(settings.defend(view(model(), reserve(count), seed)).model, tuned(count, 3, seed))


def test_with_adversarial_steps_it_is_not_fine_tuning():
    settings = AdversarialFineTuning(updates=12, adversarial_updates=1, **SHARED)
    assert not same(settings.defend(view(model(), reserve())).model, tuned(50, 3))


def watched(monkeypatch) -> list[dict]:
    """Every call of the attack, with what it was given and what it found."""
    calls: list[dict] = []

    def watch(attacked: nn.Module, images: Tensor, labels: Tensor, **settings: float) -> Tensor:
        weights = torch.cat([weight.detach().flatten() for weight in attacked.parameters()]).clone()
        buffers = {key: value.clone() for key, value in attacked.named_buffers()}
        found = pgd(attacked, images, labels, **settings)
        unchanged = all(torch.equal(value, buffers[key]) for key, value in attacked.named_buffers())
        calls.append(
            {"images": images, "labels": labels, "found": found, "weights": weights, "training": attacked.training}
            | {"unchanged": unchanged, **settings}
        )
        return found

    monkeypatch.setattr(aft, "pgd", watch)
    return calls


@pytest.mark.parametrize("adversarial", [0, 1, 5, 9])
def test_only_the_first_updates_are_adversarial_also_within_an_epoch(monkeypatch, adversarial):
    calls = watched(monkeypatch)
    AdversarialFineTuning(updates=9, adversarial_updates=adversarial, **SHARED).defend(view(model(), reserve()))
    assert len(calls) == adversarial  # an epoch has 4 updates


def test_the_attack_has_the_settings_of_the_paper_and_the_given_labels(monkeypatch):
    calls = watched(monkeypatch)
    AdversarialFineTuning(updates=4, adversarial_updates=4, **SHARED).defend(view(model(), reserve()))
    for call in calls:
        assert call["epsilon"] == 6 / 255
        assert call["step_size"] == pytest.approx(1.2 / 255)
        assert call["steps"] == 7
        assert call.get("random_start") is None
        assert not call.get("targeted", False)
    # Labels and images belong together: an epoch without augmentation gives back the pairs of the reserve.
    calls.clear()
    data = reserve(48)
    AdversarialFineTuning(updates=3, adversarial_updates=3, **SHARED).defend(view(model(), data, how=Augmentation()))
    pairs = {image.numpy().tobytes(): int(label) for image, label in zip(data.images / 255, data.labels, strict=True)}
    seen = [
        pairs[image.contiguous().numpy().tobytes()] == int(label)
        for call in calls
        for image, label in zip(call["images"], call["labels"], strict=True)
    ]
    assert len(seen) == 48
    assert all(seen)


def test_each_attack_is_on_the_model_of_that_moment_first_on_the_infected_one(monkeypatch):
    calls = watched(monkeypatch)
    infected = model()
    AdversarialFineTuning(updates=3, adversarial_updates=3, **SHARED).defend(view(infected, reserve()))
    before = torch.cat([weight.detach().flatten() for weight in infected.parameters()])
    assert torch.equal(calls[0]["weights"], before)
    assert not torch.equal(calls[1]["weights"], before)
    assert not torch.equal(calls[2]["weights"], calls[1]["weights"])
    assert all(call["training"] and call["unchanged"] for call in calls)  # train mode around it, no buffer moved


def test_adversarial_images_are_in_the_ball_around_the_augmented_ones_and_are_images(monkeypatch):
    calls = watched(monkeypatch)
    AdversarialFineTuning(updates=4, adversarial_updates=4, **SHARED).defend(view(model(), reserve()))
    for call in calls:
        change = (call["found"] - call["images"]).abs()
        assert change.max() <= 6 / 255 + 1e-6
        assert change.max() > 5.9 / 255  # seven steps of a fifth reach the ball's surface
        assert call["found"].min() >= 0
        assert call["found"].max() <= 1


def test_an_adversarial_batch_holds_adversarial_images_only():
    infected, data = model(), reserve(16)
    images, labels = data.images / 255, data.labels
    hooks = AdversarialStart(AdversarialFineTuning(), updates=5)
    found, given = hooks.augmented(infected, images, labels, 4, generator(0))
    assert torch.equal(given, labels)
    assert (found - images).abs().flatten(1).amax(1).min() > 5.9 / 255
    untouched, _ = hooks.augmented(infected, images, labels, 5, generator(0))
    assert untouched is images


def test_the_attack_can_leave_the_predicted_labels_and_training_keeps_the_given_ones(monkeypatch):
    calls = watched(monkeypatch)
    infected, data = model(), reserve(16)
    images = data.images / 255
    with torch.no_grad():
        predicted = infected(images).argmax(1)
    assert not torch.equal(predicted, data.labels)
    hooks = AdversarialStart(AdversarialFineTuning(attack_labels="predicted"), updates=1)
    _, given = hooks.augmented(infected.train(), images, data.labels, 0, generator(0))
    assert torch.equal(calls[0]["labels"], predicted)  # in eval mode, whatever mode the model is in
    assert torch.equal(given, data.labels)
    assert infected.training


def test_the_attack_raises_the_loss():
    infected, data = model(), reserve(16)
    images = data.images / 255
    found, labels = AdversarialStart(AdversarialFineTuning(), updates=1).augmented(
        infected, images, data.labels, 0, generator(0)
    )
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(infected(shown), labels) for shown in (images, found))
    assert after > before


def test_a_random_start_is_in_the_ball_and_is_drawn_from_the_given_source():
    infected, data = model(), reserve(16)
    images = data.images / 255
    settings = AdversarialFineTuning(attack_steps=0, random_start=True)
    first, again, other = (
        AdversarialStart(settings, updates=1).augmented(infected, images, data.labels, 0, generator(seed))[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 < (first - images).abs().max() <= 6 / 255 + 1e-6


@pytest.mark.parametrize(("mode", "passes"), [("eval", 0), ("train", 7)])
def test_batch_norm_learns_from_the_attack_only_in_train_mode(mode, passes):
    infected, data = model().train(), reserve(16)
    hooks = AdversarialStart(AdversarialFineTuning(attack_batch_norm=mode), updates=1)
    hooks.augmented(infected, data.images / 255, data.labels, 0, generator(0))
    counts = {int(value) for key, value in infected.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {passes}
    assert all(weight.requires_grad and weight.grad is None for weight in infected.parameters())


def test_the_released_script_is_a_row_of_its_own():
    released = ReleasedAFT()
    assert (released.updates, released.adversarial_updates) == (7820, 1173)  # 20 and 3 epochs of 50,000 images
    rates = {released.recipe(10, released.schedule).learning_rate(step, 10) for step in range(10)}
    assert rates == {0.001}
    usual = AdversarialFineTuning()
    assert usual.recipe(600, usual.schedule).learning_rate(599, 600) < 1e-6


def test_running_averages_take_in_each_batch_once():
    done = AdversarialFineTuning(updates=6, adversarial_updates=6, **SHARED).defend(view(model(), reserve())).model
    counts = {int(value) for key, value in done.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {6}


def test_it_makes_the_number_of_updates_and_tells_the_journal():
    given = view(model(), reserve())
    AdversarialFineTuning(updates=6, adversarial_updates=2, **SHARED).defend(given)
    _, size = equal_batches(50, 16)
    assert given.log.images == 6 * size
    assert all(math.isfinite(value) for _, value in given.log.curves["fine_tuning/loss"])


def test_it_repeats_under_a_seed_and_gives_its_model_back_in_eval_mode():
    settings = AdversarialFineTuning(updates=5, adversarial_updates=3, **SHARED)
    one, two, other = (settings.defend(view(model(), reserve(), seed)).model for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)
    assert not one.training
    assert all(weight.requires_grad for weight in one.parameters())


def test_it_needs_a_reserve():
    assert offered(AdversarialFineTuning, "reserve") is ReserveView
    assert offered(AdversarialFineTuning, "trainset") is not DefenderView


@pytest.mark.parametrize("name", ["test_vit", "resnetv2_18"])
def test_families_with_and_without_batch_norm_take_it(name):
    done = AdversarialFineTuning(updates=2, adversarial_updates=1, **SHARED).defend(view(model(name), reserve())).model
    assert all(value.isfinite().all() for value in done.state_dict().values())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"updates": 100}, r"defense\.aft\.adversarial_updates is 200; write 0 to 100"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"schedule": "one_cycle"}, "schedule is 'one_cycle'; write cosine or constant"),
        ({"attack_labels": "true"}, "attack_labels is 'true'; write given or predicted"),
        ({"attack_batch_norm": "off"}, "attack_batch_norm is 'off'; write eval or train"),
    ],
)
def test_a_wrong_setting_says_what_to_write(setting, message):
    with pytest.raises(ValueError, match=message):
        AdversarialFineTuning(**setting)
