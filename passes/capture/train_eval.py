"""Merge the graphs that a model has in its two modes, where Python code asks for the mode.

`if self.training:` in a forward leaves one branch in the graph. Both graphs are aligned node by
node; where they differ, a module runs the one or the other by the mode that it is in. Only what
has no parameters of its own can be put there: stochastic depth, noise, statistics by hand.
"""

from __future__ import annotations

import difflib
import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from passes.capture.refold import attach, flagged_call, free_path, rule_key
from passes.errors import CaptureError
from passes.ir.program import Provenance, graph_module, provenance, resolve, set_provenance

__all__ = ["ByMode", "graph_lines", "merge_modes"]


class ByMode(nn.Module):
    """Runs one of two graphs over the same values, by the mode that it is in."""

    def __init__(self, in_training: fx.GraphModule, in_evaluation: fx.GraphModule) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation

    def forward(self, *values: Any) -> Any:
        """Run the graph of the mode."""
        return self.in_training(*values) if self.training else self.in_evaluation(*values)

    def extra_repr(self) -> str:
        """Return both graphs for the module's repr, with numbers for names."""
        graphs = (("training", self.in_training), ("evaluation", self.in_evaluation))
        return "\n".join(f"{mode}: {'; '.join(graph_lines(m))}" for mode, m in graphs)


def graph_lines(module: fx.GraphModule) -> list[str]:
    """Return a graph as text, one line a node, that does not depend on the names of nodes."""
    number = {node: f"%{index}" for index, node in enumerate(module.graph.nodes)}
    return [
        f"{node.op} {node._pretty_print_target(node.target) if node.op != 'placeholder' else ''} "
        f"{fx.node.map_arg((node.args, node.kwargs), lambda n: number[n])}"
        for node in module.graph.nodes
    ]


_QUESTIONS = (torch.ops.aten.sym_size.int,)
"""Operators that only ask for a size: they stay where they are, whoever reads them."""

_Pair = tuple[fx.Node | None, fx.Node | None]


@dataclass(eq=False)
class _Region:
    """A place where the graphs differ: the nodes of each, and what is read of it behind.

    An output is a value of the training graph with the one that takes its place in evaluation
    mode; None where that mode needs none.
    """

    training: list[fx.Node]
    evaluation: list[fx.Node]
    before: fx.Node
    outputs: list[_Pair] = field(default_factory=list)
    calls: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)

    def inputs(self) -> list[tuple[int, fx.Node]]:
        """What it reads: 0 for the training graph and 1 for the other, and the node there."""
        found: dict[tuple[int, fx.Node], None] = {}
        for side, nodes in enumerate((self.training, self.evaluation)):
            inside = set(nodes)
            read = [source for node in nodes for source in node.all_input_nodes]
            read += [node for pair in self.outputs if (node := pair[side]) is not None]
            found |= {(side, source): None for source in read if source not in inside}
        return list(found)


def merge_modes(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> tuple[str, ...]:
    """Change the graph of training mode so that it follows the mode.

    The modules that hold the differences are added to `model`.

    Args:
        model: Root of both graphs.
        training: The graph in training mode, toggled; it is changed in place.
        evaluation: The graph in evaluation mode.

    Returns:
        The paths of the modules whose forward differs between the modes.

    Raises:
        CaptureError: The graphs cannot be merged; the message says where they part.
    """
    merger = _Merger(model, training)
    merger.align(evaluation)
    return merger.build()


class _Merger:
    def __init__(self, model: nn.Module, training: fx.Graph) -> None:
        self.model = model
        self.graph = training
        self.graph.owning_module = None
        self.regions: list[_Region] = []
        self.owner: dict[fx.Node, _Region] = {}
        """The region of every node that only one of the graphs has."""
        self.twin: dict[fx.Node, fx.Node] = {}
        """The node of the training graph for every node of the other that is the same."""
        self.attributes: dict[str, fx.Node] = {}

    def align(self, evaluation: fx.Graph) -> None:
        """Find the nodes that both graphs have, the regions between them, and what they give."""
        for ours, other in zip(_placeholders(self.graph), _placeholders(evaluation), strict=True):
            self.twin[other] = ours
        first, second = _compute(self.graph), _compute(evaluation)
        matcher = difflib.SequenceMatcher(
            None, list(map(_key, first)), list(map(_key, second)), autojunk=False
        )
        for kind, i, i_end, j, j_end in matcher.get_opcodes():
            if kind == "equal":
                self.twin.update(zip(second[j:j_end], first[i:i_end], strict=True))
                continue
            before = first[i_end] if i_end < len(first) else self.graph.output_node()
            steps = [node for node in first[i:i_end] if node.target not in _QUESTIONS]
            region = _Region(steps, second[j:j_end], before)
            self.regions.append(region)
            self.owner |= dict.fromkeys((*region.training, *region.evaluation), region)
        ends = self.graph.output_node(), evaluation.output_node()
        if _skeleton(ends[0]) != _skeleton(ends[1]):
            raise CaptureError("the structure of the outputs differs between the modes")
        self.twin[ends[1]] = ends[0]
        for other, ours in list(self.twin.items()):
            for pair in zip(_sources(ours), _sources(other), strict=True):
                if not self._same(*pair):
                    self._output(pair, ours)
        for region in self.regions:  # a region may read what another one computes
            for side, node in region.inputs():
                if (owner := self.owner.get(node)) is not None:
                    wanted = (node, None) if side == 0 else (None, node)
                    if wanted not in owner.outputs:
                        owner.outputs.append(wanted)
        self.pairs = [(ours, other) for other, ours in self.twin.items()]

    def _same(self, ours: fx.Node, other: fx.Node) -> bool:
        if ours.op == other.op == "get_attr":
            return ours.target == other.target
        return self.twin.get(other) is ours

    def _output(self, pair: tuple[fx.Node, fx.Node], user: fx.Node) -> None:
        """Have the region that the pair comes from give it; a new one if there is none."""
        owners = {self.owner[node] for node in pair if node in self.owner}
        known = [region for region in self.regions if pair in region.outputs]
        if known:
            return
        if len(owners) == 1:
            owners.pop().outputs.append(pair)
        else:
            self.regions.append(_Region([], [], user, [pair]))

    def build(self) -> tuple[str, ...]:
        """Put a module in the place of every region."""
        kept = [r for r in self.regions if r.outputs or any(map(_writes, r.training))]
        for region in kept:
            self._call(region)
        paths = [self._fill(region) for region in kept]
        chosen = {pair: v for r in kept for pair, v in zip(r.outputs, r.values, strict=True)}
        for ours, other in self.pairs:
            pairs = zip(_sources(ours), _sources(other), strict=True)
            _reread(ours, [a if self._same(a, b) else chosen[a, b] for a, b in pairs])
        for node in reversed([n for region in self.regions for n in region.training]):
            self.graph.erase_node(node)
        self._order()
        return tuple(dict.fromkeys(paths))

    def _call(self, region: _Region) -> None:
        """Insert the call of a region, without its arguments yet, and what it gives."""
        nodes = region.training or region.evaluation or [region.before]
        path = _common([_owner(node).split(".") for node in nodes])
        source = next((provenance(n).source for n in nodes if provenance(n).source), "")
        with self.graph.inserting_before(region.before):
            call = self.graph.create_node("call_module", "by_mode", (), {}, name="by_mode")
            call.target = free_path(self.model, path, call.name)
            region.values = [call] if region.outputs else []
            if len(region.outputs) > 1:
                region.values = [
                    self.graph.call_function(operator.getitem, (call, index))
                    for index in range(len(region.outputs))
                ]
        region.calls = [call]
        for node in (call, *region.values):
            set_provenance(node, Provenance(path, source))

    def _fill(self, region: _Region) -> str:
        """Make the module of a region, and give its call the arguments."""
        (call,), inputs = region.calls, region.inputs()
        graphs = [self._graph(region, side, inputs) for side in (0, 1)]
        attach(self.model, str(call.target), ByMode(*graphs))
        call.args = tuple(self._merged(side, node) for side, node in inputs)
        return provenance(call).path

    def _merged(self, side: int, node: fx.Node) -> fx.Node:
        """The value of the merged graph that a node of one of the graphs stands for."""
        if (owner := self.owner.get(node)) is not None:
            return owner.values[owner.outputs.index((node, None) if side == 0 else (None, node))]
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        return node if side == 0 else self.twin[node]

    def _attribute(self, target: str) -> fx.Node:
        if target not in self.attributes:
            place = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(place):
                self.attributes[target] = self.graph.get_attr(target)
        return self.attributes[target]

    def _graph(
        self, region: _Region, side: int, inputs: list[tuple[int, fx.Node]]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        given = [graph.placeholder(f"x{index}") for index in range(len(inputs))]
        mapping = {
            node: value for (own, node), value in zip(inputs, given, strict=True) if own == side
        }
        for node in (region.training, region.evaluation)[side]:
            if node.op == "call_module" and _state(resolve(self.model, str(node.target))):
                raise CaptureError(
                    f"module {node.target} has parameters or buffers and is called in one mode only"
                )
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta.clear()
        wanted = [pair[side] for pair in region.outputs]
        results = [None if node is None else mapping[node] for node in wanted]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        return graph_module(self.model, graph, "Branch")

    def _order(self) -> None:
        """Move every call of a region behind what it reads."""
        regions = {region.calls[0]: region for region in self.regions if region.calls}
        position = {node: index for index, node in enumerate(self.graph.nodes)}
        for call, region in regions.items():
            last = max(call.all_input_nodes, key=position.__getitem__, default=call)
            if position[last] > position[call]:
                for node in reversed(dict.fromkeys((call, *region.values))):
                    last.append(node)
        try:
            self.graph.lint()
        except RuntimeError as error:
            raise CaptureError(f"the modes do things in another order ({error})") from error


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward has the node; a call is made by the module around it."""
    path = provenance(node).path
    own = node.op == "call_module" and node.target == path
    return path.rpartition(".")[0] if own else path


def _common(paths: list[list[str]]) -> str:
    """The longest path that all of them begin with."""
    levels = itertools.takewhile(lambda atoms: len(set(atoms)) == 1, zip(*paths, strict=False))
    return ".".join(atoms[0] for atoms in levels)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _compute(graph: fx.Graph) -> list[fx.Node]:
    skipped = ("placeholder", "get_attr", "output")
    return [node for node in graph.nodes if node.op not in skipped]


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in the order of its arguments, with repeats."""
    found: list[fx.Node] = []
    call = flagged_call(node)

    def visit(source: fx.Node) -> fx.Node:
        found.append(source)
        return source

    fx.node.map_arg((node.args, node.kwargs) if call is None else dict(call), visit)
    return found


def _reread(node: fx.Node, sources: list[fx.Node]) -> None:
    """Let a node read other values, in the order of `_sources`."""
    values = iter(sources)

    def following(_: fx.Node) -> fx.Node:
        return next(values)

    node.args = fx.node.map_arg(node.args, following)
    node.kwargs = fx.node.map_arg(node.kwargs, following)


def _skeleton(node: fx.Node) -> str:
    """The arguments of a node as text, with a sign for every node that it reads."""

    def sign(source: fx.Node) -> str:
        return str(source.target) if source.op == "get_attr" else "%"

    return repr(fx.node.map_arg((node.args, node.kwargs), sign))


def _key(node: fx.Node) -> tuple[Any, ...]:
    """What two nodes have in common that are the same step of the same module."""
    key = rule_key(node)
    return key or (provenance(node).path, node.op, node.target, _skeleton(node))


def _writes(node: fx.Node) -> bool:
    """Whether a node changes what it is given."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and (
        name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    )


def _state(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))
