"""Nothing takes the CPU for the device: every method on a pretended GPU, which refuses what a real one refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.conftest import TINY

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no device that Python can pretend; newer ones have",
)


def on_the_pretended_gpu(*arguments: str) -> dict[str, str]:
    """What went wrong there. In a process of its own, since torch takes such a device once and for all."""
    command = [sys.executable, str(HERE / "pretend_gpu.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=HERE.parent, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_a_gpu_refuses_is_refused():
    assert on_the_pretended_gpu("faults") == {
        "add": "aten::add was given tensors on pretend:0 and on the CPU",
        "generator": "aten::rand was given a generator of the other device",
        "generator of the GPU": "aten::rand was given a generator of the other device",
        "index by images of the GPU": "aten::index was given tensors on pretend:0 and on the CPU",
        "numpy": ".numpy() is not supported for tensor subclasses.",
    }


@pytest.mark.slow
@pytest.mark.parametrize("images", ["device", "host"])
@pytest.mark.parametrize("family", ["test_resnet", "test_vit"])
def test_every_defense_works_on_the_device_alone(family, images):
    assert on_the_pretended_gpu("defenses", family, images) == {}


@pytest.mark.slow
def test_every_attack_and_every_measure_work_on_the_device_alone(tmp_path, cache):
    from attacks.base import attack

    where = [f"results={tmp_path}", f"dataset.cache={cache}"]
    every = f"grid.attacks=[{','.join(sorted(attack))}]"
    assert on_the_pretended_gpu("grid", *TINY, *where, every, "grid.defenses=[no_defense]") == {}
    assert on_the_pretended_gpu("autoattack") == {}
    costly = ["measure.relearn=true", "measure.relearn_poisoned=[5]", "measure.reactivate=true"]
    costly += ["measure.connection=true", "grid.attacks=[none,badnets]", "grid.defenses=[no_defense,aft]"]
    assert on_the_pretended_gpu("grid", *TINY, *where, *costly) == {}
