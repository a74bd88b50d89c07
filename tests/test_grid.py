"""What can change a figure changes a stage's identity; what cannot does not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from importlib.resources import files

import pytest
from omegaconf import OmegaConf

from attacks.base import attack
from bench.engine.errors import UserError
from bench.experiment.experiment import load_experiment
from bench.experiment.load import grids
from bench.reporting.protocol import protocol
from defenses.base import defense

BASE = ["grid.attacks=[badnets]", "grid.defenses=[fine_tuning]", "grid.seeds=1"]


@pytest.fixture
def keys(cache):
    def of(*more: str) -> tuple[str, str, str]:
        return load_experiment([*BASE, f"dataset.cache={cache}", *more]).trials[0].keys

    return of


def test_a_plan_is_the_product_of_its_axes(cache):
    experiment = load_experiment(["grid=quick", f"dataset.cache={cache}"])
    assert len(experiment.trials) == 3 * 4 * 3
    assert len({trial.keys.implant for trial in experiment.trials}) == 3 * 3  # many defenses share one implant


def test_the_keys_that_planning_leaves_with_a_trial_are_those_of_its_identities(cache):
    for trial in load_experiment(["grid=quick", f"dataset.cache={cache}"]).trials:
        left = vars(trial)["keys"]  # computed once, while the grid is expanded
        for identity, key in zip((trial.implant, trial.defend, trial.evaluate), left, strict=True):
            text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
            assert key == hashlib.sha256(text.encode()).hexdigest()[:20]


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("attack.badnets.patch_size=4", "111"),
        ("attack.badnets.poison_rate=0.05", "111"),
        ("train.epochs=7", "111"),
        ("train.lr=0.3", "111"),
        ("train.precision=bfloat16", "111"),
        ("model.stem=small", "111"),
        ("grid.models=[test_vit]", "111"),
        ("grid.seeds=[1]", "111"),
        ("dataset.size=32", "111"),
        ("reserve.held_out=0.1", "111"),
        ("defense.fine_tuning.epochs=7", "011"),
        ("reserve.size=0.02", "011"),
        ("reserve.contamination=0.1", "011"),
        ("measure.pgd_steps=5", "001"),
        ("measure.pgd_images=100", "001"),
        ("dispatch.workers=7", "000"),
        ("dispatch.threads=2", "000"),
        ("dispatch.checkpoint_s=1", "000"),
        ("tracking.enabled=false", "000"),
        ("results=elsewhere", "000"),
        ("grid.name=another", "000"),
        ("grid.exceptions=[{attack:blended,set:{attack.alpha:0.5},why:x}]", "000"),  # another attack's setting
        ("grid.exceptions=[{defense:aft,set:{defense.lr:0.5},why:x}]", "000"),
    ],
)
def test_identity_changes_with_figures_and_with_nothing_else(keys, change, stages):
    before, after = keys(), keys(change)
    assert "".join(str(int(old != new)) for old, new in zip(before, after, strict=True)) == stages


def test_a_clean_model_has_no_poison_to_taint_a_reserve_with(keys):
    clean = "grid.attacks=[none,badnets]"  # the first trial's attack is none
    assert keys(clean) == keys(clean, "reserve.contamination=0.2")
    assert keys()[1] != keys("reserve.contamination=0.2")[1]


@pytest.mark.parametrize(("registry", "group"), [(attack, "attack"), (defense, "defense")])
def test_every_setting_of_every_method_is_in_its_identity(registry, group, cache):
    words = [f"grid.{group}s=[{','.join(registry)}]", "grid.threat_models=[reserve,trainset]", "grid.seeds=[0]"]
    identities = [
        trial.implant["attack"] if group == "attack" else (trial.defend or {}).get("defense")
        for trial in load_experiment([*words, f"dataset.cache={cache}"]).trials
    ]
    assert {identity["name"] for identity in identities if identity} == set(registry)
    for identity in filter(None, identities):
        named = {field.name for field in fields(registry[identity["name"]]) if not field.metadata.get("later")}
        assert named | {"name", "version"} == set(identity) - {"source"}


def test_a_setting_that_came_later_is_named_once_it_is_used(cache):
    def named(*more: str) -> dict:
        words = ["grid=quick", "grid.attacks=[wanet]", f"dataset.cache={cache}", *more]
        return load_experiment(words).trials[0].implant["attack"]

    assert named() == {key: value for key, value in named("attack.wanet.ramp=0.5").items() if key != "ramp"}
    assert named("attack.wanet.ramp=0.5")["ramp"] == 0.5


def test_a_new_version_of_a_method_is_another_stage(keys, monkeypatch):
    before = keys()
    monkeypatch.setattr(attack["badnets"], "version", 99)
    assert keys()[0] != before[0]


def test_an_exception_sets_only_the_cells_that_match(cache):
    experiment = load_experiment(
        [
            "grid=quick",
            "grid.exceptions=[{attack: badnets, set: {attack.patch_size: 6}, why: larger}]",
            f"dataset.cache={cache}",
        ]
    )
    sizes = {trial.implant["attack"].get("patch_size") for trial in experiment.trials if trial.attack == "badnets"}
    assert sizes == {6}
    assert experiment.cfg.attack.badnets.patch_size == 3


def test_an_exception_may_name_several(cache):
    settings = "grid.exceptions=[{defense: [aft, fine_tuning], set: {defense.lr: 0.5}, why: both}]"
    experiment = load_experiment(["grid=quick", settings, f"dataset.cache={cache}"])
    rates = {trial.defense: trial.defend["defense"].get("lr") for trial in experiment.trials}
    assert (rates["aft"], rates["fine_tuning"], rates["fine_pruning"]) == (0.5, 0.5, 0.01)


def test_the_command_line_wins_over_an_exception_of_the_grid(cache):
    experiment = load_experiment(["grid=quick", "defense.aft.epsilon=0.5", f"dataset.cache={cache}"])
    aft = next(trial for trial in experiment.trials if trial.defense == "aft").defend["defense"]
    assert (aft["epsilon"], aft["updates"]) == (0.5, 160)


EXCEPTION = "grid.exceptions=[{attack: badnets, set: {attack.poison_rate: 0.05, train.lr: 0.3}, why: mine}]"
SWEEP = "grid.sweep=[{key: reserve.size, values: [0.01, 0.02]}]"
ROW = ["grid.ablations=[{name: short, defense: fine_tuning, set: {epochs: 3}}]", "grid.defenses=[short]"]


@pytest.mark.parametrize(
    ("words", "dotted", "others"),
    [
        ([EXCEPTION], "attack.badnets.poison_rate=0.2", ["attack.badnets={poison_rate: 0.2}"]),
        ([EXCEPTION], "attack.badnets.poison_rate=0.2", ["attack={badnets: {poison_rate: 2/10}}"]),
        ([EXCEPTION], "train.lr=0.4", ["train={lr: 0.4}", "++train={lr: 4e-1}", "train.lr=2/5"]),
        ([SWEEP], "reserve.size=0.03", ["reserve={size: 0.03}"]),
        (
            ROW,
            "defense.fine_tuning.epochs=9",
            ["defense.fine_tuning={epochs: 9}", "defense={fine_tuning: {epochs: 9}}"],
        ),
        ([], "measure.pgd_steps=3", ["measure={pgd_steps: 3}"]),
        ([], "measure.pgd_epsilon=0.03137254901960784", ["measure.pgd_epsilon=8/255", "measure={pgd_epsilon: 8/255}"]),
        ([], "attack.sig.delta=3", ["attack={sig: {delta: 3}}"]),
    ],
)
def test_a_setting_counts_the_same_however_it_is_written(cache, words, dotted, others):
    def outcome(word: str) -> object:
        try:
            experiment = load_experiment([*BASE, *words, word, f"dataset.cache={cache}"])
        except UserError as error:
            return str(error)
        lines = [line for line in protocol(experiment) if not line.startswith("command: ")]
        return [trial.keys for trial in experiment.trials], lines

    assert {repr(outcome(other)) for other in others} == {repr(outcome(dotted))}


def test_the_shipped_grid_takes_a_dictionary_as_it_takes_the_dotted_form(cache):
    words = ["grid=quick", "grid.defenses=[aft]", "grid.attacks=[badnets]", "grid.seeds=1", f"dataset.cache={cache}"]
    experiment = load_experiment([*words, "defense.aft={epsilon: 0.02}"])
    assert experiment.trials[0].defend["defense"]["epsilon"] == 0.02
    assert "command: python -m bench.run grid=quick" in "\n".join(protocol(experiment))
    assert "defense.aft.epsilon=0.02" in experiment.arguments


@pytest.mark.parametrize(
    "words",
    [
        ["grid.sweep=[{key: measure.pgd_epsilon, values: [4/255, 8/255]}]"],
        ["grid.ablations=[{name: gentle, defense: aft, set: {epsilon: 6/255}}]", "grid.defenses=[aft,gentle]"],
        ["grid.exceptions=[{defense: aft, set: {defense.epsilon: 6/255}, why: x}]"],
        ["defense={aft: {epsilon: 6/255}}", "attack.badnets.poison_rate=1/8", "grid.attacks=[badnets,blended]"],
        ["grid.sweep=[{key: attack.badnets.poison_rate, values: [1/8, 1/4]}]", "grid.attacks=[none,badnets,blended]"],
        ["grid.sweep=[{key: defense.aft.epsilon, values: [1/8, 1/4]}]"],
    ],
)
def test_the_command_of_each_cell_computes_that_cell(cache, words):
    import shlex

    from bench.reporting.protocol import command

    base = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,aft]", "grid.seeds=1", f"dataset.cache={cache}"]
    experiment = load_experiment([*base, *words])
    for trial in experiment.trials:
        again = load_experiment(shlex.split(command(experiment, trial))[3:])
        assert [one.keys for one in again.trials] == [trial.keys]


def test_a_fraction_is_its_quotient_wherever_a_number_stands(cache):
    words = ["grid.exceptions=[{attack: badnets, set: {attack.poison_rate: 1/8}, why: x}]"]
    words += ["grid.sweep=[{key: train.lr, values: [1/3, 2/3]}]", "measure={pgd_epsilon: 6/255}"]
    trials = load_experiment([*BASE, *words, f"dataset.cache={cache}"]).trials
    assert [trial.implant["train"]["lr"] for trial in trials] == [1 / 3, 2 / 3]
    assert {trial.implant["attack"]["poison_rate"] for trial in trials} == {1 / 8}
    assert {trial.evaluate["pgd_epsilon"] for trial in trials} == {6 / 255}
    row = ["grid.ablations=[{name: row, defense: aft, set: {epsilon: 6/255}}]", "grid.defenses=[row]"]
    assert load_experiment([*BASE, *row, f"dataset.cache={cache}"]).trials[0].defend["defense"]["epsilon"] == 6 / 255


def test_an_exception_may_be_about_what_the_command_line_narrowed_away(cache):
    words = ["grid.exceptions=[{dataset: cifar10, attack: sig, defense: nad, set: {attack.delta: 3}, why: x}]"]
    assert load_experiment([*BASE, *words, f"dataset.cache={cache}"]).trials


def test_the_protocol_prints_an_exception_unless_the_command_line_replaced_it_for_that_method(cache):
    def printed(*more: str) -> str:
        return "\n".join(protocol(load_experiment(["grid=quick", f"dataset.cache={cache}", *more])))

    assert "exception for aft: defense.epsilon=0.1, defense.updates=160" in printed()
    assert "defense.epsilon=0.1" not in printed("defense.aft.epsilon=0.2")
    # Another method's setting of the same name replaces nothing.
    shared = "grid.exceptions=[{defense: aft, set: {defense.lr: 0.5}, why: x}]"
    assert "exception for aft: defense.lr=0.5: x" in printed(shared, "defense.fine_tuning.lr=0.1")
    # Of several, those that the grid has; none without one.
    several = "grid.exceptions=[{defense: [aft, fine_tuning, pbe], set: {defense.lr: 0.5}, why: x}]"
    assert "exception for aft, fine_tuning: defense.lr=0.5: x" in printed(several)
    assert "exception for" not in printed(several, "grid.defenses=[no_defense]")
    # Where the command line has the setting of one of them, the line names the other.
    assert "exception for fine_tuning: defense.lr=0.5: x" in printed(several, "defense.aft.lr=0.1")
    both = "{dataset: digits, attack: [badnets, blended], set: {attack.poison_rate: 0.05, train.lr: 0.2}, why: x}"
    both = f"grid.exceptions=[{both}]"
    lines = printed(both, "attack.badnets.poison_rate=0.1")
    assert "exception for digits, blended: attack.poison_rate=0.05: x" in lines
    assert "exception for digits, badnets, blended: train.lr=0.2: x" in lines
    # Nor does it name what the grid sweeps.
    sweep = "grid.sweep=[{key: train.lr, values: [0.1, 0.3]}]"
    assert "train.lr=0.2" not in printed(both, sweep)
    # However it is spelt, and whether a sweep or the row of an ablation has it.
    assert "defense.epsilon=0.1" not in printed("grid.sweep=[{key: defense.aft.epsilon, values: [0.05, 0.2]}]")
    row = [
        "grid.ablations=[{name: aft_long, defense: aft, set: {updates: 300}}]",
        "grid.exceptions=[{defense: aft, set: {defense.epsilon: 0.1, defense.updates: 260}, why: x}]",
    ]
    assert "exception for aft: defense.epsilon=0.1: x" in printed(*row, "grid.defenses=[no_defense,aft_long]")
    whole = "exception for aft: defense.epsilon=0.1, defense.updates=260: x"
    assert whole in printed(*row, "grid.defenses=[no_defense,aft,aft_long]")


def test_the_protocol_names_the_command_without_what_changes_no_figure(cache):
    experiment = load_experiment(
        ["grid=quick", "grid.seeds=1", "dispatch.workers=3", "results=away", f"dataset.cache={cache}"]
    )
    assert "command: python -m bench.run grid=quick grid.seeds=1" in protocol(experiment)


ABLATED = [
    "grid.defenses=[aft,plain]",
    "grid.attacks=[badnets]",
    "grid.seeds=1",
    "grid.exceptions=[{defense: aft, set: {defense.updates: 250}, why: short}]",
]


def test_an_ablation_is_a_row_of_its_own_and_changes_its_defense_there_alone(cache):
    row = "grid.ablations=[{name: plain, defense: aft, set: {epsilon: 0}}]"
    experiment = load_experiment([*ABLATED, row, f"dataset.cache={cache}"])
    assert [trial.defense for trial in experiment.trials] == ["aft", "plain"]
    whole, ablated = (trial.defend["defense"] for trial in experiment.trials)
    # The exception for the method holds for both; the stage's identity is the method's, not the row's.
    assert ablated == {**whole, "epsilon": 0.0} != whole
    assert whole["updates"] == 250
    assert "plain: aft with epsilon=0" in "\n".join(protocol(experiment))
    same = load_experiment(["defense.aft.epsilon=0", *ABLATED, "grid.defenses=[aft]", f"dataset.cache={cache}"])
    assert same.trials[0].keys == experiment.trials[1].keys


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ("{name: aft, defense: pbe, set: {epsilon: 0}}", "'aft' is a defense already"),
        ("{name: plain, defense: pbr, set: {epsilon: 0}}", "Did you mean 'pbe'"),
        ("{name: plain, defense: aft, set: {epsilom: 0}}", "Did you mean 'epsilon'"),
        ("{name: plain, defense: aft}", "write {name: fixed, defense: pbe"),
        ("{name: plain, defense: aft, set: {epsilon: many}}", "epsilon"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_refused(cache, row, hint):
    with pytest.raises(UserError, match=hint):
        load_experiment([*ABLATED, f"grid.ablations=[{row}]", f"dataset.cache={cache}"])


def test_what_an_ablation_changes_cannot_be_set_beside_it(cache):
    row = "grid.ablations=[{name: plain, defense: aft, set: {epsilon: 0}}]"
    with pytest.raises(UserError, match="what the row 'plain' of this grid changes"):
        load_experiment([*ABLATED, row, "defense.aft.epsilon=0.1", f"dataset.cache={cache}"])


def test_a_setting_that_offers_too_little_is_not_applicable_with_the_reason(cache):
    experiment = load_experiment(
        ["grid.defenses=[fine_tuning]", "grid.threat_models=[trainset]", f"dataset.cache={cache}"]
    )
    assert all(not trial.defend and "trainset" in trial.reason for trial in experiment.trials)


def test_a_method_that_needs_no_image_is_repaired_once_for_all_settings(cache):
    experiment = load_experiment(
        ["grid.defenses=[no_defense]", "grid.threat_models=[reserve,trainset]", f"dataset.cache={cache}"]
    )
    both = {
        trial.threat_model: trial.keys for trial in experiment.trials if trial.seed == 0 and trial.attack == "badnets"
    }
    assert both["reserve"] == both["trainset"]


def test_a_sweep_is_one_more_axis_and_its_value_wins_over_exceptions(cache):
    experiment = load_experiment(
        [
            "grid=quick",
            f"dataset.cache={cache}",
            "grid.seeds=2",
            "grid.attacks=[badnets]",
            "grid.defenses=[fine_tuning,aft]",
            "grid.sweep=[{key: reserve.size, values: [0.01, 0.05]}, {key: attack.poison_rate, values: [0.1, 0.2]}]",
            "grid.exceptions=[{attack: badnets, set: {attack.poison_rate: 0.3}, why: a test}]",
        ]
    )
    assert len(experiment.trials) == 2 * 4 * 2
    assert len({trial.keys.implant for trial in experiment.trials}) == 2 * 2  # the size of the reserve shares implants
    first = experiment.trials[0]
    assert first.variant == "reserve.size=0.01, attack.poison_rate=0.1"
    assert first.defend["reserve"]["size"] == 0.01
    assert {trial.implant["attack"]["poison_rate"] for trial in experiment.trials} == {0.1, 0.2}


@pytest.mark.parametrize(
    ("sweep", "hint"),
    [
        ("[{key: dispatch.workers, values: [1, 2]}]", r"sweep a key of attack, defense"),
        ("[{key: reserve.size, values: 0.1}]", r"a list of `values`"),
        ("[{reserve.size: [0.1]}]", r"needs `key`"),
        ("[{key: reserve.size, values: []}]", r"different values"),
        ("[{key: reserve.size, values: [0.05, 0.05]}]", r"different values"),
        ("[{key: reserve.seize, values: [0.05]}]", r"grid\.sweep: reserve\.seize"),
        ("[{key: defense.epohcs, values: [1]}]", r"no defense of this grid has the setting defense\.epohcs"),
        ("[{key: defense.aft.updates, values: [1]}]", r"no defense of this grid has the setting defense\.aft\.updates"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(cache, sweep, hint):
    with pytest.raises(UserError, match=hint):
        load_experiment([*BASE, f"dataset.cache={cache}", f"grid.sweep={sweep}"])


def test_a_swept_setting_cannot_be_set_beside_the_sweep(cache):
    swept = "grid.sweep=[{key: reserve.size, values: [0.01, 0.05]}]"
    with pytest.raises(UserError, match=r"reserve\.size is swept by this grid"):
        load_experiment([*BASE, f"dataset.cache={cache}", "reserve.size=0.02", swept])


@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("attack.poison_rate", "attack.badnets.poison_rate=0.3"),
        ("attack.badnets.poison_rate", "attack.badnets.poison_rate=0.3"),
    ],
)
def test_nor_as_the_setting_of_the_one_method_that_has_it(cache, key, beside):
    swept = f"grid.sweep=[{{key: {key}, values: [0.1, 0.2]}}]"
    with pytest.raises(UserError, match=r"attack\.badnets\.poison_rate is swept by this grid"):
        load_experiment([*BASE, swept, beside, f"dataset.cache={cache}"])


def test_a_setting_that_one_method_has_is_swept_for_it_alone(cache):
    def epochs(key: str) -> dict[str, list[int | None]]:
        sweep = f"grid.sweep=[{{key: {key}, values: [1, 2]}}]"
        words = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning,fine_pruning]", "grid.seeds=1"]
        found: dict[str, list[int | None]] = {}
        for trial in load_experiment(
            ["grid=digits", *words, sweep, "grid.exceptions=[]", f"dataset.cache={cache}"]
        ).trials:
            found.setdefault(trial.defense, []).append(trial.defend["defense"].get("epochs"))
        return found

    assert epochs("defense.fine_tuning.epochs") == {
        "no_defense": [None, None],
        "fine_tuning": [1, 2],
        "fine_pruning": [100, 100],
    }
    assert epochs("defense.epochs") == {"no_defense": [None, None], "fine_tuning": [1, 2], "fine_pruning": [1, 2]}


def test_a_swept_poison_rate_passes_the_clean_model_by(cache):
    words = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense]", "grid.seeds=1"]
    sweep = "grid.sweep=[{key: attack.poison_rate, values: [0.01, 0.05]}]"
    trials = load_experiment([*words, sweep, f"dataset.cache={cache}"]).trials
    rates = [(trial.attack, trial.implant["attack"]["poison_rate"]) for trial in trials]
    assert rates == [("none", 0.0), ("none", 0.0), ("badnets", 0.01), ("badnets", 0.05)]
    assert trials[0].keys == trials[1].keys


def test_a_sweep_over_what_an_ablation_changes_is_refused(cache):
    words = [
        "grid.defenses=[aft,gentle]",
        "grid.ablations=[{name: gentle, defense: aft, set: {lr: 0.001}}]",
        "grid.sweep=[{key: defense.aft.lr, values: [0.1, 0.2]}]",
    ]
    with pytest.raises(UserError, match=r"what the row 'gentle' of this grid changes, and defense\.aft\.lr is swept"):
        load_experiment([*BASE, *words, f"dataset.cache={cache}"])


def others(value: object) -> list[object]:
    """Values near this one, of which a method takes at least one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(value - 1, 0), 8]
    if isinstance(value, float):
        return [value / 2, value * 2, value + 0.1]
    if isinstance(value, list):
        return [[other, *value[1:]] for other in others(value[0])]
    return [0, 1.0]


@pytest.mark.parametrize("group", ["reserve", "train", "measure", "model"])
def test_every_setting_of_a_stage_is_part_of_its_identity(keys, group):
    from bench.experiment.load import load

    base = ["measure.relearn=true"]  # its own settings count where it is measured
    before = keys(*base)
    for key, value in load([])[group].items():
        if isinstance(value, str) or key in ("relearn", "reactivate", "connection", "momentum"):
            continue
        value = [1, 5] if OmegaConf.is_list(value) else value
        changed = {
            "held_out": 0.2,
            "contamination": 0.2,
            "size": 0.02,
            "warmup": 0.1,
            "label_smoothing": 0.1,
            "relearn_poisoned": "[1,5]",
        }
        other = changed.get(key, others(value)[0] if value is not None else 10)
        assert keys(*base, f"{group}.{key}={other}") != before, f"{group}.{key}"


@pytest.mark.parametrize("name", grids())
def test_every_shipped_grid_can_be_planned_and_says_what_it_costs(cache, name):
    # On digits, whatever its data: names, exceptions and sweeps are what a grid can get wrong.
    experiment = load_experiment(
        [
            f"grid={name}",
            "grid.datasets=[digits]",
            "grid.models=[test_resnet]",
            "grid.seeds=[0]",
            f"dataset.cache={cache}",
        ]
    )
    assert experiment.cfg.grid.name == name
    assert experiment.cfg.grid.purpose
    text = files("bench.conf").joinpath("grid", f"{name}.yaml").read_text()
    assert "# Purpose: " in text
    assert "# Size: " in text
