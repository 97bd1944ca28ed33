"""Count the iterations that a tolerance needs on samples, and forecast the speed at them.

Of every sample the first iteration is taken whose estimate is below the tolerance
(`pnn_compile.evaluate.error_estimate`). A batch takes as many as its slowest sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from passes.errors import OptionError, amount
from pnn_compile.compiled import Compiled
from pnn_compile.evaluate.iterate import iterate, pipelined_speedup


@dataclass(frozen=True)
class CountRow:
    """Samples that take K iterations.

    Attributes:
        iterations: K.
        samples: Number of samples.
        speedup: Predicted speed-up over the original, links not counted, one iteration after
            another.
        pipelined: The same if an iteration starts on the states that are there; None for costs of
            a callable.
    """

    iterations: int
    samples: int
    speedup: float
    pipelined: float | None


@dataclass(frozen=True)
class IterationCount:
    """How many iterations a tolerance takes.

    Attributes:
        tolerance: Estimated relative error of a sample, at most.
        stages: N; as many iterations are the original.
        rows: By K, from the least that a sample takes to the most.
    """

    tolerance: float
    stages: int
    rows: tuple[CountRow, ...]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(row.samples for row in self.rows)

    @property
    def median(self) -> CountRow:
        """The row with the median sample, the upper one of two."""
        seen = 0
        for row in self.rows:
            seen += row.samples
            if 2 * seen > self.samples:
                return row
        raise AssertionError("a count has samples")

    @property
    def sentence(self) -> str:
        """The result in words."""
        low, high, middle = self.rows[0], self.rows[-1], self.median
        speeds = [row.pipelined or row.speedup for row in (middle, high)]
        count, where = f"{low.iterations} of {self.stages}", ""
        if len(self.rows) > 1:
            count = f"{low.iterations} to {high.iterations} of {self.stages}"
            count += f", median {middle.iterations},"
            where = f" at the median, {speeds[1]:.2f} times for all"
        return (
            f"{self.tolerance:g} takes K = {count} on {amount(self.samples, 'sample')}: "
            f"{speeds[0]:.2f} times the speed of the original{where}"
        )


def count_iterations(
    compiled: Compiled, batches: Iterable[Any], tolerance: float | None = None
) -> IterationCount:
    """Count the iterations that a tolerance needs on samples, in evaluation mode.

    Args:
        compiled: The network, of any number of iterations.
        batches: Batches of inputs, as in `calibrate`; iterated once.
        tolerance: Estimated relative error of a sample, at most; that of the plan if None.

    Raises:
        OptionError: There is no tolerance, there are no batches, or one does not fit the model.
    """
    plan = compiled.plan
    tolerance = plan.tolerance if tolerance is None else tolerance
    if tolerance is None:
        raise OptionError(f"{plan.model} was compiled without a tolerance: name one")
    taken: Counter[int] = Counter()
    mode = compiled.module.training
    compiled.eval()
    try:
        for batch in batches:
            small = iterate(compiled, batch, tolerance=tolerance).estimates < tolerance
            small[-1] = True  # of the last one either all are, or it is the original
            taken.update((small.int().argmax(0) + 1).tolist())
    finally:
        compiled.train(mode)
    if not taken:
        raise OptionError("iterations are counted on at least one batch of samples (got none)")
    forecasts = plan.forecasts(max(taken))
    rows = (
        CountRow(k, taken[k], forecasts[k - 1].speedup, pipelined_speedup(plan, k))
        for k in sorted(taken)
    )
    return IterationCount(tolerance, len(plan.stages), tuple(rows))
