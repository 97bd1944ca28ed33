"""Run parareal iterations one by one, and estimate the error that remains.

Parareal (Lions, Maday, Turinici 2001) corrects its states repeatedly; after K = N iterations it
equals the original network, and before that it converges superlinearly where the coarse propagators
are accurate (Gander, Vandewalle 2007). `pnn_compile.evaluate.error_estimate`
says how the error that is left is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from passes.errors import OptionError, RuntimeFault, amount
from passes.ir.isolation import preserved
from passes.ir.output_types import typed
from passes.pipeline import Compilation, Pass
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Times, simulate
from passes.transform.assemble import assemble
from passes.transform.executor import Executor, State
from passes.transform.lockstep import chained_stages
from passes.transform.network import check_mode
from passes.transform.sweep import Role, Step, sweep
from pnn_compile.compiled import gather
from pnn_compile.evaluate.error_estimate import ErrorEstimate
from pnn_compile.fit.metrics import Agreement, RelativeError, evaluating, main_output
from pnn_compile.inputs import argument_names, batch_size, device_of, explained, named_batch

if TYPE_CHECKING:
    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled


@dataclass(frozen=True)
class Iterates:
    """Outputs and estimated errors of a run of several iterations.

    Attributes:
        outputs: The outputs of the last iteration, structured as those of the model.
        iterations: Number K of iterations that were run.
        exact: Whether K = N: the outputs are the original's.
        estimates: Estimated relative error of the last state per iteration and sample, `[K, B]`
            float64; see `pnn_compile.evaluate.error_estimate`.
        increments: Change of the last state in each iteration, relative to its norm, `[K, B]`
            float64; of the first iteration against the uncorrected state.
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
    batched: bool = False,
) -> Iterates:
    """Run parareal iterations until the estimated error of every sample is small enough.

    After k iterations the outputs are those of the network compiled with `iterations=k`, with the
    same weights; the first k stages are exact by then and are not computed again. Runs in this
    process, in the mode of `compiled.module`, without gradients; buffers and random state stay as
    they were.

    Args:
        compiled: The network, of any number of iterations.
        inputs: A tensor, a tuple of positional arguments, or a dict of arguments by name.
        iterations: Largest number of iterations, at most N. If None: N if a tolerance is given,
            else that of the plan.
        tolerance: Stop as soon as the estimate of every sample is below this. An estimate, not a
            bound: see `pnn_compile.evaluate.error_estimate`.
        batched: Whether to run the stages of a loop in time as one batch, which takes as many calls
            as one stage and the memory of all; see `passes.transform.lockstep`.

    Returns:
        The outputs of the last iteration, and estimates of all of them.

    Raises:
        OptionError: A number is out of range, an argument of the network is missing, a collapsed
            sweep is asked for more than one iteration, or stages cannot run as one batch.
    """
    plan = compiled.plan
    most, enough = _max_iterations(plan, iterations, tolerance), tolerance or 0.0
    with _measuring(compiled):
        lockstep = compiled.lockstep if batched else None
        executor, batch = Executor(compiled, lockstep=lockstep), named_batch(compiled, inputs)
        errors = ErrorEstimate(plan, batch_size(batch))
        with explained(compiled, batch):
            for state in last_states(executor, batch, most, errors.watch):
                estimates = errors.add(state)
                if len(estimates) and bool((estimates[-1] < enough).all()):
                    break
            outputs = executor.head(state, batch)
    return Iterates(
        outputs=typed(outputs, compiled.program.output_types),
        iterations=len(estimates),
        exact=len(estimates) == len(plan.stages),
        estimates=estimates,
        increments=errors.increments,
        times=tuple(forecast.time for forecast in plan.forecasts(len(estimates))),
    )


def _iterate(c: Compilation) -> Compilation:
    """Take as many iterations as the tolerance takes on the example inputs."""
    compiled = gather(c, ())
    program, plan = compiled.program, compiled.plan
    example = dict(zip(argument_names(program), program.fresh_inputs(), strict=True))
    result = iterate(compiled, example, tolerance=plan.tolerance)
    count = result.iterations
    reached = "exact" if result.exact else f"estimate {result.estimates[-1].max():.2g}"
    note = f"{amount(count, 'iteration')} on the example inputs for {plan.tolerance:g} ({reached})"
    plan = replace(
        plan, iterations=count, forecast=plan.forecasts(count)[-1], notes=(*plan.notes, note)
    )
    module = assemble(program, plan, compiled.stages, compiled.operators)
    return replace(c, plan=plan, module=module)


ITERATE = Pass("iterate", ("plan", "operators", "module"), ("module",), _iterate)
"""The pass that counts the iterations of a tolerance."""


@contextmanager
def _measuring(compiled: Compiled) -> Iterator[None]:
    """Run pieces in the mode of the network, without gradients; restore all state on exit.

    A network of several iterations does not contain the operators whose results it does not need
    (the preprocessing operator of its last stage): they follow its mode and device.
    """
    operators, program = compiled.operators.named(), compiled.program
    training = compiled.module.training
    check_mode(program.name, program.capture.only_mode, training=training)
    with preserved(compiled.module, operators), torch.no_grad():
        contained = set(compiled.module.modules())
        for operator in operators.children():
            operator.to(device_of(compiled.module))
            for module in set(operator.modules()) - contained:
                module.training = training
        yield


def _max_iterations(plan: Plan, iterations: int | None, tolerance: float | None) -> int:
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise OptionError(f"the tolerance must be above 0 (got {tolerance})")
    if iterations is None:
        iterations = plan.iterations if tolerance is None else len(plan.stages)
    if iterations < 1:
        raise OptionError(f"iterations must be at least 1 (got {iterations})")
    most = min(iterations, len(plan.stages))
    if plan.windows > 1 and most > 1:
        raise OptionError("a network in windows has one iteration: pass iterations=1")
    if plan.sweep == "collapsed" and most > 1:
        raise OptionError(
            "a collapsed sweep has one iteration: its corrections reach the last state only, so "
            "further iterations change nothing; pass iterations=1, or compile with sweep='chain'"
        )
    return most


def last_states(
    executor: Executor,
    inputs: Mapping[str, Any],
    most: int,
    watch: Callable[[Step, State], object] = lambda step, state: None,
) -> Iterator[State]:
    """Yield the last state without any correction, then after iterations 1 to `most`.

    Args:
        executor: Of the network.
        inputs: A batch by name.
        most: Number of iterations.
        watch: Called with every step and the state that it makes.
    """
    plan = executor.plan
    last = len(plan.stages) - 1
    uncorrected: State = {}
    # Nothing is pruned: the caller reads the last state of every iteration.
    steps = sweep(
        last + 1, plan.sweep, most, prune=False, predicts=plan.predicts, windows=plan.windows,
        chained=chained_stages(plan) if plan.predicts else (),
    )  # fmt: skip
    for step, state in executor.run(steps, inputs):
        watch(step, state)
        if step.role is Role.FINE and not step.iteration:
            uncorrected = executor.advance(step.stage, uncorrected, state)
            if step.stage == last:
                yield uncorrected
        if step.role is Role.CORRECT and step.stage == last:
            yield state


@dataclass(frozen=True)
class DialRow:
    """Errors and predicted speed of K iterations.

    Attributes:
        iterations: K.
        estimate_mean: Estimated relative error of the last state, mean over the samples.
        estimate_p95: The same, 95th percentile.
        output_error: Relative error of the outputs against the original's.
        agreement: Share of samples whose largest output is the original's; of outputs that are
            equal, where they are whole numbers; None where they have no largest one.
        speedup: Predicted speed-up over the original, links not counted.
        serial_share: Cost of the coarse sweeps and the head over the original's.
        samples: Number of samples.
        pipelined: Predicted speed-up if an iteration starts on the states that are there, by
            simulation of the ranks' lists; None for costs of a callable.
    """

    iterations: int
    estimate_mean: float
    estimate_p95: float
    output_error: float
    agreement: float | None
    speedup: float
    serial_share: float
    samples: int
    pipelined: float | None = None


def pipelined_speedup(plan: Plan, iterations: int) -> float | None:
    """Predict the speed-up of some iterations by simulation of the instruction lists.

    Returns:
        Time of the original over that of the slowest rank, one stage a rank, links not counted;
        None for costs of a callable, which the plan does not store.
    """
    lists = Sweep.of(replace(plan, iterations=iterations))
    placement, training = plan.placement, plan.cost in ("measured", "roofline")
    try:
        times = Times.of(plan)
    except RuntimeFault:
        return None
    step = simulate(schedule(placement, lists, backward=training), times)
    return plan.forecast.sequential / step.time if step.time else 1.0


def dial(
    compiled: Compiled, batches: Iterable[Any], *, most: int | None = None
) -> tuple[DialRow, ...]:
    """Measure errors and predicted speed of 1 to N iterations on samples, in evaluation mode.

    The original is the fine stages in sequence, as they are now. Calibration does not change them.
    Training or an end-to-end fit at K = 1 does, and then more iterations converge to another
    network than the one that was compiled.

    Args:
        compiled: The network, of any number of iterations.
        batches: Batches of inputs, as in `calibrate`; iterated once.
        most: Largest number of iterations to measure; N if None.

    Returns:
        A row for every K from 1; of a collapsed sweep, and of windows, for K = 1 alone.

    Raises:
        OptionError: There are no batches, or one does not fit the model.
    """
    plan = compiled.plan
    most = min(most or plan.most_iterations, plan.most_iterations)
    tallies = [_Tally() for _ in range(most)]
    with evaluating(compiled):
        executor = Executor(compiled)
        for batch in batches:
            inputs = named_batch(compiled, batch)
            with explained(compiled, inputs):
                target = main_output(compiled.sequential(**named_batch(compiled, batch)))
                _add_batch(executor, inputs, target, tallies)
    if not tallies[0].samples:
        raise OptionError("dial needs at least one batch of samples (got none)")
    forecasts = plan.forecasts(most)
    rows = enumerate(zip(tallies, forecasts, strict=True), 1)
    return tuple(
        DialRow(
            iterations=iterations,
            estimate_mean=torch.cat(tally.estimates).mean().item(),
            estimate_p95=torch.cat(tally.estimates).quantile(0.95).item(),
            output_error=tally.error.value,
            agreement=tally.agreement.share,
            speedup=forecast.speedup,
            serial_share=forecast.serial_share,
            samples=tally.samples,
            pipelined=pipelined_speedup(plan, iterations),
        )
        for iterations, (tally, forecast) in rows
    )


@dataclass
class _Tally:
    """Sums over the samples, for one number of iterations."""

    estimates: list[torch.Tensor] = field(default_factory=list)
    error: RelativeError = field(default_factory=RelativeError)
    agreement: Agreement = field(default_factory=Agreement)
    samples: int = 0


def _add_batch(
    executor: Executor, inputs: Mapping[str, Any], target: torch.Tensor, tallies: Sequence[_Tally]
) -> None:
    """Add one batch to the tally of every number of iterations."""
    size = batch_size(inputs)
    errors = ErrorEstimate(executor.plan, size)
    states = last_states(executor, inputs, len(tallies), errors.watch)
    errors.add(next(states))
    for tally, state in zip(tallies, states, strict=True):
        tally.estimates.append(errors.add(state)[-1].cpu())
        # The head may write into its inputs, which the next iteration reads.
        output = main_output(executor.head({n: v.clone() for n, v in state.items()}, inputs))
        tally.error.add(output, target)
        tally.agreement.add(output, target, size)
        tally.samples += size
