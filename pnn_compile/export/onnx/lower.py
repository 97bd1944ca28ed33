"""The pieces of a network in ONNX: each as a row of blocks that share their form."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from pnn_compile.export.onnx.blame import refusal
from pnn_compile.export.onnx.blocks import Segment, segments
from pnn_compile.export.onnx.flat import Piece, flatten
from pnn_compile.export.onnx.observe import Observed
from pnn_compile.export.onnx.steps import Steps
from pnn_compile.export.onnx.translate import Block, translate

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["Call", "LoweredPiece", "lower"]


@dataclass(frozen=True, eq=False)
class Call:
    """A segment of a piece, and the block that computes it.

    Attributes:
        segment: The segment.
        block: Its form in ONNX.
        weights: Names in the flat graph of the weights that the block takes here.
    """

    segment: Segment
    block: Block
    weights: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoweredPiece:
    """A piece, and the blocks that compute it one after the other."""

    piece: Piece
    calls: tuple[Call, ...]


def lower(compiled: Compiled, observed: Observed, steps: Steps) -> Mapping[str, LoweredPiece]:
    """Translate all pieces that the steps call.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    counts = {step.target: len(step.outputs) for step in steps.steps}
    pieces = {
        name: flatten(
            name,
            compiled.module.get_submodule(name),
            arguments,
            observed.values.get(name, {}),
            counts[name],
        )
        for name, arguments in observed.arguments.items()
    }
    divided = dict(zip(pieces, segments(pieces.values()), strict=True))
    # What has the same key is translated once; unique segments are their own key.
    models: dict[Hashable, tuple[Piece, Segment]] = {}
    for name, parts in divided.items():
        for segment in parts:
            models.setdefault(_key(segment), (pieces[name], segment))
    pairs = [*models.values()]
    try:
        blocks = dict(zip(models, translate(pairs), strict=True))
    except Exception as error:
        raise refusal(compiled.plan.model, pairs, error) from error
    lowered = {}
    for name, parts in divided.items():
        calls = []
        for segment in parts:
            key = _key(segment)
            block = blocks[key]
            calls.append(Call(segment, block, _weights(models[key][1], segment, block)))
        lowered[name] = LoweredPiece(pieces[name], tuple(calls))
    return lowered


def _key(segment: Segment) -> Hashable:
    """What a segment is translated under; one without a key is its own."""
    return segment if segment.key is None else segment.key


def _weights(model: Segment, segment: Segment, block: Block) -> tuple[str, ...]:
    """Names of a segment's own weights, where the block has those of the segment it was made of."""
    if model is segment:
        return block.weights
    renamed = {
        str(theirs.target): str(ours.target)
        for theirs, ours in zip(model.nodes, segment.nodes, strict=True)
        if _named(theirs)
    }
    return tuple(_renamed(name, renamed) for name in block.weights)


def _named(node: fx.Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    target = max(
        (t for t in renamed if name == t or name.startswith(f"{t}.")), key=len, default=None
    )
    return name if target is None else renamed[target] + name.removeprefix(target)
