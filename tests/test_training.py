import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.engine.data import Augmentation, ImageSet, equal_batches, generator
from bench.engine.models import ModelSpec
from bench.engine.training import Diverged, Hooks, Recipe, TrainingLog, fit


class Softmax(nn.Module):
    """Linear softmax regression on the pixels: its gradient is (p - y) x."""

    def __init__(self, pixels: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(pixels, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(classes, pixels, generator=generator(0, "w")) * 0.3)
            self.fc.bias.copy_(torch.randn(classes, generator=generator(0, "b")) * 0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


class Dropped(nn.Module):
    """Convolution with channels last, batch norm and dropout: state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 9, 3, stride=2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(9, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.norm(self.conv(images)).relu()).relu()
        return self.fc(self.drop(maps.mean((2, 3))))


def dropped() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropped().to(memory_format=torch.channels_last)


def noise(count: int, channels: int = 3, size: int = 2, classes: int = 3) -> ImageSet:
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator(0, "noise"), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes)


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


# Steps ------------------------------------------------------------------------------------------------------


def gradient_by_hand(w: np.ndarray, b: np.ndarray, data: ImageSet, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    x = data.images.flatten(1).double().numpy() / 255
    logits = x @ w.T + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.eye(len(b))[data.labels.numpy()] * (1 - smoothing) + smoothing / len(b)
    return (p - y).T @ x / len(x), (p - y).mean(0)


RATES = {"constant": [1.0, 1.0, 1.0], "cosine": [0.5 * (1 + math.cos(math.pi * t)) for t in (1 / 6, 3 / 6, 5 / 6)]}


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize(("momentum", "decay", "smoothing"), [(0.0, 0.0, 0.0), (0.9, 0.0, 0.1), (0.8, 0.05, 0.0)])
def test_three_steps_of_sgd_are_those_of_the_textbook(optimizer, momentum, decay, smoothing, schedule):
    data, model = noise(9), Softmax()
    weights = [model.fc.weight.detach().double().numpy(), model.fc.bias.detach().double().numpy()]
    buffers = [np.zeros_like(weight) for weight in weights]
    for rate in RATES[schedule]:
        for i, gradient in enumerate(gradient_by_hand(*weights, data, smoothing)):
            gradient = gradient + decay * weights[i]
            buffers[i] = momentum * buffers[i] + gradient
            step = gradient + momentum * buffers[i] if optimizer == "sgd" else buffers[i]
            weights[i] = weights[i] - 0.7 * rate * step
    recipe = Recipe(
        epochs=3,
        batch_size=9,
        optimizer=optimizer,
        lr=0.7,
        momentum=momentum,
        weight_decay=decay,
        schedule=schedule,
        label_smoothing=smoothing,
    )
    fit(model, data, recipe, seed=0)
    np.testing.assert_allclose(model.fc.weight.detach().numpy(), weights[0], atol=2e-6)
    np.testing.assert_allclose(model.fc.bias.detach().numpy(), weights[1], atol=2e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_three_steps_of_adam_are_those_of_the_paper(optimizer):
    data, model, rate, decay, beta = noise(9), Softmax(), 0.02, 0.3, 0.8
    weights = [model.fc.weight.detach().double().numpy(), model.fc.bias.detach().double().numpy()]
    first, second = [0.0, 0.0], [0.0, 0.0]
    for t in (1, 2, 3):
        for i, gradient in enumerate(gradient_by_hand(*weights, data, 0.0)):
            if optimizer == "adamw":
                weights[i] = weights[i] * (1 - rate * decay)
            else:
                gradient = gradient + decay * weights[i]
            first[i] = beta * first[i] + (1 - beta) * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            scaled = np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8
            weights[i] = weights[i] - rate * first[i] / (1 - beta**t) / scaled
    recipe = Recipe(
        epochs=3, batch_size=9, optimizer=optimizer, lr=rate, momentum=beta, weight_decay=decay, schedule="constant"
    )
    fit(model, data, recipe, seed=0)
    np.testing.assert_allclose(model.fc.weight.detach().numpy(), weights[0], atol=5e-6)
    np.testing.assert_allclose(model.fc.bias.detach().numpy(), weights[1], atol=5e-6)


def test_weights_that_are_frozen_stay_as_they_are():
    model = dropped()
    model.conv.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model, noise(12, size=8), Recipe(epochs=2, batch_size=4), seed=0)
    assert torch.equal(model.conv.weight, before["conv.weight"])
    assert not torch.equal(model.fc.weight, before["fc.weight"])
    assert not model.conv.weight.requires_grad


def test_training_lowers_the_loss_on_what_can_be_learned():
    images = torch.zeros(60, 1, 4, 4, dtype=torch.uint8)
    images[::2, :, :2] = 255
    data, log = ImageSet(images, torch.arange(60) % 2), TrainingLog()
    model = fit(Softmax(16, 2), data, Recipe(epochs=20, batch_size=10), seed=0, log=log)
    assert (model(data.images / 255).argmax(1) == data.labels).all()
    losses = [value for _, value in log.curves["train/loss"]]
    assert losses[-1] < losses[0] / 3


# The learning rate --------------------------------------------------------------------------------------------


def test_a_cosine_takes_the_middle_of_each_step_and_adds_up_to_half():
    rates = [Recipe(lr=2.0).learning_rate(step, 4) for step in range(4)]
    # 1 + cos of 22.5, 67.5, 112.5 and 157.5 degrees.
    assert rates == pytest.approx([1.9238795, 1.3826834, 0.6173166, 0.0761205])
    assert sum(rates) / 4 == pytest.approx(1.0)


def test_a_constant_rate_is_constant_behind_its_warmup():
    rates = [Recipe(lr=0.4, schedule="constant", warmup=0.5).learning_rate(step, 8) for step in range(8)]
    assert rates == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.4, 0.4, 0.4, 0.4])
    assert {Recipe(lr=0.4, schedule="constant").learning_rate(step, 8) for step in range(8)} == {0.4}


def test_one_cycle_rises_for_three_tenths_and_falls_as_a_cosine():
    rates = [Recipe(lr=1.2, schedule="one_cycle").learning_rate(step, 10) for step in range(10)]
    falling = [0.6 * (1 + math.cos(math.pi * (tenth + 0.5) / 7)) for tenth in range(7)]
    assert rates == pytest.approx([0.2, 0.6, 1.0, *falling])


def test_a_cosine_behind_a_warmup_starts_at_the_top():
    rates = [Recipe(lr=1.0, warmup=0.5).learning_rate(step, 4) for step in range(4)]
    assert rates == pytest.approx([0.25, 0.75, 0.5 + math.sqrt(0.125), 0.5 - math.sqrt(0.125)])


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_no_step_is_lost_to_a_rate_of_zero_and_none_is_above_the_highest(schedule, steps):
    rates = [Recipe(lr=0.1, schedule=schedule, warmup=0.1).learning_rate(step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.1 for rate in rates)


# Batches and epochs -------------------------------------------------------------------------------------------


def test_two_trainings_of_one_name_are_refused_where_a_checkpoint_could_pass_for_the_other(tmp_path):
    log = TrainingLog(folder=tmp_path)
    fit(Softmax(), noise(6), Recipe(epochs=1), seed=0, log=log)
    with pytest.raises(ValueError, match="train"):
        fit(Softmax(), noise(6), Recipe(epochs=1), seed=0, log=log)
    fit(Softmax(), noise(6), Recipe(epochs=1), seed=0, log=log, stream="second")


def test_a_recipe_that_leaves_the_precision_open_takes_the_journals(monkeypatch):
    from bench.engine import training

    asked = []
    plain = training.autocast
    monkeypatch.setattr(
        training, "autocast", lambda precision, device: asked.append(precision) or plain("float32", device)
    )
    fit(Softmax(), noise(6), Recipe(epochs=1), seed=0, log=TrainingLog(precision="bfloat16"))
    fit(Softmax(), noise(6), Recipe(epochs=1, precision="float32"), seed=0, log=TrainingLog(precision="bfloat16"))
    assert asked == ["bfloat16", "float32"]


class Witness(Hooks):
    """Writes down what the loop does."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.batches: list[Tensor] = []
        self.kinds: list[tuple] = []

    def batch(self, images, labels, step, source):
        self.calls.append(("batch",))
        self.batches.append(images[:, 0, 0, 0].clone())
        self.kinds.append((images.dtype, int(images.max()) > 1))
        return images, labels

    def augmented(self, model, images, labels, step, source):
        self.calls.append(("augmented", step, model.training))
        self.kinds.append((images.dtype, images.max().item() > 1))
        return images, labels

    def loss(self, model, images, labels, smoothing):
        self.calls.append(("loss", smoothing))
        return super().loss(model, images, labels, smoothing)

    def after_step(self, model, step, steps):
        self.calls.append(("after_step", step, steps))


def numbered(count: int) -> ImageSet:
    """Image i has the value i everywhere."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 2, 2).contiguous()
    return ImageSet(images, torch.arange(count) % 3)


def test_hooks_are_called_in_order_with_the_number_of_the_step():
    witness = Witness()
    recipe = Recipe(epochs=2, batch_size=5, label_smoothing=0.2)
    fit(
        Softmax(),
        numbered(10),
        recipe,
        seed=0,
        hooks=witness,
        after_epoch=lambda _, n: witness.calls.append(("epoch", n)),
    )
    step = lambda i: [("batch",), ("augmented", i, True), ("loss", 0.2), ("after_step", i, 4)]  # noqa: E731
    assert witness.calls == [*step(0), *step(1), ("epoch", 1), *step(2), *step(3), ("epoch", 2)]


def test_a_batch_is_bytes_before_augmentation_and_floats_behind_it():
    witness = Witness()
    fit(Softmax(), noise(10), Recipe(epochs=1, batch_size=5), seed=0, hooks=witness)
    assert witness.kinds == [(torch.uint8, True), (torch.float32, False)] * 2


def test_what_a_hook_returns_is_what_is_trained_on():
    class Relabel(Hooks):
        def batch(self, images, labels, step, source):
            return torch.zeros_like(images), torch.full_like(labels, 2)

    model = fit(Softmax(), noise(12), Recipe(epochs=5, batch_size=4, lr=0.5), seed=0, hooks=Relabel())
    assert model(torch.zeros(1, 3, 2, 2)).argmax().item() == 2
    assert torch.allclose(model.fc.weight, Softmax().fc.weight, atol=0.05)  # black images give it no gradient


def test_every_epoch_sees_other_images_in_another_order_and_none_twice():
    witness = Witness()
    fit(Softmax(), numbered(23), Recipe(epochs=30, batch_size=5), seed=0, hooks=witness)
    batches, size = equal_batches(23, 5)
    epochs = [torch.cat(witness.batches[i : i + batches]).tolist() for i in range(0, len(witness.batches), batches)]
    assert len(epochs) == 30
    assert all(len(set(epoch)) == len(epoch) == batches * size for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 30
    assert set().union(*epochs) == set(range(23))  # those left out are others each time


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (4, 1), (5, 2), (11, 3)])
def test_updates_count_steps_whatever_an_epoch_is(updates, epochs):
    witness, log, finished = Witness(), TrainingLog(), []
    recipe = Recipe(epochs=100, updates=updates, batch_size=5)
    fit(
        Softmax(),
        numbered(20),
        recipe,
        seed=0,
        hooks=witness,
        log=log,
        after_epoch=lambda _, epoch: finished.append(epoch),
    )
    assert [call[1:] for call in witness.calls if call[0] == "after_step"] == [(i, updates) for i in range(updates)]
    assert finished == list(range(1, epochs + 1))
    assert log.images == 5 * updates


def test_as_many_updates_as_epochs_have_are_the_same_training():
    one = fit(dropped(), noise(20, size=8), Recipe(epochs=3, batch_size=5), seed=0)
    other = fit(dropped(), noise(20, size=8), Recipe(updates=12, batch_size=5), seed=0)
    assert same(one, other)


def test_no_epoch_is_no_training():
    model = fit(Softmax(), numbered(10), Recipe(epochs=0), seed=0)
    assert same(model, Softmax())
    assert not model.training


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image to train on"):
        fit(Softmax(), noise(0), Recipe(), seed=0)


def test_the_journal_has_the_mean_loss_of_every_epoch_under_the_name_of_the_part():
    log, data = TrainingLog(), noise(12)
    model = fit(Softmax(), data, Recipe(epochs=2, batch_size=4, lr=0.0), seed=0, log=log, stream="repair")
    expected = nn.functional.cross_entropy(model(data.images / 255), data.labels).item()
    assert [step for step, _ in log.curves["repair/loss"]] == [3, 6]
    assert [value for _, value in log.curves["repair/loss"]] == pytest.approx([expected] * 2, abs=1e-5)
    assert log.images == 24


def test_the_curve_ends_at_the_last_update():
    log = TrainingLog()
    fit(Softmax(), noise(20), Recipe(updates=6, batch_size=5), seed=0, log=log)
    assert [step for step, _ in log.curves["train/loss"]] == [4, 6]


# Seeds --------------------------------------------------------------------------------------------------------


def test_a_seed_and_a_part_give_the_same_weights_and_others_give_others():
    data, recipe = noise(20, size=8), Recipe(epochs=2, batch_size=5)
    how = Augmentation(crop=1 / 8, flip=True, rotation=10)
    first = fit(dropped(), data, recipe, seed=0, augmentation=how)
    torch.manual_seed(99)  # the global state does not matter
    assert same(first, fit(dropped(), data, recipe, seed=0, augmentation=how))
    assert not same(first, fit(dropped(), data, recipe, seed=1, augmentation=how))
    assert not same(first, fit(dropped(), data, recipe, seed=0, augmentation=how, stream="other"))


def test_the_global_random_state_is_put_back():
    torch.manual_seed(4)
    state = torch.get_rng_state()
    fit(dropped(), noise(10, size=8), Recipe(epochs=2, batch_size=5), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_differs_between_epochs():
    drawn = []

    class Watch(Hooks):
        def loss(self, model, images, labels, smoothing):
            drawn.append(model.drop(torch.ones(64)))
            return super().loss(model, images, labels, smoothing)

    fit(dropped(), noise(5, size=8), Recipe(epochs=3, batch_size=5), seed=0, hooks=Watch())
    assert len({tuple(mask.tolist()) for mask in drawn}) == 3


def test_the_data_are_not_changed_and_the_model_comes_back_in_eval_mode():
    data, model = noise(20, size=8), dropped()
    images, labels = data.images.clone(), data.labels.clone()
    found = fit(model, data, Recipe(epochs=1, batch_size=5), seed=0, augmentation=Augmentation(flip=True))
    assert found is model
    assert not model.training
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)


# Killed and called again ----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Kill(Hooks):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, model, step, steps):
        if step == self.step:
            raise Killed


class Averaging(Hooks):
    """A hook with a state of its own: what it returns depends on all steps before."""

    def __init__(self, kill_at: int = -1) -> None:
        self.average, self.kill_at = torch.zeros(3), kill_at

    def augmented(self, model, images, labels, step, source):
        if step == self.kill_at:
            raise Killed
        self.average = 0.7 * self.average + 0.3 * images.mean((0, 2, 3))
        return (images - 0.1 * self.average.view(1, 3, 1, 1)).clamp(0, 1), labels

    def tensors(self):
        return {"average": self.average}

    def restore(self, tensors):
        self.average = tensors["average"]


@pytest.mark.parametrize("kill_at", [0, 2, 4, 9, 15])  # of 16 steps in 4 epochs: at the start of one and within
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_a_training_that_was_killed_ends_bit_for_bit_as_one_that_was_not(tmp_path, optimizer, kill_at):
    data = noise(21, size=8)
    recipe = Recipe(epochs=4, batch_size=6, optimizer=optimizer, lr=0.01, schedule="one_cycle")
    arguments = {"seed": 0, "augmentation": Augmentation(crop=1 / 8, flip=True, rotation=5)}
    untouched, whole = Averaging(), TrainingLog()
    expected = fit(dropped(), data, recipe, **arguments, hooks=untouched, log=whole)

    with pytest.raises(Killed):
        fit(dropped(), data, recipe, **arguments, hooks=Averaging(kill_at), log=TrainingLog(tmp_path, every_s=0))
    epochs, resumed, log = [], Averaging(), TrainingLog(tmp_path, every_s=0)
    found = fit(dropped(), data, recipe, **arguments, hooks=resumed, log=log, after_epoch=lambda _, n: epochs.append(n))
    assert epochs == list(range(kill_at // 4 + 1, 5))  # nothing finished is done again
    assert same(found, expected)
    assert torch.equal(resumed.average, untouched.average)
    assert log.curves == whole.curves
    assert log.images == whole.images


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_networks_of_timm_resume_bit_for_bit(tmp_path, name, optimizer):
    data = noise(24, size=16)
    recipe = Recipe(epochs=3, batch_size=8, optimizer=optimizer, lr=0.01)
    build = lambda: ModelSpec(name, 3, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0)  # noqa: E731
    whole = TrainingLog()
    expected = fit(build(), data, recipe, seed=0, log=whole)
    assert (spent := whole.passes) == 3 * 3 * 24  # of 24 images in 3 epochs, each as costly as three forward passes

    def kill(_: nn.Module, epoch: int) -> None:
        if epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        fit(build(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0), after_epoch=kill)
    log = TrainingLog(tmp_path, every_s=0)
    assert same(fit(build(), data, recipe, seed=0, log=log), expected)
    assert log.passes == spent


def test_a_network_with_frozen_weights_resumes_bit_for_bit(tmp_path):
    def frozen() -> nn.Module:
        model = dropped()
        model.conv.requires_grad_(False)
        return model

    data, recipe = noise(20, size=8), Recipe(epochs=3, batch_size=5, optimizer="adam", lr=0.01)
    expected = fit(frozen(), data, recipe, seed=0)
    with pytest.raises(Killed):
        fit(frozen(), data, recipe, seed=0, hooks=Kill(6), log=TrainingLog(tmp_path, every_s=0))
    assert same(fit(frozen(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0)), expected)


def test_checkpoints_do_not_change_a_figure(tmp_path):
    data, recipe = noise(20, size=8), Recipe(epochs=3, batch_size=5)
    often, never = TrainingLog(tmp_path, every_s=0), TrainingLog()
    assert same(fit(dropped(), data, recipe, seed=0, log=often), fit(dropped(), data, recipe, seed=0, log=never))
    assert often.curves == never.curves


def test_a_finished_part_is_not_trained_again(tmp_path):
    data, recipe = noise(20, size=8), Recipe(epochs=3, batch_size=5)
    first = fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0))
    again = fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0), hooks=Kill(0))
    assert same(first, again)


def test_parts_have_checkpoints_of_their_own(tmp_path):
    data, recipe = noise(20, size=8), Recipe(epochs=2, batch_size=5)
    fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0), stream="surrogate")
    found = fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0), stream="train")
    assert same(found, fit(dropped(), data, recipe, seed=0, stream="train"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["surrogate.safetensors", "train.safetensors"]


def test_what_a_killed_writer_left_beside_the_checkpoint_is_not_read(tmp_path):
    data, recipe = noise(20, size=8), Recipe(epochs=3, batch_size=5)
    expected = fit(dropped(), data, recipe, seed=0)
    for name in ("train.4242", "train.safetensors.4242", "train.tmp", ".train.safetensors", "train"):
        (tmp_path / name).write_bytes(b"\x00half a checkpoint")
    with pytest.raises(Killed):
        fit(dropped(), data, recipe, seed=0, hooks=Kill(6), log=TrainingLog(tmp_path, every_s=0))
    assert same(fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0)), expected)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def of_another_training(path: Path) -> None:
    other = path.parent.parent / "other"
    with pytest.raises(Killed):
        fit(dropped(), noise(20, size=8), QUICK, seed=1, hooks=Kill(6), log=TrainingLog(other, every_s=0))
    (other / path.name).replace(path)


def of_another_network(path: Path) -> None:
    """A whole checkpoint, under the name of this training."""
    path.unlink()
    with pytest.raises(Killed):
        fit(Softmax(), noise(20), QUICK, seed=1, hooks=Kill(6), log=TrainingLog(path.parent, every_s=0))


QUICK = Recipe(epochs=3, batch_size=5)
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeroed end": lambda path: path.write_bytes(path.read_bytes()[:-64] + bytes(64)),
    "bit flip": flipped,
    "bit flip in its notes": lambda path: path.write_bytes(path.read_bytes().replace(b'"epoch":"2"', b'"epoch":"3"')),
    "foreign text": lambda path: path.write_bytes(b"\xff\xfeno checkpoint"),
    "foreign tensors": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").touch()),
    "another training": of_another_training,
    "another network": of_another_network,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_checkpoint_that_cannot_be_used_is_dropped_and_the_training_starts_afresh(
    tmp_path, capsys, damage, optimizer
):
    data, recipe, work = noise(20, size=8), replace(QUICK, optimizer=optimizer, lr=0.01), tmp_path / "work"
    expected = fit(dropped(), data, recipe, seed=0)
    with pytest.raises(Killed):
        fit(dropped(), data, recipe, seed=0, hooks=Kill(9), log=TrainingLog(work, every_s=0))
    DAMAGES[damage](work / "train.safetensors")
    capsys.readouterr()
    log = TrainingLog(work, every_s=0)
    assert same(fit(dropped(), data, recipe, seed=0, log=log), expected)
    assert "train.safetensors" in capsys.readouterr().err
    assert log.images == 60
    with safe_open(work / "train.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "3"


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bench.engine.files.save_file", full)
    trained = fit(dropped(), noise(20, size=8), QUICK, seed=0, log=TrainingLog(tmp_path, every_s=0))
    assert same(trained, fit(dropped(), noise(20, size=8), QUICK, seed=0))
    assert "No space left" in capsys.readouterr().err


def test_a_writer_killed_in_the_middle_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    data, recipe = noise(20, size=8), Recipe(epochs=4, batch_size=5)
    expected = fit(dropped(), data, recipe, seed=0)
    from bench.engine import files

    save, written = files.save_file, []

    def die_in_the_second(tensors, path, metadata):
        if len(written) == 1:
            path.write_bytes(b"half")
            raise Killed
        written.append(path)
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", die_in_the_second)
        with pytest.raises(Killed):
            fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0))
    with safe_open(tmp_path / "train.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "1"
    assert same(fit(dropped(), data, recipe, seed=0, log=TrainingLog(tmp_path, every_s=0)), expected)


def test_short_trainings_write_no_checkpoint(tmp_path):
    fit(dropped(), noise(10, size=8), Recipe(epochs=2, batch_size=5), seed=0, log=TrainingLog(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_a_checkpoint_says_how_far_it_is(tmp_path):
    fit(dropped(), noise(10, size=8), Recipe(epochs=2, batch_size=5), seed=0, log=TrainingLog(tmp_path, every_s=0))
    with safe_open(tmp_path / "train.safetensors", "pt") as file:
        kept = file.metadata()
    assert (kept["epoch"], kept["images"]) == ("2", "20")
    assert [step for step, _ in json.loads(kept["curves"])["train/loss"]] == [2, 4]


# Divergence -----------------------------------------------------------------------------------------------------


class Broken(Hooks):
    def __init__(self, value: float, step: int) -> None:
        self.value, self.step, self.now = value, step, -1

    def augmented(self, model, images, labels, step, source):
        self.now = step
        return images, labels

    def loss(self, model, images, labels, smoothing):
        return super().loss(model, images, labels, smoothing) * (self.value if self.now == self.step else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_training_and_is_not_saved(tmp_path, value):
    recipe, data = Recipe(epochs=5, batch_size=5, lr=0.25), noise(10, size=8)
    with pytest.raises(Diverged, match=r"in epoch 3 of repair; try a lower lr than 0\.25"):
        fit(
            dropped(),
            data,
            recipe,
            seed=0,
            hooks=Broken(value, step=4),
            log=TrainingLog(tmp_path, every_s=0),
            stream="repair",
        )
    with safe_open(tmp_path / "repair.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "2"


def test_a_rate_far_too_high_diverges():
    with pytest.raises(Diverged):
        fit(Softmax(), noise(9), Recipe(epochs=50, batch_size=3, lr=1e30, schedule="constant"), seed=0)


def test_diverging_is_an_arithmetic_error_so_that_the_harness_can_tell_it_from_a_bug():
    assert issubclass(Diverged, ArithmeticError)


# Precision --------------------------------------------------------------------------------------------------------


def test_auto_is_float32_on_a_cpu_and_bfloat16_is_not():
    data = noise(20, size=8)
    found = {
        kind: fit(dropped(), data, Recipe(epochs=1, batch_size=5, precision=kind), seed=0)
        for kind in ("auto", "float32", "bfloat16")
    }
    assert same(found["auto"], found["float32"])
    assert not same(found["auto"], found["bfloat16"])
    assert found["bfloat16"].fc.weight.dtype == torch.float32
    torch.testing.assert_close(found["bfloat16"].fc.weight, found["auto"].fc.weight, atol=0.02, rtol=0)
