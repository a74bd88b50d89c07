"""The mode and the precision that a network is used in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Eval mode and no gradients for weights inside; every mode and flag is as before outside.

    In train mode (`eval_mode=False` leaves it on) each attack step moves the running statistics of batch norm towards
    its own iterates.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    if eval_mode:
        model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, flag in flags:
            weight.requires_grad_(flag)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
