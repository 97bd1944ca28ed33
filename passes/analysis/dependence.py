"""Find what the values of a program depend on: inputs, and side values.

- `input_dependence`: the inputs that every value depends on, in-place writes included. A
  preprocessing operator or coarse propagator may read no input that the state it approximates does
  not depend on: otherwise a prediction could depend on the labels.
- `sized_by_values`: the values whose size is data, which cannot be guessed.
- `find_recomputable`: the side values, which are cheap to recompute from the inputs (an attention
  mask, a position embedding). A stage that reads one recomputes it with its recomputable subgraph,
  so that it need not cross a cut:

      a = embed(tokens)         subgraph of a: {a, b}, because b writes the memory of a
      b = a.mul_(scale)         subgraph of b: {a, b}
      m = dropout(b)            none: it draws random numbers
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from torch import fx

from passes.cost.flops import NodeCost
from passes.ir.observer import Fact, Own
from passes.ir.program import Program

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")

Recomputable = Mapping[fx.Node, tuple[fx.Node, ...]]
"""For every side value, the nodes that recompute it from the inputs, itself included, in order."""


Dependence = frozenset[fx.Node | Own]
"""Inputs that a value may depend on, and what it may show of them at its own position."""

_Subgraph = frozenset[fx.Node]
"""Nodes that recompute a side value."""

_SIZES = frozenset({
    "size", "sym_size", "numel", "sym_numel", "stride", "sym_stride", "dim", "ndimension", "len",
    "is_floating_point",
})  # fmt: skip
"""Functions that read nothing of a tensor but its type."""

_SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "layout"})

_LIKE = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_empty", "new_full",
})  # fmt: skip
"""Functions that read the type of their first argument, and no values."""

_AS = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Functions that read the values of their first argument, and the type of others."""

PARTS = frozenset({
    "getitem", "select", "slice", "narrow", "index_select", "split", "split_with_sizes",
    "tensor_split", "chunk", "unbind", "view", "reshape", "flatten", "unflatten", "transpose",
    "permute", "movedim", "unsqueeze", "squeeze", "contiguous", "clone", "to", "float",
})  # fmt: skip
"""Functions that return parts of their first argument, or all of it in another form."""


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls; "" for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that read its values, not its sizes alone."""
    return [user for user in node.users if node in read_by(user)]


def read_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node reads."""
    name = name_of(node)
    if name in _SIZES or (name == "getattr" and node.args[1] in _SIZE_ATTRIBUTES):
        return []
    if name in _LIKE:
        others: list[fx.Node] = []
        fx.node.map_arg((node.args[1:], node.kwargs), others.append)
        return others
    if name in _AS and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return node.all_input_nodes


def input_leaves(program: Program, facts: Mapping[fx.Node, Fact]) -> list[fx.Node]:
    """Return the input tensors: placeholders, or what the program takes from these.

    That is an element of a placeholder that holds several tensors, or a part of a tensor of which
    nothing but parts is read: in `x, labels = table[:, :-1], table[:, -1]`, both are inputs.
    """
    return list(dict.fromkeys(part for node in program.inputs for part in _parts(node, facts)))


def _parts(node: fx.Node, facts: Mapping[fx.Node, Fact]) -> list[fx.Node]:
    """Return the parts of a value that the program reads; the value itself if it reads all of it.

    The program does if no part is smaller: `x.unsqueeze(1)` is all of x.
    """
    readers, spec = readers_of(node), facts[node].spec
    if spec is not None and not all(_is_part(reader, node, facts) for reader in readers):
        return [node]
    parts = [part for reader in readers for part in _parts(reader, facts)]
    if spec is None:
        return parts
    types = [facts[part].spec for part in parts]
    return parts if any(t is not None and t.elements < spec.elements for t in types) else [node]


def _is_part(node: fx.Node, whole: fx.Node, facts: Mapping[fx.Node, Fact]) -> bool:
    """Whether a node is a part of a tensor, or a tuple of parts."""
    if node not in facts or facts[node].writes:
        return False
    return name_of(node) in PARTS and node.args[:1] == (whole,)


def input_dependence(
    program: Program, facts: Mapping[fx.Node, Fact]
) -> Mapping[fx.Node, Dependence]:
    """Return, for every node, the input tensors that its value may depend on.

    Example: in `a = f(x); b = g(y); a.add_(b); c = h(a)` the value of `c` depends on x and y,
    although `h` reads `a` and not the result of `add_`. Sizes are no values: that of
    `x.view(y.shape)` depends on x alone. Of a causal sequence that is shifted, the value depends on
    no `Own` any more.

    Args:
        program: The program.
        facts: Observed facts by node.
    """
    leaves = frozenset(input_leaves(program, facts))
    depends: dict[fx.Node, Dependence] = {}
    written: dict[int, Dependence] = {}  # by memory: inputs that writes to it depend on
    for node in program.graph.nodes:
        inputs: Dependence = frozenset()
        if node in leaves:
            spec = facts[node].spec
            axes = (None, *range(len(spec.shape) if spec is not None else 0))
            inputs = frozenset((node, *(Own(node, axis) for axis in axes)))
        nodes = [node, *node.all_input_nodes]
        memory = {storage for n in nodes if n in facts for storage in facts[n].storages}
        inputs = inputs.union(*(depends[source] for source in read_by(node)))
        inputs = inputs.union(*(written.get(storage, frozenset()) for storage in memory))
        depends[node] = inputs - facts[node].hides if node in facts else inputs
        for storage in facts[node].writes if node in facts else ():
            written[storage] = written.get(storage, frozenset()) | inputs
    return depends


def shifted(inputs: Dependence, depends: Mapping[fx.Node, Dependence]) -> Dependence:
    """Return what a value shows of the inputs that it does not show whole.

    Args:
        inputs: What the value depends on.
        depends: The same for all values, as of `input_dependence`.
    """
    leaves = (leaf for leaf in inputs if isinstance(leaf, fx.Node))
    hidden = (depends[leaf] for leaf in leaves if not depends[leaf] <= inputs)
    return inputs.intersection(itertools.chain.from_iterable(hidden))


def sized_by_values(
    facts: Mapping[fx.Node, Fact], depends: Mapping[fx.Node, Dependence]
) -> frozenset[fx.Node]:
    """Return the tensors whose number of samples follows from the values of the inputs.

    After `y = x[x[:, 0] > 0]` nothing can be guessed in the place of `y`, as another guess has
    another number of rows. What is computed from `y` is like it, until a reduction drops the rows,
    or they are written into a tensor of known size.

    Args:
        facts: Observed facts by node.
        depends: The inputs that every value depends on, as of `input_dependence`.
    """
    sized: set[fx.Node] = set()
    for node in depends:
        fact = facts.get(node)
        if fact is None or (fact.spec is not None and fact.spec.batch_axis is None):
            continue
        operands = read_by(node)
        first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
        others = [operand for operand in operands if operand is not first]
        if _WRITING.fullmatch(name_of(node)):  # the result is the first operand, with other values
            operands = [operand for operand in operands if operand is first]
        elif fact.work.selections and any(depends[source] for source in others or operands):
            sized.add(node)
        if not sized.isdisjoint(operands):
            sized.add(node)
    return frozenset(sized)


_WRITING = re.compile(r"(index_(add|copy|fill|put|reduce)|(masked_)?scatter(_\w+)?|setitem)_?")


def find_recomputable(
    order: Sequence[fx.Node],
    facts: Mapping[fx.Node, Fact],
    costs: Mapping[fx.Node, NodeCost],
    persistent: frozenset[int],
    max_share: float,
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Find every value that can be recomputed from the inputs, and the nodes that this takes.

    A value may be in memory that is written in place (an embedding scaled by `mul_`, a mask filled
    by `fill_`): its subgraph then contains every write, and it counts as a side value if all of
    them are recomputable.

    Args:
        order: The compute nodes in topological order.
        facts: Observed facts by node.
        costs: Costs by node.
        persistent: Memory that outlives a run; values written there cannot be recomputed.
        max_share: Largest share of all FLOPs in one subgraph.

    Returns:
        For each such value its subgraph, itself included, in order.
    """
    limit = max_share * sum(cost.flops for cost in costs.values())
    number = {node: index for index, node in enumerate(order)}
    last_write = {s: index for index, node in enumerate(order) for s in facts[node].writes}
    final: dict[fx.Node, _Subgraph] = {}
    unfinished: dict[fx.Node, _Subgraph] = {}  # values in memory with writes still to come
    writers: dict[int, _Subgraph] = {}  # by memory: the subgraph of all writes so far
    tainted = set(persistent & last_write.keys())  # memory with a write that is not recomputable
    for index, node in enumerate(order):
        result_memory = facts[node].storages | facts[node].writes
        memory = result_memory.union(*(facts[n].storages for n in node.all_input_nodes))
        written = memory & last_write.keys()
        sources = [n for n in node.all_input_nodes if n in number]
        parts = [final.get(source) or unfinished.get(source) for source in sources]
        parts += [writers[storage] for storage in written if storage in writers]
        recomputable = [part for part in parts if part is not None]
        subgraph = _Subgraph((node,)).union(*recomputable)
        pure = not facts[node].random and not written & tainted
        if (
            len(recomputable) < len(parts)
            or not pure
            or sum(costs[member].flops for member in subgraph) > limit
        ):
            tainted |= facts[node].writes
            continue
        writers.update(dict.fromkeys(facts[node].writes, subgraph))
        if all(last_write[storage] <= index for storage in written):
            final[node] = subgraph
        elif result_memory & written:
            unfinished[node] = subgraph
    # A later reader of an unfinished value sees all writes: they become part of its subgraph.
    for node, subgraph in unfinished.items():
        memory = facts[node].storages & last_write.keys()
        if not memory & tainted:
            final[node] = subgraph.union(*(writers[storage] for storage in memory))
    values = sorted(final, key=number.__getitem__)
    return {node: tuple(sorted(final[node], key=number.__getitem__)) for node in values}


def is_state(fact: Fact) -> bool:
    """Whether a value may be part of a state: a floating-point tensor with a batch axis."""
    return is_floating(fact) and fact.spec is not None and fact.spec.batch_axis is not None


def is_floating(fact: Fact) -> bool:
    """Whether a value is a floating-point tensor."""
    return fact.spec is not None and fact.spec.dtype in FLOAT_DTYPES
