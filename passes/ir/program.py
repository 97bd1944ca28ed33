"""The captured graph: `Program`, the provenance of its nodes, and its executable specification."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.errors import CaptureError

__all__ = [
    "CaptureReport",
    "Program",
    "Provenance",
    "graph_module",
    "is_user_code",
    "provenance",
    "resolve",
    "set_provenance",
    "verify_graph",
]

_KEY = "pnn_provenance"
_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[1])
_HIDDEN = ("<", "torch/", *(f"{folder}{os.sep}" for folder in _FOLDERS))


@dataclass(frozen=True)
class Provenance:
    """Where a node came from.

    Attributes:
        path: Qualified name of the innermost module whose forward made the node ("" at the root).
        source: `file:line` of the user's code, or "" where it is not known.
    """

    path: str = ""
    source: str = ""


@dataclass(frozen=True)
class CaptureReport:
    """How the program was captured.

    Attributes:
        rung: Name of the front end that was believed.
        rejected: For each front end tried before it, one line that says why it was not.
        notes: What a user should know: arguments that were fixed, modes that cannot be toggled.
    """

    rung: str
    rejected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A model as a flat graph over real modules.

    Attributes:
        module: The graph. One placeholder per tensor argument of the model's forward (nested
            arguments are unpacked by `getitem` nodes), module calls keep their qualified names,
            and the output node holds the model's own output structure.
        args: Example positional arguments, by placeholder name in the order of the signature.
        dynamic_batch: Whether dimension 0 of the inputs may change; validated on a second size.
        capture: How the graph was obtained.
        name: Class name of the model.
        unused: Entries of the model's state dict that the graph does not read.
        fixed: Arguments of the model's forward that hold no tensor, by name: the graph has their
            values in it and does not take them.
    """

    module: fx.GraphModule
    args: Mapping[str, Any]
    dynamic_batch: bool
    capture: CaptureReport
    name: str
    unused: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the structure: operators, options and shapes of weights, but no values."""
        lines = [f"{n.op} {_target(self.module, n)} {n.args} {n.kwargs}" for n in self.graph.nodes]
        shapes = [
            f"{key} {tuple(value.shape)} {value.dtype}"
            for key, value in self.module.state_dict().items()
            if isinstance(value, torch.Tensor)
        ]
        return hashlib.sha256("\n".join([*lines, *sorted(shapes)]).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the weights are: the device of the first of them, or of the first input."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        leaves = [x for x in pytree.tree_leaves(dict(self.args)) if isinstance(x, torch.Tensor)]
        return next(iter([*tensors, *leaves])).device

    @property
    def graph(self) -> fx.Graph:
        """The graph of the program."""
        return self.module.graph

    @property
    def order(self) -> list[fx.Node]:
        """The compute nodes in topological order: no placeholders, attributes or output."""
        skipped = ("placeholder", "get_attr", "output")
        return [node for node in self.graph.nodes if node.op not in skipped]

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders."""
        return [*self.graph.find_nodes(op="placeholder")]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    def fresh_inputs(self) -> list[Any]:
        """Copies of the example inputs, by position: the program may write into them."""

        def fresh(value: Any) -> Any:
            return value.detach().clone() if isinstance(value, torch.Tensor) else value

        return [pytree.tree_map(fresh, self.args[str(node.target)]) for node in self.inputs]


def provenance(node: fx.Node) -> Provenance:
    """Return where a node came from; an empty record for nodes that the compiler made."""
    found = node.meta.get(_KEY)
    return found if isinstance(found, Provenance) else Provenance()


def set_provenance(node: fx.Node, record: Provenance) -> None:
    """Attach the provenance record to a node."""
    node.meta[_KEY] = record


def is_user_code(filename: str) -> bool:
    """Whether a source file is neither torch's nor the compiler's nor made at run time."""
    return not filename.startswith(_HIDDEN)


def resolve(module: nn.Module, target: str) -> Any:
    """Return the submodule, parameter, buffer or constant that `target` names.

    Raises:
        AttributeError: Nothing of that name exists.
    """
    value: Any = module
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Build a GraphModule that shares modules, parameters and buffers with `root`.

    Tensors that are not in the root's state dict stay out of it (buffers that are not persistent,
    plain attributes), so that the keys are the root's; every module has the mode that it has there.
    """
    module = fx.GraphModule(root, graph, class_name=name)
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        parent, _, leaf = str(node.target).rpartition(".")
        owner = resolve(root, parent) if parent else root
        saved = owner._buffers.keys() - owner._non_persistent_buffers_set | owner._parameters.keys()
        if leaf not in saved:
            (resolve(module, parent) if parent else module)._non_persistent_buffers_set.add(leaf)
    modes = {name: child.training for name, child in root.named_modules()}
    for name, child in module.named_modules():
        child.training = modes.get(name, root.training)
    return module


def _target(module: fx.GraphModule, node: fx.Node) -> str:
    name = node._pretty_print_target(node.target)
    if node.op == "call_module":
        return f"{name} {resolve(module, str(node.target))!r}"
    return name


def verify_graph(module: fx.GraphModule) -> None:
    """Check that a graph obeys the rules that every pass relies on.

    Raises:
        CaptureError: A rule is broken; the message names the rule and the node.
    """
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise CaptureError(f"malformed graph: {error}") from error
    for rule, holds in _RULES:
        for node in module.graph.nodes:
            if not holds(module, node):
                raise CaptureError(f"malformed graph: {rule} (node {node.name!r}, {node.op})")


def _target_exists(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op not in ("call_module", "get_attr"):
        return True
    try:
        value = resolve(module, str(node.target))
    except AttributeError:
        return False
    return isinstance(value, nn.Module) == (node.op == "call_module")


def _placeholders_lead(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op != "placeholder" or node.prev.op in ("placeholder", "root")


def _output_ends(module: fx.GraphModule, node: fx.Node) -> bool:
    return (node.op == "output") == (node.next.op == "root")


def _no_tensor_constants(module: fx.GraphModule, node: fx.Node) -> bool:
    found: list[torch.Tensor] = []

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        return leaf

    fx.node.map_aggregate((node.args, node.kwargs), visit)
    return not found


_RULES: tuple[tuple[str, Callable[[fx.GraphModule, fx.Node], bool]], ...] = (
    ("placeholders come first", _placeholders_lead),
    ("one output node, and it comes last", _output_ends),
    ("every module and attribute that is used exists", _target_exists),
    ("tensors are attributes, never literal arguments", _no_tensor_constants),
)
