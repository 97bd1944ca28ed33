"""Split the program at the cuts of a plan: fine stages and head, over the same modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.errors import PartitionError
from passes.ir.program import Program, extract, nodes_between
from passes.plan.schema import Plan


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
    program, so a parameter that two stages read remains one parameter.

    Raises:
        PartitionError: The plan names nodes that the program does not have, or its states do not
            follow from each other.
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
    head_nodes = order[names.index(plan.stages[-1].last) + 1 :]
    head = extract(
        program,
        head_nodes,
        [value.name for value in plan.interfaces[-1].state],
        None,
        inputs=plan.head.inputs,
        sides=plan.head.sides,
        name="Head",
    )
    return Stages(tuple(fine), head)


def _check_chain(program: Program, plan: Plan) -> None:
    """Refuse a plan (edited by hand) whose states do not follow from each other.

    Raises:
        PartitionError: They do not.
    """

    def refuse(reason: str) -> PartitionError:
        return PartitionError(f"the plan does not fit the program {program.name}: {reason}")

    if not plan.stages or len(plan.stages) != len(plan.interfaces):
        raise refuse(f"{len(plan.stages)} stages, {len(plan.interfaces)} interfaces")
    state: set[str] = set()
    for number, (stage, face) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        if face.after != stage.last:
            raise refuse(f"stage {number} ends at {stage.last!r}, its interface at {face.after!r}")
        if unknown := sorted(set(stage.consumes) - state):
            raise refuse(f"stage {number} consumes {unknown[0]!r}, which does not cross before it")
        crossing = {value.name for value in face.state}
        if unknown := sorted(crossing.symmetric_difference(stage.produces) - state):
            raise refuse(
                f"{unknown[0]!r} crosses after stage {number} or is produced by it, not both"
            )
        state = crossing
