"""The compiler as a list of passes from a captured program to a parareal network.

A pass states what it requires and ensures in the type that it works on: `Compilation`, whose
fields fill up from pass to pass. The list is plain data; nothing registers itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from passes.analysis.analysis import Analysis, weigh
from passes.cost.measured import Measure, measure_seconds
from passes.cost.node_facts import observe
from passes.errors import OptionError
from passes.ir.program import Program, verify_graph
from passes.options import Options
from passes.plan.num_stages import decide
from passes.plan.schema import Plan
from passes.transform.assemble import assemble, sequential
from passes.transform.split import Stages, split
from passes.transform.synthesize import Operators, synthesize

__all__ = ["COMPILE", "REPLAY", "Compilation", "Pass", "PassResult", "run_passes"]


@dataclass(frozen=True)
class Compilation:
    """One compilation on its way through the passes.

    Attributes:
        program: The captured program.
        options: What was asked for; None where a plan is replayed.
        measure: Gives the seconds of segments, for measured costs.
        analysis: Costs and legal cuts.
        plan: The decisions.
        stages: The fine stages and the head.
        operators: The guesses and corrections.
        sequential: The stages one after another.
        module: The parareal network.
    """

    program: Program
    options: Options | None = None
    measure: Measure = measure_seconds
    analysis: Analysis | None = None
    plan: Plan | None = None
    stages: Stages | None = None
    operators: Operators | None = None
    sequential: fx.GraphModule | None = None
    module: fx.GraphModule | None = None


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
    """What a pass took: its name and wall seconds."""

    name: str
    seconds: float


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
        start = time.perf_counter()
        compilation = step.apply(compilation)
        results.append(PassResult(step.name, time.perf_counter() - start))
        _demand(compilation, step.ensures, f"pass {step.name!r} should have made")
        if check:
            for graph in (compilation.program.module, compilation.sequential, compilation.module):
                if graph is not None:
                    verify_graph(graph)
    return compilation, tuple(results)


def _demand(compilation: Compilation, fields: Sequence[str], what: str) -> None:
    missing = [field for field in fields if getattr(compilation, field) is None]
    if missing:
        raise OptionError(f"{what} {', '.join(missing)}")


def _analyze(c: Compilation) -> Compilation:
    assert c.options is not None
    facts = observe(c.program)
    device = next(iter(c.options.devices), None)
    found = weigh(c.program, facts, c.options.cost, device, measure=c.measure)
    return replace(c, analysis=found)


def _plan(c: Compilation) -> Compilation:
    assert c.options is not None
    assert c.analysis is not None
    options, plan = decide(c.analysis, c.options)
    return replace(c, options=options, plan=plan)


def _split(c: Compilation) -> Compilation:
    assert c.plan is not None
    stages = split(c.program, c.plan)
    return replace(c, stages=stages, sequential=sequential(c.program, c.plan, stages))


def _synthesize(c: Compilation) -> Compilation:
    assert c.plan is not None
    assert c.stages is not None
    return replace(c, operators=synthesize(c.program, c.plan, c.stages))


def _assemble(c: Compilation) -> Compilation:
    assert c.plan is not None
    assert c.stages is not None
    assert c.operators is not None
    return replace(c, module=assemble(c.program, c.plan, c.stages, c.operators))


REPLAY: tuple[Pass, ...] = (
    # Plan -> stages that share the program's modules, and their composition.
    Pass("split", ("plan",), ("stages", "sequential"), _split),
    # Plan -> preprocessing operators and coarse propagators.
    Pass("synthesize", ("plan", "stages"), ("operators",), _synthesize),
    # All of them -> the parareal network.
    Pass("assemble", ("plan", "stages", "operators"), ("module",), _assemble),
)
"""From a program and a plan to the network: decides nothing."""

COMPILE: tuple[Pass, ...] = (
    # Runs the program: shapes, aliases, writes, FLOPs, legal cuts, repeated blocks.
    Pass("analyze", ("options",), ("analysis",), _analyze),
    # Decides: cuts, families, forecast.
    Pass("plan", ("options", "analysis"), ("plan",), _plan),
    *REPLAY,
)
"""From a program and options to the network."""
