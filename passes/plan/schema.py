"""`Plan`: every decision of the compiler as frozen data, with a JSON round trip.

Splitting, synthesis, assembly, export and loading read the plan and decide nothing. Stages are
numbered from 0 here and in generated code, from 1 in formulas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from passes.coarse.family import in_time, names_of, options_of
from passes.coarse.spec import CoarseSpec, OperatorSpec, PreprocessSpec
from passes.errors import ArtifactError, amount
from passes.ir.checked_json import decode, parse
from passes.ir.tensor_spec import Value

SCHEMA = 1
"""Version of the JSON format."""


@dataclass(frozen=True)
class Interface:
    """The frontier at a cut.

    Attributes:
        after: Last node before the cut.
        before: First node after the cut.
        module: Qualified name of the module that starts after the cut, for the reader.
        state: The tensors that cross, in the order of their definition.
        why: The next best place of the cut, and what it would cost while the other cuts stay.
    """

    after: str
    before: str
    module: str
    state: tuple[Value, ...]
    why: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the state at the example inputs."""
        return sum(value.spec.bytes for value in self.state)


@dataclass(frozen=True)
class Stage:
    """One fine stage with its preprocessing operator and coarse propagator.

    Attributes:
        first: First node of the stage.
        last: Last node of the stage.
        first_module: Qualified name of the first module that its nodes belong to; "" if they all
            belong to the model itself.
        last_module: Qualified name of the last one.
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
        preprocess: The preprocessing operator of the entering state; None for the first stage.
        coarse: The propagator that approximates the stage in the sweep; None for the first stage.
        backward_seconds: The backward part of `seconds`; None if that was not measured.
        device: Name of the profile of its device; None if the options name no devices.
        memory: Its bytes on that device, by the model of `passes.cost.memory`; of the last stage
            with the head.
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
        """Number of parameters of the preprocessing operator and the coarse propagator."""
        return sum(s.parameters for s in (self.preprocess, self.coarse) if s is not None)


def windows_of(stages: int, windows: int) -> list[range]:
    """Divide the numbers of stages into windows of equally many.

    >>> windows_of(6, 2)
    [range(0, 3), range(3, 6)]
    """
    size = stages // windows
    return [range(first, first + size) for first in range(0, stages, size)]


def entering_values(
    stages: Sequence[Stage], interfaces: Sequence[Interface], number: int
) -> tuple[Value, ...]:
    """Return the values that a stage after the first reads; see `Plan.enters`."""
    values = {value.name: value for value in interfaces[number - 1].state}
    return tuple(values[name] for name in stages[number].consumes)


def corrected_values(
    stages: Sequence[Stage], interfaces: Sequence[Interface], number: int, sweep: str
) -> tuple[Value, ...]:
    """Return the values that the correction of a stage is added to; see `Plan.corrects`."""
    names, face = set(stages[number].produces), interfaces[number]
    if sweep == "collapsed":
        names = {name for stage in stages[number:] for name in stage.produces}
        face = interfaces[-1]
    return tuple(value for value in face.state if value.name in names)


@dataclass(frozen=True)
class Head:
    """The cheap suffix of the graph after the last correction; fields as in `Stage`."""

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
        makespan: Slowest stage, its preprocessing included. In a training step the slowest forward
            plus the slowest backward, as no backward starts before every forward is done.
        serial: Coarse sweeps of all iterations, with links, and the head.
        time: Step time: makespan, `iterations - 1` times `slowest`, and `serial`.
        speedup: `sequential / time`.
        bound: Speed-up if preprocessing operators and coarse propagators were free.
        imbalance: Slowest fine stage over the mean; forward and backward as in the makespan.
        serial_share: `serial / sequential`.
        gap: Relative distance of the cut from the proven optimum of the objective.
        link: Part of `serial` in which states cross links; 0 without devices.
        slowest: Slowest fine stage alone; forward and backward as in the makespan.
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
        """Combine the parts of a step into the forecast of K iterations.

        Args:
            iterations: K, at most the number of stages.
            unit: Unit of all costs.
            sequential: Cost of the original network.
            makespan: Slowest stage with its preprocessing operator.
            slowest: Slowest stage alone.
            sweep: Cost of one sweep.
            tail: Cost of the head.
            imbalance: Slowest fine stage over the mean.
            gap: Relative distance of the cut from the optimum.
            link: Part of one sweep in which states cross links.
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
class OperatorOptions:
    """The options of the operators, to build a plan again for other cuts.

    The fields are those of `passes.options.Options`.
    """

    coarse: str
    coarse_budget: float | None
    units: int
    rank: int
    preprocess: str
    prologue: float | None
    coarse_width: float | None = None


@dataclass(frozen=True)
class Plan:
    """Every decision for one model.

    Attributes:
        model: Class name of the model.
        correction: "residual" (the paper) or "difference" (classical parareal).
        sweep: "chain", or "collapsed": each residual goes straight to the last state.
        iterations: Number K of parareal iterations.
        stages: The fine stages, in order.
        interfaces: One per stage: where it ends. The last one leads into the head.
        head: The nodes after the last correction.
        forecast: The forecast of the step time.
        cost: Source of the costs of nodes: "flops", "measured", "measured-forward", "roofline",
            "roofline-forward", or the name of a callable.
        seed: Seed of the initial weights of the coarse networks.
        fingerprint: Digest of the program's structure that the plan was made for.
        ties: Parameters that more than one stage reads, each with those stages.
        notes: What a user should know.
        asked: The options of the operators; None in plans of versions that did not store them.
        tolerance: Estimated relative error down to which calls iterate; None for the iterations of
            the plan.
        windows: Number W of windows; `passes.transform.sweep` says what they are.
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
    asked: OperatorOptions | None = None
    tolerance: float | None = None
    windows: int = 1
    schema: int = SCHEMA

    def forecasts(self, most: int) -> tuple[Forecast, ...]:
        """Forecast 1 to `most` iterations of the same plan."""
        base, iterations = self.forecast, min(self.iterations, len(self.stages))
        return tuple(
            Forecast.of(
                count, unit=base.unit, sequential=base.sequential, makespan=base.makespan,
                slowest=base.slowest, sweep=base.sweep, tail=base.tail,
                imbalance=base.imbalance, gap=base.gap, link=base.link / iterations,
            )
            for count in range(1, most + 1)
        )  # fmt: skip

    def enters(self, number: int) -> tuple[Value, ...]:
        """Return the values that a stage after the first reads, which its guess stands for."""
        return entering_values(self.stages, self.interfaces, number)

    @property
    def devices(self) -> int:
        """Number of devices that compute at once: the stages of a window."""
        return len(self.stages) // self.windows

    @property
    def form(self) -> str:
        """What kind of network it is, in words."""
        windows = f" in {self.windows} windows" if self.windows > 1 else ""
        return (
            f"{amount(len(self.stages), 'stage')}{windows}, {self.correction} form, "
            f"{self.sweep} sweep, K = {self.iterations}"
        )

    @property
    def most_iterations(self) -> int:
        """Largest number of iterations: N of a chain; a collapsed sweep and windows have one."""
        return 1 if self.sweep == "collapsed" or self.windows > 1 else len(self.stages)

    @property
    def placement(self) -> tuple[int, ...]:
        """Device of every stage, if each stage of a window has a device of its own."""
        return tuple(number % self.devices for number in range(len(self.stages)))

    def opens_window(self, number: int) -> bool:
        """Return whether a stage reads a corrected state, and has neither guess nor correction."""
        return number < len(self.stages) and number % self.devices == 0

    def window_start(self, number: int) -> int:
        """Return the first stage of the window of a stage."""
        return number - number % self.devices

    @property
    def predicts(self) -> bool:
        """Whether coarse propagators predict states, as those of a loop in time.

        `passes.transform.sweep` says what that changes.
        """
        specs = [stage.coarse for stage in self.stages if stage.coarse is not None]
        return self.correction == "difference" and any(in_time(spec.family) for spec in specs)

    def reads_guess(self, coarse: OperatorSpec) -> bool:
        """Return whether a coarse propagator takes the guess in front of the residual."""
        return self.correction == "difference" and not coarse.linear and not self.predicts

    def corrects(self, number: int) -> tuple[Value, ...]:
        """Return the values that the correction of a stage is added to.

        In a chain, those that the stage produces; in a collapsed sweep, those that cross the last
        interface and depend on the stage.
        """
        return corrected_values(self.stages, self.interfaces, number, self.sweep)

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
            data = parse(text)
        except ArtifactError as error:
            raise ArtifactError(f"the plan is {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ArtifactError(f"the plan has schema {schema!r}, this version reads {SCHEMA}")
        plan: Plan = decode(cls, data, "plan", _refine)
        if plan.forecast.sequential and not plan.forecast.slowest:
            plan = dataclasses.replace(plan, forecast=_with_parts(plan))
        return plan


def _with_parts(plan: Plan) -> Forecast:
    """Compute the parts of a forecast of a version that stored their sums alone."""
    forecast, count = plan.forecast, len(plan.stages)
    iterations = min(plan.iterations, count)
    free = forecast.sequential / forecast.bound  # iterations * slowest + tail
    if iterations > 1:
        slowest = (forecast.time - forecast.makespan - forecast.serial) / (iterations - 1)
    elif forecast.imbalance < count:
        # The imbalance is slowest * count / (sequential - tail).
        slowest = forecast.imbalance * (forecast.sequential - free) / (count - forecast.imbalance)
    else:
        slowest = free  # one stage has all the cost
    tail = free - iterations * slowest
    sweep = (forecast.serial - tail) / iterations
    return dataclasses.replace(forecast, slowest=slowest, sweep=sweep, tail=tail)


def _refine(kind: Any, data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the type of the options of an operator."""
    if not issubclass(kind, OperatorSpec):
        return {}
    return {"options": _options_of(kind, data["family"], f"{where}.family")}


def _options_of(kind: type[OperatorSpec], family: Any, where: str) -> type:
    """Return the class of the options that the name of a family implies."""
    parts = decode(str, family, where).split("+")
    names = names_of(kind.role, summed=len(parts) > 1)
    for index, part in enumerate(parts):
        if part not in names:
            place = f"{where}[{index}]" if len(parts) > 1 else where
            raise ArtifactError(f"{place} is {part!r}; possible here: {', '.join(names)}")
    return options_of(kind.role, family)
