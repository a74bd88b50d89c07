"""The gallery's scores, worked out by hand and against the formula for constant images."""

from __future__ import annotations

import csv

import pytest
import torch

from bench.experiment.experiment import load_experiment
from bench.experiment.identity import attack_from
from bench.gallery import main
from bench.pipeline.runner import Runner
from bench.reporting.triggers import pictures, scores, ssim, with_another_trigger


def test_the_scores_of_one_changed_pixel_are_known():
    images = torch.zeros(2, 3, 16, 16)
    triggered = images.clone()
    triggered[:, 0, 5, 5] = 0.2
    found = scores(images, triggered)
    assert found["l0"] == pytest.approx(1 / 256)
    assert found["l2"] == pytest.approx(0.2)
    assert found["linf"] == pytest.approx(51)


def test_ssim_of_equal_images_is_one_and_of_constant_ones_their_luminance_term():
    image = torch.rand(1, 3, 32, 32)
    assert ssim(image, image).item() == pytest.approx(1)
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    # No variance: only (2 a b + c1) / (a^2 + b^2 + c1) is left.
    assert ssim(a, b).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-6)


def test_ssim_falls_with_noise():
    image = torch.rand(1, 1, 32, 32)
    noise = torch.randn(1, 1, 32, 32)
    assert ssim(image, image + 0.05 * noise) > ssim(image, image + 0.2 * noise)


def test_a_report_draws_each_stored_trigger_once_and_forgets_those_of_other_settings(run_grid, tiny, tmp_path):
    from bench.reporting.page import picture_of

    assert picture_of("digits", "net", "blended", "reserve.size=0.02") == picture_of("digits", "net", "blended")
    swept = "grid.sweep=[{key:attack.alpha,values:[0.1,0.3]}]"
    settings = ["grid.attacks=[blended]", "grid.defenses=[no_defense]"]
    run_grid(*settings, swept)
    folder = tmp_path / "results" / "quick"
    (folder / "trigger_of_another_grid.png").write_text("old")
    assert pictures(load_experiment([*tiny, *settings, swept])) == [folder / "triggers.png"]
    found = sorted(folder.glob("trigger_*.png"))
    names = [picture_of("digits", "test_resnet", "blended", f"attack.alpha=0.{n}") for n in (1, 3)]
    assert [path.name for path in found] == sorted(names)
    assert found[0].read_bytes() != found[1].read_bytes()
    for weights in (tmp_path / "results" / "store" / "implant").rglob("*.safetensors"):
        weights.unlink()
    assert (
        pictures(load_experiment([*tiny, *settings, swept])) == []
    )  # deleted for their room: a report is no worse for it
    assert pictures(load_experiment([*tiny, *settings])) == []  # nothing is stored with these
    assert list(folder.glob("trigger*")) == []


def test_no_two_places_share_a_picture_and_its_name_is_fit_for_a_file():
    from bench.reporting.page import picture_of

    names = ["signs v1.0", "signs v1_0", "signs_v1.0", "signs/v1.0", "Signs v1.0", "s" * 300, "s" * 301, "ü", "u"]
    places = [(f"folder:{name}", "net", "badnets", "") for name in names]
    places += [("a", "b_c", "d", ""), ("a_b", "c", "d", ""), ("a", "b", "c_d", "")]
    places += [("a", "b", "c", f"attack.pattern={value}") for value in ("x.y", "x_y", "x-y")]
    pictures_ = {picture_of(*place).lower() for place in places}  # some file systems know no capitals
    assert len(pictures_) == len(places)
    assert all(name.isascii() and len(name) < 200 and not set(name) & set("/\\%?#: ") for name in pictures_)


@pytest.mark.slow
def test_a_trigger_that_a_sweep_does_not_change_is_shown_once(run_grid, tiny, monkeypatch):
    settings = ["grid.attacks=[badnets,blended]", "grid.defenses=[no_defense]"]
    swept = "grid.sweep=[{key:attack.poison_rate,values:[0.05,0.1]},{key:attack.target_label,values:[0]}]"
    run_grid(*settings, swept)
    shown = []
    monkeypatch.setattr("bench.reporting.figures.triggers.triggers", lambda drawn, *_: shown.extend(drawn))
    pictures(load_experiment([*tiny, *settings, swept]))
    assert shown == ["badnets", "blended"]


@pytest.mark.slow
def test_a_gallery_is_drawn_from_what_is_stored(run_grid, tiny, tmp_path, capsys):
    settings = ["grid.attacks=[none,badnets,blended]", "grid.defenses=[no_defense]"]
    settings += [f"attack.{name}.target_label=8" for name in ("badnets", "blended")]  # what most is mistaken for
    run_grid(*settings)
    assert main([*tiny, *settings]) == 0
    folder = tmp_path / "results" / "quick"
    assert (folder / "gallery.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "gallery.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["attack", "badnets", "blended"]
    experiment = load_experiment([*tiny, *settings])
    clean = next(trial for trial in experiment.trials if trial.attack == "none")
    bench = Runner(experiment.store, experiment.infos, torch.device("cpu"))
    test = bench.test_set("digits")
    others = test[test.labels != 8]
    model = bench.stored(clean, "implant", clean.keys.implant)
    with torch.no_grad():
        sent = model(others.images.float() / 255).argmax(1) == 8
    rows = list(csv.DictReader(lines))
    assert any(row["clean_model_asr"] != row["clean_model_floor"] for row in rows)  # the trigger is looked at
    for row in rows:
        infected = next(trial for trial in experiment.trials if trial.attack == row["attack"])
        triggered = attack_from(infected.implant).trigger(others.images.float() / 255, bench.trigger_of(infected))
        with torch.no_grad():
            moved = model(triggered).argmax(1) == 8
            known = model(triggered).argmax(1) == others.labels
        assert float(row["clean_model_floor"]) == pytest.approx(sent.double().mean().item())
        assert float(row["clean_model_asr"]) == pytest.approx(moved.double().mean().item())
        assert float(row["clean_model_recovery"]) == pytest.approx(known.double().mean().item())
        assert "other_seed_asr" not in row  # there is one seed
    assert float(rows[0]["l0"]) == pytest.approx(4 / 256, abs=1e-3)  # the 2x2 patch on 16x16, at most


@pytest.mark.slow
def test_the_trigger_that_an_attack_finds_on_its_network_is_shown_behind_the_cells_of_that_network(run_grid, tiny):
    from bench.reporting.page import picture_of

    two = ["grid.attacks=[input_aware]", "grid.defenses=[no_defense]", "grid.models=[test_resnet,test_vit]"]
    run_grid(*two)
    experiment = load_experiment([*tiny, *two])
    pictures(experiment)
    first, second = (
        experiment.folder / picture_of("digits", name, "input_aware") for name in ("test_resnet", "test_vit")
    )
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.slow
def test_an_infected_model_is_shown_the_trigger_of_another_seed(run_grid, tiny, monkeypatch):
    settings = ["grid.attacks=[badnets,blended]", "grid.defenses=[no_defense]", "grid.seeds=2", "train.epochs=4"]
    _, trials = run_grid(*settings)
    experiment = load_experiment([*tiny, *settings])
    bench = Runner(experiment.store, experiment.infos, torch.device("cpu"))
    found = {
        (t.attack, t.seed): with_another_trigger(experiment, bench, t)["other_seed_asr"] for t in experiment.trials
    }
    own = {(row.attack, row.seed): row.asr for row in trials.itertuples()}
    assert found["badnets", 0] == own["badnets", 0]  # the white patch is the same for every seed
    first, second = (trial for trial in experiment.trials if trial.attack == "blended")
    test = bench.test_set("digits")
    others = test[test.labels != 0].images.float() / 255
    with torch.no_grad():
        triggered = attack_from(first.implant).trigger(others, bench.trigger_of(second))
        sent = bench.stored(first, "implant", first.keys.implant)(triggered).argmax(1) == 0
    assert found["blended", 0] == pytest.approx(sent.double().mean().item()) != own["blended", 0]
