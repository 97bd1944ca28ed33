"""Measured choice: family, rank and origin of every guess and correction, by fit against cost."""

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
from pnn_compile.fit.calibrate import calibrate_by_choice
from pnn_compile.fit.regression_sweep import Given

_Spec = TypeVar("_Spec", bound=OperatorSpec)


def choose(
    network: Compiled, analysis: Analysis, options: Options, inputs: Iterable[Any]
) -> Compiled:
    """Calibrate a network and choose by the measured fit whatever its options leave open.

    Args:
        network: What the compiler made without samples.
        analysis: What it knew.
        options: What was asked for; "auto" families are chosen among what the budget allows.
        inputs: Batches, as in `calibrate`.

    Returns:
        The network with the operators that fitted best, a plan that says what was tried, and the
        report of the calibration.

    Raises:
        OptionError: As in `calibrate`.
    """
    executor = Executor(network)
    report = calibrate_by_choice(
        network, inputs, executor, _Offered(network, analysis, options, executor)
    )
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


class _Offered:
    """Builds the candidates of the families that the options leave open."""

    def __init__(
        self, network: Compiled, analysis: Analysis, options: Options, executor: Executor
    ) -> None:
        self._network = network
        self._analysis = analysis
        self._options = options
        self._given = Given(executor)
        order = analysis.frontiers.order
        ends = {order[p.index - 1].name: p for p in analysis.frontiers.positions}
        self._cuts: list[Position] = [ends[face.after] for face in network.plan.interfaces]

    def guesses(self, number: int) -> Sequence[Operator]:
        """Guesses of every family, rank and origin that the budget allows."""
        if self._options.preprocess != "auto":
            return self._given.guesses(number)
        program, plan = self._network.program, self._network.plan
        entering = plan.enters(number)
        types = [value.spec for value in entering]
        cut = self._cuts[number - 1]
        specs = preprocess_candidates(
            self._analysis, self._options, len(plan.stages), cut, entering
        )
        return self._built(specs, lambda spec: build_preprocess(program, spec, types))

    def corrections(self, number: int) -> Sequence[Operator]:
        """Corrections of every family and rank that the budget allows."""
        if self._options.coarse != "auto":
            return self._given.corrections(number)
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
        return self._built(
            coarse_candidates(span, len(plan.stages)),
            lambda spec: build_propagator(network.program, plan, number, spec, fine),
        )

    def _built(self, specs: Sequence[_Spec], build: Callable[[_Spec], nn.Module]) -> list[Operator]:
        device = self._network.program.device
        with seeded(self._network.plan.seed):
            return [Operator(spec, build(spec).to(device).eval()) for spec in specs]
