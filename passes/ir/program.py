"""The captured graph: `Program`, its subgraphs, its interpreter, its executable specification.

A program is flat: every module call of the model that torch.nn defines is one node, and control
flow of Python is gone.

>>> module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
>>> verify_graph(module)
>>> inputs = {"input": torch.zeros(2, 4)}
>>> program = Program(module, inputs, ("batch",), CaptureReport("trace"), "MLP")
>>> program.inputs, program.order, program.output
([input_1], [_0, _1], output)
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from passes.errors import CaptureError, PartitionError
from passes.ir.module_walk import named_submodules
from passes.ir.output_types import OutputType
from passes.ir.structure_hash import program_digest

_PROVENANCE_KEY = "pnn_provenance"
_LIBRARY_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[1])
_LIBRARY_PREFIXES = ("<", "torch/", *(f"{folder}{os.sep}" for folder in _LIBRARY_FOLDERS))
"""Prefixes of file names that are not user code: generated code, torch and the compiler."""


@dataclass(frozen=True)
class Provenance:
    """Origin of a node in the user's model.

    Attributes:
        path: Qualified name of the innermost module whose forward made the node ("" at the root).
        source: `file:line` of the user's code, or "" if unknown.
    """

    path: str = ""
    source: str = ""


DIMENSIONS: tuple[str, ...] = ("batch", "sequence")
"""Dimensions of the inputs that can be free."""

Validation = Literal["full", "fast", "off"]

VALIDATIONS: dict[Validation, str] = {
    "full": "outputs, buffers and gradients, in both modes, on two inputs",
    "fast": "outputs and buffers, in both modes, on one input; no gradients",
    "off": "outputs and buffers in evaluation mode, on one input",
}
"""What capture compares a graph with its model by, for each value of `validate`."""


@dataclass(frozen=True)
class CaptureReport:
    """Record of how a program was captured.

    Attributes:
        rung: Name of the front end whose graph passed validation.
        rejected: For each front end tried before it, one line with the reason of its rejection.
        notes: Restrictions for the user: arguments that are fixed, modes that cannot be toggled.
        validation: How much of the graph was compared with the model: "full", "fast" or "off".
        runs: Runs of the model and of graphs that this took; 0 if unknown, as in an artifact.
        seconds: Their wall time.
    """

    rung: str
    rejected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    validation: Validation = "full"
    runs: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def only_mode(self) -> str:
        """The mode, "training" or "evaluation", of a graph of one mode alone; "" for both."""
        modes = (m for m in ("training", "evaluation") if self.rung.endswith(f"{m} mode alone"))
        return next(modes, "")

    @property
    def compared(self) -> str:
        """What was compared, and what that took, in words."""
        cost = f"; {self.runs} runs in {self.seconds:.1f} s" if self.runs else ""
        return f"{self.validation}: {VALIDATIONS[self.validation]}{cost}"


@dataclass(frozen=True)
class Program:
    """Hold a model as a flat graph over real modules.

    Attributes:
        module: The graph. One placeholder per tensor argument of forward (`getitem` nodes unpack
            nested ones), module calls keep their names; the output node has the output's structure.
        args: Example inputs by placeholder name, in the order of the signature.
        dynamic: Dimensions that may change: "batch", 0, and "sequence", others of that length.
        capture: How the graph was captured.
        name: Class name of the model.
        unused: Entries of the model's state dict that the graph does not read.
        fixed: Arguments of forward without tensors, and plain defaults, by name: constants of it.
        model: Copy of the model, which loads checkpoints by its own code; None if there is none.
        output_types: What makes the containers of the output, of which the graph has plain ones.
    """

    module: fx.GraphModule
    args: Mapping[str, Any]
    dynamic: tuple[str, ...]
    capture: CaptureReport
    name: str
    unused: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    output_types: tuple[OutputType, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the structure: operators, options and shapes of weights, but no values."""
        return program_digest(self.module)

    @property
    def sequence(self) -> int | None:
        """Length of the sequences in the example inputs if it is free; else None."""
        free = "sequence" in self.dynamic
        return sequence_length(tensor_leaves(dict(self.args))) if free else None

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; that of the first input if there is none."""
        state = itertools.chain(self.module.parameters(), self.module.buffers())
        return next(itertools.chain(state, tensor_leaves(dict(self.args)))).device

    @property
    def graph(self) -> fx.Graph:
        """Graph of the module."""
        return self.module.graph

    @property
    def order(self) -> list[fx.Node]:
        """Compute nodes in topological order: no placeholders, attributes or output."""
        return [node for node in self.graph.nodes if is_compute(node)]

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders, in the order of the signature."""
        return [*self.graph.find_nodes(op="placeholder")]

    @property
    def output(self) -> fx.Node:
        """Output node; its argument has the structure of the model's output."""
        return self.graph.output_node()

    def fresh_inputs(self) -> list[Any]:
        """Copy the example inputs, by position: the program may write into them."""
        return [clone_tensors(self.args[str(node.target)]) for node in self.inputs]

    def examples(self, names: Sequence[str]) -> list[Any]:
        """Copy the example inputs of placeholders, by the names of their nodes, to the device."""
        values = {n.name: self.args[str(n.target)] for n in self.inputs if n.name in names}
        copies = clone_tensors([values[name] for name in names])
        moved: list[Any] = pytree.tree_map_only(torch.Tensor, lambda x: x.to(self.device), copies)
        return moved


def provenance(node: fx.Node) -> Provenance:
    """Return the origin of a node; an empty record for nodes that the compiler made."""
    record = node.meta.get(_PROVENANCE_KEY)
    return record if isinstance(record, Provenance) else Provenance()


def set_provenance(node: fx.Node, record: Provenance) -> None:
    """Attach a provenance record to a node."""
    node.meta[_PROVENANCE_KEY] = record


def operator_name(node: fx.Node) -> str:
    """Return what a node calls, as users know it: `add` and not `add.Tensor`, `size` of a shape.

    >>> graph = fx.Graph()
    >>> operator_name(graph.call_function(torch.ops.aten.sym_size.int, (graph.placeholder("x"), 0)))
    'size'
    """
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return name.removeprefix("sym_") if isinstance(node.target, torch._ops.OpOverload) else name


def is_compute(node: fx.Node) -> bool:
    """Whether a node computes: no placeholder, attribute or output."""
    return node.op not in ("placeholder", "get_attr", "output")


def is_user_code(filename: str) -> bool:
    """Whether a source file belongs neither to torch nor to the compiler, and is not generated."""
    return not filename.startswith(_LIBRARY_PREFIXES)


def resolve(module: nn.Module, target: str) -> Any:
    """Return the submodule, parameter, buffer or constant that `target` names.

    Raises:
        AttributeError: No such name exists.
    """
    value: Any = module
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def clone_tensors(value: Any) -> Any:
    """Copy the tensors in nested containers, without their gradients."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested containers, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) in (tuple, list):
        return [leaf for item in value for leaf in tensor_leaves(item)]
    if type(value) in (bool, int, float, str, type(None)):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def sequence_length(tensors: Sequence[torch.Tensor]) -> int | None:
    """Return the size of dimension 1 of the first tensor that has one; None if there is none."""
    return next((tensor.shape[1] for tensor in tensors if tensor.dim() > 1), None)


def storage_id(tensor: torch.Tensor) -> int | None:
    """Return the identity of a tensor's memory; None if it has none (sparse, uninitialized)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one memory, and their parts of it overlap.

    >>> flat = torch.zeros(6)
    >>> share_memory(flat, flat[3:].view(3, 1)), share_memory(flat[:3], flat[3:])
    (True, False)
    """
    if storage_id(a) is None or storage_id(a) != storage_id(b) or not a.numel() or not b.numel():
        return False
    (start, end), (other_start, other_end) = _span(a), _span(b)
    return start < other_end and other_start < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its memory, and the one after its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * step for size, step in steps)
    return first * tensor.itemsize, (last + 1) * tensor.itemsize


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether a parameter has hooks on its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in the value or the arguments of a node, in order."""
    tensors: list[torch.Tensor] = []

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        return leaf

    fx.node.map_aggregate(value, visit)
    return tensors


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Build a GraphModule that shares modules, parameters and buffers with `root`.

    The state dict has the keys of the root: tensors that the root does not save (buffers that are
    not persistent, plain attributes) stay out of it. Every module keeps its mode.

    Args:
        root: Owner of everything that the graph calls and reads.
        graph: The graph.
        name: Class name of the result.
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
    modes = {name: child.training for name, child in named_submodules(root)}
    for name, child in named_submodules(module):
        child.training = modes.get(name, root.training)
    return module


def nodes_between(program: Program, first: str, last: str) -> list[fx.Node]:
    """Return the compute nodes from `first` to `last`, both included.

    Args:
        program: The program.
        first: Name of the first node.
        last: Name of the last node.

    Raises:
        PartitionError: A name is not in the program, or `last` comes before `first`.
    """
    order = program.order
    names = [node.name for node in order]
    if first not in names or last not in names or names.index(first) > names.index(last):
        raise PartitionError(
            f"the plan does not fit the program {program.name}: no run of nodes from {first!r} "
            f"to {last!r}; compile again without the plan"
        )
    return order[names.index(first) : names.index(last) + 1]


def extract(
    program: Program,
    nodes: Sequence[fx.Node],
    entering: Sequence[str],
    leaving: Sequence[str] | None,
    *,
    inputs: Sequence[str],
    sides: Sequence[str],
    name: str,
) -> fx.GraphModule:
    """Copy consecutive nodes into a GraphModule that shares the modules of the program.

    Stages, copied blocks and heads are made this way. Side values are cheap values that are
    recomputed from the inputs instead of crossing a cut.

    Args:
        program: The program.
        nodes: The nodes to copy, in order.
        entering: Names of the values that become the first placeholders.
        leaving: Names of the values to return; None for the output of the program.
        inputs: Names of the program's placeholders that come next.
        sides: Names of the side values to recompute first, and of all that they need, in order.
        name: Class name of the result.

    Returns:
        The module, called with the entering values and then the inputs. It returns one tensor, or a
        tuple if several values leave.

    Raises:
        PartitionError: A node reads a value that neither enters nor is computed inside, or a name
            is not in the program.
    """
    by_name = {node.name: node for node in program.graph.nodes}
    if unknown := [n for n in (*entering, *inputs, *sides, *(leaving or ())) if n not in by_name]:
        raise PartitionError(f"{name} names {unknown[0]!r}, which the program does not have")
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}

    def value(node: fx.Node) -> fx.Node:
        if node not in mapping and node.op == "get_attr":
            mapping[node] = graph.node_copy(node)
        if node not in mapping:
            raise PartitionError(f"{name} reads {node.name!r}, which does not reach it")
        return mapping[node]

    for placeholder in [*entering, *inputs]:
        mapping[by_name[placeholder]] = graph.placeholder(placeholder)
    for node in [by_name[side] for side in sides] + list(nodes):
        if node not in mapping:
            mapping[node] = graph.node_copy(node, value)
    if leaving is None:
        graph.output(fx.node.map_arg(program.output.args[0], value))
    else:
        results = tuple(value(by_name[result]) for result in leaving)
        graph.output(results[0] if len(results) == 1 else results)
    graph.lint()
    return graph_module(program.module, graph, name)


class Interpreter(fx.Interpreter):
    """Run a graph node by node, as its generated code would.

    torch.fx stores list and dict arguments of a node as immutable containers. The code that it
    generates passes a fresh list or dict at every call; its own interpreter passes the stored
    container itself, which a function that changes its argument cannot write to:

    >>> def append_one(values):
    ...     values.append(1)
    ...     return len(values)
    >>> graph = fx.Graph()
    >>> _ = graph.output(graph.call_function(append_one, ([5, 6],)))
    >>> module = fx.GraphModule({}, graph)
    >>> Interpreter(module).run(), Interpreter(module).run()
    (3, 3)
    """

    def __init__(self, module: nn.Module, garbage_collect_values: bool = True) -> None:
        super().__init__(module, garbage_collect_values)
        # Errors stay as they are: describing where they arose imports inductor, for a second.
        self.extra_traceback = False

    def run_by_name(self, inputs: Mapping[str, Any]) -> Any:
        """Run the graph on inputs by the names of its arguments."""
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        return self.run(*(inputs[name] for name in names))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node, with values for nodes and fresh lists and dicts."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {key: _mutable(value) for key, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    """Copy immutable lists and dicts, nested ones included, to plain ones."""
    if isinstance(value, immutable_list):
        return [_mutable(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _mutable(item) for key, item in value.items()}
    return tuple(map(_mutable, value)) if type(value) is tuple else value


def verify_graph(module: fx.GraphModule) -> None:
    """Check a graph against the rules that every pass relies on.

    Raises:
        CaptureError: The graph breaks a rule; the message names the rule and the node.
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
    return not tensors_in((node.args, node.kwargs))


_RULES: tuple[tuple[str, Callable[[fx.GraphModule, fx.Node], bool]], ...] = (
    ("placeholders come first", _placeholders_lead),
    ("one output node, and it comes last", _output_ends),
    ("every module and attribute that is used exists", _target_exists),
    ("tensors are attributes, never literal arguments", _no_tensor_constants),
)


def failing_node(module: fx.GraphModule, inputs: Mapping[str, Any]) -> str:
    """Return " in" and the module and operator at which a graph fails on inputs, "" if none."""
    reached = list[fx.Node]()

    class Tracker(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            reached.append(n)
            return super().run_node(n)

    try:
        with torch.no_grad():
            Tracker(module).run_by_name(inputs)
    except Exception:
        node = reached[-1]
        path, source = provenance(node).path, provenance(node).source
        name = operator_name(node) if node.op == "call_function" else node.name
        sources = " and ".join(source.name for source in node.all_input_nodes)
        return f" in {path or 'forward'}, {name} of {sources}" + (f" ({source})" if source else "")
    return ""
