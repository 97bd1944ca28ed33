"""`torchvision:NAME`: a model of torchvision with random weights; nothing is downloaded."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from passes.errors import SourceError
from pnn_compile.sources.calls import call
from pnn_compile.sources.errors import advise
from pnn_compile.sources.libraries import require
from pnn_compile.sources.source import Inputs, Source

__all__ = ["load"]

SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    # videos `[B, C, T, H, W]`
    ("torchvision.models.video.mvit", (2, 3, 16, 224, 224)),
    ("torchvision.models.video.", (2, 3, 16, 112, 112)),
    # the smallest images that all classifiers but the next one take at their default strides
    ("torchvision.models.inception", (2, 3, 299, 299)),
    ("torchvision.models.", (2, 3, 224, 224)),
)
"""Beginning of the factory's module, and the shape of its example input."""

OTHERS = ("torchvision.models.detection.", "torchvision.models.optical_flow.")
"""Models that take lists of images, or pairs."""


def load(name: str, arguments: dict[str, Any], given: Inputs | None) -> Source:
    """Build a model by its name in `torchvision.models`, without weights.

    Raises:
        SourceError: torchvision is missing, does not know the name, or the model takes something
            else than one tensor of images and no inputs are given.
    """
    origin = f"torchvision:{name}"
    require("torchvision", origin)
    models = require("torchvision.models", origin)
    if name not in (names := models.list_models()):
        raise SourceError(f"torchvision has no model {name!r}; {advise(name, names)}")
    builder = models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    chosen = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    if any(arguments.get(key) for key in chosen):
        raise SourceError(f"{origin}: nothing is downloaded; build pretrained models in a file.py")
    model = call(builder, origin, {**chosen, **arguments})
    if given is None:
        if builder.__module__.startswith(OTHERS):
            raise SourceError(
                f"{origin} takes more than one tensor of images: give its inputs by --input, or "
                "build it in a file.py beside a function example_inputs()"
            )
        shape = next(s for start, s in SHAPES if builder.__module__.startswith(start))
        given = (torch.randn(shape, generator=torch.Generator().manual_seed(0)),), {}
    return Source(model, *given, origin)
