"""The error dial: parareal iterations one by one, with an estimate of what error is left.

Parareal (Lions, Maday, Turinici 2001) repeats guess and correction; after K = N iterations it gives
the original network, and it converges superlinearly on the way where the coarse propagators are any
good (Gander, Vandewalle 2007). How much the last iteration still changed tells what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from passes.errors import OptionError
from passes.transform.executor import Executor, State
from passes.transform.sweep import Role, sweep
from pnn_compile.fit.isolation import evaluating, measuring
from pnn_compile.fit.metrics import Agreement, Energy, judged
from pnn_compile.inputs import batch_size, named_batch

if TYPE_CHECKING:
    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled

__all__ = ["DialRow", "Iterates", "dial", "estimated_errors", "iterate", "last_states"]


@dataclass(frozen=True)
class Iterates:
    """What a run of several iterations gave.

    Attributes:
        outputs: The outputs of the last iteration, as the model gives them.
        iterations: Number K of iterations that were run.
        exact: Whether K = N: the outputs are the original's.
        estimates: Estimated relative error of the last state per iteration and sample, `[K, B]`
            float64; see `estimated_errors`.
        increments: What each iteration changed of the last state, relative to its norm, `[K, B]`
            float64; the first against the state that no correction has reached.
        times: Predicted time of 1 to K iterations, in the unit of the plan's forecast.
    """

    outputs: Any
    iterations: int
    exact: bool
    estimates: torch.Tensor
    increments: torch.Tensor
    times: tuple[float, ...]


def iterate(
    compiled: Compiled,
    inputs: Any,
    *,
    iterations: int | None = None,
    tolerance: float | None = None,
) -> Iterates:
    """Run parareal iterations until the estimated error of every sample is small enough.

    After k iterations the outputs are those of the network compiled with `iterations=k`, with the
    same weights; the first k stages are exact by then and are not computed again. Runs in this
    process, in the mode of `compiled.module`, without gradients; buffers and random state stay as
    they were.

    Args:
        compiled: The network, of any number of iterations.
        inputs: A tensor, a tuple of positional arguments, or a dict of arguments by name.
        iterations: Most iterations to run; more than N are N. The number of stages N if a
            tolerance is given, that of the plan if not.
        tolerance: Stop as soon as the estimate of every sample is below this. An estimate, no
            bound: see `estimated_errors`.

    Raises:
        OptionError: A number is out of range, an argument of the network is missing, or a
            collapsed sweep is asked for more than one iteration.
    """
    plan = compiled.plan
    most = _most(plan, iterations, tolerance)
    with measuring(compiled):
        executor, given = Executor(compiled), named_batch(compiled, inputs)
        states = last_states(executor, given, most)
        state, changed = next(states), []
        for following in states:
            changed.append(_increment(plan, following, state, batch_size(given)))
            state = following
            estimates = estimated_errors(torch.stack(changed), len(plan.stages))
            if tolerance is not None and bool((estimates[-1] < tolerance).all()):
                break
        outputs = executor.head(state, given)
    done = len(changed)
    return Iterates(
        outputs=outputs,
        iterations=done,
        exact=done == len(plan.stages),
        estimates=estimates,
        increments=torch.stack(changed),
        times=tuple(forecast.time for forecast in plan.forecasts(done)),
    )


def estimated_errors(increments: torch.Tensor, stages: int) -> torch.Tensor:
    """Estimate the relative error of every iterate from the increments up to it.

    Where an iteration changed d_k and the one before it d_{k-1}, the contraction seen is
    rho = d_k / d_{k-1}; if it goes on, the increments still to come sum to d_k rho / (1 - rho).
    That stands for the error where it is below d_k (rho < 1/2). Elsewhere d_k itself does: near
    rho = 1 the sum says next to nothing, as only N - k increments can follow. So does d_1, which
    has nothing to compare with. Iterate N is exact: its estimate is 0.

    It is no bound. It sees what moves, not what is right: corrections that do nothing look at
    K = 1 like corrections that had nothing to do, and increments that stall and grow again look
    better than they are. Where parareal does not contract (deep trained networks with cheap
    coarse propagators, before K comes near N) it gives the order of magnitude and tells hard
    samples from easy ones, no more. It speaks of the last state, before the head, to which the
    outputs may be more or less sensitive.

    Args:
        increments: Relative increments of the iterations 1 to K, `[K, B]`.
        stages: Number N of stages.

    Returns:
        Estimates `[K, B]`.
    """
    found = increments.clone()
    for k in range(1, len(increments)):
        rho = increments[k] / increments[k - 1]
        found[k] *= torch.where(rho < 0.5, rho / (1 - rho), 1.0)
    found[stages - 1 :] = 0.0
    return found


def _most(plan: Plan, iterations: int | None, tolerance: float | None) -> int:
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise OptionError(f"the tolerance must be above 0 (got {tolerance})")
    if iterations is None:
        iterations = plan.iterations if tolerance is None else len(plan.stages)
    if iterations < 1:
        raise OptionError(f"iterations must be at least 1 (got {iterations})")
    most = min(iterations, len(plan.stages))
    if plan.sweep == "collapsed" and most > 1:
        raise OptionError(
            "a collapsed sweep has one iteration: its corrections reach the last state only, so "
            "there is nothing to iterate on; pass iterations=1, or compile with sweep='chain'"
        )
    return most


def last_states(executor: Executor, inputs: Mapping[str, Any], most: int) -> Iterator[State]:
    """Yield the last state without any correction, then after iterations 1 to `most`."""
    plan = executor.plan
    last = len(plan.stages) - 1
    uncorrected: State = {}
    # Nothing is pruned: the last state of every iteration is looked at.
    for step, state in executor.run(sweep(last + 1, plan.sweep, most, prune=False), inputs):
        if step.role is Role.FINE and not step.iteration:
            uncorrected = executor.advance(step.stage, uncorrected, state)
            if step.stage == last:
                yield uncorrected
        if step.role is Role.CORRECT and step.stage == last:
            yield state


def _increment(plan: Plan, new: State, old: State, samples: int) -> torch.Tensor:
    """Norm of the change of each sample over the norm of what it became, `[B]`.

    Several tensors count as one long vector. An axis that merges the batch with another one
    (`[B T, C]`) counts as rows of the sample that they belong to.
    """
    change, whole = torch.zeros(()), torch.zeros(())
    for value in plan.interfaces[-1].state:
        axis = value.spec.batch_axis or 0
        now, before = new[value.name], old[value.name]
        change = _energies(now - before, axis, samples) + change.to(now.device)
        whole = _energies(now, axis, samples) + whole.to(now.device)
    return (change / whole.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _energies(tensor: torch.Tensor, axis: int, samples: int) -> torch.Tensor:
    """Energy of each sample `[B]`, or of all of them `[1]` where the axis does not divide."""
    rows = samples if samples and tensor.shape[axis] % samples == 0 else 1
    return tensor.movedim(axis, 0).reshape(rows, -1).abs().double().square().sum(1)


@dataclass(frozen=True)
class DialRow:
    """What K iterations give, and what they take.

    Attributes:
        iterations: K.
        estimate_mean: Estimated relative error of the last state, mean over the samples.
        estimate_p95: The same, 95th percentile.
        output_error: Relative error of the outputs against the original's.
        agreement: Share of samples whose largest output is the original's; of outputs that are
            equal, where they are whole numbers; None where they have no largest one.
        speedup: Predicted speed-up over the original, links not counted.
        serial_share: Coarse sweeps and head over the original's cost.
        samples: Number of samples.
    """

    iterations: int
    estimate_mean: float
    estimate_p95: float
    output_error: float
    agreement: float | None
    speedup: float
    serial_share: float
    samples: int


def dial(
    compiled: Compiled, batches: Iterable[Any], *, most: int | None = None
) -> tuple[DialRow, ...]:
    """Measure on samples what every number of iterations from 1 to N gives, in evaluation mode.

    The original is the fine stages one after another, as they are now. Calibration leaves them
    alone; training or an end-to-end fit at K = 1 moves them, and then more iterations lead to
    another network than the one that was compiled.

    Args:
        compiled: The network, of any number of iterations.
        batches: Batches of inputs, as in `calibrate`; gone through once.
        most: Largest number of iterations to measure; N if None.

    Returns:
        A row for every K, from 1 on; for K = 1 alone of a collapsed sweep.

    Raises:
        OptionError: There are no batches, or one does not fit the model.
    """
    plan = compiled.plan
    count = 1 if plan.sweep == "collapsed" else len(plan.stages)
    most = min(most or count, count)
    tallies = [_Tally() for _ in range(most)]
    with evaluating(compiled):
        executor = Executor(compiled)
        for batch in batches:
            wanted = judged(compiled.sequential(**named_batch(compiled, batch)))
            inputs = named_batch(compiled, batch)
            _tally(executor, inputs, wanted, tallies)
    if not tallies[0].samples:
        raise OptionError("the dial needs at least one batch of samples; there is none")
    forecasts = plan.forecasts(most)
    rows = enumerate(zip(tallies, forecasts, strict=True), 1)
    return tuple(
        DialRow(
            iterations=iterations,
            estimate_mean=torch.cat(tally.estimates).mean().item(),
            estimate_p95=torch.cat(tally.estimates).quantile(0.95).item(),
            output_error=tally.output.share,
            agreement=tally.agreed.share,
            speedup=forecast.speedup,
            serial_share=forecast.serial_share,
            samples=tally.samples,
        )
        for iterations, (tally, forecast) in rows
    )


class _Tally:
    """Sums over the samples, for one number of iterations."""

    def __init__(self) -> None:
        self.estimates: list[torch.Tensor] = []
        self.output = Energy()
        self.agreed = Agreement()
        self.samples = 0


def _tally(
    executor: Executor, inputs: Mapping[str, Any], wanted: torch.Tensor, tallies: Sequence[_Tally]
) -> None:
    """Count one batch at every number of iterations."""
    plan, size = executor.plan, batch_size(inputs)
    states = last_states(executor, inputs, len(tallies))
    before, changed = next(states), []
    for tally, state in zip(tallies, states, strict=True):
        changed.append(_increment(plan, state, before, size))
        before = state
        tally.estimates.append(estimated_errors(torch.stack(changed), len(plan.stages))[-1].cpu())
        # The head may write into what it is given, and the next iteration reads on.
        found = judged(executor.head({n: v.clone() for n, v in state.items()}, inputs))
        tally.output.add(found, wanted)
        tally.agreed.add(found, wanted, size)
        tally.samples += size
