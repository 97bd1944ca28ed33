"""Choose the number of stages if the user does not.

More stages divide the trunk further but lengthen the serial sweep. Take a trunk of 96 units of
work, a coarse propagator of 1.5 per interface, and a head of 4:

    stages N                     1     2     4     5     6     7     8     9    10    16    20
    slowest stage, 96 / N       96    48    24  19.2    16  13.7    12  10.7   9.6     6   4.8
    serial, 1.5 (N - 1) + 4      4   5.5   8.5    10  11.5    13  14.5    16  17.5  26.5  32.5
    step time                  100  53.5  32.5  29.2  27.5  26.7  26.5  26.7  27.1  32.5  37.3

The best time is 26.5, of 8 stages. Six stages are within 5 % of it (27.8) and need two devices
less: 6 is chosen. The scan stops at N = 20: at least twice 8, and more than 25 % slower.

>>> fewest_near_best(lambda count: 96 / count + 1.5 * (count - 1) + 4, most=64)
6
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from passes.analysis.analysis import Analysis
from passes.coarse.time_step import for_loop
from passes.errors import PartitionError, SynthesisError, amount
from passes.options import Options
from passes.partition.choose_cuts import choose_cut
from passes.plan.build import SPEED, copies_whole, make_plan, note_on_cheaper, small_stages
from passes.plan.estimate import BOTTLENECKS, find_bottleneck, slowest_is_block
from passes.plan.schema import Plan

_NEAR_BEST = 1.05
"""More stages must make a step faster by more than this factor."""
_EVERY = 16
"""Scan every number of stages up to this one, above it about three per doubling."""
_MOST = 16
"""Largest number of stages if no devices are named."""
_MOST_EQUAL = 64
"""Largest number of stages if one device profile is named for all."""
_WORSE = 1.25
"""Stop the scan once a stage count is 25 % slower than the best one."""


def cut_and_plan(analysis: Analysis, options: Options) -> tuple[Options, Plan]:
    """Cut and plan; with stages="auto" for the best predicted time.

    The choice is the fewest stages whose time is within 5 % of the best. The notes of the plan say
    from which number on more stages do not pay, and why.

    Returns:
        The options with the chosen numbers, and the plan.

    Raises:
        PartitionError: The graph cannot be cut as the options ask.
        SynthesisError: A preprocessing operator or coarse propagator cannot be built.
    """
    options, loop = for_loop(analysis, options.counted())
    search, chosen = _Search(analysis, options), ""
    if options.stages != "auto" or options.cuts is not None:
        plan = make_plan(analysis, choose_cut(analysis, options), options)
    else:
        plan = search.best()
        chosen = search.note(plan)
        options = dataclasses.replace(options, stages=plan.devices)
    cheaper = note_on_cheaper(analysis, options, plan)
    small, fewer = search.note_on_small(plan), search.note_on_fewer(plan)
    notes = filter(None, (small, *plan.notes, fewer, cheaper, loop, chosen))
    return options, dataclasses.replace(plan, notes=tuple(notes))


def fewest_near_best(time: Callable[[int], float], most: int) -> int | None:
    """Return the least number of stages whose time is within 5 % of the best.

    Args:
        time: Step time of a number of stages; `inf` if the model cannot be cut so. It is assumed to
            fall, then to rise.
        most: Largest number of stages.

    Returns:
        The number, or None if every time is `inf`.
    """
    times: dict[int, float] = {}
    for count in _counts(most):
        if time(count) == math.inf:
            continue
        times[count] = time(count)
        best = min(times, key=lambda n: times[n])
        if count >= 2 * best and times[count] > _WORSE * times[best]:
            break
    if not times:
        return None
    limit = _NEAR_BEST * min(times.values())
    enough = next(count for count in times if times[count] <= limit)
    before = max((count for count in times if count < enough), default=0)
    while enough - before > 1:  # above _EVERY, numbers between the two were skipped
        middle = (before + enough) // 2
        if time(middle) <= limit:
            enough = middle
        else:
            before = middle
    return enough


def _counts(most: int) -> Iterator[int]:
    """List the numbers of stages to scan.

    >>> list(_counts(40))[14:]
    [15, 16, 20, 25, 31, 38, 40]
    """
    yield from range(1, min(most, _EVERY) + 1)
    count = _EVERY
    while (count := count + max(1, count // 4)) < most:
        yield count
    if most > _EVERY:
        yield most


class _Search:
    """Plans by number of stages, each built once."""

    def __init__(self, analysis: Analysis, options: Options) -> None:
        self._analysis = analysis
        self._options = options
        self._plans: dict[int, Plan | None] = {}
        self._first_error: Exception | None = None
        free = options.coarse_budget is None and options.coarse_width is None
        self._strict = options.coarse == "auto" and free

    def plan(self, stages: int) -> Plan | None:
        """Return the plan of this number of stages; None if it cannot be built."""
        if stages not in self._plans:
            options = dataclasses.replace(self._options, stages=stages, cuts=None)
            try:
                cut = choose_cut(self._analysis, options)
                if cut.inside_blocks:
                    parts = stages * self._options.windows
                    runs = "fewer windows" if self._options.windows > 1 else "fewer stages"
                    raise PartitionError(
                        f"{self._analysis.program.name} has no cuts between blocks that make "
                        f"{parts} stages: ask for {runs}, or allow cut_inside_blocks=True"
                    )
                self._plans[stages] = make_plan(self._analysis, cut, options)
            except (PartitionError, SynthesisError) as error:
                self._first_error = self._first_error or error
                self._plans[stages] = None
        return self._plans[stages]

    def best(self) -> Plan:
        """Return the plan of fewest stages that is nearly as fast as the fastest one.

        Raises:
            PartitionError: No number of stages can be cut.
            SynthesisError: Or none has the operators that the options ask for.
        """

        def time(stages: int) -> float:
            plan = self.plan(stages)
            return plan.forecast.time if plan is not None and self._keeps(plan) else math.inf

        stages = fewest_near_best(time, self._most)
        if stages in {None, 1}:
            self._strict = False
            stages = fewest_near_best(time, self._most)
        if stages is None:
            assert self._first_error is not None
            raise self._first_error
        plan = self.plan(stages)
        assert plan is not None
        return plan

    def _keeps(self, plan: Plan) -> bool:
        """Return whether every correction is what kept the accuracy, or nothing else exists."""
        return not self._strict or copies_whole(plan)

    @property
    def _most(self) -> int:
        """Largest number of stages to consider."""
        listed = len(self._options.devices)
        most = listed if listed > 1 else _MOST_EQUAL if listed else _MOST
        positions = len(self._analysis.frontiers.positions)
        return max(1, min(most, positions // self._options.windows))

    def note(self, chosen: Plan) -> str:
        """Say from where on more stages do not pay, and why, in one sentence."""
        count = chosen.devices
        more = [n for n, plan in self._plans.items() if plan and n > count and self._keeps(plan)]
        speed = f"{chosen.forecast.speedup:.2f} {SPEED}"
        gain = f"{amount(count, 'stage')} chosen, {speed}"
        if not more and any(plan and n > count for n, plan in self._plans.items()):
            return f"{gain}: more would need cheaper corrections than copies of whole blocks"
        if not more:
            return f"{gain}: no more than {count} can be cut or were looked at"
        doubled = min(more, key=lambda n: (abs(n - 2 * count), n))
        other = self.plan(doubled)
        assert other is not None
        return (
            f"{gain}: more do not pay ({doubled} give {other.forecast.speedup:.2f}), held back by "
            f"{BOTTLENECKS[self._bottleneck(other)]}"
        )

    def note_on_small(self, plan: Plan) -> str:
        """Name stages of less than half the mean work, and what as many fewer would give."""
        shares = small_stages(plan.stages)
        if not shares:
            return ""
        which = f"stage {shares[0]} has" if len(shares) == 1 else f"stages {', '.join(shares)} have"
        which += " less than half the mean work"
        most = (len(plan.stages) - len(shares)) // plan.windows
        fewer = next(filter(None, map(self.plan, range(most, 0, -1))), None)
        if fewer is None:
            return f"{which}: fewer {'windows' if plan.windows > 1 else 'stages'} may be as fast"
        some = amount(fewer.devices, "stage")
        if plan.windows > 1:
            some += " a window"
        elif self._options.cuts:
            some += " with other cuts"
        speed, now = fewer.forecast.speedup, plan.forecast.speedup
        verdict = "would do" if speed * _NEAR_BEST >= now else "would be slower"
        return f"{which}: {some} {verdict} ({speed:.2f} {SPEED}, these {plan.devices} {now:.2f})"

    def note_on_fewer(self, plan: Plan) -> str:
        """Say that fewer stages would do, where corrections one after another take much time."""
        options, now = self._options, plan.forecast
        if options.stages == "auto" or options.cuts or now.serial_share <= options.fit_budget:
            return ""
        others = filter(None, map(self.plan, {plan.devices // 2, plan.devices - 1} - {0, 1}))
        best = max(others, key=lambda other: other.forecast.speedup, default=plan)
        if best is plan or best.forecast.speedup < now.speedup:
            return ""
        some = amount(best.devices, "stage") + (" a window" if plan.windows > 1 else "")
        speed = f"{best.forecast.speedup:.2f} {SPEED}"
        return f"{some} would do ({speed}, these {plan.devices} {now.speedup:.2f})"

    def _bottleneck(self, plan: Plan) -> str:
        """Return what limits the speed-up of a plan, a key of `BOTTLENECKS`."""
        forecast, count = plan.forecast, plan.devices
        link = forecast.link / min(plan.iterations, count)
        parts = {
            "fine": forecast.slowest,
            "preprocessing": forecast.makespan - forecast.slowest,
            "coarse": forecast.sweep - link,
            "link": link,
            "head": forecast.tail,
        }
        bottleneck = find_bottleneck(parts, forecast.sequential, count)
        if bottleneck != "fine":
            return bottleneck
        costs = self._analysis.costs
        block = slowest_is_block(self._analysis, plan, lambda node: costs[node].cost)
        return "block" if block else "imbalance"
