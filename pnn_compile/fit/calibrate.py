"""Calibration: fit guesses and corrections in closed form to a model that is trained already.

The guesses are fitted first, each to the state that really enters its stage. Then, in the order of
the sweep, each correction is fitted on the residuals that really reach it, to the error that is
really left behind its stage. Batches are streamed; only sums of products are kept, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pnn_compile.evaluate.iterate import last_states
from pnn_compile.executor import State, Walker, plus
from pnn_compile.fit.calibration_report import CalibrationReport, InterfaceError
from pnn_compile.fit.isolation import evaluating
from pnn_compile.fit.metrics import Agreement, Energy, judged
from pnn_compile.fit.regression_sweep import Candidates, Given, fit_closed_form
from pnn_compile.inputs import CalibrationBatches, batch_size

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["calibrate", "calibrate_by_choice"]


def calibrate(compiled: Network, inputs: Iterable[Any]) -> CalibrationReport:
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
    walker = Walker(compiled)
    return calibrate_by_choice(compiled, inputs, walker, Given(walker))


def calibrate_by_choice(
    compiled: Network,
    inputs: Iterable[Any],
    walker: Walker,
    candidates: Candidates,
    *,
    keep_better: bool = False,
) -> CalibrationReport:
    """Calibrate with the best of several networks for every place; the walker holds them then.

    Args:
        compiled: The network.
        inputs: As in `calibrate`.
        walker: Of the network.
        candidates: What may be chosen from.
        keep_better: Whether weights stay where the closed form would not lower the error.

    Raises:
        OptionError: As in `calibrate`.
    """
    batches = CalibrationBatches(compiled, inputs)
    with evaluating(compiled):
        before = _judge(walker, batches)
        recalibrated = fit_closed_form(walker, batches.split, candidates, keep_better=keep_better)
        after = _judge(walker, batches)
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
class _Step:
    """One stage of the sweep on one batch.

    Attributes:
        number: Number of the stage.
        guess: Guessed state that enters it.
        fine: What the fine stage made of the guess.
        corrected: What the sweep made of that.
        true: The true state that leaves it.
    """

    number: int
    guess: State
    fine: State
    corrected: State
    true: State


def _sweep(walker: Walker, inputs: Mapping[str, Any]) -> Iterator[_Step]:
    """Walk one batch through stages 1 and later, with the true states beside."""
    last = len(walker.plan.stages) - 1
    true = walker.advance(0, {}, walker.fine(0, {}, inputs))
    corrected = true
    collapsed: list[State] = []
    for number in range(1, last + 1):
        guess = walker.guess(number, inputs)
        fine = walker.fine(number, guess, inputs)
        true = walker.advance(number, true, walker.fine(number, true, inputs))
        correction = walker.correct(number, guess, corrected, inputs)
        corrections = [correction]
        if walker.plan.sweep == "collapsed":
            collapsed.append(correction)
            corrections = collapsed if number == last else []
        corrected = walker.advance(number, corrected, fine)
        for each in corrections:
            corrected = plus(corrected, each)
        yield _Step(number, guess, fine, corrected, true)


@dataclass(frozen=True)
class _Judgement:
    guess: dict[int, float]
    uncorrected: dict[int, float]
    corrected: dict[int, float]
    agreement: float | None
    output: float


def _judge(walker: Walker, batches: CalibrationBatches) -> _Judgement:
    """Measure on held-out batches: states at K = 1, outputs at the K of the plan."""
    plan = walker.plan
    errors: dict[str, dict[int, Energy]] = {"guess": {}, "uncorrected": {}, "corrected": {}}
    outputs, agreed = Energy(), Agreement()
    for held, inputs in batches.split():
        if not held:
            continue
        true = walker.advance(0, {}, walker.fine(0, {}, inputs))
        for step in _sweep(walker, inputs):
            produced = walker.plan.stages[step.number].produces
            for kind, found, wanted, names in (
                ("guess", step.guess, true, tuple(step.guess)),
                ("uncorrected", step.fine, step.true, produced),
                ("corrected", step.corrected, step.true, produced),
            ):
                energy = errors[kind].setdefault(step.number, Energy())
                for name in names:
                    energy.add(found[name], wanted[name])
            true = step.true
        *_, last = last_states(walker, inputs, min(plan.iterations, len(plan.stages)))
        given = judged(walker.head(last, inputs))
        right = judged(walker.head(true, inputs))
        outputs.add(given, right)
        agreed.add(given, right, batch_size(inputs))
    shares = {kind: {n: e.share for n, e in found.items()} for kind, found in errors.items()}
    return _Judgement(**shares, agreement=agreed.share, output=outputs.share)
