"""bench.run end to end, on digits: a leaderboard out, nothing computed twice, failures shown and survived."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from bench import list as listing
from bench import report, status
from bench.experiment.experiment import load_experiment
from bench.pipeline.runner import Runner
from bench.reporting.page import picture_of
from bench.reporting.trials import of_trials

FIRST = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning]"]

PLUGIN = '''
"""A defense in a file of its own."""
from dataclasses import dataclass
from typing import ClassVar
import torch
from defenses.base import Defense, DefenderView, NotApplicable, ReserveView, DefenseResult, defense


@defense("shrink_head")
@dataclass(frozen=True)
class ShrinkHead(Defense):
    """Halve the head's weights."""
    paper: ClassVar[str] = "none"
    factor: float = 0.5

    def defend(self, view: ReserveView) -> DefenseResult:
        with torch.no_grad():
            view.model.head.weight.mul_(self.factor)
        return DefenseResult(view.model)


@defense("broken")
@dataclass(frozen=True)
class Broken(Defense):
    """Raises until it is mended."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        import os
        if "MENDED" in os.environ:
            return DefenseResult(view.model)
        raise RuntimeError("no | table <b>breaks</b>")


@defense("suicide")
@dataclass(frozen=True)
class Suicide(Defense):
    """Kills its process, as the kernel does when memory is short."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)


@defense("never")
@dataclass(frozen=True)
class Never(Defense):
    """Has no meaning for any model."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        raise NotApplicable("the model has no crystal ball")


@defense("hooked")
@dataclass(frozen=True)
class Hooked(Defense):
    """Repairs by a hook, which no file of weights holds."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        view.model.register_forward_hook(lambda module, inputs, output: output * 0)
        return DefenseResult(view.model)


@defense("chatty")
@dataclass(frozen=True)
class Chatty(Defense):
    """Logs a value that is no number, under a name that MLflow refuses."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        view.log.record("odd@name=1", float("nan"), 0)
        view.log.record("odd@name=1", 2.0, 1)
        return DefenseResult(view.model)


@defense("zero")
@dataclass(frozen=True)
class Zero(Defense):
    """Ends at chance."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        with torch.no_grad():
            view.model.head.weight.zero_()
        return DefenseResult(view.model)


@defense("half_blind")
@dataclass(frozen=True)
class HalfBlind(Defense):
    """Never names five of the ten classes."""
    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        with torch.no_grad():
            view.model.head.bias[5:] = -1e4
        return DefenseResult(view.model)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A module outside the repository, found by PYTHONPATH and imported by its name."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "outside_defense.py").write_text(PLUGIN)
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before}"
    from defenses.base import defense

    known = set(defense)
    yield "plugins=[outside_defense]"
    for name in set(defense) - known:
        del defense[name]
    sys.modules.pop("outside_defense", None)
    sys.path.remove(str(folder))
    os.environ["PYTHONPATH"] = before


def history(results: Path) -> list[str]:
    """The stages that were computed, one line each: stage and key."""
    return [" ".join(line.split()[1:3]) for line in (results / "store" / "history.log").read_text().splitlines()]


def test_a_grid_ends_in_a_leaderboard_with_tables_and_plots(run_grid, tmp_path, capsys):
    code, trials = run_grid(*FIRST, "report.plots=true")
    assert code == 0
    assert (trials.status == "done").all()
    folder = tmp_path / "results" / "quick"
    tables = {"leaderboard.md", "leaderboard.tex", "leaderboard.html", "leaderboard.csv", "wide.csv", "trials.csv"}
    tables |= {"config.yaml", picture_of("digits", "test_resnet", "badnets")}
    plots = {"asr_heatmap", "accuracy_against_asr", "robust_accuracy", "cost", "triggers"}
    drawn = {f"{name}.{kind}" for name in plots for kind in ("png", "pdf")}
    assert {path.name for path in folder.iterdir()} == tables | drawn | {".boards.json", ".report"}
    assert (folder / "asr_heatmap.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (folder / "leaderboard.md").read_text().split("\n", 2)[2].strip() in printed
    assert "PGD-1 " in printed  # the protocol stands beneath
    assert "exception for fine_tuning: defense.epochs=1" in printed  # and whatever is not a default
    assert "epochs 1, batch_size 64" in printed


def test_the_command_that_reproduces_a_cell_names_what_changes_a_figure_and_nothing_else(tiny):
    from bench.reporting.protocol import command

    kept = ["defense.fine_tuning.epochs=3", "measure.pgd_steps=2", "reserve.size=0.02"]
    others = ["defense.aft.lr=0.02", "attack.badnets.patch_size=4"]  # of methods that the cell does not have
    dropped = ["dispatch.workers=2", "dispatch.max_tries=3", "++dispatch.slurm.additional.nice=5", "report.plots=true"]
    dropped += ["tracking=server", "tracking.uri=http://example.org", "tracking.enabled=false"]
    experiment = load_experiment([*tiny, *kept, *dropped, *others, "dispatch.threads=2"])
    cell = next(trial for trial in experiment.trials if (trial.attack, trial.defense) == ("blended", "fine_tuning"))
    words = shlex.split(command(experiment, cell))
    assert set(kept) <= set(words)
    assert not set(others) & set(words)
    assert "dispatch.threads=2" in words  # another order of sums: the last bits
    places = [word for word in words if word.startswith(("tracking", "report", "dispatch", "++dispatch"))]
    assert places == ["dispatch.device=cpu", "dispatch.threads=2"]
    assert load_experiment(words[3:]).trials[0].keys == cell.keys


@pytest.mark.slow
def test_a_report_is_written_again_only_if_it_would_be_another(run_grid, tmp_path, tiny):
    page = tmp_path / "results" / "quick" / "leaderboard.html"

    def written(*more: str) -> bool:
        before = page.stat().st_mtime_ns if page.exists() else 0
        run_grid("grid.attacks=[badnets]", "grid.defenses=[no_defense]", *more)
        return page.stat().st_mtime_ns != before

    assert written()
    assert not written()
    assert written("grid.purpose=another")
    assert written()
    page.with_name("wide.csv").unlink()
    assert written()
    experiment = load_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense]"])
    (trial,) = experiment.trials
    result = experiment.store.result("evaluate", trial.keys.evaluate)
    shutil.rmtree(experiment.store.folder("evaluate", trial.keys.evaluate))
    result["figures"]["asr"] = 0.125
    experiment.store.finish("evaluate", trial.evaluate, result)
    assert written()
    before = page.stat().st_mtime_ns
    report.main([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense]"])
    assert page.stat().st_mtime_ns != before


def test_a_second_run_computes_nothing_and_more_seeds_compute_only_the_new(run_grid, tmp_path, tiny):
    run_grid(*FIRST)
    first = history(tmp_path / "results")
    run_grid(*FIRST)
    assert history(tmp_path / "results") == first
    run_grid(*FIRST, "grid.seeds=2")
    later = history(tmp_path / "results")
    assert later[: len(first)] == first
    assert len(later) == 2 * len(first)
    assert len(set(later)) == len(later)


def test_the_same_seed_gives_bit_identical_weights_and_figures(run_grid, tmp_path, tiny):
    _, first = run_grid(*FIRST)
    other = f"results={tmp_path / 'other'}"
    _, second = run_grid(*FIRST, other)
    figures = ["clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy"]
    pd.testing.assert_frame_equal(first[figures], second[figures], check_exact=True)
    one, two = load_experiment([*tiny, *FIRST]), load_experiment([*tiny, *FIRST, other])
    for trial in one.trials:
        for stage, key in zip(("implant", "defend"), trial.keys, strict=False):
            a, b = one.store.tensors(stage, key, "model"), two.store.tensors(stage, key, "model")
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_dry_run_prints_the_plan_and_computes_nothing(run_grid, tmp_path, capsys):
    code, _ = run_grid(*FIRST, "dry_run=true")
    assert code == 0
    assert "to compute: 2 infected models, 4 repairs" in capsys.readouterr().out
    assert not (tmp_path / "results" / "store").exists()


def test_a_defense_in_a_file_outside_joins_the_leaderboard(run_grid, plugin, tmp_path):
    code, trials = run_grid(
        "grid.attacks=[badnets]", "grid.defenses=[no_defense,shrink_head]", plugin, "defense.shrink_head.factor=0.25"
    )
    assert code == 0
    assert list(trials.defense) == ["no_defense", "shrink_head"]
    # Scaling all weights of a head keeps each prediction but for the bias, so the row is a real one.
    assert trials.clean_accuracy.notna().all()
    assert "| shrink_head |" in (tmp_path / "results" / "quick" / "leaderboard.md").read_text()


def readme_block(containing: str) -> str:
    """The Python block of the README that contains this text."""
    blocks = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1:]
    return next(block for block in (text.split("```")[0] for text in blocks) if containing in block)


def test_the_python_example_of_the_readme_runs_as_a_script_and_prints_what_was_measured(tiny, tmp_path):
    settings = [setting for setting in tiny if not setting.startswith(("results=", "dispatch.workers="))]
    more = [*settings, "grid.name=small", "grid.attacks=[badnets]", "grid.defenses=[no_defense]"]
    script = tmp_path / "example.py"
    script.write_text(readme_block("read_csv").replace("main([*grid, ", f"main([*grid, *{more}, "))
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert pd.read_csv(tmp_path / "results" / "small" / "trials.csv").status.tolist() == ["done"]
    assert run.stdout.rpartition("recovery_accuracy")[2].count("no_defense") == 1


def test_the_defense_in_the_readme_is_ranked_as_it_stands_there(run_grid, tmp_path, monkeypatch):
    (tmp_path / "my_defense.py").write_text(readme_block("@defense("))
    monkeypatch.syspath_prepend(tmp_path)
    from defenses.base import defense

    try:
        code, trials = run_grid(
            "grid.attacks=[badnets]",
            "grid.defenses=[no_defense,shrink]",
            "plugins=[my_defense]",
            "defense.shrink.factor=0.3",
            "defense.shrink.epochs=1",
        )
    finally:
        defense.pop("shrink", None)
    assert code == 0
    assert list(trials.status) == ["done", "done"]


def test_outcomes_have_five_names_and_each_is_shown_with_its_reason(run_grid, plugin, tmp_path, capsys):
    code, trials = run_grid(
        "grid.attacks=[badnets]", "grid.defenses=[no_defense,broken,never,zero]", "grid.threat_models=[reserve]", plugin
    )
    assert code == 1
    assert dict(zip(trials.defense, trials.status, strict=True)) == {
        "no_defense": "done",
        "broken": "failed",
        "never": "not applicable",
        "zero": "diverged",
    }
    text = (tmp_path / "results" / "quick" / "leaderboard.md").read_text()
    assert "| broken | failed |" in text
    assert "| never | n/a |" in text
    assert "| zero | diverged |" in text
    assert "the model has no crystal ball" in text
    assert "no \\| table &lt;b>breaks&lt;/b>" in text  # shown literally, and the table is whole
    assert "RuntimeError" in capsys.readouterr().out


def test_who_is_the_first_to_import_scikit_learn_is_not_blamed_for_what_its_import_draws():
    code = "from bench.pipeline.runner import _global_sources_untouched as untouched\n"
    code += "with untouched('first'):\n    import sklearn.decomposition"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_repaired_model_that_is_more_than_its_weights_is_refused_and_not_measured_as_undefended(run_grid, plugin):
    code, trials = run_grid("grid.attacks=[badnets]", "grid.defenses=[hooked]", plugin)
    assert code == 1
    assert trials.status[0] == "failed"
    assert "hooked returned a model that is not what its weights say" in trials.reason[0]


def test_a_curve_with_a_gap_and_an_odd_name_costs_nothing(run_grid, plugin):
    code, trials = run_grid("grid.attacks=[badnets]", "grid.defenses=[chatty]", plugin)
    assert code == 0
    assert list(trials.status) == ["done"]


@pytest.mark.slow
def test_a_stage_that_cannot_be_written_is_a_failure_with_a_reason(run_grid, monkeypatch, tmp_path):
    from bench.engine import files

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        code, trials = run_grid(*FIRST)
    assert code == 1
    assert set(trials.status) == {"failed"}
    assert "No space left on device" in trials.reason[0]
    assert not list((tmp_path / "results" / "store" / "unfinished").iterdir())
    assert run_grid(*FIRST)[0] == 0


@pytest.mark.slow
def test_a_machine_without_git_still_computes_and_says_so(run_grid, monkeypatch):
    from bench.pipeline.provenance import provenance

    monkeypatch.setenv("PATH", "")
    provenance.cache_clear()
    code, trials = run_grid("grid.attacks=[badnets]", "grid.defenses=[no_defense]")
    provenance.cache_clear()
    assert code == 0
    assert trials.commit[0] == ""
    assert trials.clean[0] == "False"


def test_an_edited_method_of_somebody_else_is_another_stage(run_grid, plugin, tmp_path, monkeypatch):
    arguments = ["grid.attacks=[badnets]", "grid.defenses=[shrink_head]", plugin]
    run_grid(*arguments)
    import inspect

    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: source(thing) + "# edited")
    run_grid(*arguments)
    stages = [line.split()[0] for line in history(tmp_path / "results")]
    assert stages.count("implant") == 1
    assert stages.count("defend") == 2


def test_a_failed_cell_is_tried_again_by_the_next_run(run_grid, plugin, monkeypatch):
    arguments = ["grid.attacks=[badnets]", "grid.defenses=[broken]", plugin]
    assert run_grid(*arguments)[0] == 1
    monkeypatch.setenv("MENDED", "1")
    code, trials = run_grid(*arguments)
    assert code == 0
    assert list(trials.status) == ["done"]


@pytest.mark.parametrize(
    "stage",
    ["implant", pytest.param("defend", marks=pytest.mark.slow), pytest.param("evaluate", marks=pytest.mark.slow)],
)
def test_a_stage_whose_folder_was_deleted_is_computed_again_and_its_neighbours_are_not(run_grid, tmp_path, tiny, stage):
    words = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]"]
    _, before = run_grid(*words)
    shutil.rmtree(tmp_path / "results" / "store" / stage)
    lines = len(history(tmp_path / "results"))
    experiment = load_experiment([*tiny, *words])
    assert (of_trials(experiment.trials, experiment.store).status == "missing").all()
    status, after = run_grid(*words)
    assert status == 0
    computed = [line.split()[0] for line in history(tmp_path / "results")[lines:]]
    assert set(computed) == {stage}
    assert len(computed) == (1 if stage == "implant" else 2)
    pd.testing.assert_series_equal(after.asr, before.asr)


@pytest.mark.slow
def test_two_workers_give_the_figures_of_one(run_grid, tmp_path):
    _, alone = run_grid(*FIRST)
    _, pooled = run_grid(*FIRST, "dispatch.workers=2", f"results={tmp_path / 'pooled'}")
    figures = ["clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy"]
    pd.testing.assert_frame_equal(alone[figures], pooled[figures], check_exact=True)
    lines = history(tmp_path / "pooled")
    assert len(lines) == len(set(lines)) == 2 + 2 + 4 + 4


@pytest.mark.slow
def test_attacks_that_optimise_on_a_clean_network_share_one_of_their_seed(run_grid, tiny, tmp_path, monkeypatch):
    grid = ["grid.attacks=[none,low_frequency,trojan_nn]", "grid.defenses=[no_defense]", "dispatch.workers=2"]
    assert run_grid(*grid, "attack.trojan_nn.steps=20")[0] == 0
    assert [line.split()[0] for line in history(tmp_path / "results")].count("surrogate") == 1
    # It is the network that each would have trained for itself.
    store, alone = (
        load_experiment([*tiny, *grid]).store,
        [*grid, "attack.trojan_nn.steps=20", f"results={tmp_path / 'alone'}"],
    )
    given = Runner._setup
    monkeypatch.setattr(Runner, "_setup", lambda bench, trial, log, *_: given(bench, trial, log))
    experiment = load_experiment([*tiny, *alone])
    bench = Runner(experiment.store, experiment.infos, torch.device("cpu"))
    for trial in experiment.trials[1:]:
        bench.run(trial, ("implant",))
        key = trial.keys.implant
        for part in ("model", "trigger"):
            one, two = store.tensors("implant", key, part), bench.store.tensors("implant", key, part)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
    assert "surrogate" not in {line.split()[0] for line in history(tmp_path / "alone")}


@pytest.mark.slow
def test_a_surrogate_that_diverges_or_fails_is_the_reason_of_its_attacks(run_grid, tmp_path, monkeypatch):
    grid = ["grid.attacks=[low_frequency,trojan_nn]", "grid.defenses=[no_defense]"]
    _, trials = run_grid(*grid, "train.lr=1e30")
    assert set(trials.status) == {"diverged"}
    assert all(reason.startswith("implant: surrogate: the loss became nan in epoch 1") for reason in trials.reason)
    assert [line.split()[0] for line in history(tmp_path / "results")].count("surrogate") == 1

    def fail(*_):
        raise ValueError("no clean data")

    monkeypatch.setattr("bench.pipeline.runner.Runner._surrogate", fail)
    code, trials = run_grid(*grid)
    assert code == 1
    assert set(trials.reason) == {"implant: ValueError: no clean data"}


def test_a_worker_that_dies_costs_its_trial_and_nothing_else(run_grid, plugin):
    code, trials = run_grid(
        "grid.attacks=[badnets]", "grid.defenses=[suicide,no_defense]", plugin, "dispatch.workers=1"
    )
    assert code == 1
    assert list(trials.status) == ["failed", "done"]
    assert "SIGKILL" in trials.reason[0]


def test_an_implant_that_fails_is_the_reason_of_all_its_trials(run_grid, monkeypatch):
    from attacks.base import attack

    def fail(*_):
        raise ValueError("no picture")

    monkeypatch.setattr(attack["badnets"], "prepare", fail)
    code, trials = run_grid(*FIRST)
    assert code == 1
    assert set(trials[trials.attack == "badnets"].reason) == {"implant: ValueError: no picture"}
    assert set(trials[trials.attack == "none"].status) == {"done"}


def test_an_infected_model_that_diverges_is_the_outcome_of_all_its_trials_and_is_trained_once(run_grid, tmp_path):
    grid = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]", "train.lr=1e30"]
    code, trials = run_grid(*grid)
    assert code == 0
    assert set(trials.status) == {"diverged"}
    assert all(reason.startswith("implant: the loss became nan in epoch 1") for reason in trials.reason)
    first = history(tmp_path / "results")
    assert sorted(line.split()[0] for line in first) == ["defend", "defend", "evaluate", "evaluate", "implant"]
    run_grid(*grid)
    assert history(tmp_path / "results") == first


def test_status_shows_a_wrecked_model_as_the_leaderboard_does(run_grid, plugin, tiny, capsys):
    grid = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,half_blind]", "train.epochs=8", plugin]
    _, trials = run_grid(*grid)
    assert list(trials.status) == ["done", "wrecked"]
    capsys.readouterr()
    status.main([*tiny, *grid])
    printed = capsys.readouterr().out
    assert "1 done, 1 wrecked" in printed
    assert "wrecked (1 trials): " in printed


def test_report_and_status_compute_nothing(run_grid, tiny, tmp_path, capsys):
    run_grid(*FIRST)
    before = history(tmp_path / "results")
    (tmp_path / "results" / "quick" / "leaderboard.md").unlink()
    assert report.main([*tiny, *FIRST]) == 0
    assert (tmp_path / "results" / "quick" / "leaderboard.md").exists()
    capsys.readouterr()
    assert status.main([*tiny, *FIRST, "grid.seeds=2"]) == 0
    assert "4 done, 4 missing" in capsys.readouterr().out
    assert history(tmp_path / "results") == before


def test_list_names_every_method_with_its_paper(capsys):
    from attacks.base import attack
    from defenses.base import defense

    listing.main([])
    printed = capsys.readouterr().out
    for registry in (attack, defense):
        for name, cls in registry.items():
            assert any(name in line and cls.paper in line for line in printed.splitlines())


def test_every_figure_can_be_traced_to_a_config_a_seed_and_a_commit(run_grid, tiny):
    run_grid(*FIRST)
    experiment = load_experiment([*tiny, *FIRST])
    trial = experiment.trials[-1]
    found = experiment.store.result("evaluate", trial.keys.evaluate)["provenance"]
    assert {"commit", "clean", "torch", "timm", "device", "python"} <= set(found)
    config = json.loads((experiment.store.folder("implant", trial.keys.implant) / "config.json").read_text())
    assert config["seed"] == trial.seed
    assert config["attack"]["patch_size"] == 3


@pytest.mark.slow
def test_the_figures_of_a_stored_repair_come_back_from_its_weights_and_timm_alone(run_grid, tiny):
    _, trials = run_grid("grid.attacks=[badnets]", "grid.defenses=[fine_tuning]", "defense.fine_tuning.lr=0.01")
    experiment = load_experiment(
        [*tiny, "grid.attacks=[badnets]", "grid.defenses=[fine_tuning]", "defense.fine_tuning.lr=0.01"]
    )
    (trial,) = experiment.trials
    stored = load_file(experiment.store.folder("defend", trial.keys.defend) / "model.safetensors")
    net = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    net.load_state_dict({name.removeprefix("net."): value for name, value in stored.items() if name.startswith("net.")})
    test = experiment.infos["digits"].load("test")
    images, labels = test.images.float() / 255, test.labels
    triggered = images.clone()
    triggered[..., -2:, -2:] = 1.0  # three white pixels of 32 are two of 16
    with torch.no_grad():
        clean, fooled = (net((x - stored["mean"]) / stored["std"]).argmax(1) for x in (images, triggered))
    (row,) = trials.itertuples()
    assert row.clean_accuracy == pytest.approx((clean == labels).double().mean().item(), abs=1e-9)
    assert row.asr == pytest.approx((fooled == 0)[labels != 0].double().mean().item(), abs=1e-9)
    assert row.recovery_accuracy == pytest.approx((fooled == labels)[labels != 0].double().mean().item(), abs=1e-9)


@pytest.mark.parametrize(
    "command", ["run", "plan", "report", "status", "cancel", "sync", "list", "data", "perf", "gallery"]
)
def test_help_answers_without_loading_torch(command):
    code = f"""if True:
        import runpy, sys
        sys.argv = ["x", "--help"]
        try:
            runpy.run_module("bench.{command}", run_name="__main__")
        except SystemExit as end:
            assert end.code == 0
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"python -m bench.{command}" in done.stdout


def test_a_users_mistake_is_one_line_and_exit_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "grid.attacks=[badnet]"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Did you mean 'badnets'?" in done.stderr
