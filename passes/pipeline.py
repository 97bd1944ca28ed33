"""The compiler as a list of passes from a model to a parareal network.

All passes work on one type, `Compilation`, whose fields fill up from pass to pass. A pass states
which fields it requires and which it ensures. The list is plain data; there is no registry.

    CAPTURE    model -> program
    COMPILE    program, options -> analysis -> plan -> stages, operators -> module
    REPLAY     program, plan -> stages, operators -> module
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import fx, nn

from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture_and_observe
from passes.cost.measured import Measure, measure_seconds
from passes.cost.node_facts import observe
from passes.errors import OptionError
from passes.ir.isolation import rare_collection
from passes.ir.observer import Observations
from passes.ir.program import Program, Validation, verify_graph
from passes.options import Options
from passes.plan.num_stages import cut_and_plan
from passes.plan.schema import Plan
from passes.transform.assemble import assemble, sequential, verify_steps
from passes.transform.split import Stages, split
from passes.transform.synthesize import Operators, synthesize


@dataclass(frozen=True)
class Compilation:
    """State of a compilation between two passes.

    Attributes:
        model: The user's model, which is copied and never changed.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic: Dimensions of the inputs to keep free, as `capture` takes them.
        validate: How much capture compares with the model.
        program: The captured program.
        observations: What the runs that validated it showed of its nodes.
        options: Options of the compilation; None if a plan is replayed.
        measure: Function that measures the seconds of segments, for measured costs.
        analysis: Costs and legal cuts.
        plan: The decisions.
        stages: The fine stages and the head.
        operators: The preprocessing operators and coarse propagators.
        sequential: The network of the stages one after another.
        module: The parareal network.
        samples: Batches to calibrate on.
        calibration: The report of the calibration.
    """

    model: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Collection[str] = ("batch",)
    validate: Validation = "full"
    program: Program | None = None
    observations: Observations | None = None
    options: Options | None = None
    measure: Measure = measure_seconds
    analysis: Analysis | None = None
    plan: Plan | None = None
    stages: Stages | None = None
    operators: Operators | None = None
    sequential: fx.GraphModule | None = None
    module: fx.GraphModule | None = None
    samples: Iterable[Any] | None = None
    calibration: Any = None


@dataclass(frozen=True)
class Pass:
    """One step of the compiler.

    Attributes:
        name: Name in reports.
        requires: Fields of the compilation that must be set before.
        ensures: Fields that it sets.
        apply: Function from a compilation to the next one.
    """

    name: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    apply: Callable[[Compilation], Compilation]


@dataclass(frozen=True)
class PassResult:
    """Outcome of a pass.

    Attributes:
        name: Its name.
        seconds: Its wall time in seconds.
        changed: Fields of the compilation that it replaced.
    """

    name: str
    seconds: float
    changed: tuple[str, ...] = ()


def run_passes(
    compilation: Compilation,
    passes: Sequence[Pass],
    *,
    check: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> tuple[Compilation, tuple[PassResult, ...]]:
    """Run passes in order.

    Args:
        compilation: State to start from.
        passes: The passes.
        check: Whether to verify every graph of the compilation between passes.
        progress: Called with the name of the pass that starts.

    Returns:
        The compilation after the last pass, and the outcome of every pass.

    Raises:
        OptionError: A field that a pass requires is missing, or one that it ensures is not set.
        PnnError: Whatever a pass raises.
    """
    results = []
    for step in passes:
        _demand(compilation, step.requires, f"pass {step.name!r} requires")
        progress(step.name)
        start, before = time.perf_counter(), compilation
        with rare_collection():
            compilation = step.apply(compilation)
        seconds = time.perf_counter() - start
        results.append(PassResult(step.name, seconds, _changed(before, compilation)))
        _demand(compilation, step.ensures, f"pass {step.name!r} should have made")
        if check:
            _verify(compilation)
    return compilation, tuple(results)


def _changed(before: Compilation, after: Compilation) -> tuple[str, ...]:
    names = (entry.name for entry in fields(Compilation))
    return tuple(name for name in names if getattr(before, name) is not getattr(after, name))


def _verify(compilation: Compilation) -> None:
    """Verify every graph; each node of an assembled graph must belong to a step."""
    if compilation.program is not None:
        verify_graph(compilation.program.module)
    for graph in (compilation.sequential, compilation.module):
        if graph is not None:
            verify_graph(graph)
            verify_steps(graph)


def _demand(compilation: Compilation, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if getattr(compilation, name) is None]
    if missing:
        raise OptionError(f"{what} {', '.join(missing)}")


def insert(passes: Sequence[Pass], step: Pass, *, after: str) -> tuple[Pass, ...]:
    """Return the passes with another one inserted.

    Args:
        passes: The passes.
        step: The pass to insert.
        after: Name of the pass before it.

    Raises:
        OptionError: No pass has that name.
    """
    names = [listed.name for listed in passes]
    if after not in names:
        raise OptionError(f"no pass is called {after!r}; those of the list: {', '.join(names)}")
    index = names.index(after) + 1
    return (*passes[:index], step, *passes[index:])


def _capture(c: Compilation) -> Compilation:
    assert c.model is not None
    program, observations = capture_and_observe(
        c.model, c.args, c.kwargs, dynamic=c.dynamic, validate=c.validate
    )
    return replace(c, program=program, observations=observations)


def _analyze(c: Compilation) -> Compilation:
    assert c.options is not None
    assert c.program is not None
    facts = observe(c.program, c.observations)
    device = next(iter(c.options.devices), None)
    analysis = analyze(c.program, facts, c.options.cost, device, measure=c.measure)
    return replace(c, analysis=analysis)


def _plan(c: Compilation) -> Compilation:
    assert c.options is not None
    assert c.analysis is not None
    options, plan = cut_and_plan(c.analysis, c.options)
    return replace(c, options=options, plan=plan)


def _split(c: Compilation) -> Compilation:
    assert c.program is not None
    assert c.plan is not None
    stages = split(c.program, c.plan)
    return replace(c, stages=stages, sequential=sequential(c.program, c.plan, stages))


def _synthesize(c: Compilation) -> Compilation:
    assert c.program is not None
    assert c.plan is not None
    assert c.stages is not None
    return replace(c, operators=synthesize(c.program, c.plan, c.stages))


def _assemble(c: Compilation) -> Compilation:
    assert c.program is not None
    assert c.plan is not None
    assert c.stages is not None
    assert c.operators is not None
    return replace(c, module=assemble(c.program, c.plan, c.stages, c.operators))


CAPTURE = Pass("capture and validate", ("model",), ("program",), _capture)
"""From a model to a program with equal outputs, gradients and buffers."""

REPLAY: tuple[Pass, ...] = (
    # Plan -> stages that share the program's modules, and their composition.
    Pass("split", ("program", "plan"), ("stages", "sequential"), _split),
    # Plan -> preprocessing operators and coarse propagators.
    Pass("synthesize", ("plan", "stages"), ("operators",), _synthesize),
    # All of them -> the parareal network.
    Pass("assemble", ("plan", "stages", "operators"), ("module",), _assemble),
)
"""From a program and a plan to the network, without decisions."""

COMPILE: tuple[Pass, ...] = (
    # Run the program: shapes, aliases, writes, FLOPs, legal cuts, repeated blocks.
    Pass("analyze", ("program", "options"), ("analysis",), _analyze),
    # Decide: cuts, families, forecast.
    Pass("plan", ("options", "analysis"), ("plan",), _plan),
    *REPLAY,
)
"""From a program and options to the network."""
