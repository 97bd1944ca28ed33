"""Says which operator of the user's code has no ONNX form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import fx

from passes.errors import ExportError
from pnn_compile.export.onnx.blocks import Segment
from pnn_compile.export.onnx.flat import Origin, Piece

__all__ = ["refusal"]

_Translate = Callable[[Sequence[tuple[Piece, Segment]]], object]


def refusal(
    model: str,
    pairs: Sequence[tuple[Piece, Segment]],
    translate: _Translate,
    error: Exception,
) -> ExportError:
    """Find the first node that cannot be exported, and make the error that names it.

    Args:
        model: Name of the model.
        pairs: The segments that were translated together, each with its piece.
        translate: Translates some of them; raises where that is impossible.
        error: What it raised for all of them.
    """
    for pair in pairs:
        found = _first(pair, translate)
        if found is not None:
            return _error(model, *found)
    return ExportError(f"{model} has no ONNX form: {_reason(error)}")


def _first(
    pair: tuple[Piece, Segment], translate: _Translate
) -> tuple[Piece, fx.Node, Exception] | None:
    """The last node of the shortest beginning of a segment that cannot be exported."""
    piece, segment = pair
    starts = [s for s in _beginnings(piece, segment)]
    failed: Exception | None = _tried(translate, (piece, starts[-1])) if starts else None
    if failed is None:
        return None
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        error = _tried(translate, (piece, starts[middle]))
        if error is None:
            low = middle + 1
        else:
            high, failed = middle, error
    return piece, starts[low].nodes[-1], failed


def _beginnings(piece: Piece, segment: Segment) -> list[Segment]:
    """The segment up to each of its nodes that gives a tensor, and the whole of it."""
    found = []
    for number, node in enumerate(segment.nodes, 1):
        if node.op == "get_attr":
            continue
        if node in piece.specs:
            found.append(Segment(segment.nodes[:number], segment.entering, (node,)))
    return [*found, segment]


def _tried(translate: _Translate, pair: tuple[Piece, Segment]) -> Exception | None:
    try:
        translate([pair])
    except Exception as error:
        return error
    return None


def _error(model: str, piece: Piece, node: fx.Node, error: Exception) -> ExportError:
    origin = piece.origins.get(node, Origin("", ""))
    what = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        what = type(piece.module.get_submodule(str(node.target))).__name__
    where = f"module {origin.path}" if origin.path else f"the top level of {piece.name}"
    line = f" ({origin.source})" if origin.source else ""
    return ExportError(
        f"{model} has no ONNX form: {what} in {where}{line} cannot be exported: {_reason(error)}; "
        "replace that operator, or keep the model in torch"
    )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:300]
