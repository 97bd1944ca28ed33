"""Check a plan against its program before it is replayed: it may have been edited by hand."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from passes.coarse.family import FAMILIES, GUESSES
from passes.coarse.spec import CoarseSpec
from passes.errors import ArtifactError
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec
from passes.options import BLOCK_FAMILIES
from passes.plan.schema import Interface, Plan

__all__ = ["check_plan"]

_Problems = Iterator[tuple[str, str]]
"""Where in the JSON text, and what is wrong there."""

_ALONE = (*BLOCK_FAMILIES, "exact", "zero")
_SOURCE_FIELDS = ("name", "shape", "dtype", "batch_axis", "channel_axis")
_BLOCK_FIELDS = ("first", "last", "entering", "leaving", "inputs", "sides")


def check_plan(program: Program, plan: Plan) -> None:
    """Check that a plan means something over a program.

    Raises:
        ArtifactError: It does not; the message names the place in the JSON text and what may
            stand there.
    """
    # The first problem counts: later checks rely on what earlier ones found in order.
    for place, problem in _Checker(program, plan).problems():
        raise ArtifactError(f"{place} {problem}")


class _Checker:
    def __init__(self, program: Program, plan: Plan) -> None:
        self.plan = plan
        self.order = [node.name for node in program.order]
        self.nodes = set(self.order)
        self.inputs = [node.name for node in program.inputs]
        self.every = {node.name for node in program.graph.nodes if node.op != "output"}

    def problems(self) -> _Problems:
        plan = self.plan
        yield from _among("plan.correction", plan.correction, ("residual", "difference"))
        yield from _among("plan.sweep", plan.sweep, ("chain", "collapsed"))
        yield from _at_least_one("plan.iterations", plan.iterations)
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
        if not number:
            for field, spec in (("preprocess", stage.preprocess), ("coarse", stage.coarse)):
                if spec is not None:
                    yield f"{place}.{field}", "must be null: the first stage starts from the inputs"
            return
        summed = [family for family in GUESSES if family not in BLOCK_FAMILIES]
        yield from self._operator(number, "preprocess", stage.preprocess, GUESSES, summed)
        sums = [family for family in FAMILIES if family not in _ALONE]
        yield from self._operator(number, "coarse", stage.coarse, FAMILIES, sums)

    def _reads(self, place: str, inputs: Sequence[str], sides: Sequence[str]) -> _Problems:
        yield from _each_among(f"{place}.inputs", inputs, self.inputs)
        yield from _each_among(f"{place}.sides", sides, self.nodes)

    def _operator(
        self,
        number: int,
        field: str,
        spec: CoarseSpec | None,
        known: Sequence[str],
        sums: Sequence[str],
    ) -> _Problems:
        place = f"plan.stages[{number}].{field}"
        if spec is None:
            yield place, "is null: every stage after the first has one"
            return
        parts = spec.family.split("+")
        if len(parts) > 1:
            yield from _each_among(f"{place}.family", parts, sums)
        yield from _among(f"{place}.family", parts[0], known)
        options, here = spec.options, f"{place}.options"
        guess, copies = known is GUESSES, spec.family in BLOCK_FAMILIES
        names = ["inputs"] * (guess or copies) + ["sides", "sources"] * guess
        names += ["rank"] * ("lowrank" in parts) + ["blocks"] * copies
        names += ["copied", "stem"] * (guess and copies)
        yield from _fields(here, options, names)
        if "rank" in names:
            yield from _at_least_one(f"{here}.rank", options["rank"])
        for name in {"inputs", "sides", "sources", "blocks"} & options.keys():
            yield from _list(f"{here}.{name}", options[name])
        yield from self._reads(here, options.get("inputs", ()), options.get("sides", ()))
        if guess and "copied" in options:
            yield from _list(f"{here}.copied", options["copied"])
            yield from _each_among(f"{here}.copied", options["copied"], self.nodes)
            if len(options["copied"]) != 2:
                yield f"{here}.copied", "should name two nodes, the first and the last"
        if guess:
            yield from self._sources(f"{here}.sources", options["sources"])
        if "reads" in options:
            entering = len(options["sources"]) if guess else len(self.plan.stages[number].consumes)
            leaving = self.plan.enters(number) if guess else self.plan.corrects(number)
            yield from _reads(f"{here}.reads", options["reads"], entering, len(leaving))
        if guess and copies:
            stem = options["stem"]
            yield from _fields(f"{here}.stem", stem, ("inputs", "leaving"))
            yield from _list(f"{here}.stem.inputs", stem["inputs"])
            yield from _each_among(f"{here}.stem.inputs", stem["inputs"], options["inputs"])
            yield from _among(f"{here}.stem.leaving", stem["leaving"], self.every)
        if copies:
            yield from self._blocks(here, spec.family, options["blocks"], options["inputs"])

    def _sources(self, place: str, sources: Sequence[Any]) -> _Problems:
        if not sources:
            yield place, "is empty: a guess needs something to read"
        for index, source in enumerate(sources):
            here = f"{place}[{index}]"
            yield from _fields(here, source, _SOURCE_FIELDS)
            yield from _among(f"{here}.name", source["name"], self.every)
            yield from _list(f"{here}.shape", source["shape"])
            axes = {name: source[name] for name in ("dtype", "batch_axis", "channel_axis")}
            yield from _tensor(here, TensorSpec(shape=tuple(source["shape"]), **axes))

    def _blocks(
        self, place: str, family: str, blocks: Sequence[Any], inputs: Sequence[str]
    ) -> _Problems:
        thinned = family == "thinned"
        if not blocks:
            yield f"{place}.blocks", f"is empty: family {family} copies at least one block"
        for index, block in enumerate(blocks):
            here = f"{place}.blocks[{index}]"
            yield from _fields(here, block, (*_BLOCK_FIELDS, *["step"] * thinned))
            if thinned:
                yield from _at_least_one(f"{here}.step", block["step"])
            for name in ("first", "last", "leaving"):
                yield from _among(f"{here}.{name}", block[name], self.nodes)
            yield from _among(f"{here}.entering", block["entering"], self.every)
            for name, known in (("inputs", inputs), ("sides", self.nodes)):
                yield from _list(f"{here}.{name}", block[name])
                yield from _each_among(f"{here}.{name}", block[name], known)


def _reads(place: str, rows: Any, entering: int, leaving: int) -> _Problems:
    yield from _list(place, rows)
    if len(rows) != leaving:
        yield place, f"has {len(rows)} rows: one for each of {leaving} values"
    for index, row in enumerate(rows):
        yield from _list(f"{place}[{index}]", row)
        yield from _each_among(f"{place}[{index}]", row, range(entering))


def _state(plan: Plan, number: int) -> list[str]:
    return [value.name for value in plan.interfaces[number].state]


def _tensor(place: str, spec: TensorSpec) -> _Problems:
    if not isinstance(getattr(torch, str(spec.dtype), None), torch.dtype):
        yield f"{place}.dtype", f"is {spec.dtype!r}, no dtype of torch: float32, for example"
    for index, size in enumerate(spec.shape):
        if not _is_whole(size) or size < 0:
            yield f"{place}.shape[{index}]", f"is {size!r}, no size"
    axes = tuple(range(-len(spec.shape), len(spec.shape)))
    yield from _among(f"{place}.batch_axis", spec.batch_axis, (None, *axes))
    if axes:
        yield from _among(f"{place}.channel_axis", spec.channel_axis, axes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least_one(place: str, value: Any) -> _Problems:
    if not _is_whole(value) or value < 1:
        yield place, f"is {value!r}: it should be a whole number of at least 1"


def _list(place: str, value: Any) -> _Problems:
    if not isinstance(value, (list, tuple)):
        yield place, f"is of type {type(value).__name__}: it should be a list"


def _fields(place: str, record: Any, names: Sequence[str]) -> _Problems:
    if not isinstance(record, Mapping):
        yield place, f"is of type {type(record).__name__}: it should be an object"
    for name in names:
        if name not in record:
            yield f"{place}.{name}", f"is missing: it needs {', '.join(names)}"


def _each_among(place: str, values: Sequence[Any], known: Collection[Any]) -> _Problems:
    for index, value in enumerate(values):
        yield from _among(f"{place}[{index}]", value, known)


_FEW = 8


def _among(place: str, value: Any, known: Collection[Any], why: str = "") -> _Problems:
    if isinstance(value, Hashable) and value in known:
        return
    if isinstance(known, set):
        allowed = "a node of the program"
    elif not known:
        allowed = "nothing"
    else:
        items = [str(item) if item is not None else "null" for item in known]
        more = ", ..." if len(items) > _FEW else ""
        allowed = ", ".join(items[:_FEW]) + more
    yield place, f"is {value!r}; possible here: {allowed}" + (f" ({why})" if why else "")
