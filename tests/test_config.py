"""Overrides are type-checked, and whatever is wrong is refused in one line that says what to write."""

from __future__ import annotations

import pytest

from attacks.base import attack
from bench.config import UserError, attack_of, defense_of, grids, load
from bench.door import plan
from bench.grid import seeds_of
from defenses.base import defense


def refusal(*arguments: str) -> str:
    """The one line that these settings are refused with, before any compute."""
    with pytest.raises(UserError) as caught:
        plan(list(arguments))
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
        ("attack.badnets.poison_rate=10", ["it is a share in [0, 1]", "write 0.1"]),
        ("attack.badnets.label_mode=dirty", ["all_to_one or all_to_all or clean_label"]),
        ("attack.badnets.label_mode=clean_label attack.badnets.poison_rate=0.5", ["write at most 0.1"]),
        ("attack.badnets.target_label=10", ["the classes are 0 to 9"]),
        ("grid.attacks=[badnet]", ["no attack is named 'badnet'", "Did you mean 'badnets'?"]),
        ("grid.defenses=[finetuning]", ["Did you mean 'fine_tuning'?"]),
        ("grid.datasets=[digit]", ["Did you mean 'digits'?"]),
        ("grid.datasets=[svhn]", ["python -m bench.data svhn", "dataset.root"]),
        ("grid.models=[test_resnett]", ["Did you mean 'test_resnet'"]),
        ("grid.settings=[reserved]", ["Did you mean 'reserve'?"]),
        ("grid.models=[vgg16_bn]", ["16x16", "dataset.size"]),
        ("grid=quik", ["Did you mean 'quick'?"]),
        ("gird=quick", ["Did you mean 'grid'?"]),
        ("grid.seeds=0", ["grid.seeds"]),
        ("grid.seeds=[1,1]", ["different"]),
        ("train.optimizer=sdg", ["sgd"]),
        ("train.epochs=many", ["epochs", "many"]),
        ("reserve.size=0.5", ["size <= pool"]),
        ("defense.aft.adversarial_updates=700 grid.exceptions=[]", ["write 0 to 600"]),
        ("plugins=[no.such.module]", ["no.such.module", "PYTHONPATH"]),
        ("quick", ["key=value"]),
        ("+attack.badnets.more=1", ["more"]),
        ("grid.exceptions=[{attack:badnets,set:{attack.patch_siez:4},why:x}]", ["patch_siez"]),
        ("grid.exceptions=[{attak:badnets,set:{},why:x}]", ["attack"]),
        ("grid.exceptions=[{defense:atf,set:{},why:x}]", ["Did you mean 'aft'?"]),
        ("grid.exceptions=[{set:{reserve.size:0.5},why:x}]", ["size <= pool"]),
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
        ("measure.pgd_epsilon=8", ["pixels are in [0, 1]", "0.03137"]),
        ("measure.pgd_step_size=0", ["pixels are in [0, 1]"]),
        # 30 % of a reserve of which a tenth is of the target's class.
        ("grid.attacks=[sig] reserve.pool=0.5 reserve.contamination=0.3", ["only poison images of class 0"]),
        ("dispatch.workers=-1", ["at least 0"]),
        ("dispatch.device=gpu", ["auto, cpu or cuda"]),
        ("grid.name=store", ["another"]),
        ("reserve.pool=0.001 reserve.size=0.001", ["less than one image"]),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_helps(argument, words, cache, tmp_path):
    line = refusal(*argument.split(" "), f"dataset.cache={cache}", f"dataset.root={tmp_path}")
    for word in words:
        assert word in line


def test_every_grid_that_ships_composes_and_every_name_in_it_resolves():
    from bench.grid import check

    for name in grids():
        cfg = load([f"grid={name}"])
        check(cfg)
        assert cfg.grid.name == name
        assert cfg.grid.purpose


def test_a_grid_in_a_folder_of_the_users_is_found(tmp_path, cache):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "mine.yaml").write_text(
        "# @package _global_\ngrid: {name: mine, attacks: [none], seeds: [7]}\n"
    )
    opened = plan(["grid=mine", f"hydra.searchpath=[file://{tmp_path}]", f"dataset.cache={cache}"])
    assert {(trial.attack, trial.seed) for trial in opened.trials} == {("none", 7)}


def test_a_number_of_seeds_counts_from_zero():
    assert seeds_of(3) == [0, 1, 2]
    assert seeds_of([5, 2]) == [5, 2]
