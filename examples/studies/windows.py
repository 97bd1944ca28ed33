"""Windowed parareal: the trunk is cut into windows, one after another, each in parallel stages.

With the units A to F of a trunk, two windows of three stages each:

    window 1:  A   B   C   from guesses that follow from the state in front of A
    window 2:  D   E   F   from guesses that follow from the corrected state after C

A guess errs by what the units of its own window do, not by all that lies before it. Every window
costs a sweep of its own. One window is the parareal network; a window for each unit is the
original. With the state itself as guess and as correction a window is a group of layers in parallel
(`in_groups`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pnn_compile as pnn
from passes.plan.schema import Plan

__all__ = ["Windowed", "in_windows"]


@dataclass(frozen=True)
class Windowed:
    """A network whose trunk is a composition of parareal networks.

    Attributes:
        network: The network.
        plans: The plans of its windows.
        rest: FLOPs of the layers outside of the windows.
    """

    network: nn.Module
    plans: tuple[Plan, ...]
    rest: float

    @property
    def speedup(self) -> float:
        """Predicted speed-up: the windows, and what is outside, one after another."""
        before = self.rest + sum(plan.forecast.sequential for plan in self.plans)
        return before / (self.rest + sum(plan.forecast.time for plan in self.plans))

    @property
    def serial(self) -> float:
        """Share of the original's cost in sweeps, and in layers outside of the windows."""
        before = self.rest + sum(plan.forecast.sequential for plan in self.plans)
        return (self.rest + sum(plan.forecast.serial for plan in self.plans)) / before

    @property
    def rounds(self) -> int:
        """Messages one after another: the sweep of every window, and handing its result out."""
        hops = (
            (len(plan.stages) - 1).bit_length()
            if plan.sweep == "collapsed"
            else len(plan.stages) - 1
            for plan in self.plans
        )
        return sum(count + 1 for count in hops)


def in_windows(
    original: nn.Module,
    count: int,
    samples: Sequence[torch.Tensor],
    *,
    stages: int,
    seed: int,
    **options: Any,
) -> Windowed:
    """Convert every window of a copy of a trained network, on the states that reach it.

    Args:
        original: A network with a `trunk` or `blocks` of units.
        count: Number of windows, as equal in units as possible.
        samples: Batches of inputs to calibrate on.
        stages: Stages of a window; at most one for each unit.
        seed: Seed of the compilation.
        options: Options of `pnn.compile`.
    """
    network = copy.deepcopy(original).eval()
    name = next(n for n in ("trunk", "blocks") if hasattr(network, n))
    units = list(getattr(network, name))
    states = _entering(network, getattr(network, name), samples)
    bounds = [len(units) * part // count for part in range(count + 1)]
    windows, plans = list[nn.Module](), list[Plan]()
    for start, stop in itertools.pairwise(bounds):
        window = nn.Sequential(*units[start:stop]).eval()
        if stop - start == 1 or stages == 1:
            raise ValueError(f"{count} windows of {len(units)} units leave one unit to a window")
        compiled = pnn.compile(
            window, states[0][:2], stages=min(stages, stop - start), seed=seed,
            calibration=states, **options,
        )  # fmt: skip
        with torch.no_grad():
            states = [window(state) for state in states]
        windows.append(compiled.module)
        plans.append(compiled.plan)
    setattr(network, name, nn.Sequential(*windows))
    whole = pnn.compile(original, samples[0][:2], stages=2, seed=seed).plan.forecast.sequential
    rest = whole - sum(plan.forecast.sequential for plan in plans)
    return Windowed(network, tuple(plans), rest)


def _entering(
    network: nn.Module, trunk: nn.Module, samples: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    states = list[torch.Tensor]()
    handle = trunk.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone()))
    with torch.no_grad():
        for batch in samples:
            network(batch)
    handle.remove()
    return states
