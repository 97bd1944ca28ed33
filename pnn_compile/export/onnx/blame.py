"""Says which operator of the user's code has no ONNX form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from passes.errors import ExportError
from pnn_compile.export.onnx.blocks import Segment
from pnn_compile.export.onnx.flat import Origin, Piece
from pnn_compile.export.onnx.translate import TAG

__all__ = ["refusal"]


def refusal(model: str, pairs: Sequence[tuple[Piece, Segment]], error: Exception) -> ExportError:
    """Make the error that names the operator at which torch's exporter failed, and its line.

    Args:
        model: Name of the model.
        pairs: The segments that were translated together, each with its piece.
        error: What the exporter raised.
    """
    advice = "replace that operator, or keep the model in torch"
    tag = next(_tags(error), None)
    if tag is None or tag[0] >= len(pairs):
        return ExportError(f"{model} has no ONNX form: {_reason(error)}; {advice}")
    piece, segment = pairs[tag[0]]
    node = segment.nodes[tag[1]]
    origin = piece.origins.get(node, Origin())
    what = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        what = type(piece.module.get_submodule(str(node.target))).__name__
    where = f"module {origin.path}" if origin.path else f"the top level of {piece.name}"
    line = f" ({origin.source})" if origin.source else ""
    return ExportError(
        f"{model} has no ONNX form: {what} in {where}{line} cannot be exported: {_reason(error)}; "
        f"{advice}"
    )


def _tags(error: BaseException | None) -> Iterator[tuple[int, int]]:
    """The nodes that were worked on when it happened, innermost first.

    The exporter's messages name no node of the graph that it was given. Its frames hold it.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for each in reversed(chain):
        frames = []
        step = each.__traceback__
        while step is not None:
            frames.append(step.tb_frame)
            step = step.tb_next
        for frame in reversed(frames):
            for value in [*frame.f_locals.values()]:
                if isinstance(value, fx.Node):
                    custom: Any = value.meta.get("custom") or {}
                    if TAG in custom:
                        yield custom[TAG]


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:300]
