"""Cut the pieces of a network into segments, the units that are translated to ONNX.

A piece is a preprocessing operator, a fine stage, a coarse propagator or the head. `flatten` writes
it as a flat graph: one placeholder per tensor, a tuple of tensors as output. `segments` cuts its
nodes wherever a single tensor is live. Segments with equal keys differ only in the values of their
weights and are translated once, because translating a node takes a hundred times as long as
copying its translation, and deep networks repeat themselves: of the 333 units of ResNet-1001, eight
differ.

A fine stage of a stem and 12 residual blocks (the input of a block is live until its sum):

    nodes      stem  conv_1 relu_1 add_1  conv_2 relu_2 add_2  ...  conv_12 relu_12 add_12
    live       1     2      2      1      2      2      1           2       2       1
    segments   [stem]  [conv_1 relu_1 add_1]  [conv_2 relu_2 add_2]  ...
    keys       None    k                      k
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.ir.module_walk import named_tensors
from passes.ir.observer import TRUSTED_PACKAGES
from passes.ir.program import Provenance, is_compute, provenance, resolve
from passes.ir.run_step import output_tensors
from passes.ir.structure_hash import digest, node_lines

CHILD = "network"
"""Name of a piece that is no graph, inside the flat graph that calls it."""

_MIN_SAVED = 24
"""Fewest nodes that need not be translated for a segment to be treated as a repeated one."""


@dataclass(frozen=True)
class SymbolicSpec:
    """Type and shape of a tensor, with sizes that may depend on the number of samples.

    Attributes:
        shape: Sizes at the example batch size (the smaller one of two that were run).
        dtype: Type of the elements.
        dims: Sizes; text such as "batch" or "16*batch" where they depend on
            free dimensions.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    @property
    def dynamic(self) -> tuple[int, ...]:
        """Axes whose size depends on the batch."""
        return tuple(axis for axis, size in enumerate(self.dims) if isinstance(size, str))


def spec_leaves(value: Any) -> list[Any]:
    """Return the leaves of nested containers, each `SymbolicSpec` as one leaf."""
    return pytree.tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, SymbolicSpec))


@dataclass(frozen=True, eq=False)
class Piece:
    """A preprocessing operator, a fine stage, a coarse propagator or the head, as a flat graph.

    Attributes:
        name: Its name in the parareal network, such as "fine_0".
        module: The flat graph: one placeholder per tensor, a tuple of tensors as output.
        specs: Types of its values that are tensors, by node.
        origins: Where its compute nodes came from.
        prefix: Prefix of the names that its weights have in ONNX; "" for those of the model.
    """

    name: str
    module: fx.GraphModule
    specs: Mapping[fx.Node, SymbolicSpec]
    origins: Mapping[fx.Node, Provenance]
    prefix: str

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders."""
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def nodes(self) -> list[fx.Node]:
        """The compute nodes, in order."""
        return [node for node in self.module.graph.nodes if is_compute(node)]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes whose values it returns."""
        nodes: Any = self.module.graph.output_node().args[0]
        return tuple(nodes)

    def onnx_name(self, target: str) -> str:
        """Return the ONNX name of a weight of the flat graph."""
        return self.prefix + target.removeprefix(f"{CHILD}.")


def flatten(
    name: str, module: nn.Module, arguments: tuple[Any, ...], values: Mapping[str, Any], count: int
) -> Piece:
    """Write a piece as a flat graph over the same modules.

    Args:
        name: Its name in the parareal network.
        module: The piece.
        arguments: What it is called with, tensors replaced by their specs.
        values: Values of its nodes by name, tensors replaced by their specs; {} if the piece is no
            graph.
        count: Number of tensors that it returns.
    """
    graph = fx.Graph()
    specs: dict[fx.Node, SymbolicSpec] = {}
    inputs = [_placeholders(graph, argument, specs) for argument in arguments]
    outputs: Any
    if isinstance(module, fx.GraphModule):
        root: nn.Module = module
        output = _copy(module, graph, inputs, values, specs)
        outputs = pytree.tree_leaves(output)
        if len(outputs) != count or not all(node in specs for node in outputs):
            # The output holds constants, or objects that hide tensors: unpack it at run time.
            outputs = _items(graph, graph.call_function(output_tensors, (output,)), count)
    else:
        root = nn.Module()
        root.add_module(CHILD, module)
        output = graph.call_module(CHILD, tuple(inputs))
        outputs = [output] if count == 1 else _items(graph, output, count)
    graph.output(tuple(outputs))
    flat = fx.GraphModule(root, graph, class_name=name)
    from_model = name.startswith(("fine_", "head"))
    origins = {
        node: _origin(node)
        if from_model
        else Provenance("" if node.target == CHILD else str(node.target))
        for node in flat.graph.nodes
    }
    # A GraphModule holds a copy of the graph that it is made of.
    copies = dict(zip(graph.nodes, flat.graph.nodes, strict=True))
    flat_specs = {copies[node]: spec for node, spec in specs.items()}
    return Piece(name, flat, flat_specs, origins, "" if from_model else f"{name}.")


def _origin(node: fx.Node) -> Provenance:
    """Return the provenance of a program node, its file named from the working directory."""
    origin = provenance(node)
    file, colon, line = origin.source.rpartition(":")
    path = Path(file)
    if path.is_absolute():
        inside = path.is_relative_to(Path.cwd())
        file = str(path.relative_to(Path.cwd())) if inside else path.name
    return Provenance(origin.path, f"{file}{colon}{line}")


def _placeholders(graph: fx.Graph, argument: Any, specs: dict[fx.Node, SymbolicSpec]) -> Any:
    """Add a placeholder per tensor; return the argument with the placeholders for tensors."""
    structure = pytree.tree_structure(argument, is_leaf=lambda leaf: isinstance(leaf, SymbolicSpec))
    leaves = []
    for leaf in spec_leaves(argument):
        if isinstance(leaf, SymbolicSpec):
            node = graph.placeholder(f"given_{len(specs)}")
            specs[node] = leaf
            leaves.append(node)
        else:
            leaves.append(leaf)
    return pytree.tree_unflatten(leaves, structure)


def _copy(
    module: fx.GraphModule,
    graph: fx.Graph,
    inputs: list[Any],
    values: Mapping[str, Any],
    specs: dict[fx.Node, SymbolicSpec],
) -> Any:
    """Copy the compute nodes of a graph; return its output over the copies."""
    copies: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(arguments)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: copies[n])
        else:
            copy = graph.node_copy(node, lambda n: copies[n])
            copies[node] = copy
            if isinstance(values[node.name], SymbolicSpec):
                specs[copy] = values[node.name]
    raise AssertionError("a graph ends with its output")


def _items(graph: fx.Graph, sequence: fx.Node, count: int) -> list[fx.Node]:
    return [graph.call_function(operator.getitem, (sequence, index)) for index in range(count)]


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive nodes of a piece.

    Attributes:
        nodes: The attributes that the compute nodes read, then the compute nodes, in order.
        inputs: Values from outside that they read, in the order of their first use.
        outputs: Values that later nodes or the output of the piece read.
        key: Equal for segments that differ only in the values of their weights; None for a segment
            that occurs once.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: Hashable = None


def segments(pieces: Iterable[Piece]) -> list[list[Segment]]:
    """Divide every piece into repeated segments and what lies between them.

    A segment starts and ends where a single tensor is live, so that no two of them share memory.
    """
    pieces = list(pieces)
    atoms = [_atoms(piece) for piece in pieces]
    counts = Counter(key for runs in atoms for _, key in runs)
    result = []
    for piece, piece_atoms in zip(pieces, atoms, strict=True):
        runs: list[tuple[list[fx.Node], Hashable]] = []
        for nodes, key in piece_atoms:
            if key is not None and (counts[key] - 1) * len(nodes) >= _MIN_SAVED:
                runs.append((nodes, key))
            elif runs and runs[-1][1] is None:
                # Every segment costs a little: neighbors that do not repeat become one.
                runs[-1] = (runs[-1][0] + nodes, None)
            else:
                runs.append((nodes, None))
        result.append(_with_boundaries(piece, runs))
    return result


def _atoms(piece: Piece) -> list[tuple[list[fx.Node], Hashable]]:
    """Return the shortest runs of nodes that may be segments, each with its key."""
    nodes = piece.nodes
    ends = [-1, *_narrow_positions(piece, nodes), len(nodes) - 1]
    atoms = [nodes[a + 1 : b + 1] for a, b in pairwise(ends)]
    return [(atom, _structure(piece, atom)) for atom in atoms if atom]


def _narrow_positions(piece: Piece, nodes: Sequence[fx.Node]) -> list[int]:
    """Return the positions of nodes after which one tensor is live and nothing else."""
    last_use = _last_uses(piece, nodes)
    live: set[fx.Node] = {node for node in piece.inputs if last_use.get(node, -1) >= 0}
    ending: dict[int, list[fx.Node]] = {}
    for node, position in last_use.items():
        ending.setdefault(position, []).append(node)
    narrow = []
    for position, node in enumerate(nodes[:-1]):
        if last_use.get(node, -1) > position:
            live.add(node)
        live.difference_update(ending.get(position, ()))
        if len(live) == 1 and next(iter(live)) in piece.specs:
            narrow.append(position)
    return narrow


def _last_uses(piece: Piece, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return the position of the last reader of every value; the output stands at the end."""
    position = {node: index for index, node in enumerate(nodes)}
    return {
        node: max(position.get(user, len(nodes)) for user in node.users)
        for node in piece.module.graph.nodes
        if node.users and node.op != "get_attr"
    }


def _with_boundaries(piece: Piece, runs: Sequence[tuple[list[fx.Node], Hashable]]) -> list[Segment]:
    """Add to every run of nodes its inputs and outputs."""
    last_use = _last_uses(piece, piece.nodes)
    result, start = [], 0
    for nodes, key in runs:
        stop = start + len(nodes)
        inside = set(nodes)
        read = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes))
        attributes = [n for n in read if n.op == "get_attr"]
        inputs = tuple(n for n in read if n.op != "get_attr" and n not in inside)
        outputs = tuple(n for n in nodes if last_use.get(n, -1) >= stop)
        if key is not None:
            # The same nodes with other outputs are another ONNX graph.
            key = key, tuple(index for index, n in enumerate(nodes) if n in outputs)
        result.append(Segment((*attributes, *nodes), inputs, outputs, key))
        start = stop
    return result


def _structure(piece: Piece, nodes: Sequence[fx.Node]) -> Hashable:
    """Describe consecutive nodes up to names and values of weights; None if that is impossible."""
    modules = {
        node: resolve(piece.module, str(node.target)) for node in nodes if node.op == "call_module"
    }
    if not all(map(_is_describable, modules.values())):
        return None
    number = {node: f"%{index}" for index, node in enumerate(nodes)}
    entering: dict[fx.Node, str] = {}
    weights: dict[int, int] = {}

    def describe_target(node: fx.Node) -> str:
        if node.op == "call_module":
            return repr(_describe_module(modules[node], weights))
        return node.target if isinstance(node.target, str) else f"{node.target} {id(node.target)}"

    def describe_source(node: fx.Node) -> str:
        if node.op == "get_attr":
            return repr(_describe_weight(resolve(piece.module, str(node.target)), weights))
        if node in number:
            return number[node]
        return entering.setdefault(node, f"entering {len(entering)} {piece.specs.get(node)}")

    return digest(node_lines(nodes, describe_target, describe_source))


def _is_describable(module: nn.Module) -> bool:
    """Whether a module consists of modules of torch and of the compiler, without hooks."""
    return all(
        type(child).__module__.startswith(TRUSTED_PACKAGES)
        and not child._forward_hooks
        and not child._forward_pre_hooks
        for child in module.modules()
    )


def _describe_module(module: nn.Module, weights: dict[int, int]) -> tuple[Any, ...]:
    """Describe a module by the classes and options of its submodules and by its weights."""
    facts: list[Any] = []
    for name, child in module.named_modules():
        options = sorted(
            (key, repr(value))
            for key, value in vars(child).items()
            if not key.startswith("_") and not isinstance(value, torch.Tensor)
        )
        facts.append((name, type(child), options))
    for name, tensor in named_tensors(module):
        facts.append((name, _describe_weight(tensor, weights)))
    return tuple(facts)


def _describe_weight(tensor: Any, weights: dict[int, int]) -> tuple[Any, ...]:
    """Describe a weight by shape, dtype and the number of its first appearance in the block."""
    if not isinstance(tensor, torch.Tensor):
        return (repr(tensor),)
    return tuple(tensor.shape), tensor.dtype, weights.setdefault(id(tensor), len(weights))
