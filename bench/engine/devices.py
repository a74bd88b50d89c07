"""The device that trials are computed on."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


@functools.cache
def cpu_name() -> str:
    """The model of the CPU as Linux names it; the architecture where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def pick_device(wanted: str) -> torch.device:
    """`auto` is a GPU if there is one.

    Raises:
        ValueError: no such device.
    """
    has_gpu = torch.cuda.is_available()
    if wanted not in ("auto", "cpu", "cuda") or (wanted == "cuda" and not has_gpu):
        gpu = "" if has_gpu else " (there is no GPU here that torch can use)"
        raise ValueError(f"dispatch.device is {wanted!r}; write auto, cpu or cuda{gpu}")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and has_gpu) else "cpu")
