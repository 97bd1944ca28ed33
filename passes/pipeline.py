"""The compiler as a list of passes from a model to a parareal network.

A pass states what it requires and ensures in the type that it works on: `Compilation`, whose
fields fill up from pass to pass. The list is plain data; nothing registers itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import fx, nn

from passes.analysis.analysis import Analysis, weigh
from passes.capture.ladder import capture
from passes.cost.measured import Measure, measure_seconds
from passes.cost.node_facts import observe
from passes.errors import OptionError
from passes.ir.program import Program, verify_graph
from passes.options import Options
from passes.plan.num_stages import cut_and_plan
from passes.plan.schema import Plan
from passes.transform.assemble import assemble, sequential, verify_steps
from passes.transform.split import Stages, split
from passes.transform.synthesize import Operators, synthesize

__all__ = [
    "CAPTURE",
    "COMPILE",
    "REPLAY",
    "Compilation",
    "Pass",
    "PassResult",
    "insert",
    "run_passes",
]


@dataclass(frozen=True)
class Compilation:
    """One compilation on its way through the passes.

    Attributes:
        model: The user's model, which is copied and never changed.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic_batch: Whether to keep the batch size free where the model allows it.
        program: The captured program.
        options: What was asked for; None where a plan is replayed.
        measure: Gives the seconds of segments, for measured costs.
        analysis: Costs and legal cuts.
        plan: The decisions.
        stages: The fine stages and the head.
        operators: The guesses and corrections.
        sequential: The stages one after another.
        module: The parareal network.
        samples: Batches to calibrate on.
        calibration: What calibration found.
    """

    model: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_batch: bool = True
    program: Program | None = None
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
        name: What the report calls it.
        requires: Fields of the compilation that must be filled before.
        ensures: Fields that it fills.
        apply: From a compilation to the next one.
    """

    name: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    apply: Callable[[Compilation], Compilation]


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        name: Its name.
        seconds: Wall seconds that it took.
        changed: Fields of the compilation that hold something else after it; empty if none does.
    """

    name: str
    seconds: float
    changed: tuple[str, ...] = ()


def run_passes(
    compilation: Compilation, passes: Sequence[Pass], *, check: bool = False
) -> tuple[Compilation, tuple[PassResult, ...]]:
    """Run passes in order.

    Args:
        compilation: Where to start.
        passes: The passes.
        check: Whether to verify every graph of the compilation between passes.

    Raises:
        OptionError: A pass lacks what it requires, or did not ensure what it promised.
        PnnError: Whatever a pass raises.
    """
    results = []
    for step in passes:
        _demand(compilation, step.requires, f"pass {step.name!r} requires")
        start, before = time.perf_counter(), compilation
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
    """Check every graph; those that are assembled say of every node which step it belongs to."""
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
    """Return the passes with one more of the user's own after the one of that name.

    Raises:
        OptionError: No pass has that name.
    """
    names = [one.name for one in passes]
    if after not in names:
        raise OptionError(f"no pass is called {after!r}; those of the list: {', '.join(names)}")
    place = names.index(after) + 1
    return (*passes[:place], step, *passes[place:])


def _capture(c: Compilation) -> Compilation:
    assert c.model is not None
    program = capture(c.model, c.args, c.kwargs, dynamic_batch=c.dynamic_batch)
    return replace(c, program=program)


def _analyze(c: Compilation) -> Compilation:
    assert c.options is not None
    assert c.program is not None
    facts = observe(c.program)
    device = next(iter(c.options.devices), None)
    analysis = weigh(c.program, facts, c.options.cost, device, measure=c.measure)
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
"""From a model to a program that equals it in outputs, gradients and buffers."""

REPLAY: tuple[Pass, ...] = (
    # Plan -> stages that share the program's modules, and their composition.
    Pass("split", ("program", "plan"), ("stages", "sequential"), _split),
    # Plan -> preprocessing operators and coarse propagators.
    Pass("synthesize", ("plan", "stages"), ("operators",), _synthesize),
    # All of them -> the parareal network.
    Pass("assemble", ("plan", "stages", "operators"), ("module",), _assemble),
)
"""From a program and a plan to the network: decides nothing."""

COMPILE: tuple[Pass, ...] = (
    # Runs the program: shapes, aliases, writes, FLOPs, legal cuts, repeated blocks.
    Pass("analyze", ("program", "options"), ("analysis",), _analyze),
    # Decides: cuts, families, forecast.
    Pass("plan", ("options", "analysis"), ("plan",), _plan),
    *REPLAY,
)
"""From a program and options to the network."""
