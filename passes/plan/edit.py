"""A plan whose cuts were moved by hand: where to, and how to make the rest of it anew.

Four names of a plan say where stage j begins: the `first` node of the stage, the `last` of the one
before, and `after` and `before` of the interface between them. The number of `nodes` tells where
it began when the plan was made. Whoever moves one of the names moves the cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from passes.analysis.analysis import MEASURED, ROOFLINE
from passes.errors import ArtifactError, PartitionError
from passes.options import Options
from passes.plan.schema import Plan

__all__ = ["moved_cuts", "options_of"]


def moved_cuts(order: Sequence[str], plan: Plan) -> tuple[str, ...] | None:
    """Where the stages of an edited plan begin.

    Args:
        order: Names of the program's nodes, in order.
        plan: The plan.

    Returns:
        The first node of every stage but the first; None where no cut was moved, or where a name
        is none of the program's, which `check_plan` tells.

    Raises:
        ArtifactError: Two names of one cut were moved to different places.
    """
    place = {name: index for index, name in enumerate(order)}
    if len(plan.interfaces) != len(plan.stages):
        return None
    starts, moved, made = [], False, 0
    for number in range(1, len(plan.stages)):
        stage, ahead = plan.stages[number], plan.stages[number - 1]
        face = plan.interfaces[number - 1]
        made += ahead.nodes
        named = {
            f"plan.stages[{number}].first": place.get(stage.first),
            f"plan.interfaces[{number - 1}].before": place.get(face.before),
            f"plan.stages[{number - 1}].last": _behind(place.get(ahead.last)),
            f"plan.interfaces[{number - 1}].after": _behind(place.get(face.after)),
        }
        if None in named.values():
            return None
        found = {where: index for where, index in named.items() if index != made}
        if len(set(found.values())) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise ArtifactError(
                f"{one} moves the cut in front of {order[_within(first, order)]}, but {other} in "
                f"front of {order[_within(second, order)]}: move one of them, or both alike"
            )
        start = next(iter(found.values()), made)
        if start is None or not 0 < start < len(order):
            return None
        moved = moved or bool(found)
        starts.append(order[start])
    return tuple(starts) if moved else None


def _behind(place: int | None) -> int | None:
    return None if place is None else place + 1


def _within(place: int | None, order: Sequence[str]) -> int:
    return min(place or 0, len(order) - 1)


def options_of(plan: Plan, cuts: tuple[str, ...]) -> Options:
    """Return what a plan was asked for, with other cuts.

    Raises:
        PartitionError: It does not say enough.
    """
    if plan.cost in ROOFLINE or plan.cost not in ("flops", *MEASURED):
        raise PartitionError(
            f"the cuts of the plan were moved, but it was weighed by {plan.cost!r}, of which it "
            f"does not hold the figures: compile with cuts={list(cuts)} (--cut-at "
            f"{','.join(cuts)}) and the same cost and devices instead"
        )
    if plan.asked is None:
        raise PartitionError(
            "the cuts of the plan were moved, but it was made by a version that did not store what "
            f"was asked for: compile with cuts={list(cuts)} (--cut-at {','.join(cuts)}) instead"
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
