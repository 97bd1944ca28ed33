"""Replay a plan that may have been edited by hand: check it, and find the cuts that were moved.

Four names of a plan say where stage j begins: the `first` node of the stage, the `last` of the one
before, and `after` and `before` of the interface between them. The number of `nodes` tells where
it began originally. Editing one of the names moves the cut (`moved_cuts`), and the program is
planned again with the options of the plan; otherwise `check_plan` checks all that the plan says.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from passes.analysis.analysis import MEASURED, ROOFLINE
from passes.coarse.family import names_of, starts_anywhere
from passes.coarse.spec import NON_EMPTY, OperatorSpec, PreprocessOptions
from passes.errors import ArtifactError, PartitionError, suggest
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec
from passes.options import Options
from passes.plan.schema import Interface, Plan

_Problems = Iterator[tuple[str, str]]
"""Pairs of a place in the JSON text and what is wrong there."""


def check_plan(program: Program, plan: Plan) -> None:
    """Check that a plan fits a program.

    Raises:
        ArtifactError: It does not; the message names the place in the JSON text, and the values
            that are possible there.
    """
    # Only the first problem counts: later checks rely on the earlier ones.
    for place, problem in _Checker(program, plan).problems():
        raise ArtifactError(f"{place} {problem}")


class _Checker:
    """Checks of a plan, top down; each yields its problems."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.plan = plan
        self.order = [node.name for node in program.order]
        self.nodes = set(self.order)
        self.inputs = [node.name for node in program.inputs]
        self.values = {node.name for node in program.graph.nodes if node.op != "output"}

    def problems(self) -> _Problems:
        """Yield every problem."""
        plan = self.plan
        yield from _among("plan.correction", plan.correction, ("residual", "difference"))
        yield from _among("plan.sweep", plan.sweep, ("chain", "collapsed"))
        yield from _at_least_one("plan.iterations", plan.iterations)
        if plan.tolerance is not None and not plan.tolerance > 0:
            yield "plan.tolerance", f"is {plan.tolerance!r}: it should be a number above 0"
        if plan.sweep == "collapsed":
            yield from _among("plan.correction", plan.correction, ("residual",), "collapsed sweep")
            yield from _among("plan.iterations", plan.iterations, (1,), "collapsed sweep")
        if not plan.stages:
            yield "plan.stages", "is empty: a plan has at least one stage"
        if len(plan.interfaces) != len(plan.stages):
            yield (
                "plan.interfaces",
                f"has {len(plan.interfaces)} entries for {len(plan.stages)} stages: one per stage",
            )
        if plan.windows < 1 or len(plan.stages) % plan.windows:
            yield (
                "plan.windows",
                f"is {plan.windows!r}: it should divide {len(plan.stages)} stages",
            )
        if plan.windows > 1:
            yield from _among("plan.sweep", plan.sweep, ("chain",), "windows")
            yield from _among("plan.iterations", plan.iterations, (1,), "windows")
            yield from _among("plan.tolerance", plan.tolerance, (None,), "windows")
        for number, face in enumerate(plan.interfaces):
            yield from self._interface(f"plan.interfaces[{number}]", face)
        for number in range(len(plan.stages)):
            yield from self._stage(f"plan.stages[{number}]", number)
        yield from self._reads("plan.head", plan.head.inputs, plan.head.sides)

    def _interface(self, place: str, face: Interface) -> _Problems:
        for index, value in enumerate(face.state):
            here = f"{place}.state[{index}]"
            yield from _among(f"{here}.name", value.name, self.nodes)
            yield from _tensor(f"{here}.spec", value.spec)

    def _stage(self, place: str, number: int) -> _Problems:
        stage = self.plan.stages[number]
        start = 0
        if number:
            start = self.order.index(self.plan.stages[number - 1].last) + 1
        yield from _among(f"{place}.last", stage.last, self.order[start:])
        if stage.first not in self.nodes:
            advice = suggest(stage.first, self.order[start:])
            yield f"{place}.first", f"is {stage.first!r}, and no node is called that; {advice}"
        yield from _among(f"{place}.first", stage.first, self.order[start : start + 1])
        after = self.plan.interfaces[number].after
        yield from _among(f"plan.interfaces[{number}].after", after, (stage.last,))
        yield from self._reads(place, stage.inputs, stage.sides)
        state = _state(self.plan, number - 1) if number else []
        crossing = _state(self.plan, number)
        within = set(self.order[start : self.order.index(stage.last) + 1])
        yield from _each_among(f"{place}.consumes", stage.consumes, state)
        yield from _each_among(
            f"{place}.produces", stage.produces, [name for name in crossing if name in within]
        )
        for index, name in enumerate(crossing):
            if name not in stage.produces and name not in state:
                yield (
                    f"plan.interfaces[{number}].state[{index}].name",
                    f"is {name!r}, which is neither in {place}.produces nor crosses before it",
                )
        specs: dict[str, OperatorSpec | None] = {
            "preprocess": stage.preprocess,
            "coarse": stage.coarse,
        }
        for role, spec in specs.items():
            if spec is not None and self.plan.opens_window(number):
                yield (
                    f"{place}.{role}",
                    "must be null: the first stage starts from the inputs, and that of a window "
                    "from the state before it",
                )
            elif spec is not None:
                yield from self._operator(number, f"{place}.{role}.options", spec)
            elif not self.plan.opens_window(number):
                yield f"{place}.{role}", "is null: every stage after the first has one"

    def _reads(self, place: str, inputs: Sequence[str], sides: Sequence[str]) -> _Problems:
        yield from _each_among(f"{place}.inputs", inputs, self.inputs)
        yield from _each_among(f"{place}.sides", sides, self.nodes)

    def _operator(self, number: int, place: str, spec: OperatorSpec) -> _Problems:
        options, leaving = spec.options, self.plan.corrects(number)
        entering = len(self.plan.stages[number].consumes)
        if isinstance(options, PreprocessOptions):
            entering, leaving = len(options.sources), self.plan.enters(number)
            start = self.plan.window_start(number)
            inside = (True,) if start else (None, False)
            yield from _among(f"{place}.window", options.window, inside)
            before = _state(self.plan, start - 1) if start else []
            yield from _each_among(f"{place}.entering", options.entering or (), before)
            if start:
                families = [n for n in names_of("preprocess") if starts_anywhere(n)]
                for name in () if starts_anywhere(spec.family) else (spec.family,):
                    yield from _among(f"{place.removesuffix('options')}family", name, families)
            if start and not options.entering:  # the state in front of it is all that it takes
                yield from _each_among(f"{place}.sources", options.state, before)
                yield from _each_among(f"{place}.inputs", options.inputs, ())
                yield from _each_among(f"{place}.sides", options.sides, ())
                yield from _among(f"{place}.copied", options.copied, (None,))
        yield from _each_among(f"{place}.inputs", options.inputs, self.inputs)
        yield from self._annotated(place, options, type(options), options.inputs)
        if options.reads is not None:
            if len(options.reads) != len(leaving):
                rows = f"has {len(options.reads)} rows: one for each of {len(leaving)} values"
                yield f"{place}.reads", rows
            for index, row in enumerate(options.reads):
                yield from _each_among(f"{place}.reads[{index}]", row, range(entering))

    def _annotated(self, place: str, value: Any, kind: Any, inputs: Sequence[str]) -> _Problems:
        """Check the `Annotated` rules of a value and of everything in it."""
        arguments = typing.get_args(kind)
        if value is None:
            return
        if type(None) in arguments:
            yield from self._annotated(place, value, arguments[0], inputs)
        elif typing.get_origin(kind) is typing.Annotated:
            yield from self._rule(kind.__metadata__[0], place, value, inputs)
            yield from self._annotated(place, value, arguments[0], inputs)
        elif isinstance(value, tuple):
            kinds = arguments[:1] * len(value) if ... in arguments else arguments
            for index, (item, inner) in enumerate(zip(value, kinds, strict=True)):
                yield from self._annotated(f"{place}[{index}]", item, inner, inputs)
        elif dataclasses.is_dataclass(value):
            if isinstance(value, TensorSpec):
                yield from _tensor(place, value)
            for name, hint in typing.get_type_hints(type(value), include_extras=True).items():
                yield from self._annotated(f"{place}.{name}", getattr(value, name), hint, inputs)

    def _rule(self, rule: str, place: str, value: Any, inputs: Sequence[str]) -> _Problems:
        if rule == NON_EMPTY and not value:
            yield place, "is empty: it needs at least one item"
        elif rule == "count":
            yield from _at_least_one(place, value)
        elif rule == "share" and not 0 < value <= 1:
            yield place, f"is {value!r}: it should be a share above 0 and at most 1"
        elif rule in ("node", "value", "input"):
            names = {"node": self.nodes, "value": self.values, "input": inputs}
            yield from _among(place, value, names[rule])


def _state(plan: Plan, number: int) -> list[str]:
    return [value.name for value in plan.interfaces[number].state]


def _tensor(place: str, spec: TensorSpec) -> _Problems:
    if not isinstance(getattr(torch, str(spec.dtype), None), torch.dtype):
        yield f"{place}.dtype", f"is {spec.dtype!r}, no dtype of torch: float32, for example"
    for index, size in enumerate(spec.shape):
        if size < 0:
            yield f"{place}.shape[{index}]", f"is {size!r}, no size"
    axes = tuple(range(len(spec.shape)))
    yield from _among(f"{place}.batch_axis", spec.batch_axis, (None, *axes))
    if axes:  # a channel axis counts from the end if no position may be mixed with later ones
        counted = (*range(-len(axes), 0), *axes)
        yield from _among(f"{place}.channel_axis", spec.channel_axis, counted)


def _at_least_one(place: str, value: int) -> _Problems:
    if value < 1:
        yield place, f"is {value!r}: it should be a whole number of at least 1"


def _each_among(place: str, values: Sequence[Any], allowed: Collection[Any]) -> _Problems:
    for index, value in enumerate(values):
        yield from _among(f"{place}[{index}]", value, allowed)


_FEW = 8
"""Possible values that a message lists."""


def _among(place: str, value: Any, allowed: Collection[Any], why: str = "") -> _Problems:
    if value in allowed:
        return
    if isinstance(allowed, set):
        listed = "a node of the program"
    elif not allowed:
        listed = "nothing"
    else:
        items = [str(item) if item is not None else "null" for item in allowed]
        more = ", ..." if len(items) > _FEW else ""
        listed = ", ".join(items[:_FEW]) + more
    yield place, f"is {value!r}; possible here: {listed}" + (f" ({why})" if why else "")


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


def stored_options(plan: Plan, cuts: tuple[str, ...]) -> Options:
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
        tolerance=plan.tolerance,
        windows=plan.windows,
        seed=plan.seed,
        **dataclasses.asdict(plan.asked),
    )


def options_to_replan(program: Program, plan: Plan) -> Options | None:
    """Return the options that plan a program again at the moved cuts of a plan.

    Returns:
        The options; None if no cut was moved, so that the plan is to be replayed.

    Raises:
        ArtifactError: The plan belongs to another program, or was edited and is inconsistent.
        PartitionError: Cuts were moved, and the plan does not store the other options.
    """
    if plan.fingerprint == program.fingerprint:
        moved = moved_cuts([node.name for node in program.order], plan)
        if moved is not None:
            return stored_options(plan, moved)
    check_replayed(program, plan)
    return None


def check_replayed(program: Program, plan: Plan) -> None:
    """Check that a plan belongs to a program, and is consistent with it.

    Raises:
        ArtifactError: It belongs to another one, or was edited and is inconsistent.
    """
    if plan.fingerprint != program.fingerprint:
        raise ArtifactError(
            f"the plan was made for another {plan.model}: the structure of {program.name} differs "
            "(layers, shapes or options); compile it again"
        )
    check_plan(program, plan)
