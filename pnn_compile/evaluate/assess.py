"""Assess whether a model is worth running in parallel: its parareal network against early exits.

With few iterations a parareal network is faster than the original, and less accurate. An early exit
(`pnn_compile.fit.early_exit`) of the same predicted time is so too, on one device: only a parareal
network that agrees better with the original than the early exit is worth N devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from passes.options import Options
from pnn_compile.compiled import Compiled, compile_program
from pnn_compile.evaluate.iterate import dial
from pnn_compile.fit.calibrate import choose
from pnn_compile.fit.early_exit import EarlyExit, fit_early_exit
from pnn_compile.fit.metrics import Agreement, RelativeError, evaluating, main_output
from pnn_compile.inputs import CalibrationBatches, batch_size

_KEPT = 0.99
"""Smallest agreement of a network that counts as equal to its original in practice."""

_CLOSE = 0.01
"""Largest relative error of such a network, where outputs have no largest score."""


@dataclass(frozen=True)
class Fidelity:
    """Distance of outputs from the original's, on held-out samples.

    Attributes:
        agreement: Share of samples whose largest output is the original's; None where there is no
            largest one.
        error: Relative error of the outputs.
    """

    agreement: float | None
    error: float

    @property
    def kept(self) -> bool:
        """Whether the network counts as equal to its original."""
        return self.error <= _CLOSE if self.agreement is None else self.agreement >= _KEPT

    def beats(self, other: Fidelity, samples: int = 0) -> bool:
        """Return whether it is closer; with `samples`, by more than twice the standard error."""
        if self.agreement is None or other.agreement is None:
            return self.error < other.error
        spread = (self.agreement * (1 - self.agreement) / samples) ** 0.5 if samples else 0.0
        return self.agreement > other.agreement + 2 * spread

    def __str__(self) -> str:
        if self.agreement is None:
            return f"within {self.error:.2%} of the original's outputs"
        return f"{self.agreement:.1%} agreement with the original"


@dataclass(frozen=True)
class VerdictRow:
    """A parareal network beside an early exit of the same predicted time.

    Attributes:
        stages: N, of a window.
        windows: W.
        iterations: K.
        speedup: Predicted speed-up over the original, links not counted.
        serial_share: Cost of the coarse sweeps and the head over the original's.
        fidelity: Of the parareal network.
        exit: Of the early exit, fitted in the same closed form; None where none is that fast.
        exit_share: Cost of the layers of the early exit over the original's.
    """

    stages: int
    windows: int
    iterations: int
    speedup: float
    serial_share: float
    fidelity: Fidelity
    exit: Fidelity | None
    exit_share: float | None

    @property
    def size(self) -> str:
        """N, and W where there are several windows."""
        return f"N = {self.stages}" + (f", W = {self.windows}" if self.windows > 1 else "")


@dataclass(frozen=True)
class Verdict:
    """Whether a model is worth running as a parareal network, in numbers and in words.

    Attributes:
        rows: By number of stages, windows and iterations.
        held_out: Number of samples of the measurement; none of them was fitted.
        sentence: Conclusion from the numbers.
        advice: Suggestions what to try next.
    """

    rows: tuple[VerdictRow, ...]
    held_out: int
    sentence: str
    advice: tuple[str, ...]


def assess(
    compiled: Compiled,
    inputs: Iterable[Any],
    *,
    stages: Sequence[int] = (),
    windows: Sequence[int] = (),
    iterations: int = 2,
    **options: Any,
) -> Verdict:
    """Compare parareal networks of several sizes with early exits of the same latency.

    Nothing is trained: operators and early exits are fitted in closed form to the same samples, and
    compared on every fifth batch, which is held out. After `fit`, pass samples that it did not use.

    Args:
        compiled: A calibrated network; it is not fitted again.
        inputs: Batches, as in `calibrate`.
        stages: Other numbers N of stages to try; these networks are compiled and calibrated here.
        windows: Other numbers W of windows to try, each with every number of stages.
        iterations: Largest number K of iterations to show.
        **options: Options of `compile` for the other networks; correction, sweep and seed default
            to those of the plan.

    Returns:
        A row per number of stages, windows and iterations, and what follows from them.

    Raises:
        OptionError: As in `calibrate`; an option is unknown.
        PartitionError: The model cannot be cut into so many stages.
    """
    batches = CalibrationBatches(compiled, inputs)
    plan = compiled.plan
    networks = {(plan.devices, plan.windows): compiled}
    sizes = itertools.product((plan.devices, *stages), (plan.windows, *windows))
    for size in sizes:
        if size not in networks:
            asked = {**options, "stages": size[0], "windows": size[1]}
            networks[size] = _compiled(compiled, inputs, asked)
    rows: list[VerdictRow] = []
    for size in sorted(networks):
        rows += _rows(networks[size], batches, iterations)
    samples = batches.count(held_out=True)
    return Verdict(tuple(rows), samples, _sentence(rows, samples), _advice(rows, networks))


def _compiled(compiled: Compiled, inputs: Iterable[Any], options: Mapping[str, Any]) -> Compiled:
    plan = compiled.plan
    start = Options(correction=plan.correction, sweep=plan.sweep, seed=plan.seed)
    calibrated = Options.of(start, options).calibrated()
    network = compile_program(compiled.program, calibrated)
    assert network.weighed is not None
    return choose(network, network.weighed, calibrated, inputs)


def _rows(network: Compiled, batches: CalibrationBatches, iterations: int) -> list[VerdictRow]:
    held_out = [inputs for held_out, inputs in batches.split() if held_out]
    rows = []
    for dial_row in dial(network, held_out, most=iterations):
        exit_ = fit_early_exit(network, batches, 1 / dial_row.speedup)
        rows.append(
            VerdictRow(
                stages=network.plan.devices,
                windows=network.plan.windows,
                iterations=dial_row.iterations,
                speedup=dial_row.speedup,
                serial_share=dial_row.serial_share,
                fidelity=Fidelity(dial_row.agreement, dial_row.output_error),
                exit=None if exit_ is None else _fidelity(network, exit_, held_out),
                exit_share=None if exit_ is None else exit_.share,
            )
        )
    return rows


def _fidelity(
    network: Compiled, exit_: EarlyExit, batches: Iterable[Mapping[str, Any]]
) -> Fidelity:
    agreement, error = Agreement(), RelativeError()
    with evaluating(network):
        for inputs in batches:
            output = main_output(exit_(**inputs))
            target = main_output(network.sequential(**inputs))
            agreement.add(output, target, batch_size(inputs))
            error.add(output, target)
    return Fidelity(agreement.share, error.value)


def _sentence(rows: Sequence[VerdictRow], samples: int) -> str:
    """Summarize the row of one iteration and most stages in a sentence."""
    row = _largest(rows)
    result = (
        f"{row.size}: {row.fidelity} on {samples} held-out samples at "
        f"{row.speedup:.1f} times its speed"
    )
    if row.speedup <= 1:
        return f"{result}: not faster; try fewer stages, or a larger model."
    if row.exit is None:
        return f"{result}; no early exit is that fast."
    both = f"{result}; an early exit of the same latency: {row.exit}"
    if row.exit.kept:
        return f"{both}. This model does not use its depth: a shorter one does the same."
    if row.fidelity.kept:
        return f"{both}. This depth can be run in parallel as it is."
    if row.fidelity.beats(row.exit, samples):
        return (
            f"{both}. The layers after the exit matter, and running them in parallel is closer to "
            "the original than leaving them out."
        )
    if row.fidelity.beats(row.exit):
        return f"{both}. {samples} samples are too few to tell which is closer: pass more."
    return f"{both}. A shorter network is as good here as running the depth in parallel."


def _largest(rows: Sequence[VerdictRow]) -> VerdictRow:
    single = (row for row in rows if row.iterations == 1)
    return max(single, key=lambda row: (row.stages, -row.windows))


def _advice(
    rows: Sequence[VerdictRow], networks: Mapping[tuple[int, int], Compiled]
) -> tuple[str, ...]:
    row, advice = _largest(rows), []
    if row.exit is not None and row.exit_share is not None and not row.fidelity.beats(row.exit):
        advice.append(
            f"try the shorter network first: {row.exit_share:.0%} of the layers and a linear map "
            "are as close to the original"
        )
    if row.fidelity.kept:
        return (*advice, "try more stages: assess(..., stages=...)")
    advice.append("fit it: pnn.fit trains it towards the original's outputs, without labels")
    fewer = [r for r in rows if r.iterations == 1 and r.stages < row.stages and r.speedup > 1]
    same = [r for r in rows if r.stages == row.stages and r.speedup > 1]
    more = [r for r in same if r.iterations > 1]
    cut = [r for r in same if r.windows > row.windows]
    if row.windows == max(r.windows for r in rows) == 1:
        advice.append("cut it into windows, which keep more: assess(..., windows=[2, 4])")
    for candidates, words in (
        (cut, "cut it into windows"), (fewer, "take fewer stages"), (more, "iterate"),
    ):  # fmt: skip
        better = [r for r in candidates if r.fidelity.beats(row.fidelity)]
        if better:
            best = min(better, key=lambda r: r.fidelity.error)
            advice.append(
                f"{words}: {best.size}, K = {best.iterations}: {best.fidelity} at "
                f"{best.speedup:.1f} times its speed"
            )
    if _at_the_limit(networks[row.stages, row.windows]):
        advice.append(
            "raise coarse_budget: the best family tried was the most expensive one allowed"
        )
    return tuple(advice)


def _at_the_limit(network: Compiled) -> bool:
    """Return whether the best operator was the most expensive candidate of its place."""
    specs = [s for stage in network.plan.stages for s in (stage.preprocess, stage.coarse) if s]
    return any(s.tried and s.flops == max(trial.flops for trial in s.tried) for s in specs)
