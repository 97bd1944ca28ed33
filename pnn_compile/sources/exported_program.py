"""`file.pt2`: a program that torch.export.save wrote.

Such a file holds a graph and raw weights. torch's loader would run code that a crafted one holds:
`pnn_compile.sources.exported_archive` looks at it first, and gives torch what it found in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from passes.capture.refold import toggle
from passes.errors import SourceError
from passes.ir.program import Provenance, provenance, set_provenance
from pnn_compile.sources.calls import refuse_arguments
from pnn_compile.sources.errors import first_line
from pnn_compile.sources.exported_archive import checked
from pnn_compile.sources.source import Inputs, Source

__all__ = ["SUFFIX", "load"]

SUFFIX = ".pt2"

_FLAGS = ("training", "train", "use_input_stats")
"""What operators call the argument that says whether they train."""


def load(text: str, arguments: Mapping[str, Any], given: Inputs | None) -> Source:
    """Load a saved exported program; its own example inputs serve unless others are given.

    Raises:
        SourceError: The file is missing, damaged, of another version of torch, or holds what could
            run code; it has no example inputs; or it cannot be switched between training and
            evaluation.
    """
    path = Path(text)
    refuse_arguments(arguments, text, "it is a program already, not a factory")
    if not path.is_file():
        raise SourceError(f"no such file: {path}")
    archive = checked(path)
    try:
        exported = torch.export.load(archive)
        module = exported.module(check_guards=False)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise SourceError(
            f"{path} cannot be loaded ({type(error).__name__}: {first_line(error)}): save it "
            f"again with torch.export.save of torch {torch.__version__}"
        ) from error
    assert isinstance(module, fx.GraphModule)
    _free(module, text)
    given = given or exported.example_inputs
    if given is None:
        raise SourceError(f"{path} holds no example inputs: add --input 1x3x32x32 for each of them")
    args, kwargs = given
    return Source(module, tuple(args), dict(kwargs), text)


def _free(module: fx.GraphModule, text: str) -> None:
    """Let train() and eval() work, which torch takes from an exported module.

    Raises:
        SourceError: An operator trains and cannot be switched.
    """
    for node in module.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if stack:
            set_provenance(node, Provenance(stack[-1][0]))
    toggle(module, module.graph)
    for node in module.graph.nodes:
        if _trains(node):
            raise SourceError(
                f"{text} was exported in training mode, and {node.target} of "
                f"{provenance(node).path or node.name} cannot be switched to evaluation: call "
                "model.eval() before torch.export.export, or name the Python file that builds it"
            )
    del module.train, module.eval  # they refuse; the class has its own
    module.recompile()


def _trains(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return any(given.get(flag) is True for flag in _FLAGS)
