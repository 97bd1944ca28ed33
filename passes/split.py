"""Cut the program where the plan says: fine stages and head over the same modules."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from passes.errors import PartitionError
from passes.plan import Plan
from passes.program import Program, graph_module

__all__ = ["Stages", "extract", "nodes_between", "sequential", "split", "unpack"]


@dataclass(frozen=True)
class Stages:
    """The pieces of a program.

    Attributes:
        fine: One GraphModule per stage, from (consumed state, inputs) to the state it produces: a
            tensor, or a tuple where there are several.
        head: From (state, inputs) to the output structure of the model.
    """

    fine: tuple[fx.GraphModule, ...]
    head: fx.GraphModule


def split(program: Program, plan: Plan) -> Stages:
    """Build the fine stages and the head.

    Submodules, parameters and buffers keep their qualified names and are shared with the
    program, so a parameter that two stages read stays one parameter.

    Raises:
        PartitionError: The plan names nodes that the program does not have, or does not chain.
    """
    _check_chain(program, plan)
    fine = []
    for number, stage in enumerate(plan.stages):
        nodes = nodes_between(program, stage.first, stage.last)
        fine.append(
            extract(
                program,
                nodes,
                stage.consumes,
                stage.produces,
                inputs=stage.inputs,
                sides=stage.sides,
                name=f"Fine{number}",
            )
        )
    order = program.order
    names = [node.name for node in order]
    rest = order[names.index(plan.stages[-1].last) + 1 :]
    head = extract(
        program,
        rest,
        [value.name for value in plan.interfaces[-1].state],
        None,
        inputs=plan.head.inputs,
        sides=plan.head.sides,
        name="Head",
    )
    return Stages(tuple(fine), head)


def _check_chain(program: Program, plan: Plan) -> None:
    """Refuse a plan whose states do not follow from each other (one that was edited)."""

    def refuse(reason: str) -> PartitionError:
        return PartitionError(f"the plan does not fit the program {program.name}: {reason}")

    if not plan.stages or len(plan.stages) != len(plan.interfaces):
        raise refuse(f"{len(plan.stages)} stages, {len(plan.interfaces)} interfaces")
    state: set[str] = set()
    for number, (stage, face) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        if face.after != stage.last:
            raise refuse(f"stage {number} ends at {stage.last!r}, its interface at {face.after!r}")
        if strange := sorted(set(stage.consumes) - state):
            raise refuse(f"stage {number} consumes {strange[0]!r}, which does not cross before it")
        crossing = {value.name for value in face.state}
        if strange := sorted(crossing.symmetric_difference(stage.produces) - state):
            raise refuse(
                f"{strange[0]!r} crosses behind stage {number} or is produced by it, not both"
            )
        state = crossing


def nodes_between(program: Program, first: str, last: str) -> list[fx.Node]:
    """Return the compute nodes from `first` to `last`, both included.

    Raises:
        PartitionError: One of them does not exist, or they are in the wrong order.
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
    """Copy a run of nodes into a GraphModule of its own.

    Args:
        program: Where the nodes are.
        nodes: The nodes, in order.
        entering: Names of the values that become the first placeholders.
        leaving: Names of the values to return, or None for the output of the program.
        inputs: Placeholders of the program that become the next placeholders.
        sides: Names of the values to recompute first, with all that they need, in order.
        name: Class name of the result.

    Raises:
        PartitionError: A node reads a value that is neither computed inside nor given, or a name
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

    for given in [*entering, *inputs]:
        mapping[by_name[given]] = graph.placeholder(given)
    for node in [by_name[side] for side in sides] + list(nodes):
        if node not in mapping:
            mapping[node] = graph.node_copy(node, value)
    if leaving is None:
        graph.output(fx.node.map_arg(program.output.args[0], value))
    else:
        results = tuple(value(by_name[wanted]) for wanted in leaving)
        graph.output(results[0] if len(results) == 1 else results)
    graph.lint()
    return graph_module(program.module, graph, name)


def sequential(program: Program, plan: Plan, stages: Stages) -> fx.GraphModule:
    """Compose the stages one after another; equal to the original network."""
    root = fx.GraphModule({}, fx.Graph())
    for number, stage in enumerate(stages.fine):
        root.add_module(f"fine_{number}", stage)
    root.add_module("head", stages.head)
    graph = fx.Graph()
    values = {node.name: graph.placeholder(str(node.target)) for node in program.inputs}
    for number, stage_plan in enumerate(plan.stages):
        arguments = [values[name] for name in (*stage_plan.consumes, *stage_plan.inputs)]
        result = graph.create_node("call_module", f"fine_{number}", tuple(arguments), {})
        values.update(unpack(graph, result, stage_plan.produces))
    state = [values[value.name] for value in plan.interfaces[-1].state]
    arguments = [*state, *(values[name] for name in plan.head.inputs)]
    graph.output(graph.create_node("call_module", "head", tuple(arguments), {}))
    graph.lint()
    network = fx.GraphModule(root, graph, class_name=f"Sequential{program.name}")
    network.training = program.module.training
    return network


def unpack(graph: fx.Graph, result: fx.Node, names: Sequence[str]) -> dict[str, fx.Node]:
    """Name the tensors that a call returned: itself, or the elements of its tuple."""
    if len(names) == 1:
        return {names[0]: result}
    return {
        name: graph.create_node(
            "call_function", operator.getitem, (result, i), {}, name=f"{result.name}_{name}"
        )
        for i, name in enumerate(names)
    }
