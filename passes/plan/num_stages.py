"""How many stages, and how dear a coarse sweep, where the user leaves it to the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from passes.analysis.analysis import Analysis
from passes.coarse.select import stage_budget
from passes.errors import PartitionError, SynthesisError
from passes.options import Options
from passes.partition.choose_cuts import choose_cut
from passes.plan.bottleneck import LIMITS, find_limit, is_block
from passes.plan.build import make_plan
from passes.plan.schema import Plan

__all__ = ["decide"]

_NEAR_BEST = 1.05
"""Stages, or a cheaper sweep, that make a step faster by no more than this are not worth it."""
_EVERY = 16
"""Up to here every number of stages is looked at, behind it one of about three in every double."""
_MOST = 16
"""Stages that are looked at where no devices are named; of one kind of device more are."""
_MOST_ALIKE = 64
_WORSE = 1.25
"""Numbers of stages behind one that is this much slower than the best are not looked at."""


def decide(analysis: Analysis, options: Options) -> tuple[Options, Plan]:
    """Cut and plan; under stages="auto" for the best predicted time.

    The fewest stages are taken whose time is within 5 % of the best, and corrections that copy
    blocks unless cheaper ones, of a smaller coarse budget, are faster by more than that. The notes
    of the plan say where more stages stop paying and why.

    Returns:
        The options with the numbers that were chosen, and the plan.

    Raises:
        PartitionError: The graph cannot be cut as asked for.
        SynthesisError: A guess or a correction cannot be made.
    """
    if options.stages != "auto" or options.cuts is not None:
        return options, make_plan(analysis, choose_cut(analysis, options), options)
    search = _Search(analysis, options)
    found = search.best(options.coarse_budget)
    cheaper = search.cheaper_budget(len(found.stages))
    if cheaper is not None:
        other = search.best(cheaper)
        if other.forecast.time * _NEAR_BEST < found.forecast.time:
            found = other
            options = dataclasses.replace(options, coarse_budget=cheaper)
    count = len(found.stages)
    note = search.note(found, options.coarse_budget)
    found = dataclasses.replace(found, notes=(*found.notes, note))
    return dataclasses.replace(options, stages=count), found


class _Search:
    """Plans by number of stages and coarse budget, each made once."""

    def __init__(self, analysis: Analysis, options: Options) -> None:
        self._analysis = analysis
        self._options = options
        self._plans: dict[tuple[int, float], Plan | None] = {}
        self._problem: Exception | None = None

    def plan(self, stages: int, budget: float) -> Plan | None:
        """The plan of so many stages; None where there is none."""
        key = stages, budget
        if key not in self._plans:
            options = dataclasses.replace(self._options, stages=stages, coarse_budget=budget)
            try:
                cut = choose_cut(self._analysis, options)
                self._plans[key] = make_plan(self._analysis, cut, options)
            except (PartitionError, SynthesisError) as error:
                self._problem = self._problem or error
                self._plans[key] = None
        return self._plans[key]

    def best(self, budget: float) -> Plan:
        """The plan of fewest stages that is nearly as fast as the fastest one.

        Raises:
            PartitionError: There is none at all.
        """
        plans: list[Plan] = []
        for count in self._counts():
            found = self.plan(count, budget)
            if found is None:
                continue
            plans.append(found)
            least = min(plans, key=lambda plan: plan.forecast.time)
            far = count >= 2 * len(least.stages)
            if far and found.forecast.time > _WORSE * least.forecast.time:
                break
        if not plans:
            assert self._problem is not None
            raise self._problem
        least = min(plans, key=lambda plan: plan.forecast.time)
        limit = _NEAR_BEST * least.forecast.time
        before, enough = 0, len(least.stages)
        for plan in plans:
            if plan.forecast.time <= limit:
                enough = len(plan.stages)
                break
            before = len(plan.stages)
        while enough - before > 1:  # between two that were looked at
            middle = (before + enough) // 2
            found = self.plan(middle, budget)
            if found is not None and found.forecast.time <= limit:
                enough = middle
            else:
                before = middle
        chosen = self.plan(enough, budget)
        assert chosen is not None
        return chosen

    def _counts(self) -> Iterator[int]:
        most = self._most
        yield from range(1, min(most, _EVERY) + 1)
        count = _EVERY
        while (count := count + max(1, count // 4)) < most:
            yield count
        if most > _EVERY:
            yield most

    @property
    def _most(self) -> int:
        """The largest number of stages to look at."""
        listed = len(self._options.devices)
        most = listed if listed > 1 else _MOST_ALIKE if listed else _MOST
        return max(1, min(most, len(self._analysis.frontiers.positions)))

    def cheaper_budget(self, stages: int) -> float | None:
        """The largest half, quarter, ... of the budget that leaves no room for copied blocks."""
        options, units = self._options, self._analysis.trunk_flops * self._options.units
        if options.coarse != "auto" or options.sweep == "collapsed" or not units:
            return None
        budget = options.coarse_budget
        if units > stage_budget(self._analysis, options, stages):
            return None
        while units <= stage_budget(
            self._analysis, dataclasses.replace(options, coarse_budget=budget), stages
        ):
            budget /= 2
        return budget

    def note(self, chosen: Plan, budget: float) -> str:
        """Where more stages stop paying and why, in one sentence."""
        count = len(chosen.stages)
        behind = [n for (n, b), plan in self._plans.items() if plan and b == budget and n > count]
        gain = f"{count} stages chosen, {chosen.forecast.speedup:.2f} times the original's speed"
        if budget < self._options.coarse_budget:
            gain += f" with a coarse budget of {budget:.2%}"
        if not behind:
            return f"{gain}: no more than {count} can be cut or were looked at"
        after = min(behind, key=lambda n: (abs(n - 2 * count), n))
        other = self.plan(after, budget)
        assert other is not None
        return (
            f"{gain}: more do not pay ({after} give {other.forecast.speedup:.2f}), held back by "
            f"{LIMITS[self._limit(other)]}"
        )

    def _limit(self, plan: Plan) -> str:
        forecast, count = plan.forecast, len(plan.stages)
        link = forecast.link / min(plan.iterations, count)
        parts = {
            "fine": forecast.slowest,
            "preprocessing": forecast.makespan - forecast.slowest,
            "coarse": forecast.sweep - link,
            "link": link,
            "head": forecast.tail,
        }
        found = find_limit(parts, forecast.sequential, count)
        if found != "fine":
            return found
        costs = self._analysis.costs
        block = is_block(self._analysis, plan, lambda node: costs[node].cost)
        return "block" if block else "imbalance"
