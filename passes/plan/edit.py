"""A plan whose cuts were moved by hand: where to, and how to make the rest of it anew.

Four names of a plan say where stage j begins: the `first` node of the stage, the `last` of the one
before, and `after` and `before` of the interface between them. The number of `nodes` tells where
it began when the plan was made. Whoever moves one of the names moves the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passes.analysis.analysis import MEASURED, ROOFLINE
from passes.coarse.copied_blocks import UnitsOptions
from passes.coarse.lowrank import LowRankOptions
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
    """What a plan was asked for, as far as it says, with other cuts.

    Raises:
        PartitionError: It does not say enough.
    """
    if plan.cost in ROOFLINE or plan.cost not in ("flops", *MEASURED):
        raise PartitionError(
            f"the cuts of the plan were moved, but it was weighed by {plan.cost!r}, of which it "
            f"does not hold the figures: compile with cuts={list(cuts)} (--cut-at "
            f"{','.join(cuts)}) and the same cost and devices instead"
        )
    return Options(
        cuts=cuts,
        cost=plan.cost,  # type: ignore[arg-type]  # one of those above
        correction=plan.correction,
        sweep=plan.sweep,
        iterations=plan.iterations,
        seed=plan.seed,
        **_families(plan),
    )


def _families(plan: Plan) -> dict[str, Any]:
    """Families of guesses and corrections that all stages have in common; the others are chosen."""
    found: dict[str, Any] = {}
    later = plan.stages[1:]
    for name, specs in (
        ("coarse", [stage.coarse for stage in later]),
        ("preprocess", [stage.preprocess for stage in later]),
    ):
        families = {spec.family for spec in specs if spec is not None}
        if len(families) == 1:
            found[name] = families.pop()
    coarse = [stage.coarse.options for stage in later if stage.coarse]
    ranks = {options.rank for options in coarse if isinstance(options, LowRankOptions)}
    if len(ranks) == 1:
        found["rank"] = ranks.pop()
    shares = {stage.preprocess.options.prologue for stage in later if stage.preprocess} - {None}
    if len(shares) == 1:
        found["prologue"] = shares.pop()
    units = [len(options.blocks) for options in coarse if isinstance(options, UnitsOptions)]
    if units and "coarse" in found:
        found["units"] = max(units)
    return found
