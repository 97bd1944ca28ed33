"""Does this model have depth to spare? Agreement with the original beside an early exit.

A parareal network trades depth for width: at one iteration it keeps what does not need the full
depth, and more iterations buy the rest back. The control that matters is an early exit, which takes
as long on one device, because that is what a user could do instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import OptionError
from passes.options import Options
from passes.pipeline import COMPILE, Compilation, run_passes
from pnn_compile.agreement import agreement, judged
from pnn_compile.batches import CalibrationBatches, batch_size
from pnn_compile.choose import choose
from pnn_compile.early_exit import EarlyExit, fit_early_exit
from pnn_compile.iterate import dial
from pnn_compile.network import Network, gather

__all__ = ["Verdict", "VerdictRow", "assess"]

_KEPT = 0.99
"""Agreement from which on a network counts as equal to its original in practice."""


@dataclass(frozen=True)
class VerdictRow:
    """A parareal network beside an early exit of the same predicted time.

    Attributes:
        stages: N.
        iterations: K.
        speedup: Predicted speed-up over the original, links not counted.
        serial_share: Coarse sweeps and head over the original's cost.
        agreement: Share of held-out samples whose largest output is the original's.
        output_error: Relative error of the outputs against the original's.
        exit_agreement: The same share of an early exit fitted in the same closed form; None where
            no early exit is that quick.
        exit_share: Cost of the layers that the early exit keeps over the original's.
    """

    stages: int
    iterations: int
    speedup: float
    serial_share: float
    agreement: float
    output_error: float
    exit_agreement: float | None
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
    compiled: Network,
    inputs: Iterable[Any],
    *,
    stages: Sequence[int] = (),
    iterations: int = 2,
    **options: Any,
) -> Verdict:
    """Compare parareal networks of several sizes with early exits of the same latency.

    Nothing is trained: guesses, corrections and exits are fitted in closed form to the same
    samples, and judged on every fifth batch, which is not fitted.

    Args:
        compiled: A calibrated network; it is judged as it stands.
        inputs: Batches, as in `calibrate`.
        stages: Other numbers N of stages to try; they are compiled and calibrated anew.
        iterations: Largest number K of iterations to show.
        **options: Options of `compile` for the other numbers of stages.

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


def _compiled(compiled: Network, inputs: Iterable[Any], options: Mapping[str, Any]) -> Network:
    try:
        wanted = Options(**options)
    except TypeError as error:
        raise OptionError(f"assess takes the options of compile ({error})") from error
    compilation, results = run_passes(Compilation(compiled.program, wanted), COMPILE)
    assert compilation.analysis is not None
    return choose(gather(compilation, results), compilation.analysis, wanted, inputs)


def _rows(network: Network, batches: CalibrationBatches, iterations: int) -> list[VerdictRow]:
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
                agreement=dialled.agreement,
                output_error=dialled.output_error,
                exit_agreement=None if exit_ is None else _agreement(network, exit_, held),
                exit_share=None if exit_ is None else exit_.share,
            )
        )
    return rows


def _agreement(network: Network, exit_: EarlyExit, held: Iterable[Mapping[str, Any]]) -> float:
    agreed, samples = 0.0, 0
    original = network.sequential.eval()
    with torch.no_grad():
        for inputs in held:
            size = batch_size(inputs)
            found, wanted = judged(exit_(**inputs)), judged(original(**inputs))
            agreed += agreement(found, wanted) * size
            samples += size
    return agreed / max(samples, 1)


def _sentence(rows: Sequence[VerdictRow], samples: int) -> str:
    """Say in one sentence what the row of one iteration and most stages shows."""
    row = max((r for r in rows if r.iterations == 1), key=lambda r: r.stages)
    found = (
        f"N = {row.stages} agrees with the original on {row.agreement:.1%} of {samples} held-out "
        f"samples at {row.speedup:.1f} times its speed"
    )
    spread = (row.agreement * (1 - row.agreement) / max(samples, 1)) ** 0.5
    if row.exit_agreement is None:
        return f"{found}; no early exit is that quick."
    control = f"an early exit of the same latency on {row.exit_agreement:.1%}"
    if row.agreement >= _KEPT:
        return f"{found}, {control}: this depth can be run in parallel as it is."
    if row.agreement > row.exit_agreement + 2 * spread:
        return (
            f"{found}, {control}: the layers behind the exit matter, and running them in parallel "
            "keeps more of them than leaving them out."
        )
    return (
        f"{found}, {control}: parallel depth gains nothing here that a shorter network would not "
        "give."
    )


def _advice(rows: Sequence[VerdictRow], networks: Mapping[int, Network]) -> tuple[str, ...]:
    advice = []
    first = [row for row in rows if row.iterations == 1]
    row = max(first, key=lambda r: r.stages)
    if row.agreement >= _KEPT:
        return ("nothing needs to be done; more stages may pay (assess tries them)",)
    if row.exit_agreement is not None and row.exit_agreement >= row.agreement:
        advice.append(
            f"try the shorter network first: {row.exit_share:.0%} of the layers and a linear map "
            "answer as often like the original"
        )
    advice.append("fit it: one epoch of pnn.fit (no labels needed) recovers most of such losses")
    better = [r for r in first if r.stages < row.stages and r.agreement > row.agreement]
    if better:
        best = max(better, key=lambda r: r.agreement)
        advice.append(
            f"take fewer stages: N = {best.stages} agrees on {best.agreement:.1%} at "
            f"{best.speedup:.1f} times the speed"
        )
    more = [r for r in rows if r.stages == row.stages and r.iterations > 1 and r.speedup > 1]
    gains = [r for r in more if r.agreement > row.agreement]
    if gains:
        best = max(gains, key=lambda r: r.agreement)
        advice.append(
            f"iterate: K = {best.iterations} agrees on {best.agreement:.1%} at {best.speedup:.1f} "
            "times the speed"
        )
    if _at_the_limit(networks[row.stages]):
        advice.append("raise coarse_budget: the best family tried was the dearest one allowed")
    return tuple(advice)


def _at_the_limit(network: Network) -> bool:
    """Whether a larger correction or guess might have fitted better still."""
    specs = [s for stage in network.plan.stages for s in (stage.preprocess, stage.coarse) if s]
    return any(s.tried and s.flops == max(trial.flops for trial in s.tried) for s in specs)
