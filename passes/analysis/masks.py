"""Find masks, and the values that they hide: no guess may show these.

    h = x * mask                 states after it depend on no masked position of x: guesses read h
    m = lengths > 0              recomputed wherever it is read, and never guessed
    s = scores.masked_fill(m)    no cut between the mask and the product: a guess of weights that
    w = softmax(s)               are only nearly 0 would mix what they separate
    y = w @ v

A mask with dropout is no side value, as it draws random numbers; a cut that it crosses is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from passes.analysis.dependence import (
    PARTS,
    Dependence,
    Recomputable,
    input_leaves,
    is_floating,
    is_state,
    name_of,
    read_by,
    readers_of,
)
from passes.ir.module_walk import submodule
from passes.ir.observer import Fact
from passes.ir.program import Program

MAX_SIDE_SHARE = 0.01
"""Largest share of all FLOPs that a stage may spend to recompute one side value."""

_HIDING = frozenset({
    "mul", "mul_", "imul", "div", "div_", "truediv", "where", "masked_fill", "masked_fill_",
    "matmul", "mm", "bmm", "einsum", "minimum", "maximum",
})  # fmt: skip
"""Functions of a value and of another input after which nobody may read the value: masks."""

_ELEMENTWISE = frozenset({"add", "add_", "iadd", "sub", "sub_", "neg", "cat", "stack", "concat"})
"""Other functions that may lie between an input and its mask."""


def _module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls; None for other nodes."""
    owner = node.graph.owning_module
    called = node.op == "call_module" and owner is not None
    return submodule(owner, str(node.target)) if called and owner is not None else None


def plain_values(program: Program) -> set[fx.Node]:
    """Return the inputs, and the values that follow from inputs without any parameter or module."""
    plain: set[fx.Node] = set()
    for node in program.graph.nodes:
        computed = node.op in ("call_function", "call_method") and plain.issuperset(
            node.all_input_nodes
        )
        if computed or node.op == "placeholder":
            plain.add(node)
    return plain


def after_masks(
    value: fx.Node,
    facts: Mapping[fx.Node, Fact],
    depends: Mapping[fx.Node, Dependence],
    plain: set[fx.Node],
) -> fx.Node:
    """Return what the program makes of a value by masks before anything else reads it.

    The states of `y = f(x * mask)` depend on no masked position of x, which no guess may read.
    """
    result = value
    while True:
        readers = readers_of(value)
        writers = [r for r in readers if r in facts and facts[r].writes & facts[value].storages]
        if writers and value.op != "placeholder":
            written = [s for writer in writers for s in read_by(writer) if s is not value]
            if any(depends[source] for source in written if source in plain):
                result = value  # x[mask] = 0: later readers see what was written
            readers = [reader for reader in readers if reader not in writers]
        if len(readers) != 1 or readers[0] not in facts:
            return result
        (reader,) = readers
        passes = name_of(reader) in _HIDING | _ELEMENTWISE | PARTS
        if not passes and not isinstance(_module_of(reader), nn.Identity | _DropoutNd):
            return result
        others = [source for source in read_by(reader) if source is not value]
        hides = name_of(reader) in _HIDING and any(
            depends[source] for source in others if source in plain
        )
        if hides and is_state(facts[reader]):
            result = reader
        value = reader


def find_masks(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recomputable: Recomputable,
    recompute: Callable[[float], Recomputable],
    depends: Mapping[fx.Node, Dependence],
) -> Recomputable:
    """Return masked inputs, and masks that nothing learned goes into, as side values of any cost.

    No guess of a mask could stand in for it: one that is only nearly 0 mixes what it separates.
    """
    leaves = input_leaves(program, facts)
    plain = plain_values(program)
    floats = {leaf for leaf in leaves if is_floating(facts[leaf])}
    learned = _learned(program, facts, set(program.graph.nodes) - plain | floats)
    states = {node for node in program.order if is_state(facts[node])}
    wanted = {node for node in states - learned if learned.intersection(node.users)}
    wanted |= {after_masks(leaf, facts, depends, plain) for leaf in leaves if is_state(facts[leaf])}
    missing = {node for node in wanted if node.op != "placeholder"} - recomputable.keys()
    return recomputed(missing, recompute)


def _learned(
    program: Program, facts: Mapping[fx.Node, Fact], learned: set[fx.Node]
) -> set[fx.Node]:
    """Return the values that follow from some, also where these are written into their memory."""
    learned, memory = {*learned}, set[int]()
    while True:
        before = len(learned), len(memory)
        for node in program.order:
            if learned.intersection(read_by(node)) or facts[node].storages & memory:
                learned.add(node)
                memory |= facts[node].writes
        if before == (len(learned), len(memory)):
            return learned


def recomputed(
    wanted: Collection[fx.Node], recompute: Callable[[float], Recomputable]
) -> Recomputable:
    """Return values with all that recomputes them, at any cost, where anything does.

    Args:
        wanted: The values.
        recompute: Finds the side values up to a share of all FLOPs.
    """
    missing = {*wanted}
    result: Recomputable = {}
    share = 2 * MAX_SIDE_SHARE
    while missing and share < 2:
        values = recompute(share)
        for node in missing & values.keys():
            result = {**result, **{member: values[member] for member in values[node]}}
        missing -= result.keys()
        share *= 2
    return result


def without_dropout(facts: Mapping[fx.Node, Fact]) -> dict[fx.Node, Fact]:
    """Return the facts of the program with dropout off."""
    return {
        node: replace(fact, random=False) if is_dropout(node) else fact
        for node, fact in facts.items()
    }


def is_dropout(node: fx.Node) -> bool:
    """Whether a node drops values at random in training mode, and writes to no memory."""
    module = _module_of(node)
    return isinstance(module, _DropoutNd) and not module.inplace


def remove_dropout(module: fx.GraphModule) -> None:
    """Remove the calls of dropout from a module: a guess needs no noise of its own."""
    for node in [node for node in module.graph.nodes if is_dropout(node)]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()


_COMBINING = frozenset({
    "matmul", "mm", "bmm", "mv", "einsum", "baddbmm", "imatmul", "scaled_dot_product_attention",
})  # fmt: skip
"""Functions that add up values under weights, of which a zero hides a value."""

_WEIGHING = frozenset({
    "softmax", "log_softmax", "sigmoid", "relu", "exp", "tanh", "nan_to_num", "pow", "clamp",
    "type_as", "to", "half", "bfloat16", "double",
})  # fmt: skip
"""Functions that lie between masked scores and the product with what they weigh."""


@dataclass(frozen=True)
class _Weights:
    """Values on the way from a mask to a product.

    Attributes:
        nodes: The values so far.
        hidden: Whether zeros among them hide something: after a mask that was added, these come
            with a softmax.
    """

    nodes: frozenset[fx.Node]
    hidden: bool


def find_weights(
    program: Program, facts: Mapping[fx.Node, Fact], depends: Mapping[fx.Node, Dependence]
) -> frozenset[fx.Node]:
    """Return what may cross no cut: masks with dropout, and masked weights before their product.

    A guess of them would only nearly hide what they hide; scores before the mask hold, beside what
    a position may read, what the mask takes away.

    Args:
        program: The program.
        facts: Observed facts by node.
        depends: The inputs that every value depends on.
    """
    masks = plain_values(program)  # and all that follows from no input
    noisy: set[fx.Node] = set()  # masks that draw random numbers, and what follows from them
    ways: dict[fx.Node, _Weights] = {}
    found: set[fx.Node] = set()
    order = program.order
    for index, node in enumerate(order):
        read, name = read_by(node), name_of(node)
        masks.update(value for value in (node, *read) if not depends[value])
        follows = bool(noisy.intersection(read)) and node.op != "call_module"
        if masks.issuperset(read) and (follows or is_dropout(node)):
            noisy.add(node)
            masks.add(node)
        elif name in _COMBINING:
            found.update(*(ways[n].nodes for n in read if n in ways and ways[n].hidden))
        elif way := _way(node, ways, masks):
            if noisy.intersection(read):
                way = replace(way, nodes=way.nodes | noisy)
            ways[node] = way
            for written in facts[node].writes:  # scores[mask] = -inf: later readers see it
                ways.update((v, way) for v in order[:index] if written in facts[v].storages)
        if node not in noisy and name in _HIDING | _COMBINING and noisy.intersection(read):
            found |= noisy
    return frozenset(found)


def _way(
    node: fx.Node, ways: Mapping[fx.Node, _Weights], masks: Collection[fx.Node]
) -> _Weights | None:
    """Return the way on which a node lies, if it applies a mask, or goes on from one."""
    name, read = name_of(node), read_by(node)
    values = [source for source in read if source not in masks]
    if not values:
        return None
    earlier = ways.get(values[0])
    before = _Weights(_scores(values[0]), False) if earlier is None else earlier
    nodes = before.nodes | {node}
    masked = len(values) == 1 < len(read)
    hides = name in _HIDING or name in ("setitem", "index_put", "index_put_")
    if (masked and hides) or name in ("tril", "tril_", "triu", "triu_"):
        return _Weights(nodes, True)
    if masked and name in ("add", "add_", "iadd", "sub", "sub_"):
        return _Weights(nodes, before.hidden)
    if earlier is None or not _weighs(node):
        return None
    softmax = name == "softmax" or isinstance(_module_of(node), nn.Softmax)
    return _Weights(nodes, before.hidden or softmax)


def _weighs(node: fx.Node) -> bool:
    """Whether a value may lie between the products that scores come from and go into."""
    layers = nn.Identity | _DropoutNd | nn.Softmax | nn.Sigmoid | nn.ReLU
    names = _WEIGHING | _HIDING - _COMBINING | _ELEMENTWISE | PARTS
    return name_of(node) in names or isinstance(_module_of(node), layers)


def _scores(node: fx.Node) -> frozenset[fx.Node]:
    """Return a value with those before it, back to the product of two values that it comes from."""
    nodes = {node}
    while _weighs(node) and read_by(node):
        node = read_by(node)[0]
        nodes.add(node)
    return frozenset(nodes if name_of(node) in _COMBINING else ())
