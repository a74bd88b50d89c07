"""A device that is not the CPU, for machines without a GPU: CPU tensors behind another device's name.

What a GPU refuses is refused here too: tensors of two devices in one operation, a generator of the other device,
`.numpy()`. Only the device is pretended: no kernel of a GPU runs, and what asks for `cuda` by name does not.

As a program it prints, as JSON, what went wrong:

    python tests/pretend_gpu.py defenses FAMILY [host]   # every defense; with `host`, the images stay on the CPU
    python tests/pretend_gpu.py grid SETTING...          # bench.run of that grid
    python tests/pretend_gpu.py autoattack               # cut short
    python tests/pretend_gpu.py faults                   # what must go wrong
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

backend_registration._setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
Generator = torch.Generator
# A generator loses its class on its way through torch; which seeds were meant for which device stays.
SEEDS: dict[int, set[bool]] = {}


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


class Far(torch.Tensor):
    """A tensor of the pretended device; its numbers lie in `inner`, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        self.inner = inner
        return self

    def tolist(self) -> Any:  # which torch has for no subclass
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Far({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class FarGenerator(Generator):
    def __new__(cls) -> FarGenerator:
        return super().__new__(cls, "cpu")

    @property
    def device(self) -> torch.device:
        return DEVICE

    def manual_seed(self, seed: int) -> FarGenerator:
        super().manual_seed(seed)
        SEEDS.setdefault(seed, set()).add(True)
        return self


class NearGenerator(Generator):
    def manual_seed(self, seed: int) -> NearGenerator:
        super().manual_seed(seed)
        SEEDS.setdefault(seed, set()).add(False)
        return self


class _Generators(type):
    """`torch.Generator(device)` for both devices."""

    def __call__(cls, device: Any = "cpu") -> Generator:
        return FarGenerator() if is_far(device) else NearGenerator()

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Generator)


class _Generator(metaclass=_Generators):
    pass


def inner(value: Any) -> Any:
    return value.inner if isinstance(value, Far) else value


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on which device it runs, whether a GPU would take its arguments, and its result."""
    name = func._schema.name
    flat, _ = tree_flatten((args, kwargs))
    far = [value for value in flat if isinstance(value, Far)]
    # A single number may stay on the CPU, where it is not what is worked on in place.
    near = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, Far)]
    near = [value for value in near if value.ndim or (name.endswith("_") and value is args[0])]
    if name == "aten::copy_":
        there = isinstance(args[0], Far)
    else:
        there = is_far(kwargs["device"]) if kwargs.get("device") is not None else bool(far)
    copies = name in ("aten::copy_", "aten::_to_copy")
    indexes = name.startswith("aten::index") and isinstance(args[0], Far)  # which a GPU takes from the CPU
    if far and near and not copies and not indexes:
        raise RuntimeError(f"{name} was given tensors on {DEVICE} and on the CPU")
    for value in flat:
        if isinstance(value, Generator) and there not in SEEDS.get(value.initial_seed(), {there}):
            raise RuntimeError(f"{name} was given a generator of the other device")
    if not far and not there:
        return func(*args, **kwargs)
    if there and kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if any(value.shape != value.inner.shape for value in far):
        raise NotImplementedError(f"{name} gives a tensor another shape in place, which is not pretended here")
    if not there:
        return found
    own = {id(value.inner): value for value in far}  # what works in place gives back what it was given
    return tree_map(lambda value: own.get(id(value), Far(value)) if isinstance(value, torch.Tensor) else value, found)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What is not made of operations that can be met one by one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in ("tensor", "as_tensor") and is_far(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if name in ("quantile", "nanquantile") and isinstance(args[0], Far):  # they squeeze a tensor in place
            if not all(isinstance(value, Far) for value in args if isinstance(value, torch.Tensor)):
                raise RuntimeError(f"{name} was given tensors of two devices")
            return Far(func(*map(inner, args), **kwargs))
        return func(*args, **kwargs)


def faults() -> dict[str, str]:
    """What a GPU refuses, and how it is refused here."""
    there, here = torch.rand(3, device=DEVICE), torch.rand(3)
    seeded = {device: torch.Generator(device).manual_seed(place) for place, device in enumerate(("cpu", DEVICE))}
    found = {}
    for name, fault in {
        "add": lambda: there + here,
        "generator": lambda: torch.rand(3, generator=seeded["cpu"], device=DEVICE),
        "generator of the GPU": lambda: torch.rand(3, generator=seeded[DEVICE]),
        "index by images of the GPU": lambda: here[there > 0],
        "numpy": lambda: there.numpy(),
    }.items():
        try:
            fault()
            found[name] = "taken"
        except (RuntimeError, TypeError) as error:
            found[name] = str(error)
    return found


def defenses(family: str, where: str = "") -> dict[str, str]:
    """What went wrong with each defense, run with as little work as it can be given."""
    import test_families as tests

    from bench.engine.data import ImageSet
    from bench.experiment.load import load_methods
    from defenses.base import NotApplicable, ReserveView, TrainsetView, defense

    load_methods([])

    def moved(data: ImageSet) -> ImageSet:
        return ImageSet(data.images, data.labels.to(DEVICE)) if where == "host" else data.to(DEVICE)

    wrong = {}
    for name, cls in sorted(defense.items()):
        view = tests.view_for(cls, family, 3)
        more: dict[str, Any] = {"model": view.model.to(DEVICE), "device": DEVICE}
        if isinstance(view, ReserveView):
            more["reserve"] = moved(view.reserve)
        elif isinstance(view, TrainsetView):
            more |= {
                "trainset": moved(view.trainset),
                "fresh_model": lambda seed: tests.spec(family, 3).build(seed).to(DEVICE),
            }
        try:
            verdict = tests.smallest(name).defend(replace(view, **more))
        except NotApplicable:
            continue
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        given = [*verdict.model.state_dict().values(), verdict.suspicion, verdict.flagged]
        if any(value is not None and value.device != DEVICE for value in given):
            wrong[name] = "a part of its verdict is on the CPU"
    return wrong


def autoattack() -> dict[str, str]:
    """What went wrong with AutoAttack in either norm, in few steps of so small a ball that each of its attacks runs."""
    import test_families as tests

    from bench.engine.autoattack import autoattack as attacked
    from bench.engine.data import ImageSet, generator
    from bench.engine.metrics import predict

    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=generator(0, "pixels"), dtype=torch.uint8)
    data = ImageSet(pixels, torch.zeros(6, dtype=torch.int64)).to(DEVICE)
    model = tests.spec("test_resnet", 3).build(0).eval().to(DEVICE)
    data = ImageSet(data.images, predict(model, data))
    wrong = {}
    for norm in ("linf", "l2"):
        try:
            found = attacked(model, data, norm=norm, epsilon=1e-6, seed=0, iterations=3, queries=5)
            if found.robust.device != DEVICE or not found.robust.any():
                wrong[norm] = f"{found.robust}"
        except Exception as error:
            wrong[norm] = f"{type(error).__name__}: {error}"
    return wrong


def grid(*settings: str) -> dict[str, str]:
    """What went wrong with each cell of a grid, computed in this process."""
    import bench.engine.devices
    import bench.run
    from bench.experiment.experiment import load_experiment
    from bench.reporting.trials import of_trials

    load = safetensors.torch.load_file

    def load_file(path: str, device: Any = "cpu") -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in load(path).items()}

    safetensors.torch.load_file = load_file
    bench.engine.devices.pick_device = lambda wanted: DEVICE
    bench.run.main([*settings])
    experiment = load_experiment([*settings])
    trials = of_trials(experiment.trials, experiment.store)
    trials = trials[trials.status != "done"]
    return dict(zip(trials.attack + "/" + trials.defense, trials.reason.astype(str), strict=True))


if __name__ == "__main__":
    torch.Generator = _Generator  # type: ignore[assignment,misc]
    torch.set_num_threads(1)
    with _Functions(), _Operations():
        found = {"defenses": defenses, "grid": grid, "autoattack": autoattack, "faults": faults}[sys.argv[1]](
            *sys.argv[2:]
        )
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # torch does not end a thread that went back through the gradients of such a device
