"""Merge the graphs of training and evaluation mode of a model that branches on `self.training`.

`if self.training:` in a forward leaves one branch in a graph. The two graphs are aligned node by
node; where they differ, a `ByMode` module runs the one or the other branch by its mode:

    training:    a = linear(x);  m = mask(a);  b = mul(a, m);  c = head(b)
    evaluation:  a = linear(x);                                c = head(a)
    merged:      a = linear(x);  b = by_mode(a);               c = head(b)

where `by_mode` returns `mul(a, mask(a))` in training mode and `a` in evaluation mode. A branch may
hold no parameters or buffers of its own, because a module that only one mode calls cannot be a node
of the merged graph: stochastic depth, noise and statistics by hand are possible.
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
from passes.ir.program import (
    Provenance,
    graph_module,
    is_compute,
    provenance,
    resolve,
    set_provenance,
)
from passes.ir.structure_hash import arguments_text, graph_lines


class ByMode(nn.Module):
    """Run one of two graphs on the same values, by the mode of the module.

    Args:
        in_training: The graph for training mode.
        in_evaluation: The graph for evaluation mode.
    """

    def __init__(self, in_training: fx.GraphModule, in_evaluation: fx.GraphModule) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation

    def forward(self, *values: Any) -> Any:
        """Run the graph of the mode."""
        return self.in_training(*values) if self.training else self.in_evaluation(*values)

    def extra_repr(self) -> str:
        """Return both graphs, with numbers for names of nodes: part of the program's digest."""
        graphs = (("training", self.in_training), ("evaluation", self.in_evaluation))
        return "\n".join(f"{mode}: {'; '.join(graph_lines(m.graph))}" for mode, m in graphs)


_SIZE_QUERIES = (torch.ops.aten.sym_size.int,)
"""Operators that only query a size: they stay where they are, whoever reads them."""

_Pair = tuple[fx.Node | None, fx.Node | None]
"""A value of the training graph and the value of the evaluation graph in its place."""


@dataclass(eq=False)
class _Region:
    """A place where the graphs differ.

    Attributes:
        training: Nodes of the training graph.
        evaluation: Nodes of the evaluation graph.
        before: Node of the training graph that follows the region.
        outputs: Values that later nodes read; None in a mode that needs no such value.
        calls: The call of the `ByMode` module in the merged graph, once it is inserted.
        values: The nodes of the merged graph that stand for the outputs.
    """

    training: list[fx.Node]
    evaluation: list[fx.Node]
    before: fx.Node
    outputs: list[_Pair] = field(default_factory=list)
    calls: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)

    def inputs(self) -> list[tuple[int, fx.Node]]:
        """Return what the region reads: 0 for the training graph or 1, and the node there."""
        inputs: dict[tuple[int, fx.Node], None] = {}
        for side, nodes in enumerate((self.training, self.evaluation)):
            inside = set(nodes)
            sources = [source for node in nodes for source in node.all_input_nodes]
            sources += [node for pair in self.outputs if (node := pair[side]) is not None]
            inputs |= {(side, source): None for source in sources if source not in inside}
        return list(inputs)


def merge_modes(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> tuple[str, ...]:
    """Change the graph of training mode so that it follows the mode.

    Args:
        model: Root of both graphs; it gets the `ByMode` modules.
        training: The graph in training mode, after `toggle`; it is changed in place.
        evaluation: The graph in evaluation mode.

    Returns:
        The paths of the modules whose forward differs between the modes.

    Raises:
        CaptureError: The graphs cannot be merged; the message says where they diverge.
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
        self.region_of: dict[fx.Node, _Region] = {}
        """The region of every node that only one of the graphs has."""
        self.counterpart: dict[fx.Node, fx.Node] = {}
        """The node of the training graph for every equal node of the evaluation graph."""
        self.attributes: dict[str, fx.Node] = {}

    def align(self, evaluation: fx.Graph) -> None:
        """Match the nodes of both graphs; find the regions between them and their outputs."""
        placeholders = (graph.find_nodes(op="placeholder") for graph in (evaluation, self.graph))
        self.counterpart.update(zip(*placeholders, strict=True))
        self._match_nodes(evaluation)
        ends = self.graph.output_node(), evaluation.output_node()
        if arguments_text(ends[0], _anonymous) != arguments_text(ends[1], _anonymous):
            raise CaptureError("the structure of the outputs differs between the modes")
        self.counterpart[ends[1]] = ends[0]
        for evaluated, trained in list(self.counterpart.items()):
            for pair in zip(_sources(trained), _sources(evaluated), strict=True):
                if not self._same(*pair):
                    self._add_output(pair, trained)
        for region in self.regions:  # a region may read what another one computes
            for side, node in region.inputs():
                if (owner := self.region_of.get(node)) is not None:
                    output = (node, None) if side == 0 else (None, node)
                    if output not in owner.outputs:
                        owner.outputs.append(output)
        self.pairs = [(trained, evaluated) for evaluated, trained in self.counterpart.items()]

    def _match_nodes(self, evaluation: fx.Graph) -> None:
        """Find the longest common subsequences of equal nodes; the rest makes the regions."""
        first, second = (
            [node for node in graph.nodes if is_compute(node)] for graph in (self.graph, evaluation)
        )
        matcher = difflib.SequenceMatcher(
            None, list(map(_alignment_key, first)), list(map(_alignment_key, second)),
            autojunk=False,
        )  # fmt: skip
        for kind, i, i_end, j, j_end in matcher.get_opcodes():
            if kind == "equal":
                self.counterpart.update(zip(second[j:j_end], first[i:i_end], strict=True))
                continue
            before = first[i_end] if i_end < len(first) else self.graph.output_node()
            nodes = [node for node in first[i:i_end] if node.target not in _SIZE_QUERIES]
            region = _Region(nodes, second[j:j_end], before)
            self.regions.append(region)
            self.region_of |= dict.fromkeys((*region.training, *region.evaluation), region)

    def _same(self, trained: fx.Node, evaluated: fx.Node) -> bool:
        if trained.op == evaluated.op == "get_attr":
            return trained.target == evaluated.target
        return self.counterpart.get(evaluated) is trained

    def _add_output(self, pair: tuple[fx.Node, fx.Node], user: fx.Node) -> None:
        """Add a pair of values to the region that computes them, or to a new, empty region."""
        if any(pair in region.outputs for region in self.regions):
            return
        owners = {self.region_of[node] for node in pair if node in self.region_of}
        if len(owners) == 1:
            owners.pop().outputs.append(pair)
        else:
            self.regions.append(_Region([], [], user, [pair]))

    def build(self) -> tuple[str, ...]:
        """Replace every region by the call of a module; return the paths of the regions."""
        needed = [r for r in self.regions if r.outputs or any(map(_writes, r.training))]
        for region in needed:
            self._insert_call(region)
        paths = [self._attach_module(region) for region in needed]
        chosen = {pair: v for r in needed for pair, v in zip(r.outputs, r.values, strict=True)}
        for trained, evaluated in self.pairs:
            pairs = zip(_sources(trained), _sources(evaluated), strict=True)
            sources = [a if self._same(a, b) else chosen[a, b] for a, b in pairs]
            _replace_sources(trained, sources)
        for node in reversed([n for region in self.regions for n in region.training]):
            self.graph.erase_node(node)
        self._sort_calls()
        return tuple(dict.fromkeys(paths))

    def _insert_call(self, region: _Region) -> None:
        """Insert the call of a region, still without arguments, and the reads of its results."""
        nodes = region.training or region.evaluation or [region.before]
        path = _common_prefix([_caller_path(node).split(".") for node in nodes])
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

    def _attach_module(self, region: _Region) -> str:
        """Make the module of a region and set the arguments of its call; return its path."""
        (call,), inputs = region.calls, region.inputs()
        branches = [self._make_branch(region, side, inputs) for side in (0, 1)]
        attach(self.model, str(call.target), ByMode(*branches))
        call.args = tuple(self._merged(side, node) for side, node in inputs)
        return provenance(call).path

    def _merged(self, side: int, node: fx.Node) -> fx.Node:
        """Return the node of the merged graph that stands for a node of one of the graphs."""
        if (owner := self.region_of.get(node)) is not None:
            return owner.values[owner.outputs.index((node, None) if side == 0 else (None, node))]
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        return node if side == 0 else self.counterpart[node]

    def _attribute(self, target: str) -> fx.Node:
        if target not in self.attributes:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.attributes[target] = self.graph.get_attr(target)
        return self.attributes[target]

    def _make_branch(
        self, region: _Region, side: int, inputs: list[tuple[int, fx.Node]]
    ) -> fx.GraphModule:
        """Copy the nodes of one mode into a graph; both branches take the inputs of both."""
        graph = fx.Graph()
        mapping = {}
        for index, (input_side, node) in enumerate(inputs):
            placeholder = graph.placeholder(f"x{index}")
            if input_side == side:
                mapping[node] = placeholder
        for node in (region.training, region.evaluation)[side]:
            if node.op == "call_module" and _has_state(resolve(self.model, str(node.target))):
                raise CaptureError(
                    f"module {node.target} has parameters or buffers and is called in one mode only"
                )
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta.clear()
        outputs = [pair[side] for pair in region.outputs]
        results = [None if node is None else mapping[node] for node in outputs]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        return graph_module(self.model, graph, "Branch")

    def _sort_calls(self) -> None:
        """Move every call of a region after the values that it reads."""
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
            raise CaptureError(f"the modes compute in different orders ({error})") from error


def _caller_path(node: fx.Node) -> str:
    """Return the path of the module whose forward contains the node, be it a module call."""
    path = provenance(node).path
    is_call_of_path = node.op == "call_module" and node.target == path
    return path.rpartition(".")[0] if is_call_of_path else path


def _common_prefix(paths: list[list[str]]) -> str:
    """Return the longest path that all paths begin with.

    >>> _common_prefix([["blocks", "0", "conv"], ["blocks", "0", "norm"]])
    'blocks.0'
    """
    levels = itertools.takewhile(lambda atoms: len(set(atoms)) == 1, zip(*paths, strict=False))
    return ".".join(atoms[0] for atoms in levels)


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads, in the order of its arguments, with repeats."""
    sources: list[fx.Node] = []
    call = flagged_call(node)

    def visit(source: fx.Node) -> fx.Node:
        sources.append(source)
        return source

    fx.node.map_arg((node.args, node.kwargs) if call is None else dict(call), visit)
    return sources


def _replace_sources(node: fx.Node, sources: list[fx.Node]) -> None:
    """Make a node read other values, in the order of `_sources`."""
    values = iter(sources)

    def following(_: fx.Node) -> fx.Node:
        return next(values)

    node.args = fx.node.map_arg(node.args, following)
    node.kwargs = fx.node.map_arg(node.kwargs, following)


def _anonymous(source: fx.Node) -> str:
    return str(source.target) if source.op == "get_attr" else "%"


def _alignment_key(node: fx.Node) -> tuple[Any, ...]:
    """Return a key that is equal for the same step of the same module in both graphs."""
    options = arguments_text(node, _anonymous)
    return rule_key(node) or (provenance(node).path, node.op, node.target, options)


def _writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments in place."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and (
        name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    )


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))
