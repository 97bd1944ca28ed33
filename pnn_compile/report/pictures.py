"""Pictures of outputs that are images: the original beside its iterates, as PNG data URIs."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F

from passes.transform.executor import Executor
from pnn_compile.compiled import Compiled
from pnn_compile.evaluate.iterate import last_states
from pnn_compile.fit.metrics import evaluating, main_output
from pnn_compile.inputs import batch_size, named_batch

_SAMPLES = 6
"""Samples that are drawn."""
_ITERATIONS = 4
"""Largest number of iterations that is drawn."""
_PIXELS = 128
"""Largest side of a picture; larger images are reduced."""
_LEAST = 4
"""Smallest side of an output that counts as an image."""


@dataclass(frozen=True)
class PictureRow:
    """The same samples by one network.

    Attributes:
        name: "original", or the number of iterations.
        images: Data URIs, one a sample.
        errors: Relative errors of the samples; empty for the original.
    """

    name: str
    images: tuple[str, ...]
    errors: tuple[float, ...] = ()


def sample_pictures(compiled: Compiled, batch: Any) -> tuple[PictureRow, ...]:
    """Draw some samples by the original and by 1, 2 ... iterations.

    Args:
        compiled: The network.
        batch: Inputs, as in `calibrate`.

    Returns:
        A row a network; none if the outputs are not images `[B, 1 or 3, H, W]`.
    """
    plan = compiled.plan
    most = min(_ITERATIONS, plan.most_iterations)
    with evaluating(compiled):
        inputs = named_batch(compiled, batch)
        target = main_output(compiled.sequential(**named_batch(compiled, batch)))
        if not _is_image(target, inputs):
            return ()
        executor = Executor(compiled)
        states = islice(last_states(executor, inputs, most), 1, None)
        outputs = [
            main_output(executor.head({n: v.clone() for n, v in state.items()}, inputs))
            for state in states
        ]
    target = target[:_SAMPLES].float().cpu()
    bounds = target.min().item(), target.max().item()
    rows = [PictureRow("original", _drawn(target, bounds))]
    for count, output in enumerate(outputs, 1):
        result = output[:_SAMPLES].float().cpu()
        wrong = (result - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
        errors = tuple(wrong.nan_to_num(posinf=1e9).tolist())
        rows.append(PictureRow(f"K = {count}", _drawn(result, bounds), errors))
    return tuple(rows)


def _is_image(output: torch.Tensor, inputs: Mapping[str, Any]) -> bool:
    return (
        output.dim() == 4
        and output.is_floating_point()
        and output.shape[0] == batch_size(inputs)
        and output.shape[1] in (1, 3)
        and min(output.shape[2:]) >= _LEAST
    )


def _drawn(images: torch.Tensor, bounds: tuple[float, float]) -> tuple[str, ...]:
    """Return data URIs of images `[B, C, H, W]`; bounds are the values of black and white."""
    low, high = bounds
    if max(images.shape[2:]) > _PIXELS:
        scale = _PIXELS / max(images.shape[2:])
        size = [max(1, round(side * scale)) for side in images.shape[2:]]
        images = F.interpolate(images, size, mode="area")
    pixels = ((images - low) / max(high - low, 1e-12)).nan_to_num().clamp(0, 1) * 255
    return tuple(map(_data_uri, pixels.round().byte()))


def _data_uri(pixels: torch.Tensor) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def png(pixels: torch.Tensor) -> bytes:
    """Write an image `[1 or 3, H, W]` of bytes as PNG (ISO/IEC 15948): gray, or RGB."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, -1)
    unfiltered = F.pad(rows, (1, 0))  # the type of the filter of every row: none
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    data = zlib.compress(bytes(unfiltered.flatten().tolist()), 9)
    chunks = (b"IHDR", header), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
