"""Find the values that preprocessing operators read.

- `preprocessing_sources`: these values.
- `with_sources`: side values of any cost for the states that otherwise nothing could guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from passes.analysis.dependence import (
    FLOAT_DTYPES,
    Dependence,
    Recomputable,
    input_dependence,
    input_leaves,
    is_state,
    shifted,
)
from passes.analysis.masks import MAX_SIDE_SHARE, after_masks, find_masks, plain_values, recomputed
from passes.ir.observer import Fact
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec

_MAX_SHIFTED_SHARE = 0.25
"""Largest share of all FLOPs that a stage may spend to recompute a sequence that is shifted."""


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
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recomputable: Recomputable,
    guessable: Recomputable,
) -> list[PreprocessingSource]:
    """Find the values that the preprocessing operators of all interfaces may read.

    These are the floating-point inputs with a batch axis and, in place of other inputs (token ids),
    the first learned values that the trunk reads, if recomputing them in every stage is cheap. If
    no learned value depends on an input alone, any floating-point value will do (an image of
    integers that is divided by 255). Beside them stand sequences that the program shifts first.

    Args:
        program: The program.
        facts: Observed facts by node.
        recomputable: For every side value, the nodes that recompute it.
        guessable: The same for all that guesses may be made of, by way of a dropout too.
    """
    depends = input_dependence(program, facts)
    plain = plain_values(program)
    values = _before_masks(program, facts, recomputable)
    masked = dict.fromkeys(after_masks(value, facts, depends, plain) for value in values)
    return [
        PreprocessingSource(value, spec)
        for value in masked
        if value.op == "placeholder" or value in guessable
        if (spec := facts[value].spec) is not None
    ]


def _before_masks(
    program: Program, facts: Mapping[fx.Node, Fact], recomputable: Recomputable
) -> list[fx.Node]:
    """Return the sources as they are before a mask hides parts of them."""
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
    return values + _shifted(facts, recomputable)


def _shifted(facts: Mapping[fx.Node, Fact], recomputable: Recomputable) -> list[fx.Node]:
    """Return the first side values that the trunk reads shifted: they do not show their position.

    After `y = f(F.pad(x, (1, -1)))` guesses of states start from y, and not from x.
    """
    found: list[fx.Node] = []
    for node, subgraph in recomputable.items():
        feeds_trunk = any(user not in recomputable for user in node.users)
        covered = any(value in subgraph for value in found)
        if facts[node].hides and is_state(facts[node]) and feeds_trunk and not covered:
            found.append(node)
    return found


def with_sources(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recompute: Callable[[float], Recomputable],
    quietly: Callable[[float], Recomputable],
) -> tuple[Recomputable, Recomputable]:
    """Find the side values, and those of any cost where no state could be guessed without them.

    In a small network a look-up in an embedding may take more than the share of a side value, and
    a network that takes integers alone has no other source.

    Args:
        program: The program.
        facts: Observed facts by node.
        recompute: Finds the side values up to a share of all FLOPs.
        quietly: The same, with dropout off.

    Returns:
        For every side value, the nodes that recompute it. And the same for all that guesses may be
        made of: inputs and look-ups that reach the trunk through a mask and a dropout count too.
    """
    depends, plain = input_dependence(program, facts), plain_values(program)
    recomputable = recompute(MAX_SIDE_SHARE)
    recomputable = {**recomputable, **find_masks(program, facts, recomputable, recompute, depends)}
    values = _before_masks(program, facts, recomputable)
    masked = {after_masks(value, facts, depends, plain) for value in values}
    dropped = {node for node in masked if node.op != "placeholder"} - recomputable.keys()
    undropped = recomputed(dropped, quietly)
    states = {
        depends[node]: node
        for node in program.order
        if depends[node] and node not in recomputable and is_state(facts[node])
    }
    result = dict(recomputable)
    for inputs, state in states.items():
        sources = preprocessing_sources(program, facts, result, {**undropped, **result})
        read = [depends[source.node] for source in sources if depends[source.node] <= inputs]
        if read and shifted(inputs, depends).issubset(itertools.chain.from_iterable(read)):
            continue
        for learned in (True, False):
            if subgraph := _cheapest(program, facts, recompute, inputs, state, learned=learned):
                result |= subgraph
                break
    return result, {**undropped, **result}


def _cheapest(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recompute: Callable[[float], Recomputable],
    inputs: Dependence,
    state: fx.Node,
    *,
    learned: bool,
) -> Recomputable:
    """Return the first value, with all that recomputes it, from which a state can be guessed."""
    depends = input_dependence(program, facts)
    leaves = [leaf for leaf in inputs if isinstance(leaf, fx.Node)]
    wanted = shifted(inputs, depends)
    share = 2 * MAX_SIDE_SHARE
    while share < (_MAX_SHIFTED_SHARE if wanted else 2):
        values = recompute(share)
        for node in values:
            fits = is_state(facts[node]) and node is not state and depends[node] <= inputs
            if not fits or not depends[node] or not wanted <= depends[node]:
                continue
            if not learned or any(_looks_up(leaf, node, values) for leaf in leaves):
                return {member: values[member] for member in values[node]}
        share *= 2
    return {}


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
        if not is_state(facts[node]):
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
