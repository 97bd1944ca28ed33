"""Load a `.pt2` file: a program that torch.export.save wrote.

Such a file contains a graph and raw weights. torch's loader would run the code in a crafted one:
`pnn_compile.sources.exported_archive` checks it first, and torch reads only what passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.capture.refold import toggle
from passes.errors import ArtifactError, SourceError
from passes.ir.program import Provenance, provenance, set_provenance
from pnn_compile.artifact.check_plan import follow_shapes
from pnn_compile.artifact.functions import check_enums, is_fragile
from pnn_compile.artifact.values import UnsupportedError
from pnn_compile.sources.exported_archive import checked_archive
from pnn_compile.sources.source import Inputs, Source
from pnn_compile.sources.user_code import brief, refuse_arguments

SUFFIX = ".pt2"

_FLAGS = ("training", "train", "use_input_stats")
"""Names of the argument that tells an operator whether to train."""


def load(text: str, arguments: Mapping[str, Any], inputs: Inputs | None) -> Source:
    """Load a saved exported program.

    Args:
        text: Path of the file.
        arguments: Must be empty: a program is not built.
        inputs: Inputs that replace the example inputs of the file.

    Raises:
        SourceError: The file is missing, damaged, of another version of torch, or contains what
            could run code; it has no example inputs; or it cannot switch between training and
            evaluation.
    """
    path = Path(text)
    refuse_arguments(arguments, text, "it is a program already, not a factory")
    if not path.is_file():
        raise SourceError(f"no such file: {path}")
    archive = checked_archive(path)
    try:
        exported = torch.export.load(archive)
        module = exported.module(check_guards=False)
    except Exception as error:  # whatever torch raises on a damaged file
        raise SourceError(
            f"{path} cannot be loaded ({type(error).__name__}: {brief(error)}): save it "
            f"again with torch.export.save of torch {torch.__version__}"
        ) from error
    assert isinstance(module, fx.GraphModule)
    _enable_modes(module, text)
    inputs = inputs or exported.example_inputs
    if inputs is None:
        raise SourceError(f"{path} has no example inputs: add --input 1x3x32x32 for each argument")
    args, kwargs = inputs
    _check_operands(path, module, args, kwargs)
    return Source(module, tuple(args), dict(kwargs), text)


def _check_operands(
    path: Path, module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Refuse operands that operators would trust, and crash the process: as in artifacts.

    Raises:
        SourceError: A number stands for a dtype, or the sizes of operands do not fit.
    """
    nested = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    try:
        for node in (node for part in nested for node in part.graph.nodes):
            if node.op == "call_function":
                check_enums(node.target, node.args, node.kwargs)
        if any(is_fragile(node.target) for part in nested for node in part.graph.nodes):
            flat = fx.Graph()  # without the code of an exported graph that nests its arguments
            flat.output(flat.graph_copy(module.graph, {}))
            follow_shapes(fx.GraphModule(module, flat), pytree.tree_leaves((args, kwargs)))
    except (ArtifactError, UnsupportedError) as error:
        raise SourceError(
            f"{path} contains operands that could crash the process ({error}): save it again with "
            "torch.export.save, or name the Python file that builds the model"
        ) from error


def _enable_modes(module: fx.GraphModule, text: str) -> None:
    """Make train() and eval() work, which raise in an exported module.

    Raises:
        SourceError: An operator trains and cannot switch to evaluation.
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
                f"{provenance(node).path or node.name} cannot switch to evaluation: call "
                "model.eval() before torch.export.export, or name the Python file that builds it"
            )
    del module.train, module.eval  # these raise, and hide those of the class
    module.recompile()


def _trains(node: fx.Node) -> bool:
    """Whether an operator is called in training mode."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return any(values.get(flag) is True for flag in _FLAGS)
