"""`Plan`: every decision of the compiler as frozen, JSON-able data.

Splitting, synthesis, emission, export and loading read the plan and decide nothing. Stages are
numbered from 0 here and in generated code, from 1 in formulas.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from passes.coarse.family import names_of, options_of
from passes.coarse.spec import CoarseSpec, OperatorSpec, PreprocessSpec
from passes.errors import ArtifactError
from passes.ir.tensor_spec import Value

__all__ = ["SCHEMA", "Forecast", "Head", "Interface", "Plan", "Stage"]

SCHEMA = 1


@dataclass(frozen=True)
class Interface:
    """The frontier at a cut.

    Attributes:
        after: Last node before the cut.
        before: First node behind the cut.
        module: Qualified name of the module that starts behind the cut, for the reader.
        state: The tensors that cross, in the order of their definition.
        why: The next best place of the cut and what it would cost, the other cuts staying.
    """

    after: str
    before: str
    module: str
    state: tuple[Value, ...]
    why: str = ""

    @property
    def bytes(self) -> int:
        """Bytes that cross at the example inputs."""
        return sum(value.spec.bytes for value in self.state)


@dataclass(frozen=True)
class Stage:
    """One fine stage with its preprocessing operator and coarse propagator.

    Attributes:
        first: First node of the stage.
        last: Last node of the stage.
        first_module: Qualified name of the module that the first node belongs to.
        last_module: Qualified name of the module that the last node belongs to.
        nodes: Number of nodes, replicated side values not counted.
        inputs: Placeholders of the program that the stage reads.
        sides: Side values that the stage recomputes.
        consumes: Components of the entering state that the stage reads.
        produces: Components of the leaving state that the stage computes.
        flops: Forward FLOPs of the fine stage.
        backward_flops: Backward FLOPs of the fine stage.
        seconds: Measured seconds: with cost "measured" of a training step, with
            "measured-forward" of the forward pass; else None.
        parameters: Number of parameters.
        parameter_bytes: Their bytes.
        activation_bytes: Bytes of the tensors that the stage's nodes write.
        preprocess: The operator that guesses the entering state; None for the first stage.
        coarse: The propagator that imitates the stage in the sweep; None for the first stage.
        backward_seconds: The part of `seconds` on the way back; None where that was not measured.
        device: Name of the profile of the device that the stage was cut for; None where there was
            none.
        memory: Bytes that it holds there, by the model of `passes.cost.memory`; the last one with
            the head.
    """

    first: str
    last: str
    first_module: str
    last_module: str
    nodes: int
    inputs: tuple[str, ...]
    sides: tuple[str, ...]
    consumes: tuple[str, ...]
    produces: tuple[str, ...]
    flops: int
    backward_flops: int
    seconds: float | None
    parameters: int
    parameter_bytes: int
    activation_bytes: int
    preprocess: PreprocessSpec | None = None
    coarse: CoarseSpec | None = None
    backward_seconds: float | None = None
    device: str | None = None
    memory: int | None = None

    @property
    def operator_parameters(self) -> int:
        """Number of parameters of the guess and the correction."""
        return sum(s.parameters for s in (self.preprocess, self.coarse) if s is not None)


@dataclass(frozen=True)
class Head:
    """The cheap suffix of the graph behind the last correction; fields as of a `Stage`."""

    first_module: str
    nodes: int
    inputs: tuple[str, ...]
    sides: tuple[str, ...]
    flops: int
    seconds: float | None
    backward_seconds: float | None = None


@dataclass(frozen=True)
class Forecast:
    """The step-time model, in the unit of the costs that were asked for.

    FLOPs are those of the forward pass; measured seconds are of a training step or, with cost
    "measured-forward", of the forward pass.

    Attributes:
        unit: "FLOPs" or "seconds", or "cost" for a callable of the user.
        sequential: Cost of the original network, on the device that is fastest for it.
        makespan: Slowest stage, its preprocessing included; of a training step the slowest one
            forward and the slowest one backward, as none goes back before all went forward.
        serial: Coarse sweep, links and head.
        time: `iterations` rounds of makespan and sweep, and the head.
        speedup: `sequential / time`.
        bound: What the speed-up would be if guesses and corrections were free.
        imbalance: Slowest fine stage over the mean, of both ways as in the makespan.
        serial_share: `serial / sequential`.
        gap: Relative distance of the cut from the proven optimum of the objective.
        link: Seconds of the serial part in which states cross links; 0 without devices.
        slowest: Slowest fine stage alone, of both ways as in the makespan.
        sweep: One coarse sweep, links included.
        tail: The head.
    """

    unit: str
    sequential: float
    makespan: float
    serial: float
    time: float
    speedup: float
    bound: float
    imbalance: float
    serial_share: float
    gap: float
    link: float = 0.0
    slowest: float = 0.0
    sweep: float = 0.0
    tail: float = 0.0

    @classmethod
    def of(
        cls,
        iterations: int,
        *,
        unit: str,
        sequential: float,
        makespan: float,
        slowest: float,
        sweep: float,
        tail: float,
        imbalance: float,
        gap: float,
        link: float,
    ) -> Forecast:
        """Put the figures of K iterations together; the guesses are made in the first one only.

        Args:
            iterations: K, at most the number of stages.
            unit: As above, and so are the others;
            sequential: the original network,
            makespan: the slowest stage with its guess,
            slowest: the slowest stage alone,
            sweep: one sweep,
            tail: the head,
            imbalance: of the stages,
            gap: of the cut,
            link: the part of one sweep in which states cross links.
        """
        serial = iterations * sweep + tail
        time = makespan + (iterations - 1) * slowest + serial
        free = iterations * slowest + tail
        return cls(
            unit=unit,
            sequential=sequential,
            makespan=makespan,
            serial=serial,
            time=time,
            speedup=sequential / time if time else 1.0,
            bound=sequential / free if slowest else 1.0,
            imbalance=imbalance,
            serial_share=serial / sequential if sequential else 0.0,
            gap=gap,
            link=iterations * link,
            slowest=slowest,
            sweep=sweep,
            tail=tail,
        )


@dataclass(frozen=True)
class Asked:
    """What the operators were asked for, so that a plan can be made anew for other cuts.

    The fields are those of `passes.options.Options`.
    """

    coarse: str
    coarse_budget: float
    units: int
    rank: int
    preprocess: str
    prologue: float | None


@dataclass(frozen=True)
class Plan:
    """What was decided for one model.

    Attributes:
        model: Class name of the model.
        correction: "residual" (the paper) or "difference" (classical parareal).
        sweep: "chain", or "collapsed": each residual goes straight to the last state.
        iterations: Number K of parareal iterations.
        stages: The fine stages, in order.
        interfaces: One per stage: where it ends. The last one leads into the head.
        head: What stays behind the last correction.
        forecast: The step-time model.
        cost: How nodes were weighed: "flops", "measured", "measured-forward" or the name of a
            callable.
        seed: Seed of the initial weights of the coarse networks.
        fingerprint: Digest of the program's structure that the plan was made for.
        ties: Parameters that more than one stage reads, each with those stages.
        notes: What a user should know.
        asked: What the operators were asked for; None in plans of versions that did not store it.
        schema: Version of this format.
    """

    model: str
    correction: str
    sweep: str
    iterations: int
    stages: tuple[Stage, ...]
    interfaces: tuple[Interface, ...]
    head: Head
    forecast: Forecast
    cost: str
    seed: int
    fingerprint: str
    ties: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    asked: Asked | None = None
    schema: int = SCHEMA

    def forecasts(self, most: int) -> tuple[Forecast, ...]:
        """Forecast 1 to `most` iterations, with everything else as it is."""
        known, rounds = self.forecast, min(self.iterations, len(self.stages))
        return tuple(
            Forecast.of(
                count, unit=known.unit, sequential=known.sequential, makespan=known.makespan,
                slowest=known.slowest, sweep=known.sweep, tail=known.tail,
                imbalance=known.imbalance, gap=known.gap, link=known.link / rounds,
            )
            for count in range(1, most + 1)
        )  # fmt: skip

    def enters(self, number: int) -> tuple[Value, ...]:
        """The values that a stage after the first reads: what its guess stands for."""
        known = {value.name: value for value in self.interfaces[number - 1].state}
        return tuple(known[name] for name in self.stages[number].consumes)

    def reads_guess(self, coarse: OperatorSpec) -> bool:
        """Whether a correction is called with the guess in front of the residual."""
        return self.correction == "difference" and not coarse.linear

    def corrects(self, number: int) -> tuple[Value, ...]:
        """The values that the correction of a stage is added to.

        In a chain what the stage produces; in a collapsed sweep what crosses the last interface
        and depends on the stage.
        """
        names = set(self.stages[number].produces)
        face = self.interfaces[number]
        if self.sweep == "collapsed":
            names = {name for stage in self.stages[number:] for name in stage.produces}
            face = self.interfaces[-1]
        return tuple(value for value in face.state if value.name in names)

    def to_json(self) -> str:
        """Return the plan as readable, diffable JSON text."""
        data = dataclasses.asdict(self)
        for stage in data["stages"]:
            for spec in filter(None, (stage["preprocess"], stage["coarse"])):
                options = spec["options"].items()
                spec["options"] = {key: value for key, value in options if value is not None}
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back from `to_json` text.

        Raises:
            ArtifactError: The text is not JSON, of another schema, or a field of it is missing,
                unknown or of another type; the message names the place.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"the plan is not JSON ({error})") from error
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise ArtifactError(f"the plan has schema {found!r}, this version reads {SCHEMA}")
        plan: Plan = _decode(cls, data, "plan")
        if plan.forecast.sequential and not plan.forecast.slowest:
            plan = dataclasses.replace(plan, forecast=_with_parts(plan))
        return plan


def _with_parts(plan: Plan) -> Forecast:
    """Compute the parts of a forecast from a version that stored their sums alone."""
    known, count = plan.forecast, len(plan.stages)
    rounds = min(plan.iterations, count)
    free = known.sequential / known.bound  # rounds * slowest + tail
    if rounds > 1:
        slowest = (known.time - known.makespan - known.serial) / (rounds - 1)
    elif known.imbalance < count:
        # With it, the imbalance, which is slowest * count / (sequential - tail).
        slowest = known.imbalance * (known.sequential - free) / (count - known.imbalance)
    else:
        slowest = free  # one stage has all the cost
    tail = free - rounds * slowest
    sweep = (known.serial - tail) / rounds
    return dataclasses.replace(known, slowest=slowest, sweep=sweep, tail=tail)


def _decode(kind: Any, data: Any, where: str) -> Any:
    """Rebuild a value of the annotated type `kind` from plain JSON data."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, data, where)
    if type(None) in arguments:
        return None if data is None else _decode(arguments[0], data, where)
    if origin is tuple and isinstance(data, list):
        kinds = arguments[:1] * len(data) if ... in arguments else arguments
        if len(kinds) != len(data):
            raise ArtifactError(f"{where} should have {len(kinds)} items, found {len(data)}")
        pairs = enumerate(zip(kinds, data, strict=True))
        return tuple(_decode(inner, item, f"{where}[{i}]") for i, (inner, item) in pairs)
    if origin is Mapping and isinstance(data, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and type(data) is kind:
        return data
    name = "list" if origin is tuple else getattr(kind, "__name__", str(kind))
    raise ArtifactError(f"{where} should be {name}, found {type(data).__name__}")


def _decode_record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} should be an object, found {type(data).__name__}")
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in fields(kind)}
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    for name in needed:
        if name not in data:
            raise ArtifactError(f"{where}.{name} is missing: it needs {', '.join(needed)}")
    if unknown := sorted(set(data) - set(hints)):
        raise ArtifactError(f"{where} has unknown fields ({', '.join(unknown)})")
    if issubclass(kind, OperatorSpec):
        hints["options"] = _options_of(kind, data["family"], f"{where}.family")
    return kind(**{name: _decode(hints[name], data[name], f"{where}.{name}") for name in data})


def _options_of(kind: type[OperatorSpec], family: Any, where: str) -> type:
    """The class of the options of a family, which the family's name decides."""
    parts = _decode(str, family, where).split("+")
    names = names_of(kind.role, summed=len(parts) > 1)
    for index, part in enumerate(parts):
        if part not in names:
            place = f"{where}[{index}]" if len(parts) > 1 else where
            raise ArtifactError(f"{place} is {part!r}; possible here: {', '.join(names)}")
    return options_of(kind.role, family)
