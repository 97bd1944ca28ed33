"""Find what the values of a program depend on: inputs, side values, and preprocessing sources.

- `input_dependence`: the inputs that every value depends on, in-place writes included. A
  preprocessing operator or coarse propagator may read no input that the state it approximates does
  not depend on: otherwise a prediction could depend on the labels.
- `find_recomputable`: the side values, which are cheap to recompute from the inputs (an attention
  mask, a position embedding). A stage that reads one recomputes it with its recomputable subgraph,
  so that it need not cross a cut:

      a = embed(tokens)         subgraph of a: {a, b}, because b writes the memory of a
      b = a.mul_(scale)         subgraph of b: {a, b}
      m = dropout(b)            none: it draws random numbers

- `preprocessing_sources`: the values that preprocessing operators read.
- `with_sources`: side values of any cost for the states that otherwise nothing could guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from passes.cost.flops import NodeCost
from passes.cost.node_facts import Fact
from passes.ir.module_walk import submodule
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec

MAX_SIDE_SHARE = 0.01
"""Largest share of all FLOPs that a stage may spend to recompute one side value."""

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")

Recomputable = Mapping[fx.Node, tuple[fx.Node, ...]]
"""For every side value, the nodes that recompute it from the inputs, itself included, in order."""

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

_PARTS = frozenset({
    "getitem", "select", "slice", "narrow", "index_select", "split", "split_with_sizes",
    "tensor_split", "chunk", "unbind", "view", "reshape", "flatten", "unflatten", "transpose",
    "permute", "movedim", "unsqueeze", "squeeze", "contiguous", "clone", "to", "float",
})  # fmt: skip
"""Functions that return parts of their first argument, or all of it in another form."""


_HIDING = frozenset({
    "mul", "mul_", "imul", "div", "div_", "truediv", "where", "masked_fill", "masked_fill_",
    "matmul", "mm", "bmm", "einsum", "minimum", "maximum",
})  # fmt: skip
"""Functions of a value and of another input after which nobody may read the value: masks."""

_ELEMENTWISE = frozenset({"add", "add_", "iadd", "sub", "sub_", "neg", "cat", "stack", "concat"})
"""Other functions that may lie between an input and its mask."""


def _name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls; "" for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls; None for other nodes."""
    owner = node.graph.owning_module
    called = node.op == "call_module" and owner is not None
    return submodule(owner, str(node.target)) if called and owner is not None else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that read its values, not its sizes alone."""
    return [user for user in node.users if node in _read_by(user)]


def _read_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node reads."""
    name = _name(node)
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
    readers, spec = _readers(node), facts[node].spec
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
    return _name(node) in _PARTS and node.args[:1] == (whole,)


def input_dependence(
    program: Program, facts: Mapping[fx.Node, Fact]
) -> Mapping[fx.Node, frozenset[fx.Node]]:
    """Return, for every node, the input tensors that its value may depend on.

    Example: in `a = f(x); b = g(y); a.add_(b); c = h(a)` the value of `c` depends on x and y,
    although `h` reads `a` and not the result of `add_`. Sizes are no values: that of
    `x.view(y.shape)` depends on x alone.

    Args:
        program: The program.
        facts: Observed facts by node.
    """
    leaves = frozenset(input_leaves(program, facts))
    depends: dict[fx.Node, frozenset[fx.Node]] = {}
    written: dict[int, frozenset[fx.Node]] = {}  # by memory: inputs that writes to it depend on
    for node in program.graph.nodes:
        inputs = frozenset({node}) if node in leaves else frozenset[fx.Node]()
        nodes = [node, *node.all_input_nodes]
        memory = {storage for n in nodes if n in facts for storage in facts[n].storages}
        inputs = inputs.union(*(depends[source] for source in _read_by(node)))
        inputs = inputs.union(*(written.get(storage, frozenset()) for storage in memory))
        depends[node] = inputs
        for storage in facts[node].writes if node in facts else ():
            written[storage] = written.get(storage, frozenset()) | inputs
    return depends


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


@dataclass(frozen=True)
class PreprocessingSource:
    """A value that preprocessing operators read.

    Attributes:
        node: A floating-point input, or a learned value computed directly from inputs (an
            embedding).
        spec: Its type.
    """

    node: fx.Node
    spec: TensorSpec


def preprocessing_sources(
    program: Program, facts: Mapping[fx.Node, Fact], recomputable: Recomputable
) -> list[PreprocessingSource]:
    """Find the values that the preprocessing operators of all interfaces may read.

    These are the floating-point inputs with a batch axis and, in place of other inputs (token ids),
    the first learned values that the trunk reads, if recomputing them in every stage is cheap. If
    no learned value depends on an input alone, any floating-point value will do (an image of
    integers that is divided by 255).

    Args:
        program: The program.
        facts: Observed facts by node.
        recomputable: For every side value, the nodes that recompute it.
    """
    values: list[fx.Node] = []
    for leaf in input_leaves(program, facts):
        spec = facts[leaf].spec
        if spec is None or spec.dtype not in FLOAT_DTYPES:
            values += _side_values(leaf, facts, recomputable, learned=True)
        elif spec.batch_axis is not None:
            values.append(leaf)
    if not values:
        for leaf in input_leaves(program, facts):
            values += _side_values(leaf, facts, recomputable, learned=False)
    depends = input_dependence(program, facts)
    plain = _plain_values(program)
    masked = dict.fromkeys(_after_masks(value, facts, depends, plain) for value in values)
    return [
        PreprocessingSource(value, spec)
        for value in masked
        if value.op == "placeholder" or value in recomputable
        if (spec := facts[value].spec) is not None
    ]


def _plain_values(program: Program) -> set[fx.Node]:
    """Return the inputs, and the values that follow from inputs without any parameter or module."""
    plain: set[fx.Node] = set()
    for node in program.graph.nodes:
        computed = node.op in ("call_function", "call_method") and plain.issuperset(
            node.all_input_nodes
        )
        if computed or node.op == "placeholder":
            plain.add(node)
    return plain


def _after_masks(
    value: fx.Node,
    facts: Mapping[fx.Node, Fact],
    depends: Mapping[fx.Node, frozenset[fx.Node]],
    plain: set[fx.Node],
) -> fx.Node:
    """Return what the program makes of a value by masks before anything else reads it.

    The states of `y = f(x * mask)` depend on no masked position of x, which no guess may read.
    """
    result = value
    while True:
        readers = _readers(value)
        writers = [r for r in readers if r in facts and facts[r].writes & facts[value].storages]
        if writers and value.op != "placeholder":
            written = [s for writer in writers for s in _read_by(writer) if s is not value]
            if any(depends[source] for source in written if source in plain):
                result = value  # x[mask] = 0: later readers see what was written
            readers = [reader for reader in readers if reader not in writers]
        if len(readers) != 1 or readers[0] not in facts:
            return result
        (reader,) = readers
        passes = _name(reader) in _HIDING | _ELEMENTWISE | _PARTS
        if not passes and not isinstance(_module_of(reader), nn.Identity | _DropoutNd):
            return result
        others = [source for source in _read_by(reader) if source is not value]
        hides = _name(reader) in _HIDING and any(
            depends[source] for source in others if source in plain
        )
        if hides and _is_state(facts[reader]):
            result = reader
        value = reader


def _masks(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recomputable: Recomputable,
    recompute: Callable[[float], Recomputable],
    depends: Mapping[fx.Node, frozenset[fx.Node]],
) -> Recomputable:
    """Return masked inputs, and masks that nothing learned goes into, as side values of any cost.

    No guess of a mask could stand in for it: one that is only nearly 0 mixes what it separates.
    """
    leaves = input_leaves(program, facts)
    plain = _plain_values(program)
    floats = {leaf for leaf in leaves if _is_floating(facts[leaf])}
    learned = set(program.graph.nodes) - plain | floats
    for node in program.order:
        if learned.intersection(_read_by(node)):
            learned.add(node)
    states = {node for node in program.order if _is_state(facts[node])}
    wanted = {node for node in states - learned if learned.intersection(node.users)}
    wanted |= {
        _after_masks(leaf, facts, depends, plain) for leaf in leaves if _is_state(facts[leaf])
    }
    missing = {node for node in wanted if node.op != "placeholder"} - recomputable.keys()
    result: Recomputable = {}
    share = 2 * MAX_SIDE_SHARE
    while missing and share < 2:
        values = recompute(share)
        for node in missing & values.keys():
            result = {**result, **{member: values[member] for member in values[node]}}
        missing -= result.keys()
        share *= 2
    return result


def with_sources(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recomputable: Recomputable,
    recompute: Callable[[float], Recomputable],
) -> Recomputable:
    """Add side values of any cost where no state could be guessed without them.

    In a small network a look-up in an embedding may take more than the share of a side value, and
    a network that takes integers alone has no other source.

    Args:
        program: The program.
        facts: Observed facts by node.
        recomputable: For every cheap side value, the nodes that recompute it.
        recompute: Finds the side values up to a larger share of all FLOPs.
    """
    depends = input_dependence(program, facts)
    masks = _masks(program, facts, recomputable, recompute, depends)
    recomputable = {**recomputable, **masks}
    states = {
        depends[node]: node
        for node in program.order
        if depends[node] and node not in recomputable and _is_state(facts[node])
    }
    result = dict(recomputable)
    for inputs, state in states.items():
        sources = preprocessing_sources(program, facts, result)
        if any(depends[source.node] <= inputs for source in sources):
            continue
        for learned in (True, False):
            if subgraph := _cheapest(program, facts, recompute, inputs, state, learned=learned):
                result |= subgraph
                break
    return result


def _cheapest(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recompute: Callable[[float], Recomputable],
    inputs: frozenset[fx.Node],
    state: fx.Node,
    *,
    learned: bool,
) -> Recomputable:
    """Return the first value, with all that recomputes it, from which a state can be guessed."""
    depends = input_dependence(program, facts)
    share = 2 * MAX_SIDE_SHARE
    while share < 2:
        values = recompute(share)
        for node in values:
            fits = _is_state(facts[node]) and node is not state and depends[node] <= inputs
            if not fits or not depends[node]:
                continue
            if not learned or any(_looks_up(leaf, node, values) for leaf in inputs):
                return {member: values[member] for member in values[node]}
        share *= 2
    return {}


def _is_state(fact: Fact) -> bool:
    return _is_floating(fact) and fact.spec is not None and fact.spec.batch_axis is not None


def _is_floating(fact: Fact) -> bool:
    return fact.spec is not None and fact.spec.dtype in FLOAT_DTYPES


def _side_values(
    leaf: fx.Node, facts: Mapping[fx.Node, Fact], recomputable: Recomputable, *, learned: bool
) -> list[fx.Node]:
    """Return the side values that follow from an input, and that the trunk reads.

    Args:
        leaf: The input.
        facts: Observed facts by node.
        recomputable: For every side value, the nodes that recompute it.
        learned: Whether only those count that look up parameters.
    """
    sources: list[fx.Node] = []
    for node, subgraph in recomputable.items():
        if not _is_state(facts[node]):
            continue
        if learned:
            follows = any(_looks_up(leaf, member, recomputable) for member in subgraph)
        else:
            follows = any(leaf in member.all_input_nodes for member in subgraph)
        feeds_trunk = any(user not in recomputable for user in node.users)
        covered = any(source in subgraph for source in sources)
        if follows and feeds_trunk and not covered:
            sources.append(node)
    return sources


def _looks_up(leaf: fx.Node, member: fx.Node, recomputable: Recomputable) -> bool:
    """Whether a node reads parameters and the values of an input, as an embedding does.

    A table of positions that is only combined with a mask of the input does not count: it carries
    no information on the values of the input.
    """
    if member.op != "call_module" and all(n.op != "get_attr" for n in member.all_input_nodes):
        return False
    subgraph = recomputable.get(member, (member,))
    return any(leaf in node.all_input_nodes for node in subgraph)
