"""Overrides are type-checked, and whatever is wrong is refused in one line that says what to write."""

from __future__ import annotations

import pytest

from attacks.base import attack
from bench.engine.errors import UserError
from bench.experiment.axes import seeds_of
from bench.experiment.experiment import load_experiment
from bench.experiment.identity import attack_of, defense_of
from bench.experiment.load import load
from defenses.base import defense


def refusal(*arguments: str) -> str:
    """The one line that these settings are refused with, before any compute."""
    with pytest.raises(UserError) as caught:
        load_experiment(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_override_reaches_the_method_with_its_type():
    cfg = load(["attack.badnets.patch_size=4", "defense.aft.lr=1e-3"])
    assert attack_of(cfg, "badnets").patch_size == 4
    assert defense_of(cfg, "aft").lr == 0.001


def test_every_default_is_the_one_of_the_code():
    cfg = load([])
    for registry, of in ((attack, attack_of), (defense, defense_of)):
        for name, cls in registry.items():
            assert of(cfg, name) == cls()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("attack.badnets.patch_siez=4", ["attack.badnets.patch_siez", "Did you mean 'patch_size'?"]),
        ("attack.badnet.patch_size=4", ["Did you mean 'badnets'?"]),
        ("attack.badnets.patch_size=4.5", ["patch_size", "4.5"]),
        ("attack.badnets.patch_size=big", ["patch_size", "big"]),
        ("attack.badnets.poison_rate=10", ["attack.badnets.poison_rate is 10", "0.1"]),
        ("attack.badnets.label_mode=dirty", ["all_to_one or all_to_all or clean_label"]),
        ("attack.badnets.label_mode=clean_label attack.badnets.poison_rate=0.5", ["write at most 0.1"]),
        ("attack.badnets.target_label=10", ["the classes are 0 to 9"]),
        ("grid.attacks=[badnet]", ["no attack is named 'badnet'", "Did you mean 'badnets'?"]),
        ("grid.defenses=[finetuning]", ["Did you mean 'fine_tuning'?"]),
        ("grid.datasets=[digit]", ["Did you mean 'digits'?"]),
        ("grid.datasets=[svhn]", ["python -m bench.data svhn", "dataset.root"]),
        ("grid.models=[test_resnett]", ["Did you mean 'test_resnet'"]),
        ("grid.threat_models=[reserved]", ["Did you mean 'reserve'?"]),
        ("grid.models=[vgg16_bn]", ["16x16", "dataset.size"]),
        ("grid=quik", ["Did you mean 'quick'?"]),
        # Words of Hydra's that have another name here.
        ("-m train.epochs=1,2", ["-m", "grid.sweep"]),
        ("--multirun", ["--multirun", "grid.sweep"]),
        ("--config-name=quick", ["--config-name", "grid=NAME"]),
        ("--config-dir=/tmp", ["--config-dir", "hydra.searchpath"]),
        ("--cfg=job", ["--cfg", "dry_run=true"]),
        ("hydra.run.dir=x", ["hydra.run.dir", "results=DIR"]),
        ("hydra.job.chdir=true", ["hydra.job.chdir"]),
        ("hydra/launcher=joblib", ["hydra.launcher", "dispatch"]),
        ("hydra.searchpath=[file:///nowhere] grid=mine", ["hydra.searchpath", "/nowhere"]),
        ("tracking=null", ["tracking=null", "local", "tracking.enabled=false"]),
        ("grid=null", ["grid=null", "quick"]),
        ("dispatch=null", ["dispatch=null", "local"]),
        ("grid=digits,quick", ["grid=digits,quick", "grid=digits"]),
        ("train.epochs=1,2", ["train.epochs", "1,2", "grid.sweep"]),
        ("grid.attacks=badnets,blended", ["grid.attacks=[badnets,blended]"]),
        ("~train.epochs", ["~train.epochs"]),
        ("results=a,b", ["""results="a,b\""""]),
        ("results=my results", ["results=my results", "quote"]),
        ("results=a(b)", ["""results="a(b)\""""]),
        ("train=3", ["train.KEY"]),
        ("measure=null", ["measure.KEY"]),
        ("attack.badnets=5", ["attack.badnets.KEY"]),
        ("train.lr=1/0", ["train.lr", "1/0"]),
        ("train.epochs=6/2", ["train.epochs", "6/2"]),
        # Interpolations.
        ("train.epochs=${oc.env:BENCH_TEST_NOT_SET}", ["train.epochs", "BENCH_TEST_NOT_SET"]),
        ("grid.seeds=[${oc.env:BENCH_TEST_NOT_SET}]", ["grid.seeds", "BENCH_TEST_NOT_SET"]),
        ("measure.relearn=${grid.name}", ["measure.relearn", "quick", "true or false"]),
        ("measure.pgd_steps=${train.lr}", ["measure.pgd_steps", "0.1"]),
        ("reserve.size=${reserve.nothing}", ["reserve.size", "reserve.nothing"]),
        # Seeds.
        ("grid.seeds=[-1]", ["-1", "4294967295"]),
        ("grid.seeds=[99999999999999999999]", ["99999999999999999999", "4294967295"]),
        ("grid.seeds=1.5", ["grid.seeds", "1.5"]),
        ("grid.seeds=[0,1.0]", ["grid.seeds", "1.0"]),
        ("grid.seeds=true", ["grid.seeds", "True"]),
        ("grid.seeds=-3", ["grid.seeds", "-3"]),
        ("grid.seeds=0x10", ["grid.seeds", "0x10"]),
        ("grid.seeds=100000000", ["grid.seeds", "100000000"]),
        ("""grid.seeds=["1",1]""", ["grid.seeds"]),
        # Names in a grid's exceptions, and settings that no cell has.
        ("grid.exceptions=[{dataset:digit,set:{train.epochs:7},why:x}]", ["Did you mean 'digits'?"]),
        ("grid.exceptions=[{dataset:'folder:nowhere',set:{train.epochs:7},why:x}]", ["folder:nowhere"]),
        ("grid.exceptions=[{model:test-resnet,set:{train.epochs:7},why:x}]", ["Did you mean 'test_resnet'"]),
        ("grid.exceptions=[{model:[test_resnet,resnet81],set:{train.epochs:7},why:x}]", ["resnet81"]),
        ("grid.exceptions=[digits]", ["grid.exceptions", "digits"]),
        ("grid.attacks=[badnets] attack.sig.poison_rate=0.2", ["attack.sig.poison_rate", "grid.attacks"]),
        ("defense=${grid.name}", ["defense.KEY"]),
        ("grid.attacks=[badnets] defense={nad:{beta:0}}", ["defense.nad.beta", "grid.defenses"]),
        ("grid.threat_models=[trainset] grid.defenses=[abl] reserve.size=0.02", ["reserve.size=0.02"]),
        (
            "grid.threat_models=[trainset] grid.defenses=[abl] reserve.contamination=0.1",
            ["reserve.contamination=0.1"],
        ),
        ("grid.attacks=[none] reserve.contamination=0.1", ["reserve.contamination=0.1"]),
        ("measure.relearn_poisoned=[5]", ["measure.relearn_poisoned=[5]", "measure.relearn=true"]),
        # A reference is resolved once, and what it refers to differs from cell to cell.
        (
            "reserve.size=${reserve.held_out} grid.sweep=[{key:reserve.held_out,values:[0.05,0.1]}]",
            ["reserve.size", "reserve.held_out", "grid.sweep"],
        ),
        (
            "reserve={size:'${.held_out}'} grid.sweep=[{key:reserve.held_out,values:[0.05,0.1]}]",
            ["reserve.size", "reserve.held_out", "grid.sweep"],
        ),
        (
            "defense.aft.epsilon=${attack.badnets.poison_rate} grid.sweep=[{key:attack.poison_rate,values:[0.05,0.1]}]",
            ["defense.aft.epsilon", "attack.badnets.poison_rate", "grid.sweep"],
        ),
        (
            "train.lr=${train.weight_decay} grid.exceptions=[{set:{train:{weight_decay:0.01}},why:x}]",
            ["train.lr", "train.weight_decay", "grid.exceptions"],
        ),
        # Shares that come to no image, or to the same ones.
        ("grid.attacks=[sig] grid.defenses=[no_defense] reserve.contamination=0.5", ["reserve.contamination", "0.5"]),
        ("reserve.contamination=0.002", ["0.002", "71", "at least 0.0071"]),
        ("reserve.size=0.0001", ["0.0001", "1438", "at least 0.00035"]),
        ("attack.badnets.poison_rate=0.0001", ["0.0001", "1367"]),
        ("attack.badnets.cover_rate=0.0003", ["cover_rate", "0.0003", "1367"]),
        (
            "grid.sweep=[{key:reserve.size,values:[0.02,0.0201]}]",
            ["reserve.size=0.02 ", "reserve.size=0.0201", "digits"],
        ),
        ("grid.sweep=[{key:attack.poison_rate,values:[0.1,0.1001]}]", ["0.1 ", "0.1001", "137"]),
        ("grid.sweep=[{key:measure.pgd_images,values:[359,5000]}]", ["=359", "=5000"]),
        ("grid.sweep=[{key:measure.pgd_epsilon,values:[1/2,0.5]}]", ["different values"]),
        ("grid.sweep=[{key:train,values:[{epochs:1},{epochs:2}]}]", ["group of settings"]),
        # What would lie elsewhere on the disk, or in no file at all.
        ("grid.name=..", ["grid.name", ".."]),
        ("grid.name=.", ["grid.name"]),
        ('grid.name=""', ["grid.name"]),
        ("grid.name=a/b", ["grid.name", "a/b"]),
        ("grid.name=Store", ["grid.name", "Store"]),
        ("grid.name=mlflow.db", ["grid.name", "mlflow.db"]),
        (f"grid.name={'x' * 260}", ["grid.name", "260"]),
        (f'grid.name="{"ü" * 130}"', ["grid.name", "260"]),
        ('grid.name="a\x1bb"', ["grid.name", "x1b"]),
        ('grid.models=["a\x00b"]', ["grid.models", "x00"]),
        ('dispatch.slurm.partition="gpu\x07"', ["dispatch.slurm.partition", "x07"]),
        ('dispatch.slurm.setup=["a\u2028b"]', ["dispatch.slurm.setup", "u2028"]),
        ("results=a%20b", ["results", "a%20b"]),
        ("results=a?b", ["results", "a?b"]),
        ("gird=quick", ["Did you mean 'grid'?"]),
        ("grid.seeds=0", ["grid.seeds"]),
        ("grid.seeds=[1,1]", ["different"]),
        ("train.optimizer=sdg", ["sgd"]),
        ("train.epochs=many", ["epochs", "many"]),
        ("reserve.size=0.5", ["size <= held_out"]),
        ("defense.aft.adversarial_updates=700 grid.exceptions=[]", ["write 0 to 600"]),
        ("plugins=[no.such.module]", ["no.such.module", "PYTHONPATH"]),
        ("quick", ["key=value"]),
        ("+attack.badnets.more=1", ["more"]),
        ("grid.exceptions=[{attack:badnets,set:{attack.patch_siez:4},why:x}]", ["patch_siez"]),
        ("grid.exceptions=[{attak:badnets,set:{},why:x}]", ["attack"]),
        ("grid.exceptions=[{defense:atf,set:{},why:x}]", ["Did you mean 'aft'?"]),
        ("grid.exceptions=[{set:{reserve.size:0.5},why:x}]", ["size <= held_out"]),
        ("grid.exceptions=[{set:{dataset.size:8},why:x}]", ["single cells"]),
        ("measure.pgd_images=0", ["at least 1"]),
        ("grid.attacks=badnets", ["write 'grid.attacks=[badnets]'"]),
        ("attack.poison_rate=0.05", ["attack.NAME.poison_rate"]),
        ("grid.exceptions=[{attack:badnets,set:{poison_rate:0.1},why:x}]", ["e.g. attack.poison_rate"]),
        ("grid.sweep=[{key:attack.poison_rat,values:[0.1]}]", ["Did you mean 'poison_rate'?"]),
        ("grid.defenses=[shrink]", ["no defense is named 'shrink'", "'plugins=[its_module]'"]),
        ("train.lr=-1", ["lr is -1"]),
        ("train.label_smoothing=3", ["label_smoothing is 3", "below 1"]),
        ("defense.fine_tuning.epochs=-5", ["defense.fine_tuning.epochs is -5"]),
        ("measure.pgd_epsilon=8", ["measure.pgd_epsilon is 8", "8/255"]),
        ("measure.pgd_step_size=0", ["measure.pgd_step_size is 0"]),
        # 30 % of a reserve of which a tenth is of the target's class.
        ("grid.attacks=[sig] reserve.held_out=0.5 reserve.contamination=0.3", ["only poison images of class 0"]),
        ("dispatch.workers=-1", ["at least 0"]),
        ("dispatch.device=gpu", ["auto, cpu or cuda"]),
        ("grid.name=store", ["another"]),
        ("reserve.held_out=0.001 reserve.size=0.001", ["less than one image"]),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_helps(argument, words, cache, tmp_path):
    line = refusal(*argument.split(" "), f"dataset.cache={cache}", f"dataset.root={tmp_path}")
    for word in words:
        assert word in line


def test_a_budget_is_a_group_that_the_command_line_replaces():
    assert load(["grid=cifar10_small"]).train.epochs == 12
    assert load(["grid=cifar10_small", "budget=gpu"]).train.epochs == 60
    assert load(["grid=cifar10_small", "budget=gpu", "train.epochs=7"]).train.epochs == 7
    assert load(["grid=quick", "budget=gpu"]).train.epochs == 20  # what a grid sets itself comes last
    with pytest.raises(UserError, match=r"gpuu.*gpu"):
        load(["budget=gpuu"])


def test_a_grid_in_a_folder_of_the_users_is_found(tmp_path, cache):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "mine.yaml").write_text(
        "# @package _global_\ngrid: {name: mine, attacks: [none], seeds: [7]}\n"
    )
    experiment = load_experiment(["grid=mine", f"hydra.searchpath=[file://{tmp_path}]", f"dataset.cache={cache}"])
    assert {(trial.attack, trial.seed) for trial in experiment.trials} == {("none", 7)}


YAML = """
# @package _global_
grid:
  name: mine
  purpose: >
    two lines
    of prose
  datasets: [digits]
  models: [test_resnet]
  attacks: [badnets]
  defenses: [no_defense]
  seeds: "${oc.env:BENCH_TEST_SEEDS}"
  exceptions:
    - attack: badnets
      set: {attack: {poison_rate: 1/4}, train.lr: "${oc.env:BENCH_TEST_RATE}"}
      why: "${grid.purpose}"
measure:
  pgd_images: ${oc.env:BENCH_TEST_IMAGES}
  pgd_epsilon: 4/255
  relearn: "${oc.env:BENCH_TEST_FLAG}"
"""


@pytest.mark.parametrize("flag", ["false", "true", "no", "on"])
def test_a_grid_in_yaml_reads_numbers_from_the_environment(tmp_path, cache, monkeypatch, flag):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "mine.yaml").write_text(YAML)
    for name, value in (("SEEDS", "10"), ("RATE", "1/8"), ("IMAGES", "30"), ("FLAG", flag)):
        monkeypatch.setenv(f"BENCH_TEST_{name}", value)
    experiment = load_experiment(["grid=mine", f"hydra.searchpath=[file://{tmp_path}]", f"dataset.cache={cache}"])
    assert [trial.seed for trial in experiment.trials] == list(range(10))
    trial = experiment.trials[0]
    assert (trial.evaluate["pgd_images"], trial.evaluate["pgd_epsilon"]) == (30, 4 / 255)
    assert trial.evaluate["relearn"] is (flag in ("true", "on"))
    assert bool(trial.clean_control) is trial.evaluate["relearn"]
    assert (trial.implant["attack"]["poison_rate"], trial.implant["train"]["lr"]) == (0.25, 0.125)
    assert experiment.cfg.grid.purpose == experiment.cfg.grid.exceptions[0].why == "two lines of prose"


def test_a_grid_in_yaml_that_cannot_be_read_is_refused_in_one_line(tmp_path, cache):
    (tmp_path / "grid").mkdir()
    for text in ("grid: {name: [", "# @package _global_\ntrain: {epohcs: 3}", "# @package _global_\ntrain: null"):
        (tmp_path / "grid" / "mine.yaml").write_text(text)
        refusal("grid=mine", f"hydra.searchpath=[file://{tmp_path}]", f"dataset.cache={cache}")


@pytest.mark.parametrize("value", [10, "10", list(range(10)), [str(seed) for seed in range(10)]])
def test_a_number_of_seeds_that_arrives_as_text_is_the_number(value):
    assert seeds_of(value) == list(range(10))


@pytest.mark.parametrize(
    "value",
    [
        "a",
        "true",
        "8/255",
        "a b",
        'it\'s "it"',
        "back\\",
        "a,b",
        "[x]",
        "{x}",
        "${not.one",
        "",
        "5",
        None,
        True,
        0.1,
        1e-7,
    ],
)
def test_what_is_written_for_a_command_line_is_read_back(value):
    from bench.experiment.overrides import parsed, to_override

    assert parsed(f"a.b={to_override(value)}") == value
    assert parsed(f"a.b=[{to_override(value)}]") == [value]


def test_the_largest_seed_has_its_place_in_a_table(cache, tmp_path):
    from bench.reporting.trials import of_trials

    experiment = load_experiment(["grid.seeds=[4294967295]", f"dataset.cache={cache}", f"results={tmp_path}"])
    assert set(of_trials(experiment.trials, experiment.store).seed) == {2**32 - 1}


def test_a_number_of_seeds_counts_from_zero():
    assert seeds_of(3) == [0, 1, 2]
    assert seeds_of([5, 2]) == [5, 2]
