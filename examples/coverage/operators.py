"""Make torchvision importable where its compiled operators were built for another torch.

Its index carries builds for CUDA; beside a torch for CPUs their operators do not load, and the
import ends at `torchvision::nms`. Without them everything works but detection.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

__all__ = ["declare"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # alive for as long as the schemas shall be


def declare() -> None:
    """Declare what torchvision's Python code names, where it is installed and cannot load it."""
    found = importlib.util.find_spec("torchvision")
    if _declared or found is None or found.origin is None or _loads(Path(found.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _loads(folder: Path) -> bool:
    try:
        for path in folder.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        return False
    return True
