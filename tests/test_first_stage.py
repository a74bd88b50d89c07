"""The seconds of the first stage of a process are the stage's: what is imported once is imported before its clock."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

from bench.experiment.experiment import load_experiment

CHILD = """
import json, pickle, sys
import torch
import bench.pipeline.runner
from bench.experiment.load import load_methods

load_methods([])
torch.set_num_threads(1)
trials, infos, store = pickle.load(open(sys.argv[1], "rb"))
bench_ = bench.pipeline.runner.Runner(store, infos, torch.device("cpu"))
timed, begin = [], bench_.log


def journal(stage, trial):
    timed.append((stage, set(sys.modules)))
    return begin(stage, trial)


bench_.log = journal
before = torch.random.get_rng_state()
for trial in trials:
    for stage in ("implant", "defend", "evaluate"):
        begun = len(timed)
        bench_.run(trial, (stage,))
        for index in range(begun, len(timed)):
            timed[index] = timed[index][0], sorted(set(sys.modules) - timed[index][1])
print(json.dumps({"timed": timed, "drew": not torch.equal(before, torch.random.get_rng_state())}))
"""


def test_nothing_heavy_is_imported_while_the_first_stage_of_a_process_is_timed(tiny: list[str], tmp_path: Path) -> None:
    filters = ["grid.defenses=[activation_clustering,no_defense]", "grid.threat_models=[trainset]"]
    experiment = load_experiment(
        [*tiny, "grid.attacks=[badnets]", *filters, "defense.activation_clustering.retrain=false"]
    )
    with (tmp_path / "plan.pickle").open("wb") as file:
        pickle.dump((experiment.trials, experiment.infos, experiment.store), file)
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "plan.pickle")], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    told = json.loads(found.stdout.splitlines()[-1])
    assert {stage for stage, _ in told["timed"]} == {"implant", "defend", "inspect", "evaluate"}
    heavy = {"timm", "torchvision", "sympy", "triton", "torch._dynamo", "sklearn", "scipy", "pandas"}
    for stage, modules in told["timed"]:
        imported = {name for name in modules if name in heavy}
        assert not imported, (stage, imported)
        assert len(modules) < 60, (stage, modules)
    assert not told["drew"], "warming up drew from the global source of random numbers"
