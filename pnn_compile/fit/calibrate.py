"""Calibrate: fit preprocessing operators and coarse propagators to a model, in closed form.

`pnn_compile.fit.regression_sweep` does the fit. Every fifth batch is held out to measure the errors
before and after. Batches are streamed; only sums of products are kept, in float64. `calibrate` fits
the operators of a network; `choose` also selects family, rank and prologue of every operator, by
error within the budget of FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.coarse.family import build_preprocess
from passes.coarse.select import coarse_candidates, preprocess_candidates
from passes.coarse.spec import CoarseSpec, OperatorSpec, PreprocessSpec, Span
from passes.ir.isolation import seeded
from passes.options import Options
from passes.pipeline import Compilation, Pass
from passes.plan.build import with_operators
from passes.transform.assemble import assemble
from passes.transform.executor import Executor, Operator
from passes.transform.network import check_mode
from passes.transform.sweep import Symbol, sweep
from passes.transform.synthesize import Operators, build_propagator
from pnn_compile.compiled import gather
from pnn_compile.fit.metrics import Agreement, RelativeError, evaluating, main_output
from pnn_compile.fit.regression_sweep import Candidates, CurrentOperators, fit_closed_form
from pnn_compile.inputs import CalibrationBatches, batch_size

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_Spec = TypeVar("_Spec", bound=OperatorSpec)


@dataclass(frozen=True)
class InterfaceError:
    """Relative errors, on held-out samples, of the states around one stage.

    In a collapsed sweep only the last state is corrected.

    Attributes:
        stage: Number of the stage.
        guess_before: Of the guess that enters it, before calibration.
        guess_after: The same after calibration.
        uncorrected: Of the state after it, without a correction.
        corrected_before: With the correction, before calibration.
        corrected_after: With the correction, after calibration.
    """

    stage: int
    guess_before: float
    guess_after: float
    uncorrected: float
    corrected_before: float
    corrected_after: float


@dataclass(frozen=True)
class CalibrationReport:
    """Errors before and after calibration, on samples that were not fitted.

    Ridge, rank and family are chosen on these samples too, so the errors are those of the best of
    a few candidates. Judge a network that is fitted further on samples of its own.

    Attributes:
        interfaces: Errors by stage.
        agreement_before: Share of held-out samples whose largest output is the original's; of
            outputs that are equal, where they are whole numbers; None where there is no largest.
        agreement_after: The same after calibration.
        output_error_before: Relative error of the outputs against the original's.
        output_error_after: The same after calibration.
        fitted: Number of samples that were fitted.
        held_out: Number of samples that were held out.
        recalibrated: Operators whose BatchNorm statistics were measured anew, because that lowered
            their error.
    """

    interfaces: tuple[InterfaceError, ...]
    agreement_before: float | None
    agreement_after: float | None
    output_error_before: float
    output_error_after: float
    fitted: int
    held_out: int
    recalibrated: tuple[str, ...] = ()


def calibrate(compiled: Compiled, inputs: Iterable[Any]) -> CalibrationReport:
    """Fit the operators of a network to its own fine stages, in closed form.

    Families "linear" and "lowrank" are fitted by ridge regression, sums of them one part after the
    other. Other families keep their weights (`pnn.fit` trains those), but their BatchNorm
    statistics are measured anew where that lowers the error. The fine stages never change.
    Deterministic.

    Args:
        compiled: The network; its fine stages hold the trained weights.
        inputs: Batches of inputs: a tensor, a tuple of positional arguments, or a dict of
            arguments by name. Iterated several times: pass a list or a DataLoader that does not
            shuffle. Every fifth batch is held out.

    Returns:
        The errors before and after, on held-out samples.

    Raises:
        OptionError: There are fewer than two batches, they come from a generator, or a batch does
            not fit the model, or the network was captured for training mode alone.
    """
    executor = Executor(compiled)
    return calibrate_candidates(compiled, inputs, executor, CurrentOperators(executor))


def calibrate_candidates(
    compiled: Compiled,
    inputs: Iterable[Any],
    executor: Executor,
    candidates: Candidates,
    *,
    keep_better: bool = False,
) -> CalibrationReport:
    """Calibrate several candidates for every place, and leave the best ones in the executor.

    Args:
        compiled: The network.
        inputs: As in `calibrate`.
        executor: Of the network.
        candidates: The operators to choose from.
        keep_better: Whether weights stay where the closed form would not lower the error.

    Returns:
        As in `calibrate`.

    Raises:
        OptionError: As in `calibrate`.
    """
    program = compiled.program
    check_mode(program.name, program.capture.only_mode, training=False)
    batches = CalibrationBatches(compiled, inputs)
    with evaluating(compiled):
        before = _measure(executor, batches)
        recalibrated = fit_closed_form(executor, batches.split, candidates, keep_better=keep_better)
        after = _measure(executor, batches)
    interfaces = tuple(
        InterfaceError(
            stage=number,
            guess_before=before.guess[number],
            guess_after=after.guess[number],
            uncorrected=after.uncorrected[number],
            corrected_before=before.corrected[number],
            corrected_after=after.corrected[number],
        )
        for number in sorted(after.corrected)
    )
    return CalibrationReport(
        interfaces=interfaces,
        agreement_before=before.agreement,
        agreement_after=after.agreement,
        output_error_before=before.output,
        output_error_after=after.output,
        fitted=batches.count(held_out=False),
        held_out=batches.count(held_out=True),
        recalibrated=recalibrated,
    )


@dataclass(frozen=True)
class _Errors:
    """Relative errors of the states by stage number, and of the outputs."""

    guess: dict[int, float]
    uncorrected: dict[int, float]
    corrected: dict[int, float]
    agreement: float | None
    output: float


def _measure(executor: Executor, batches: CalibrationBatches) -> _Errors:
    """Measure on held-out batches: states at K = 1, outputs at the K of the plan."""
    plan = executor.plan
    errors: dict[str, dict[int, RelativeError]] = {"guess": {}, "uncorrected": {}, "corrected": {}}
    output_error, agreed = RelativeError(), Agreement()
    one_iteration = sweep(
        len(plan.stages), plan.sweep, predicts=plan.predicts, windows=plan.windows
    )
    for held_out, inputs in batches.split():
        if not held_out:
            continue
        true = [*executor.true_states(inputs)]
        states = {step.writes: state for step, state in executor.run(one_iteration, inputs)}
        for number, stage in enumerate(plan.stages):
            if stage.preprocess is None:
                continue
            guess, fine, corrected = (states[Symbol(letter, number)] for letter in "xyu")
            for kind, state, target, names in (
                ("guess", guess, true[number - 1], stage.consumes),
                ("uncorrected", fine, true[number], stage.produces),
                ("corrected", corrected, true[number], stage.produces),
            ):
                error = errors[kind].setdefault(number, RelativeError())
                for name in names:
                    error.add(state[name], target[name])
        last = executor.corrected_state(inputs)
        output = main_output(executor.head(last, inputs))
        target_output = main_output(executor.head(true[-1], inputs))
        output_error.add(output, target_output)
        agreed.add(output, target_output, batch_size(inputs))
    by_kind = {
        kind: {number: error.value for number, error in by_stage.items()}
        for kind, by_stage in errors.items()
    }
    return _Errors(**by_kind, agreement=agreed.share, output=output_error.value)


def choose(
    network: Compiled, analysis: Analysis, options: Options, inputs: Iterable[Any]
) -> Compiled:
    """Calibrate a network, and choose the operators that its options leave open by their error.

    Args:
        network: The network as compiled without samples.
        analysis: Costs and legal cuts of its model.
        options: "auto" families are chosen among those that `passes.coarse.select` proposes.
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
        """Build the preprocessing operators that `passes.coarse.select` proposes."""
        if self._options.preprocess != "auto":
            return self._current.preprocess(number)
        program, plan = self._network.program, self._network.plan
        entering = plan.enters(number)
        types = [value.spec for value in entering]
        cut = self._cuts[number - 1]
        start = plan.window_start(number)
        window = self._cuts[start - 1] if start else None
        specs = preprocess_candidates(
            self._analysis, self._options, len(plan.stages), cut, entering, window
        )
        return self._build(specs, lambda spec: build_preprocess(program, spec, types))

    def coarse(self, number: int) -> Sequence[Operator]:
        """Build the coarse propagators that `passes.coarse.select` proposes."""
        if self._options.coarse != "auto":
            return self._current.coarse(number)
        network, plan = self._network, self._network.plan
        fine = network.stages.fine[number]
        span = Span(
            self._analysis,
            self._options,
            self._cuts[number - 1],
            self._cuts[-1 if plan.sweep == "collapsed" else number],
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


def _calibrate(c: Compilation) -> Compilation:
    """Fit the operators to samples; choose those that the options leave open by their error."""
    assert c.samples is not None
    compiled = gather(c, ())
    if c.options is None or c.analysis is None:  # a plan is replayed: it decides
        return dataclasses.replace(c, calibration=calibrate(compiled, c.samples))
    chosen = choose(compiled, c.analysis, c.options, c.samples)
    return dataclasses.replace(
        c, plan=chosen.plan, operators=chosen.operators, module=chosen.module,
        calibration=chosen.calibration,
    )  # fmt: skip


CALIBRATE = Pass("calibrate", ("samples", "plan", "module"), ("calibration",), _calibrate)
"""The pass that fits preprocessing operators and coarse propagators to samples."""
