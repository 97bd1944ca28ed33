"""Does this model have depth to spare? Agreement with the original beside an early exit.

A parareal network trades depth for width: at one iteration it keeps what does not need the full
depth, and more iterations buy the rest back. The control that matters is an early exit, which takes
as long on one device, because that is what a user could do instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from passes.options import Options
from passes.pipeline import COMPILE, Compilation, run_passes
from pnn_compile.compiled import Compiled, gather
from pnn_compile.evaluate.iterate import dial
from pnn_compile.fit.early_exit import EarlyExit, fit_early_exit
from pnn_compile.fit.isolation import evaluating
from pnn_compile.fit.metrics import Agreement, Energy, judged
from pnn_compile.fit.select import choose
from pnn_compile.inputs import CalibrationBatches, batch_size

__all__ = ["Fidelity", "Verdict", "VerdictRow", "assess"]

_KEPT = 0.99
"""Agreement from which on a network counts as equal to its original in practice."""

_CLOSE = 0.01
"""The same for the relative error of outputs that have no largest score."""


@dataclass(frozen=True)
class Fidelity:
    """How close outputs are to the original's, on held-out samples.

    Attributes:
        agreement: Share of samples whose largest output is the original's; None where there is no
            largest one.
        error: Relative error of the outputs.
    """

    agreement: float | None
    error: float

    @property
    def kept(self) -> bool:
        """Whether nothing seems to be lost."""
        return self.error <= _CLOSE if self.agreement is None else self.agreement >= _KEPT

    def beats(self, other: Fidelity, samples: int = 0) -> bool:
        """Whether it is closer, by more than twice the standard error if samples are given."""
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
        stages: N.
        iterations: K.
        speedup: Predicted speed-up over the original, links not counted.
        serial_share: Coarse sweeps and head over the original's cost.
        fidelity: What the network keeps.
        exit: What an early exit keeps that is fitted in the same closed form; None where no early
            exit is that quick.
        exit_share: Cost of the layers that the early exit keeps over the original's.
    """

    stages: int
    iterations: int
    speedup: float
    serial_share: float
    fidelity: Fidelity
    exit: Fidelity | None
    exit_share: float | None


@dataclass(frozen=True)
class Verdict:
    """Whether a model keeps its answers as a parareal network, in numbers and in words.

    Attributes:
        rows: By number of stages and iterations.
        held_out: Samples that judged; none of them was fitted.
        sentence: What the numbers say.
        advice: What to try next.
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
    iterations: int = 2,
    **options: Any,
) -> Verdict:
    """Compare parareal networks of several sizes with early exits of the same latency.

    Nothing is trained: guesses, corrections and exits are fitted in closed form to the same
    samples, and judged on every fifth batch, which is not fitted (give other samples than those of
    `fit`, where the network was trained on).

    Args:
        compiled: A calibrated network; it is judged as it stands.
        inputs: Batches, as in `calibrate`.
        stages: Other numbers N of stages to try; they are compiled and calibrated anew.
        iterations: Largest number K of iterations to show.
        **options: Options of `compile` for the other numbers of stages; correction, sweep and seed
            are those of the plan if not given.

    Raises:
        OptionError: As in `calibrate`; an option is unknown.
        PartitionError: The model cannot be cut into so many stages.
    """
    batches = CalibrationBatches(compiled, inputs)
    networks = {len(compiled.plan.stages): compiled}
    for count in stages:
        if count not in networks:
            networks[count] = _compiled(compiled, inputs, {**options, "stages": count})
    rows: list[VerdictRow] = []
    for count in sorted(networks):
        rows += _rows(networks[count], batches, iterations)
    held = batches.count(held_out=True)
    return Verdict(tuple(rows), held, _sentence(rows, held), _advice(rows, networks))


def _compiled(compiled: Compiled, inputs: Iterable[Any], options: Mapping[str, Any]) -> Compiled:
    plan = compiled.plan
    start = Options(correction=plan.correction, sweep=plan.sweep, seed=plan.seed)
    wanted = Options.of(start, options).calibrated()
    compilation, results = run_passes(
        Compilation(program=compiled.program, options=wanted), COMPILE
    )
    assert compilation.analysis is not None
    return choose(gather(compilation, results), compilation.analysis, wanted, inputs)


def _rows(network: Compiled, batches: CalibrationBatches, iterations: int) -> list[VerdictRow]:
    held = [inputs for held_out, inputs in batches.split() if held_out]
    rows = []
    for dialled in dial(network, held, most=iterations):
        exit_ = fit_early_exit(network, batches, 1 / dialled.speedup)
        rows.append(
            VerdictRow(
                stages=len(network.plan.stages),
                iterations=dialled.iterations,
                speedup=dialled.speedup,
                serial_share=dialled.serial_share,
                fidelity=Fidelity(dialled.agreement, dialled.output_error),
                exit=None if exit_ is None else _fidelity(network, exit_, held),
                exit_share=None if exit_ is None else exit_.share,
            )
        )
    return rows


def _fidelity(network: Compiled, exit_: EarlyExit, held: Iterable[Mapping[str, Any]]) -> Fidelity:
    agreed, error = Agreement(), Energy()
    with evaluating(network):
        for inputs in held:
            found, wanted = judged(exit_(**inputs)), judged(network.sequential(**inputs))
            agreed.add(found, wanted, batch_size(inputs))
            error.add(found, wanted)
    return Fidelity(agreed.share, error.share)


def _sentence(rows: Sequence[VerdictRow], samples: int) -> str:
    """Say in one sentence what the row of one iteration and most stages shows."""
    row = _largest(rows)
    found = (
        f"N = {row.stages}: {row.fidelity} on {samples} held-out samples at "
        f"{row.speedup:.1f} times its speed"
    )
    if row.speedup <= 1:
        return f"{found}: no gain in time, with fewer stages or a larger model there may be one."
    if row.exit is None:
        return f"{found}; no early exit is that quick."
    beside = f"{found}; an early exit of the same latency: {row.exit}"
    if row.exit.kept:
        return f"{beside}. This model does not use its depth: a shorter one does the same."
    if row.fidelity.kept:
        return f"{beside}. This depth can be run in parallel as it is."
    if row.fidelity.beats(row.exit, samples):
        return (
            f"{beside}. The layers behind the exit matter, and running them in parallel keeps more "
            "of them than leaving them out."
        )
    return f"{beside}. Parallel depth gains nothing here that a shorter network would not give."


def _largest(rows: Sequence[VerdictRow]) -> VerdictRow:
    return max((row for row in rows if row.iterations == 1), key=lambda row: row.stages)


def _advice(rows: Sequence[VerdictRow], networks: Mapping[int, Compiled]) -> tuple[str, ...]:
    row, advice = _largest(rows), []
    if row.exit is not None and row.exit_share is not None and not row.fidelity.beats(row.exit):
        advice.append(
            f"try the shorter network first: {row.exit_share:.0%} of the layers and a linear map "
            "are as close to the original"
        )
    if row.fidelity.kept:
        return (*advice, "more stages may pay: assess tries them")
    advice.append("fit it: pnn.fit trains the whole to the original's outputs, without labels")
    fewer = [r for r in rows if r.iterations == 1 and r.stages < row.stages and r.speedup > 1]
    more = [r for r in rows if r.stages == row.stages and r.iterations > 1 and r.speedup > 1]
    for found, words in ((fewer, "take fewer stages"), (more, "iterate")):
        better = [r for r in found if r.fidelity.beats(row.fidelity)]
        if better:
            best = min(better, key=lambda r: r.fidelity.error)
            advice.append(
                f"{words}: N = {best.stages}, K = {best.iterations}: {best.fidelity} at "
                f"{best.speedup:.1f} times its speed"
            )
    if _at_the_limit(networks[row.stages]):
        advice.append("raise coarse_budget: the best family tried was the dearest one allowed")
    return tuple(advice)


def _at_the_limit(network: Compiled) -> bool:
    """Whether a larger correction or guess might have fitted better still."""
    specs = [s for stage in network.plan.stages for s in (stage.preprocess, stage.coarse) if s]
    return any(s.tried and s.flops == max(trial.flops for trial in s.tried) for s in specs)
