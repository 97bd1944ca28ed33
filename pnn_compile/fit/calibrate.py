"""Calibration: fit guesses and corrections in closed form to a model that is trained already.

The guesses are fitted first, each to the state that really enters its stage. Then, in the order of
the sweep, each correction is fitted on the residuals that really reach it, to the error that is
really left behind its stage. Batches are streamed; only sums of products are kept, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.transform.executor import Executor
from passes.transform.sweep import Symbol, sweep
from pnn_compile.fit.calibration_report import CalibrationReport, InterfaceError
from pnn_compile.fit.isolation import evaluating
from pnn_compile.fit.metrics import Agreement, Energy, judged
from pnn_compile.fit.regression_sweep import Candidates, Given, fit_closed_form
from pnn_compile.inputs import CalibrationBatches, batch_size

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["calibrate", "calibrate_by_choice"]


def calibrate(compiled: Compiled, inputs: Iterable[Any]) -> CalibrationReport:
    """Fit the guesses and corrections of a network to its own fine stages, in closed form.

    Families "linear" and "lowrank" are fitted by ridge regression, sums of them one part after the
    other; other families keep their weights (`pnn.fit` trains those), but their BatchNorm
    statistics are measured anew where that lowers the error. The fine stages are never changed.
    Deterministic.

    Args:
        compiled: The network; its fine stages hold the trained weights.
        inputs: Batches of inputs: a tensor, a tuple of positional arguments, or a dict of
            arguments by name. Iterated several times, so give a list or a DataLoader that does
            not shuffle. Every fifth batch judges and is not fitted.

    Raises:
        OptionError: There are fewer than two batches, they come from a generator, or a batch does
            not fit the model.
    """
    executor = Executor(compiled)
    return calibrate_by_choice(compiled, inputs, executor, Given(executor))


def calibrate_by_choice(
    compiled: Compiled,
    inputs: Iterable[Any],
    executor: Executor,
    candidates: Candidates,
    *,
    keep_better: bool = False,
) -> CalibrationReport:
    """Calibrate with the best of several networks for every place; the executor holds them then.

    Args:
        compiled: The network.
        inputs: As in `calibrate`.
        executor: Of the network.
        candidates: What may be chosen from.
        keep_better: Whether weights stay where the closed form would not lower the error.

    Raises:
        OptionError: As in `calibrate`.
    """
    batches = CalibrationBatches(compiled, inputs)
    with evaluating(compiled):
        before = _judge(executor, batches)
        recalibrated = fit_closed_form(executor, batches.split, candidates, keep_better=keep_better)
        after = _judge(executor, batches)
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
class _Judgement:
    guess: dict[int, float]
    uncorrected: dict[int, float]
    corrected: dict[int, float]
    agreement: float | None
    output: float


def _judge(executor: Executor, batches: CalibrationBatches) -> _Judgement:
    """Measure on held-out batches: states at K = 1, outputs at the K of the plan."""
    plan = executor.plan
    errors: dict[str, dict[int, Energy]] = {"guess": {}, "uncorrected": {}, "corrected": {}}
    outputs, agreed = Energy(), Agreement()
    once = sweep(len(plan.stages), plan.sweep)
    for held, inputs in batches.split():
        if not held:
            continue
        true = [*executor.true_states(inputs)]
        made = {step.writes: state for step, state in executor.run(once, inputs)}
        for number, stage in enumerate(plan.stages[1:], 1):
            guess, fine, corrected = (made[Symbol(letter, number)] for letter in "xyu")
            for kind, found, wanted, names in (
                ("guess", guess, true[number - 1], stage.consumes),
                ("uncorrected", fine, true[number], stage.produces),
                ("corrected", corrected, true[number], stage.produces),
            ):
                energy = errors[kind].setdefault(number, Energy())
                for name in names:
                    energy.add(found[name], wanted[name])
        last = executor.corrected_state(inputs)
        given = judged(executor.head(last, inputs))
        right = judged(executor.head(true[-1], inputs))
        outputs.add(given, right)
        agreed.add(given, right, batch_size(inputs))
    shares = {kind: {n: e.share for n, e in found.items()} for kind, found in errors.items()}
    return _Judgement(**shares, agreement=agreed.share, output=outputs.share)
