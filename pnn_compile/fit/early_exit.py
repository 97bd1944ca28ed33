"""Early exit: the baseline of a parareal network that takes the same time on one device.

It runs the first layers of the original, maps their state to the last state by a linear bridge of
the coarse families, fitted in the same closed form, and ends in the original's head:

    inputs -> first layers -> bridge -> head -> outputs

The more a parareal network accelerates the original, the fewer layers an early exit of the same
time may keep: at a speed-up of 4, a quarter of the FLOPs, head and bridge included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.analysis.cut_points import Position, requirements
from passes.coarse.linear import Linear, LowRank, linear_flops, lowrank_flops
from passes.coarse.wrappers import Sum
from passes.ir.isolation import seeded
from passes.ir.program import extract
from passes.ir.tensor_spec import TensorSpec
from passes.transform.executor import Executor
from pnn_compile.fit.candidates import Sample, fit_networks, state_tensors
from pnn_compile.fit.metrics import evaluating
from pnn_compile.inputs import CalibrationBatches, argument_names

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_RANK = 32


class EarlyExit(nn.Module):
    """The first layers of a network's original, a bridge to its last state, and its head.

    Its layers are copies. Inputs and outputs are those of the original.

    Args:
        compiled: The network.
        cut: Where to leave the original.

    Attributes:
        share: FLOPs of the first layers over the original's.
    """

    def __init__(self, compiled: Compiled, cut: Position) -> None:
        super().__init__()
        program, analysis = compiled.program, compiled.analysis
        nodes = analysis.frontiers.order[: cut.index]
        inputs, sides = requirements(program, nodes, analysis.frontiers.recomputable)
        names = [node.name for node in cut.state]
        first = extract(program, nodes, [], names, inputs=inputs, sides=sides, name="First")
        leaving = [value.spec for value in compiled.plan.interfaces[-1].state]
        self.first = copy.deepcopy(first)
        self.bridge = Sum(
            [LowRank(cut.specs, leaving, _RANK, bias=True), Linear(cut.specs, leaving, bias=True)]
        ).to(program.device)
        self.head = copy.deepcopy(compiled.stages.head)
        self.share = sum(analysis.costs[node].flops for node in nodes) / analysis.flops
        self._arguments = argument_names(program)
        by_node = {node.name: str(node.target) for node in program.inputs}
        self._first_reads = [by_node[name] for name in inputs]
        self._head_reads = [by_node[name] for name in compiled.plan.head.inputs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the original's inputs."""
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        state = state_tensors(self.bridge(*self.state(inputs)))
        return self.head(*state, *(inputs[name] for name in self._head_reads))

    def state(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return the state after the first layers."""
        return state_tensors(self.first(*(inputs[name] for name in self._first_reads)))


def build_early_exit(compiled: Compiled, share: float) -> EarlyExit | None:
    """Build the longest early exit within a share of the original's FLOPs.

    Args:
        compiled: The network.
        share: Largest share of the original's FLOPs, head and bridge included.

    Returns:
        The early exit; None where even the shortest one takes more.
    """
    cut = _cut(compiled, share)
    if cut is None:
        return None
    with seeded(compiled.plan.seed), torch.device("cpu"):
        return EarlyExit(compiled, cut)


def fit_early_exit(
    compiled: Compiled, batches: CalibrationBatches, share: float
) -> EarlyExit | None:
    """Build and fit the longest early exit within a share of the original's FLOPs.

    Args:
        compiled: The network.
        batches: Batches to fit the bridge to; the last state of the original is the target.
        share: Largest share of the original's FLOPs, head and bridge included.

    Returns:
        The early exit, in evaluation mode; None where even the shortest one takes more.
    """
    exit_ = build_early_exit(compiled, share)
    if exit_ is None:
        return None
    exit_.eval()
    executor = Executor(compiled)
    names = [value.name for value in compiled.plan.interfaces[-1].state]

    def samples() -> Iterator[Sample]:
        for held_out, inputs in batches.split():
            state = list(exit_.state(inputs))
            last = executor.last_state(inputs)
            targets = [last[name] for name in names]
            yield Sample(held_out, state, targets, state, targets)

    with evaluating(compiled):
        fit_networks([exit_.bridge], samples)
    return exit_


def _cut(compiled: Compiled, share: float) -> Position | None:
    """Return the last position whose prefix, bridge and head take at most a share of all FLOPs."""
    analysis = compiled.analysis
    leaving = [value.spec for value in compiled.plan.interfaces[-1].state]
    order = analysis.frontiers.order
    end = [node.name for node in order].index(compiled.plan.interfaces[-1].after) + 1
    budget = share * analysis.flops - compiled.plan.head.flops
    spent, best = 0.0, None
    ends = {p.index: p for p in analysis.frontiers.positions if p.boundary}
    for index, node in enumerate(order[: end - 1], 1):
        spent += analysis.costs[node].flops
        position = ends.get(index)
        if position and spent + _bridge_flops(position.specs, leaving) <= budget:
            best = position
    return best


def _bridge_flops(entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> float:
    return linear_flops(entering, leaving) + lowrank_flops(entering, leaving, _RANK)
