from __future__ import annotations

import copy

import pytest
import torch

from baselines.mcr import AlongTheCurve, Curve, ModeConnectivityRepair, renew_statistics
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import ReserveView


def model(name: str = "test_efficientnet", seed: int = 0) -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(seed).eval()


def images(count: int = 40) -> ImageSet:
    drawn = torch.randint(0, 256, (count, 3, 16, 16), generator=generator(0, "reserve"), dtype=torch.uint8)
    return ImageSet(drawn, torch.arange(count) % 4)


def repaired(infected: Classifier, **settings: float) -> tuple[Classifier, ReserveView]:
    seen = ReserveView(
        copy.deepcopy(infected), 4, 0, torch.device("cpu"), TrainingLog(), reserve=images(), augmentation=Augmentation()
    )
    settings = {"tuning_epochs": 1, "epochs": 2, "batch_size": 10, **settings}
    return ModeConnectivityRepair(**settings).defend(seen).model, seen


def test_the_curve_ends_exactly_in_its_two_models_and_bends_as_bezier_says():
    first, last = model(seed=1), model(seed=2)
    curve = Curve(first, last)
    with torch.no_grad():
        for weight in curve.bend.parameters():
            weight.normal_(generator=generator(3))
    bend = dict(curve.bend.named_parameters())
    for t in (0.0, 0.1, 0.5, 1.0):
        for name, found in curve.point(t).items():
            ends = dict(first.named_parameters())[name], dict(last.named_parameters())[name]
            # Bernstein polynomials, as weights that sum to 1: .81, .18, .01 at t = .1
            weights = {0.0: (1, 0, 0), 0.1: (0.81, 0.18, 0.01), 0.5: (0.25, 0.5, 0.25), 1.0: (0, 0, 1)}[t]
            expected = weights[0] * ends[0] + weights[1] * bend[name] + weights[2] * ends[1]
            torch.testing.assert_close(found, expected)
            if t in (0.0, 1.0):
                assert torch.equal(found, ends[int(t)])


def test_the_bend_starts_half_way_so_that_the_curve_is_a_straight_line():
    first, last = model(seed=1), model(seed=2)
    found = Curve(first, last).point(0.3)
    for (name, one), two in zip(first.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(found[name], 0.7 * one + 0.3 * two)


def test_only_the_bend_learns():
    curve = Curve(model(seed=1), model(seed=2))
    data = images(8)
    hooks = AlongTheCurve(1e-4)
    curve.t = 0.4
    hooks.loss(curve, data.images / 255, data.labels, 0.0).backward()
    assert all(weight.grad is not None for weight in curve.bend.parameters())
    assert all(weight.grad is None for end in (curve.start, curve.end) for weight in end.parameters())


def test_the_gradient_of_the_bend_is_that_of_the_point_times_two_t_one_minus_t():
    first, data, t = model("test_convnext"), images(8), 0.3
    curve = Curve(first, first)  # all three are one, and so is every point
    curve.t = t
    AlongTheCurve(0.0).loss(curve, data.images / 255, data.labels, 0.0).backward()
    loss = torch.nn.functional.cross_entropy(first(data.images / 255), data.labels)
    plain = torch.autograd.grad(loss, list(first.parameters()))
    for bend, gradient in zip(curve.bend.parameters(), plain, strict=True):
        torch.testing.assert_close(bend.grad, 2 * t * (1 - t) * gradient, atol=1e-5, rtol=1e-3)


def test_each_batch_is_trained_at_a_place_of_its_own_in_zero_to_one():
    curve, hooks, source, places = Curve(model(), model()), AlongTheCurve(0.0), generator(0), []
    for step in range(200):
        hooks.augmented(curve, torch.zeros(1), torch.zeros(1), step, source)
        places.append(curve.t)
    assert 0 <= min(places) < 0.05
    assert 0.95 < max(places) <= 1
    assert abs(sum(places) / 200 - 0.5) < 0.08


def test_at_zero_it_returns_the_weights_of_the_infected_model_and_at_one_those_of_its_copy():
    infected = model()
    start, _ = repaired(infected, t=0.0)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), infected.parameters(), strict=True))
    # Another budget for the curve cannot matter at its end, and the end is no longer the infected model.
    one, two = repaired(infected, t=1.0)[0], repaired(infected, t=1.0, epochs=4)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, infected.head.weight)


def test_running_statistics_are_the_mean_over_the_reserve():
    net, data = model("test_resnet"), images(64)
    seen = []
    first = next(layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    renew_statistics(net, data)
    handle.remove()
    (inputs,) = seen
    torch.testing.assert_close(first.running_mean.double(), inputs.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        first.running_var.double(), inputs.transpose(0, 1).flatten(1).var(1), atol=1e-5, rtol=1e-4
    )
    assert first.momentum == 0.1
    assert not any(layer.training for layer in net.modules())


def test_renewed_statistics_are_the_means_over_batches_of_what_a_norm_sees():
    net, data = model("test_resnet"), images(64)
    norm = next(layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    renew_statistics(net, data, batch_size=16)
    assert [len(batch) for batch in seen] == [16] * 4
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in seen]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3)) for batch in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_without_batch_norm_nothing_is_renewed():
    net = model("test_vit")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    renew_statistics(net, images())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_it_repeats_under_a_seed():
    one, two = (repaired(model())[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.slow
def test_on_digits_the_papers_place_is_too_near_to_the_infected_model(run_grid):
    """With one infected model the whole path is infected: a fine-tune of 71 images leaves the backdoor at both ends."""
    status, trials = run_grid(
        *("train.epochs=30", "train.batch_size=64", "model.stem=half", "grid.attacks=[badnets]"),
        *("grid.defenses=[no_defense,mcr]",),
    )
    assert status == 0
    found = trials.set_index("defense")
    assert found.clean_accuracy["mcr"] > 0.95
    assert found.asr["mcr"] > 0.5
