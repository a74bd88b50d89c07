"""A network for measuring and attacking: batch norm folded into convolutions, and no gradients of weights.

In eval mode a batch norm multiplies each channel by a constant and adds another one, which the convolution in front of
it can do at no cost. What cannot be folded stays as it is: a norm after something else, a convolution whose output is
also read elsewhere, and convolutions that compute their weights.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .models import Classifier
from .modes import frozen

Net = TypeVar("Net", bound=nn.Module)


def inference_model(model: Net) -> Net:
    """The model in eval mode, as fast as it can be; its logits are the model's own up to rounding.

    Ask for it again after the weights have changed: it shares them but for the folded ones, which are computed anew at
    each call (about a hundredth of a forward pass of 128 images).

    Returns:
        A network of its own without gradients for weights; the model itself, in eval mode, where nothing can be folded
        or a hook of somebody's would be lost.
    """
    model.eval()
    if not isinstance(model, Classifier) or any(_hooks(module) for module in model.modules()):
        return model
    layers = [id(module) for module in model.modules()]
    known = _FOLDED.get(model)
    if known is None or known.layers != layers:
        known = _FOLDED[model] = _Folded(model, layers)
    return known.fresh(model)  # type: ignore[return-value]


@contextmanager
def under_attack(model: Net, eval_mode: bool = True) -> Iterator[Net]:
    """The network to attack in place of `model`: in eval mode its `inference_model`.

    Every mode and flag of the model is as before outside. In train mode (`eval_mode=False` leaves it on) each step of
    an attack moves the running statistics of batch norm towards its own iterates, and the network is the model itself.
    """
    with frozen(model, eval_mode):
        yield inference_model(model) if eval_mode else model


class _Folded:
    """A copy of a model without its foldable norms."""

    def __init__(self, model: Classifier, layers: list[int]) -> None:
        self.layers = layers
        self.pairs = foldable(model)
        self.copy = copy.deepcopy(model).requires_grad_(False)
        for norm, convolution in self.pairs.items():
            layer = self.copy.get_submodule(norm)
            # timm's norms may hold a drop and an activation, which follow in this order.
            rest = [part for part in (getattr(layer, "drop", None), getattr(layer, "act", None)) if part is not None]
            self.copy.set_submodule(norm, nn.Sequential(*rest))
            folded = self.copy.get_submodule(convolution)
            assert isinstance(folded, nn.Conv2d)
            folded.bias = nn.Parameter(torch.zeros_like(folded.weight[:, 0, 0, 0]), requires_grad=False)

    def fresh(self, model: Classifier) -> Classifier:
        """The copy with the weights that the model has now."""
        if not self.pairs:
            return model
        own = {f"{name}.{kind}" for name in self.pairs.values() for kind in ("weight", "bias")}
        weights = dict(model.named_parameters())
        for name, parameter in self.copy.named_parameters():
            if name not in own and parameter.data_ptr() != weights[name].data_ptr():
                parameter.data = weights[name].data
        buffers = dict(model.named_buffers())
        for name, _ in list(self.copy.named_buffers()):
            holder, _, key = name.rpartition(".")
            self.copy.get_submodule(holder)._buffers[key] = buffers[name]
        with torch.no_grad():
            for norm, convolution in self.pairs.items():
                _fold(model.get_submodule(norm), model.get_submodule(convolution), self.copy.get_submodule(convolution))
        return self.copy.eval()


_FOLDED: weakref.WeakKeyDictionary[nn.Module, _Folded] = weakref.WeakKeyDictionary()


def _fold(norm: Any, convolution: Any, folded: Any) -> None:
    """Write the weights of a convolution that does what the two do."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    torch.mul(convolution.weight, scale[:, None, None, None], out=folded.weight)
    shift = -norm.running_mean * scale
    if convolution.bias is not None:
        shift += convolution.bias * scale
    folded.bias.copy_(shift if norm.bias is None else shift + norm.bias)


def foldable(model: Classifier) -> dict[str, str]:
    """The norms that the convolution in front of them can take over, by their names.

    One black image is traced: the norm has to read what the convolution wrote, and nothing else may read it, which the
    graph of the gradients tells.
    """
    names = {module: name for name, module in model.named_modules()}
    written: dict[nn.Module, list[tuple[Tensor, int]]] = {}
    read: dict[nn.Module, list[tuple[Tensor, int]]] = {}

    def writes(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        written.setdefault(layer, []).append((output, output._version))

    def reads(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.setdefault(layer, []).append((inputs[0], inputs[0]._version))

    norms = [layer for layer in names if _has_statistics(layer)]
    if not norms:
        return {}
    handles = [layer.register_forward_pre_hook(reads) for layer in norms]
    handles += [layer.register_forward_hook(writes) for layer in names if type(layer) is nn.Conv2d]
    black = torch.zeros(1, model.mean.shape[1], model.image_size, model.image_size, device=model.mean.device)
    passes = Classifier.passes
    try:
        with frozen(model), torch.enable_grad():
            logits = model(black.requires_grad_(True))
    finally:
        Classifier.passes = passes
        for handle in handles:
            handle.remove()
    readers = _readers(logits)
    pairs = {}
    for norm, inputs in read.items():
        for convolution, outputs in written.items():
            if len(inputs) != 1 or len(outputs) != 1:
                continue  # shared by two places of the network
            (seen, seen_version), (output, version) = inputs[0], outputs[0]
            if seen is output and seen_version == version and readers[output.grad_fn] == 1:
                pairs[names[norm]] = names[convolution]
    return pairs


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None


def _readers(logits: Tensor) -> Counter[Any]:
    """How many operations read the result of each, on the way to the logits."""
    readers: Counter[Any] = Counter()
    waiting, seen = [logits.grad_fn], {logits.grad_fn}
    while waiting:
        operation = waiting.pop()
        for source, _ in operation.next_functions:  # type: ignore[union-attr]
            if source is not None:
                readers[source] += 1
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
    return readers


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
