"""What the device at hand calls itself."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["processor_name"]


def processor_name(device: torch.device) -> str:
    """Name of a device: of a GPU, or of the processor of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
