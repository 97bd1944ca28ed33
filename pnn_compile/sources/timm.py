"""`timm:NAME`: a model of timm with random weights; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

from passes.errors import SourceError
from pnn_compile.sources.errors import advise, blame
from pnn_compile.sources.libraries import require
from pnn_compile.sources.source import Inputs, Source

__all__ = ["load"]

_BATCH = 2


def load(name: str, arguments: dict[str, Any], given: Inputs | None) -> Source:
    """Build a model by `timm.create_model`, with an image batch of the size that it is made for.

    Raises:
        SourceError: timm is missing, does not know the name, or fails to build the model.
    """
    origin = f"timm:{name}"
    timm = require("timm", origin)
    if not timm.is_model(name):
        raise SourceError(f"timm has no model {name!r}; {advise(name, timm.list_models())}")
    if arguments.get("pretrained"):
        raise SourceError(f"{origin}: nothing is downloaded; build pretrained models in a file.py")
    with blame(origin):
        model = timm.create_model(name, **arguments)
    if given is None:
        size = arguments.get("img_size", model.default_cfg["input_size"][1:])
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = arguments.get("in_chans", model.default_cfg["input_size"][0])
        generator = torch.Generator().manual_seed(0)
        given = (torch.randn(_BATCH, channels, *size, generator=generator),), {}
    return Source(model, *given, origin)
