"""The plan counts what there is to do, costs it by what was measured, and says on what it rests."""

from __future__ import annotations

import heapq
import random

import pytest
import torch

from bench.dispatch.costs import UNKNOWN, Job, critical_path, estimated, jobs_of, simulated
from bench.dispatch.tasks import pending
from bench.engine.errors import UserError
from bench.engine.models import ModelSpec
from bench.experiment.experiment import load_experiment
from bench.plan import main
from bench.storage.store import STAGES

GRID = ["grid.attacks=[badnets,blended]", "grid.defenses=[no_defense,fine_tuning]", "grid.seeds=3"]


def finish(experiment, trial, stage: str, seconds: float, status: str = "done") -> None:
    """A finished stage that took so long, without computing it."""
    identity = trial.clean_control if stage == "clean_control" else getattr(trial, stage)
    stage = "implant" if stage == "clean_control" else stage
    result = {"status": status, "seconds": seconds, "provenance": {"device": "abacus"}}
    experiment.store.finish(stage, identity, result)


def cost(experiment, place, assumed=None):
    return estimated(experiment, assumed).costs[place]


def test_a_stage_costs_the_median_of_the_same_cell_at_other_seeds(tiny):
    experiment = load_experiment([*tiny, *GRID, "grid.seeds=4"])
    cell = [trial for trial in experiment.trials if (trial.attack, trial.defense) == ("badnets", "fine_tuning")]
    for trial, seconds in zip(cell[:3], (10.0, 20.0, 90.0), strict=True):
        finish(experiment, trial, "implant", seconds)
    for trial in experiment.trials:
        if trial.attack == "blended" and trial.seed == 0 and trial.defense == "no_defense":
            finish(experiment, trial, "implant", 500.0)  # another cell's
    found = cost(experiment, ("implant", cell[3].keys.implant))
    assert (found.seconds, found.basis) == (20.0, "the same cell")


def test_without_the_cell_it_is_the_method_there_then_others_then_elsewhere_then_nothing(tiny):
    experiment = load_experiment([*tiny, *GRID])
    places = {(trial.attack, trial.defense, trial.seed): trial for trial in experiment.trials}
    target_labels = ("defend", places["blended", "fine_tuning", 0].keys.defend)
    assert cost(experiment, target_labels).basis == UNKNOWN
    assert cost(experiment, target_labels).seconds is None
    assert cost(experiment, target_labels, {"defend": 3.0}).seconds == 3.0

    # Another grid's: another architecture, and the same store.
    other = load_experiment([*tiny, *GRID, "grid.models=[test_vit]", "grid.defenses=[fine_pruning]"])
    for stage, seconds in (("implant", 1.0), ("defend", 7.0)):
        finish(other, other.trials[0], stage, seconds)
    assert cost(experiment, target_labels).basis == "elsewhere"
    finish(experiment, places["badnets", "no_defense", 0], "defend", 5.0)
    assert (cost(experiment, target_labels).seconds, cost(experiment, target_labels).basis) == (5.0, "others there")
    finish(experiment, places["badnets", "fine_tuning", 0], "defend", 9.0)
    assert (cost(experiment, target_labels).seconds, cost(experiment, target_labels).basis) == (
        9.0,
        "the same method there",
    )
    finish(experiment, places["blended", "fine_tuning", 1], "defend", 11.0)
    assert (cost(experiment, target_labels).seconds, cost(experiment, target_labels).basis) == (11.0, "the same cell")


def test_what_was_measured_with_other_settings_counts_where_nothing_nearer_is(tiny):
    before = load_experiment([*tiny, *GRID])
    for stage, seconds in (("implant", 4.0), ("defend", 6.0), ("inspect", 1.0), ("evaluate", 2.0)):
        finish(before, before.trials[0], stage, seconds)
    experiment = load_experiment([*tiny, *GRID, "train.lr=0.05"])  # every stage is another one
    costs = {stage: cost(experiment, (stage, key)) for stage, key in experiment.trials[0].stage_keys()}
    assert {stage: found.seconds for stage, found in costs.items()} == {
        "implant": 4.0,
        "defend": 6.0,
        "inspect": 1.0,
        "evaluate": 2.0,
    }


def test_a_cell_that_came_to_nothing_says_nothing_of_other_cells(tiny):
    experiment = load_experiment([*tiny, *GRID])
    finish(experiment, experiment.trials[0], "defend", 0.0, status="diverged")
    costs = estimated(experiment).costs
    known = {place for place, found in costs.items() if found.seconds is not None}
    assert known == {("defend", trial.keys.defend) for trial in experiment.trials[1:3]}  # its own other seeds


def test_every_stage_is_counted_once_and_clean_controls_by_their_name(tiny, capsys):
    assert main([*tiny, *GRID, "measure.relearn=true", "--assume=implant:60,clean_control:30,defend:5,evaluate:1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:16].strip(): line[16:].split() for line in lines}
    assert rows["infected models"] == ["0", "6", "0.10", "?"]
    assert rows["clean controls"][:2] == ["0", "3"]  # one for each seed
    assert rows["repairs"][:2] == rows["evaluations"][:2] == ["0", "12"]
    assert rows["inspections"] == ["0", "6", "?", "?"]
    assert "to compute: 6 infected models, 12 repairs with their measures, 3 clean controls to measure them by" in lines
    # 6 x 60 + 3 x 30 + 12 x 6 s
    assert "work: 0.14 core hours" in lines
    assert any(line.startswith("critical path: 66 s: ") for line in lines)
    assert any("nothing is known of 6 stages" in line for line in lines)


def test_a_finished_grid_has_nothing_left(run_grid, tiny, capsys):
    one = ["grid.attacks=[badnets]", "grid.defenses=[no_defense]"]
    run_grid(*one)
    capsys.readouterr()
    assert main([*tiny, *one]) == 0
    printed = capsys.readouterr().out
    assert "to compute: 0 infected models, 0 repairs" in printed
    assert "critical path" not in printed
    # And of what it left, another seed is planned: seconds and bytes.
    experiment = load_experiment([*tiny, *one, "grid.seeds=[1]"])
    costs = estimated(experiment).costs
    done = load_experiment([*tiny, *one]).trials[0]
    for stage, key in experiment.trials[0].stage_keys():
        before = dict(done.stage_keys())[stage]
        assert costs[stage, key].seconds == experiment.store.result(stage, before)["seconds"]
        assert costs[stage, key].size == sum(p.stat().st_size for p in experiment.store.folder(stage, before).iterdir())


def test_the_first_repair_of_a_model_inspects_it(tiny):
    experiment = load_experiment([*tiny, *GRID, "grid.attacks=[badnets]", "grid.seeds=1"])
    tasks = pending(experiment.trials, experiment.store)
    seconds = dict(zip((*STAGES[:2], "inspect", "evaluate"), (100.0, 10.0, 5.0, 1.0), strict=True))
    jobs = jobs_of(tasks, estimated(experiment, seconds), job_seconds=0.5)
    assert [(job.seconds, job.needs) for job in jobs] == [(100.5, ()), (16.5, (0,)), (11.5, (0,))]
    assert [job.seconds for job in critical_path(jobs)] == [100.5, 16.5]


def test_equal_jobs_take_as_many_rounds_as_they_need():
    for count, width in ((12, 4), (13, 4), (3, 8), (1, 1)):
        assert simulated([Job("", 2.0)] * count, width) == 2.0 * -(-count // width)
    assert simulated([], 3) == 0


def test_a_schedule_keeps_the_order_and_lies_within_its_bounds():
    source = random.Random(0)
    for width in (1, 2, 5, 40):
        jobs: list[Job] = []
        for index in range(30):
            needs = tuple(source.sample(range(index), min(index, source.randrange(3))))
            jobs.append(Job("", source.uniform(1, 9), needs))
        work, longest = sum(job.seconds for job in jobs), sum(job.seconds for job in critical_path(jobs))
        spent = simulated(jobs, width)
        assert max(work / width, longest) <= spent + 1e-9
        assert spent <= work / width + longest + 1e-9  # Graham 1966: no greedy schedule is worse
        if width == 1:
            assert spent == pytest.approx(work)
        if width == 40:
            assert spent == pytest.approx(longest)


def test_independent_jobs_go_to_whoever_is_free_first():
    seconds = [random.Random(1).uniform(1, 9) for _ in range(50)]
    ends = [0.0] * 7
    for value in seconds:
        heapq.heapreplace(ends, ends[0] + value)
    assert simulated([Job("", value) for value in seconds], 7) == pytest.approx(max(ends))


@pytest.mark.parametrize("option", ["--width=0", "--width=x", "--assume=implan:3", "--assume=implant", "--wide=3"])
def test_a_wrong_option_is_refused_with_the_right_ones(tiny, option):
    with pytest.raises(UserError, match="--width=N, --job-seconds=S and --assume="):
        main([*tiny, option])


def test_nor_does_what_came_to_nothing_with_other_settings(tiny):
    before = load_experiment([*tiny, *GRID, "train.epochs=2"])
    finish(before, before.trials[0], "implant", 1.0, status="diverged")
    experiment = load_experiment([*tiny, *GRID])
    assert cost(experiment, ("implant", experiment.trials[0].keys.implant)).basis == UNKNOWN


# Scaled to other work -----------------------------------------------------------------------------------------------


def measured(tiny, *more: str):
    """The tiny grid with the first stages of each kind finished, in 4, 6, 1 and 2 seconds."""
    before = load_experiment([*tiny, *GRID, *more])
    for stage, seconds in (("implant", 4.0), ("defend", 6.0), ("inspect", 1.0), ("evaluate", 2.0)):
        finish(before, tuned(before), stage, seconds)
    return before


def tuned(experiment):
    """The trial that repairs BadNets' first model by fine-tuning."""
    return next(trial for trial in experiment.trials if (trial.attack, trial.defense) == ("badnets", "fine_tuning"))


@pytest.mark.parametrize(
    ("changed", "stage", "times"),
    [
        ("train.epochs=2", "implant", 2),
        ("train.epochs=200", "implant", 200),
        ("defense.fine_tuning.epochs=3", "defend", 3),
        ("reserve.size=0.025", "defend", 0.5),
        ("measure.pgd_steps=5", "evaluate", (2 * 359 + 2 * 5 * 50) / (2 * 359 + 2 * 50)),
    ],
)
def test_what_was_measured_counts_times_the_ratio_of_images_and_epochs(tiny, changed, stage, times):
    measured(tiny)
    experiment = load_experiment([*tiny, *GRID, changed])
    found = cost(experiment, (stage, dict(tuned(experiment).stage_keys())[stage]))
    seconds = {"implant": 4.0, "defend": 6.0, "evaluate": 2.0}[stage]
    assert found.seconds == pytest.approx(seconds * times)
    assert found.ratio == pytest.approx(times)


def flops_by_hand(name: str, channels: int, size: int, stem: str) -> int:
    """Two for each multiply-add of convolutions and linear layers, from the shapes that pass through them."""
    model, total = ModelSpec(name, 10, channels, size, (0.5,) * channels, (0.5,) * channels, stem).build(0).eval(), 0

    def add(layer, inputs, output) -> None:
        nonlocal total
        each = layer.weight.shape[1:].numel()  # multiply-adds of one output
        total += 2 * each * output[0].numel()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(add)
    with torch.no_grad():
        model(torch.rand(1, channels, size, size))
    return total


@pytest.mark.parametrize(
    ("name", "stem"), [("test_efficientnet", "stock"), ("test_resnet", "half"), ("test_convnext", "small")]
)
def test_a_network_of_so_many_times_the_operations_takes_so_many_times_the_seconds(tiny, name, stem):
    measured(tiny)
    times = flops_by_hand(name, 1, 16, stem) / flops_by_hand("test_resnet", 1, 16, "stock")
    experiment = load_experiment([*tiny, *GRID, f"grid.models=[{name}]", f"model.stem={stem}"])
    seconds = {stage: cost(experiment, (stage, key)).seconds for stage, key in tuned(experiment).stage_keys()}
    assert seconds == pytest.approx(
        {"implant": 4 * times, "defend": 6 * times, "inspect": times, "evaluate": 2 * times}
    )


def test_a_data_set_of_more_images_takes_longer_in_proportion(tiny, tmp_path):
    before = measured(tiny)
    # Grey images of ten classes, too: the same network at the same size.
    other = ["grid.datasets=[fashion_mnist]", "dataset.size=16", f"dataset.root={tmp_path / 'nowhere'}"]
    experiment = load_experiment([*tiny, *GRID, *other], dry=True)
    digits = before.infos["digits"]
    trained = sum(count - round(0.05 * count) for count in digits.train_counts)
    seconds = {stage: cost(experiment, (stage, key)).seconds for stage, key in tuned(experiment).stage_keys()}
    assert seconds["implant"] == pytest.approx(4 * 57_000 / trained)
    assert seconds["defend"] == pytest.approx(6 * 60_000 / sum(digits.train_counts))
    assert seconds["inspect"] == pytest.approx(10_000 / 359)


def test_a_smaller_stored_network_takes_less_disk(tiny):
    before = measured(tiny)
    experiment = load_experiment([*tiny, *GRID, "grid.models=[test_efficientnet]"])
    place = ("implant", tuned(experiment).keys.implant)
    was = sum(path.stat().st_size for path in experiment.store.folder("implant", tuned(before).keys.implant).iterdir())
    count = [
        sum(weight.numel() for weight in ModelSpec(name, 10, 1, 16, (0.5,), (0.5,)).build(0).parameters())
        for name in ("test_efficientnet", "test_resnet")
    ]
    assert cost(experiment, place).size == pytest.approx(was * count[0] / count[1])


def test_an_assumption_stays_in_force_for_what_was_not_measured_there(tiny):
    measured(tiny)
    assumed = {"implant": 600.0, "defend": 60.0, "evaluate": 10.0}
    here = load_experiment([*tiny, *GRID])
    kinds = {(trial.attack, trial.defense): trial for trial in here.trials if trial.seed == 2}
    assert cost(here, ("implant", kinds["badnets", "no_defense"].keys.implant), assumed).seconds == 4.0  # measured
    assert cost(here, ("implant", kinds["blended", "no_defense"].keys.implant), assumed).seconds == 600.0
    assert cost(here, ("defend", kinds["blended", "fine_tuning"].keys.defend), assumed).seconds == 6.0
    assert cost(here, ("defend", kinds["blended", "no_defense"].keys.defend), assumed).seconds == 60.0
    elsewhere = load_experiment([*tiny, *GRID, "grid.models=[test_efficientnet]"])
    found = {stage: cost(elsewhere, (stage, key), assumed) for stage, key in tuned(elsewhere).stage_keys()}
    assert {stage: found[stage].seconds for stage in assumed} == assumed
    assert found["inspect"].basis == "elsewhere"  # nothing was assumed of it


def test_the_epochs_of_one_method_say_nothing_of_another(tiny):
    experiment = load_experiment([*tiny, *GRID, "defense.fine_tuning.epochs=50"])
    finish(experiment, next(trial for trial in experiment.trials if trial.defense == "no_defense"), "defend", 5.0)
    found = cost(experiment, ("defend", tuned(experiment).keys.defend))
    assert (found.seconds, found.basis) == (5.0, "others there")


def test_a_costly_measure_is_not_known_by_what_was_measured_without_it(tiny):
    measured(tiny)
    experiment = load_experiment([*tiny, *GRID, "measure.autoattack_images=10"])
    keys = dict(tuned(experiment).stage_keys())
    assert cost(experiment, ("evaluate", keys["evaluate"])).basis == UNKNOWN
    again = load_experiment([*tiny, *GRID, "measure.pgd_steps=2"])
    assert cost(again, ("evaluate", dict(tuned(again).stage_keys())["evaluate"])).seconds > 2


def test_the_plan_says_what_each_estimate_rests_on(tiny, capsys):
    measured(tiny)
    assert main([*tiny, *GRID, "train.epochs=200", "--assume=implant:3600"]) == 0
    lines = capsys.readouterr().out.splitlines()
    basis = next(line for line in lines if line.startswith("by what was measured on"))
    # Of six models three are of the attack that was measured, at 200 times the epochs.
    assert "assumed 3" in basis
    assert "(x 1 to 200)" in basis
    assert (
        next(line for line in lines if line.startswith("infected models")).split()[4]
        == f"{(3 * 800 + 3 * 3600) / 3600:.2f}"
    )


# Without data -------------------------------------------------------------------------------------------------------

FOUR = ["grid.datasets=[cifar10,cifar100,gtsrb,tiny_imagenet]", "grid.models=[test_resnet]", "grid.attacks=[badnets]"]


def test_a_grid_is_planned_by_published_sizes_where_its_data_are_missing(tiny, tmp_path, capsys):
    from bench.run import main as run

    nowhere = [*tiny, *FOUR, "grid.defenses=[no_defense]", f"dataset.root={tmp_path / 'nowhere'}"]
    nowhere.append(f"dataset.cache={tmp_path / 'no_cache'}")
    assert main([*nowhere, "--assume=implant:3600,defend:0,inspect:0,evaluate:0"]) == 0
    printed = capsys.readouterr().out
    assert "work: 4.00 core hours" in printed  # one model for each data set
    assert run([*nowhere, "dry_run=true"]) == 0
    dry = capsys.readouterr().out
    for name in ("cifar10", "cifar100", "gtsrb", "tiny_imagenet"):
        assert [line for line in printed.splitlines() if line.startswith("planned") and f" {name}, " in line]
        assert f"{name}/test_resnet/badnets/0: implant" in dry
    assert not (tmp_path / "no_cache").exists()


def test_what_computes_names_every_missing_data_set_and_how_to_get_it(tiny, tmp_path):
    from bench.run import main as run

    nowhere = [*tiny, *FOUR, f"dataset.root={tmp_path / 'nowhere'}", f"dataset.cache={tmp_path / 'no_cache'}"]
    with pytest.raises(UserError) as error:
        run(nowhere)
    lines = str(error.value).splitlines()
    for name in ("cifar10", "cifar100", "gtsrb"):
        assert [line for line in lines if f"{name} " in line and f"python -m bench.data {name}`" in line]
    assert [line for line in lines if "tiny-imagenet-200.zip" in line]


def test_a_folder_of_unknown_size_is_named_with_all_that_are_missing(tiny, tmp_path):
    places = [f"dataset.root={tmp_path / 'nowhere'}", f"dataset.cache={tmp_path / 'no_cache'}"]
    with pytest.raises(UserError) as error:
        main([*tiny, "grid.datasets=[cifar10,'folder:signs']", *places])
    assert "cifar10" in str(error.value)
    assert "signs/train/<class>" in str(error.value)
    with pytest.raises(UserError, match="signs") as error:
        main([*tiny, "grid.datasets=['folder:signs']", *places])
    assert "\n" not in str(error.value)


def test_stages_of_an_architecture_that_is_not_here_are_left_out_and_named(tiny, capsys):
    before = measured(tiny)
    gone = {**tuned(before).implant, "model": {"name": "gone_net", "stem": "stock"}, "seed": 9}
    before.store.finish("implant", gone, {"status": "done", "seconds": 1.0, "provenance": {}})
    assert main([*tiny, *GRID, "train.epochs=3"]) == 0
    assert any("left out: 1 stages" in line and "gone_net" in line for line in capsys.readouterr().out.splitlines())
