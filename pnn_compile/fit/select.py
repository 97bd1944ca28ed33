"""Choose family, rank and prologue of every operator by calibration: error against FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.coarse.family import build_preprocess
from passes.coarse.select import coarse_candidates, preprocess_candidates
from passes.coarse.spec import CoarseSpec, OperatorSpec, PreprocessSpec, Span
from passes.ir.isolation import seeded
from passes.options import Options
from passes.plan.build import with_operators
from passes.transform.assemble import assemble
from passes.transform.executor import Executor, Operator
from passes.transform.synthesize import Operators, build_propagator
from pnn_compile.compiled import Compiled
from pnn_compile.fit.calibrate import calibrate_candidates
from pnn_compile.fit.regression_sweep import CurrentOperators

_Spec = TypeVar("_Spec", bound=OperatorSpec)


def choose(
    network: Compiled, analysis: Analysis, options: Options, inputs: Iterable[Any]
) -> Compiled:
    """Calibrate a network, and choose the operators that its options leave open by their error.

    Args:
        network: The network as compiled without samples.
        analysis: Costs and legal cuts of its model.
        options: "auto" families are chosen among all that the budget allows.
        inputs: Batches, as in `calibrate`.

    Returns:
        The network with the operators of the smallest error, a plan that lists the candidates, and
        the report of the calibration.

    Raises:
        OptionError: As in `calibrate`.
    """
    executor = Executor(network)
    candidates = _CandidateBuilder(network, analysis, options, executor)
    report = calibrate_candidates(network, inputs, executor, candidates)
    plan = with_operators(
        analysis,
        network.plan,
        options,
        _specs(executor.guesses, PreprocessSpec),
        _specs(executor.corrections, CoarseSpec),
    )
    operators = Operators(_networks(executor.guesses), _networks(executor.corrections))
    mode = network.module.training
    for operator in (*operators.preprocess.values(), *operators.coarse.values()):
        operator.train(mode)
    module = assemble(network.program, plan, network.stages, operators)
    return dataclasses.replace(
        network, plan=plan, operators=operators, module=module, calibration=report
    )


def _specs(operators: dict[int, Operator], kind: type[_Spec]) -> dict[int, _Spec]:
    pairs = ((number, operator.spec) for number, operator in operators.items())
    return {number: spec for number, spec in pairs if isinstance(spec, kind)}


def _networks(operators: dict[int, Operator]) -> dict[int, nn.Module]:
    return {number: operator.network for number, operator in operators.items()}


class _CandidateBuilder:
    """Build the candidates of the families that the options leave open."""

    def __init__(
        self, network: Compiled, analysis: Analysis, options: Options, executor: Executor
    ) -> None:
        self._network = network
        self._analysis = analysis
        self._options = options
        self._current = CurrentOperators(executor)
        order = analysis.frontiers.order
        ends = {order[p.index - 1].name: p for p in analysis.frontiers.positions}
        self._cuts: list[Position] = [ends[face.after] for face in network.plan.interfaces]

    def preprocess(self, number: int) -> Sequence[Operator]:
        """Build preprocessing operators of every family, rank and prologue within the budget."""
        if self._options.preprocess != "auto":
            return self._current.preprocess(number)
        program, plan = self._network.program, self._network.plan
        entering = plan.enters(number)
        types = [value.spec for value in entering]
        cut = self._cuts[number - 1]
        specs = preprocess_candidates(
            self._analysis, self._options, len(plan.stages), cut, entering
        )
        return self._build(specs, lambda spec: build_preprocess(program, spec, types))

    def coarse(self, number: int) -> Sequence[Operator]:
        """Build coarse propagators of every family and rank within the budget."""
        if self._options.coarse != "auto":
            return self._current.coarse(number)
        network, plan = self._network, self._network.plan
        fine = network.stages.fine[number]
        span = Span(
            self._analysis,
            self._options,
            self._cuts[number - 1],
            self._cuts[number],
            plan.enters(number),
            plan.corrects(number),
        )
        return self._build(
            coarse_candidates(span, len(plan.stages)),
            lambda spec: build_propagator(network.program, plan, number, spec, fine),
        )

    def _build(self, specs: Sequence[_Spec], build: Callable[[_Spec], nn.Module]) -> list[Operator]:
        device = self._network.program.device
        with seeded(self._network.plan.seed):
            return [Operator(spec, build(spec).to(device).eval()) for spec in specs]
