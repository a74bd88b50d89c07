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
            rest = [module for name in ("drop", "act") if (module := getattr(layer, name, None)) is not None]
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
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    torch.mul(convolution.weight, scale[:, None, None, None], out=folded.weight)
    shift = norm.bias - norm.running_mean * scale
    folded.bias.copy_(shift if convolution.bias is None else shift + convolution.bias * scale)


def foldable(model: Classifier) -> dict[str, str]:
    """The norms that the convolution in front of them can take over, by their names.

    One black image is traced: the norm has to read what the convolution wrote, and nothing else may read it, which the
    graph of the gradients tells.
    """
    names = {module: name for name, module in model.named_modules()}
    if not any(_has_statistics(layer) for layer in names):
        return {}
    passes = Classifier.passes
    trace = model.trace(gradients=True)
    Classifier.passes = passes
    readers = _readers(trace.logits)
    pairs = {}
    for norm in filter(_has_statistics, trace.read):
        for convolution, outputs in trace.written.items():
            is_plain = type(convolution) is nn.Conv2d  # others may compute their weights
            is_used_once = len(outputs) == len(trace.read[norm]) == 1
            if is_plain and is_used_once and trace.feeds(convolution, norm) and readers[outputs[0][0].grad_fn] == 1:
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
