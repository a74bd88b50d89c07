"""Any timm architecture, fitted to small images, with normalisation inside and its structure open to methods."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import generator
from .modes import frozen

STEMS = ("small", "half", "stock")


@dataclass(frozen=True)
class Norm:
    """A normalisation layer with a scale and a shift for each channel.

    Attributes:
        name: of the layer in its Classifier: `name.weight` is the scale, `name.bias` the shift, (C,) each.
        layer: the module. That of timm's fused layers (BatchNormAct2d) applies the activation too.
        convolution: whose output the layer reads, unchanged; None if it reads a sum, tokens or anything else.
    """

    name: str
    layer: Any
    convolution: nn.Conv2d | None

    @property
    def has_statistics(self) -> bool:
        """Whether the layer stores a running mean and variance, as batch norm does."""
        return getattr(self.layer, "running_var", None) is not None


@dataclass
class Trace:
    """What the convolutions wrote and the norms read in one pass: each tensor with its version.

    Another version is another content: an activation in place leaves the same tensor.
    """

    written: dict[nn.Conv2d, list[tuple[Tensor, int]]] = field(default_factory=dict)
    read: dict[nn.Module, list[tuple[Tensor, int]]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def feeds(self, convolution: nn.Conv2d, norm: nn.Module) -> bool:
        """Is the first thing that the norm read what the convolution wrote?"""
        seen, version = self.read[norm][0]
        return any(output is seen and at == version for output, at in self.written[convolution])


class Classifier(nn.Module):
    """A timm network that takes images in [0, 1].

    Normalisation is its first layer: triggers and epsilons live in pixel space for every data set and network.

    Attributes:
        net: the timm model.
        notes: how the network was fitted to the image size, one line each.
        image_size: pixels a side of the images that it takes.
        passes: images that went through any classifier of this process, in forward passes: one without gradients is
            1, with gradients to the images alone 2, in training 3.
    """

    passes: ClassVar[float] = 0.0

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        notes: Sequence[str] = (),
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.net: Any = net  # timm's networks share methods that nn.Module does not declare
        self.notes = tuple(notes)
        self.image_size = image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] -> (B, classes) logits."""
        return self.net(self._counted(images))

    def _counted(self, images: Tensor) -> Tensor:
        """The images normalised, and noted in `passes`."""
        cost = 1
        if torch.is_grad_enabled():
            trained = any(weight.requires_grad for weight in self.parameters())
            cost = 3 if trained else 2 if images.requires_grad else 1
        Classifier.passes += cost * len(images)
        return (images - self.mean) / self.std

    def features(self, images: Tensor) -> Tensor:
        """(B, D): what the classifier head reads."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(images)
        finally:
            handle.remove()
        return seen[0].flatten(1)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The output of each stage as (B, C, H, W) maps, also for transformers (tokens as a grid)."""
        maps: list[Tensor] = self.net.forward_intermediates(
            self._counted(images), intermediates_only=True, output_fmt="NCHW"
        )
        return maps

    def logits_and_stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What `forward` and `stages` give, by one pass: batch norm sees the batch once."""
        last, maps = self.net.forward_intermediates(self._counted(images), output_fmt="NCHW")
        return self.net.forward_head(last), maps

    def norms(self) -> list[Norm]:
        """The normalisation layers with scale and shift, in the order in which a forward runs them.

        The order of `modules()` says nothing of what feeds what: a shortcut's layers stand last and run first, and
        in a pre-activation block the norm stands in front of the convolution. So one black image is traced.
        """
        trace = self.trace()
        names = {layer: name for name, layer in self.named_modules()}
        return [
            Norm(names[layer], layer, next((conv for conv in trace.written if trace.feeds(conv, layer)), None))
            for layer in trace.read
        ]

    def trace(self, gradients: bool = False) -> Trace:
        """Which layers wrote and read which tensors in a pass of one black image, in eval mode.

        Args:
            gradients: record the graph behind the logits.
        """
        trace = Trace()

        def writes(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d)
            trace.written.setdefault(layer, []).append((output, output._version))

        def reads(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            trace.read.setdefault(layer, []).append((inputs[0], inputs[0]._version))

        handles = [layer.register_forward_pre_hook(reads) for layer in self.modules() if _is_norm(layer)]
        handles += [layer.register_forward_hook(writes) for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        black = torch.zeros(1, self.mean.shape[1], self.image_size, self.image_size, device=self.mean.device)
        try:
            with frozen(self), torch.set_grad_enabled(gradients):
                trace.logits = self(black.requires_grad_(gradients))
        finally:
            for handle in handles:
                handle.remove()
        return trace

    @property
    def head(self) -> nn.Linear | nn.Conv2d:
        """The last layer: linear, or a 1x1 convolution in some families."""
        return self.net.get_classifier()


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build one network again.

    Attributes:
        name: a timm architecture; `resnetv2_18` is the PreActResNet-18 of the papers with one norm more, in front of
            the pooling.
        num_classes, channels, image_size: of the data set.
        mean, std: per channel, of the training images in [0, 1].
        stem: `small` (stride one up to 48 pixels, no pooling before the first stage: the usual fit for 32x32),
            `half` (the stem's stride stays, its pooling goes: a quarter of the cost) or `stock` (as timm has it).
    """

    name: str
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stem: str = "small"

    def build(self, seed: int) -> Classifier:
        """An untrained network; the same seed gives the same weights, and the global random state is left alone.

        Raises:
            LookupError: timm has no such architecture.
        """
        check_name(self.name)
        self._check_stem()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's source too
            net, notes = _fitted(self)
        model = Classifier(net, self.mean, self.std, notes, self.image_size)
        return model.to(memory_format=torch.channels_last)

    def flops(self) -> int:
        """Floating-point operations of one image's forward pass: those of convolutions and matrix products."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            model = self.build(0).eval()
            image = torch.empty(1, self.channels, self.image_size, self.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.net(image)
        return int(counter.get_total_flops())

    def check(self) -> tuple[str, ...]:
        """Refuse, before any training, an architecture that cannot take these images or that methods cannot read.

        Returns:
            How the network is fitted to them, one line each.

        Raises:
            LookupError: timm has no such architecture.
            ValueError: its maps shrink to nothing at this image size, it lacks what methods ask a network for, or its
                logits are not what its head makes of the features.
        """
        check_name(self.name)
        self._check_stem()
        try:
            model = self._tried()
        except Unfit as error:
            raise ValueError(str(error)) from error
        except Exception as error:  # whatever an architecture raises
            raise ValueError(
                f"{self.name} (model.stem={self.stem}) cannot take {self.image_size}x{self.image_size} images: "
                f"{_first_line(error)}. {self._advice()}"
            ) from error
        self._check_head()
        return model.notes

    def _check_head(self) -> None:
        plain = (0.5,) * self.channels
        _check_head(replace(self, num_classes=7, mean=plain, std=plain), _entrypoint(self.name))

    def _check_stem(self) -> None:
        if self.stem not in STEMS:
            raise ValueError(f"model.stem is {self.stem!r}; write one of {', '.join(STEMS)}")

    def _tried(self) -> Classifier:
        """The network without memory for its weights, after a pass in training."""
        with torch.device("meta"):
            model = self.build(0)
            asked = ("get_classifier", "forward_intermediates", "forward_head")
            missing = [name for name in asked if not callable(getattr(model.net, name, None))]
            if missing:
                raise Unfit(
                    f"{self.name} has no {', '.join(missing)}: methods ask a network for its last layer "
                    "(get_classifier), the maps of its stages (forward_intermediates) and the logits of the last map "
                    "(forward_head), as timm's architectures have them; add them, or take another architecture"
                )
            if not isinstance(model.head, nn.Linear | nn.Conv2d):
                raise Unfit(
                    f"{self.name} has no single linear layer as its head, which features and pruning are read from; "
                    "take another architecture (of a distilled transformer the one without `distilled`)"
                )
            model(torch.empty(2, self.channels, self.image_size, self.image_size))
        return model

    def _advice(self) -> str:
        """What else of this architecture would do."""
        others = [replace(self, stem=stem) for stem in STEMS if stem != self.stem]
        others += [replace(self, image_size=size) for size in (32, 64, 128, 224) if size > self.image_size]
        for other in others:
            with suppress(Exception):
                other._tried()
                other._check_head()
                return (
                    f"Set model.stem={other.stem}, or take another architecture"
                    if other.stem != self.stem
                    else f"Set dataset.size={other.image_size}, or another model.stem"
                )
        return "Take another architecture: no model.stem and no dataset.size up to 224 would do"

    def examined(self, cache: Path) -> tuple[tuple[str, ...], str]:
        """What `check` and `source` return, remembered in `cache` for an architecture of timm's.

        Importing timm takes longer than planning thousands of trials. Whether its architecture fits is decided by the
        versions of timm, torch and this module; a process that has imported timm may have registered another one.

        Raises:
            LookupError, ValueError: as `check` and `source`.
        """
        if "timm" not in sys.modules and (notes := _remembered(self, cache)) is not None:
            return notes, ""
        check_name(self.name)
        notes, source = _examined(self, _entrypoint(self.name))
        path, about = _memory_of(self, cache)
        if not source and not path.exists():
            temporary = path.with_suffix(f".{uuid.uuid4().hex}")
            with suppress(OSError):  # a cache that cannot be written to does without
                path.parent.mkdir(exist_ok=True)
                temporary.write_text(json.dumps({"about": about, "notes": notes}))
                os.replace(temporary, path)
        return notes, source

    def source(self) -> str:
        """A digest of the code of a network that is not timm's, whose version nobody raises; empty for timm's.

        Raises:
            ValueError: the code is in no file.
        """
        entry = _entrypoint(self.name)
        return "" if _is_of(entry.__module__, "timm") else _digest_of_code(replace(self, mean=(), std=()), entry)


@cache
def _examined(spec: ModelSpec, entry: Callable[..., nn.Module]) -> tuple[tuple[str, ...], str]:
    """What `check` and `source` return, once for each function that is registered under the name."""
    return spec.check(), spec.source()


@cache
def _memory_of(spec: ModelSpec, folder: Path) -> tuple[Path, str]:
    """The file in which it is kept how an architecture is fitted, and all that this depends on."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    about = json.dumps([asdict(spec), version("timm"), version("torch"), code])
    return folder / "architectures" / f"{hashlib.sha256(about.encode()).hexdigest()[:20]}.json", about


@cache
def _remembered(spec: ModelSpec, folder: Path) -> tuple[str, ...] | None:
    path, about = _memory_of(spec, folder)
    with suppress(OSError, ValueError, TypeError, KeyError):
        remembered = json.loads(path.read_text())
        if remembered["about"] == about:
            return tuple(map(str, remembered["notes"]))
    return None


class Unfit(ValueError):
    """An architecture lacks what a stem or the methods need; the message says what."""


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].rstrip(".")
    told = isinstance(error, RuntimeError | AssertionError | ValueError) and text
    return text if told else f"{type(error).__name__} {text}".strip()


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    import timm

    return timm.model_entrypoint(name)


@cache
def _check_head(spec: ModelSpec, entry: Callable[..., nn.Module]) -> None:
    """Refuse a network whose logits are not its head's, and whose stages cannot be read.

    Args:
        entry: what builds it, for the cache: a name can be registered anew.

    Raises:
        ValueError: head(features(images)) differs from the logits.
    """
    model, source = spec.build(0).eval(), generator(0, "check")
    images = torch.rand(2, spec.channels, spec.image_size, spec.image_size, generator=source)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():  # a branch that starts as nothing would hide
                weight.normal_(0, 0.1, generator=source)
        try:
            logits, features = model(images), model.features(images)
            expected = F.linear(features, model.head.weight.flatten(1), model.head.bias)
            agree = torch.allclose(expected, logits, rtol=1e-3, atol=1e-3, equal_nan=True)
        except (RuntimeError, IndexError):  # other shapes, or the head is not asked at all
            agree = False
        if not agree:
            raise ValueError(
                f"{spec.name}: its logits are not what its head, {type(model.head).__name__}, makes of what it reads "
                "(a second head?), and methods that read features or prune would see a part of it; take another "
                "architecture"
            )


@cache
def _digest_of_code(spec: ModelSpec, entry: Callable[..., nn.Module]) -> str:
    with torch.device("meta"):
        layers = {type(layer) for layer in spec.build(0).net.modules()}
    modules = {entry.__module__, *(kind.__module__ for layer in layers for kind in layer.__mro__)}
    own_modules = sorted(
        name for name in modules if not any(_is_of(name, known) for known in ("timm", "torch", "builtins"))
    )
    try:
        code = [inspect.getsource(sys.modules[name]) for name in own_modules]
    except (OSError, TypeError) as error:
        raise ValueError(f"{spec.name}: its code cannot be read ({error}); define it in a file of a module") from error
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def _is_of(module: str, package: str) -> bool:
    return module.partition(".")[0] == package


def architectures() -> list[str]:
    """The names of all architectures."""
    import timm  # half of the start of every command that builds no network

    return list(timm.list_models())


def check_name(name: str) -> None:
    """Raises LookupError, with the near names, if timm has no such architecture."""
    import timm

    if "." in name or not timm.is_model(name):  # timm knows names with a tag of weights too
        near = get_close_matches(name, architectures(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise LookupError(f"timm has no architecture named {name!r}.{hint} `timm.list_models()` lists all.")


def _fitted(spec: ModelSpec) -> tuple[nn.Module, list[str]]:
    """Create the network and keep its first stage from shrinking a small image.

    First by the network's own arguments (patch size, image size); where there are none, by surgery on the first
    convolution and the pooling behind it. timm names both in `default_cfg`.
    """
    import timm
    from timm.layers import ClassifierHead

    size = spec.image_size
    basic: dict[str, Any] = {"num_classes": spec.num_classes, "in_chans": spec.channels}
    patches = 8 if spec.stem == "small" else 4  # patches a side
    config = timm.get_pretrained_cfg(spec.name)
    fixed = bool(config and config.fixed_input_size)

    if "swin" in spec.name and spec.stem != "stock":
        patch, window = max(1, size // (2 * patches)), max(1, patches // 2)
        fit: dict[str, Any] = {"img_size": size, "patch_size": patch, "window_size": window}
        return timm.create_model(spec.name, **basic, **fit), [f"{key}={value}" for key, value in fit.items()]
    if fixed and spec.stem == "stock":
        return timm.create_model(spec.name, **basic, img_size=size), [f"img_size={size}"]
    if fixed:
        # The divisor of the size that comes nearest to the wanted number of patches.
        patch = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(size / d - patches))
        fit = {"img_size": size, "patch_size": patch}
        return timm.create_model(spec.name, **basic, **fit), [f"{key}={value}" for key, value in fit.items()]
    if spec.stem != "stock" and "convnext" in spec.name:
        patch = (1 if spec.stem == "small" else 2) * max(1, size // 32)
        return timm.create_model(spec.name, **basic, patch_size=patch), [f"patch_size={patch}"]

    net: Any = timm.create_model(spec.name, **basic)
    notes: list[str] = []
    if spec.name.startswith("vgg"):
        # Its own head is 7x7 convolutions on a map that a small image does not have (and 120 M weights).
        net.pre_logits, net.head_hidden_size = nn.Identity(), net.num_features
        net.head = ClassifierHead(net.num_features, spec.num_classes, pool_type="avg")
        notes.append("head: global average pooling and one linear layer")
    if spec.stem == "stock":
        return net, notes
    if spec.stem == "small" and size <= 48:
        first = (getattr(net, "default_cfg", None) or {}).get("first_conv")
        if not first:
            raise Unfit(
                f"{spec.name} names no first convolution (default_cfg['first_conv']), whose stride model.stem=small "
                "would change; add it, or set model.stem=stock"
            )
        for name in [first] if isinstance(first, str) else first:
            notes += _unstride(net, name)
    for name in ("maxpool", "stem.pool", "features.pool0"):
        if _has(net, name) and not isinstance(net.get_submodule(name), nn.Identity):
            net.set_submodule(name, nn.Identity())
            notes.append(f"{name} removed")
    return net, notes


def _is_norm(layer: nn.Module) -> bool:
    affine = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return "Norm" in type(layer).__name__ and all(isinstance(w, nn.Parameter) and w.ndim == 1 for w in affine)


def _has(net: nn.Module, name: str) -> bool:
    return name in dict(net.named_modules())


def _unstride(net: nn.Module, name: str) -> list[str]:
    conv = net.get_submodule(name)
    if not isinstance(conv, nn.Conv2d) or conv.stride == (1, 1):
        return []
    if conv.kernel_size[0] < 7:
        conv.stride = (1, 1)
        return [f"{name} stride 1"]
    small = type(conv)(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule(name, small)
    return [f"{name} 3x3 stride 1 in place of {conv.kernel_size[0]}x{conv.kernel_size[1]}"]
