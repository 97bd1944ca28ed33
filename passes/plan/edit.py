"""Find the cuts that a user moved by hand in a plan, and the options to plan again with them.

Four names of a plan say where stage j begins: the `first` node of the stage, the `last` of the one
before, and `after` and `before` of the interface between them. The number of `nodes` tells where
it began originally. Editing one of the names moves the cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from passes.analysis.analysis import MEASURED, ROOFLINE
from passes.errors import ArtifactError, PartitionError
from passes.options import Options
from passes.plan.schema import Plan


def moved_cuts(order: Sequence[str], plan: Plan) -> tuple[str, ...] | None:
    """Find where the stages of an edited plan begin.

    Args:
        order: Names of the program's nodes, in order.
        plan: The plan.

    Returns:
        The first node of every stage but the first; None if no cut was moved, or if a name is
        unknown in the program, which `check_plan` reports.

    Raises:
        ArtifactError: Two names of one cut were moved to different places.
    """
    index_of = {name: index for index, name in enumerate(order)}
    if len(plan.interfaces) != len(plan.stages):
        return None
    starts, moved, original = [], False, 0
    for number in range(1, len(plan.stages)):
        stage, before = plan.stages[number], plan.stages[number - 1]
        face = plan.interfaces[number - 1]
        original += before.nodes
        named = {
            f"plan.stages[{number}].first": index_of.get(stage.first),
            f"plan.interfaces[{number - 1}].before": index_of.get(face.before),
            f"plan.stages[{number - 1}].last": _next(index_of.get(before.last)),
            f"plan.interfaces[{number - 1}].after": _next(index_of.get(face.after)),
        }
        if None in named.values():
            return None
        edits = {where: index for where, index in named.items() if index != original}
        if len(set(edits.values())) > 1:
            (one, first), (other, second) = list(edits.items())[:2]
            raise ArtifactError(
                f"{one} moves the cut in front of {order[_clamp(first, order)]}, but {other} in "
                f"front of {order[_clamp(second, order)]}: move one of them, or both alike"
            )
        start = next(iter(edits.values()), original)
        if start is None or not 0 < start < len(order):
            return None
        moved = moved or bool(edits)
        starts.append(order[start])
    return tuple(starts) if moved else None


def _next(index: int | None) -> int | None:
    return None if index is None else index + 1


def _clamp(index: int | None, order: Sequence[str]) -> int:
    return min(index or 0, len(order) - 1)


def options_of(plan: Plan, cuts: tuple[str, ...]) -> Options:
    """Return the options of a plan, with other cuts.

    Raises:
        PartitionError: The plan does not store enough of them.
    """
    if plan.cost in ROOFLINE or plan.cost not in ("flops", *MEASURED):
        raise PartitionError(
            f"the cuts of the plan were moved, but its costs are those of {plan.cost!r}, which it "
            f"does not store: compile with cuts={list(cuts)} (--cut-at "
            f"{','.join(cuts)}) and the same cost and devices instead"
        )
    if plan.asked is None:
        raise PartitionError(
            "the cuts of the plan were moved, but it was made by a version that did not store the "
            f"options: compile with cuts={list(cuts)} (--cut-at {','.join(cuts)}) instead"
        )
    return Options(
        cuts=cuts,
        cost=plan.cost,  # type: ignore[arg-type]  # one of those above
        correction=plan.correction,
        sweep=plan.sweep,
        iterations=plan.iterations,
        seed=plan.seed,
        **dataclasses.asdict(plan.asked),
    )
