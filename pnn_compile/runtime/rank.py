"""`RankNetwork`: the part of a parareal network that one rank owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes.errors import RuntimeFault
from passes.schedule.instruction import Instruction
from passes.schedule.lists import Sweep, schedule
from passes.transform.executor import Executor
from pnn_compile.inputs import device_of

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["RankNetwork"]


class RankNetwork(nn.Module):
    """The guesses, fine stages, corrections and head that live on one rank.

    Args:
        compiled: The whole network; the rank's pieces are shared with it, not copied.
        placement: Rank of every stage.
        rank: This rank.
        device: Where its pieces are moved to; None to leave them where they are.

    Attributes:
        own: Numbers of the stages that live here.
        corrected: Numbers of the stages whose correction lives here; in a collapsed sweep that is
            where the stage before is.

    Raises:
        RuntimeFault: The placement does not fit the network.
    """

    def __init__(
        self,
        compiled: Compiled,
        placement: Sequence[int],
        rank: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check(compiled, placement)
        self.plan = compiled.plan
        self.placement = tuple(placement)
        self.rank = rank
        self.sweep = Sweep.of(compiled.plan)
        self.executor = Executor(compiled)
        self.own = [stage for stage, place in enumerate(placement) if place == rank]
        count, rounds = len(placement), range(self.sweep.iterations)
        corrected = sorted({s for k in rounds for s in self.sweep.corrected(count, k)})
        self.corrected = [s for s in corrected if placement[self.sweep.corrector(s)] == rank]
        for stage in self.own:
            self.add_module(f"fine_{stage}", compiled.stages.fine[stage])
            if stage and stage in self.sweep.computed(count, 0):
                self.add_module(f"preprocess_{stage}", self.executor.guesses[stage].network)
        for stage in self.corrected:
            self.add_module(f"coarse_{stage}", self.executor.corrections[stage].network)
        if self.last in self.own:
            self.add_module("head", compiled.stages.head)
        if device is not None:
            self.to(device)
        home = device or device_of(compiled.module)
        self._home = torch.device("cpu") if home.type == "meta" else home

    @property
    def device(self) -> torch.device:
        """Where the rank computes: where its tensors are, if it has any."""
        return device_of(self, self._home)

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.plan.stages) - 1

    def programs(
        self, *, batches: int = 1, backward: bool = True
    ) -> tuple[tuple[Instruction, ...], ...]:
        """What every rank does in one step; see `schedule`."""
        return schedule(self.placement, self.sweep, batches=batches, backward=backward)


def _check(compiled: Compiled, placement: Sequence[int]) -> None:
    plan = compiled.plan
    if len(placement) != len(plan.stages):
        raise RuntimeFault(
            f"{plan.model} has {len(plan.stages)} stages, but {len(placement)} were placed"
        )
    if sorted(set(placement)) != list(range(max(placement) + 1)):
        raise RuntimeFault(f"every rank needs a stage (stages were placed on {list(placement)})")
