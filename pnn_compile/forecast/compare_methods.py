"""Forecast a step of three methods: parareal network, pipeline, and data parallelism.

All use the same costs, and the first two the same simulator, on the instruction lists that ranks
run. Part of a batch is assumed to take its share of the time, in favor of the other methods, as
launches cost the same. If devices differ, a pipeline has the cuts that balance the first of them.

Two stages and two micro-batches (0, 1) of a pipeline, forward and backward:

    rank 0   fine 0, send, fine 1, send,       receive, backward 0, receive, backward 1
    rank 1   receive, fine 0, receive, fine 1, backward 0, send, backward 1, send
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from torch import fx

from passes.analysis.analysis import Analysis
from passes.coarse.family import in_time
from passes.coarse.time_step import for_loop
from passes.cost.device_profile import DeviceProfile
from passes.cost.memory import Memory
from passes.errors import OptionError, PartitionError, SynthesisError
from passes.options import Options
from passes.partition.choose_cuts import choose_cut
from passes.plan.build import make_plan
from passes.plan.estimate import find_bottleneck, slowest_is_block
from passes.plan.schema import Plan
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, Times, simulate
from pnn_compile.forecast.table import ForecastRow

_PARAREAL_ONLY = (
    Kind.GUESS, Kind.GUESS_BACKWARD, Kind.PREDICT, Kind.CORRECT, Kind.COARSE_BACKWARD,
)  # fmt: skip
"""Instructions that the original network does not have."""

_PART = {
    Kind.FINE: "fine",
    Kind.FINE_BACKWARD: "fine",
    Kind.GUESS: "preprocessing",
    Kind.GUESS_BACKWARD: "preprocessing",
    Kind.PREDICT: "coarse",
    Kind.CORRECT: "coarse",
    Kind.COARSE_BACKWARD: "coarse",
    Kind.HEAD: "head",
    Kind.HEAD_BACKWARD: "head",
}
"""Part of a step that an instruction belongs to; "link" for all others."""


@dataclass(frozen=True)
class DeviceCosts:
    """Times, memory and links of a step of the original on every device.

    Attributes:
        analysis: Costs and legal cuts of the model.
        options: Options of the parareal networks; stages and sweep are set row by row.
        training: Whether a step trains.
        batch: Samples of a step.
        profiles: One device for all, or one per stage; none for free links and unlimited memory.
    """

    analysis: Analysis
    options: Options
    training: bool
    batch: int
    profiles: tuple[DeviceProfile, ...]

    @property
    def linked(self) -> bool:
        """Whether links take time: only where the unit of times is seconds."""
        return bool(self.profiles) and self.analysis.unit == "seconds"

    @property
    def links(self) -> dict[str, Any]:
        """The slowest links, inside nodes and between them, as `Times` takes them."""
        if not self.linked:
            return {}
        return {
            "latency": max(p.link_latency for p in self.profiles),
            "bandwidth": min(p.link_bandwidth for p in self.profiles),
            "node": min((p.node for p in self.profiles if p.node), default=0),
            "network_latency": max(p.network_latency for p in self.profiles),
            "network_bandwidth": min(p.network_bandwidth for p in self.profiles),
        }

    def device(self, rank: int) -> DeviceProfile | None:
        """Return the device of a rank."""
        if not self.profiles:
            return None
        return self.profiles[rank] if len(self.profiles) > 1 else self.profiles[0]

    def forward(self, node: fx.Node, rank: int = 0) -> float:
        """Return the time of a node, forward."""
        cost = self.analysis.on(self.device(rank))[node]
        return float(cost.flops) if self.analysis.unit == "FLOPs" else cost.forward

    def backward(self, node: fx.Node, rank: int = 0) -> float:
        """Return the time of a node, backward; 0 in inference."""
        cost = self.analysis.on(self.device(rank))[node]
        if not self.training:
            return 0.0
        return float(cost.backward_flops) if self.analysis.unit == "FLOPs" else cost.backward

    def total(self, node: fx.Node, rank: int = 0) -> float:
        """Return the time of a node in a step, forward and backward."""
        return self.forward(node, rank) + self.backward(node, rank)

    def original(self, rank: int) -> float:
        """Return the time of the original on the device of a rank."""
        return sum(self.total(node, rank) for node in self.analysis.frontiers.order)

    @cached_property
    def sequential(self) -> float:
        """Time of the original on one device, the fastest one for it."""
        return min(self.original(rank) for rank in range(max(1, len(self.profiles))))

    @cached_property
    def memory(self) -> Memory:
        """Memory of consecutive nodes."""
        return Memory(self.analysis.program, self.analysis.costs, training=self.training)

    def check_memory(self, memory: Sequence[float]) -> None:
        """Check the bytes of every rank against the memory of its device.

        Raises:
            PartitionError: A device has less memory.
        """
        for rank, size in enumerate(memory):
            device = self.device(rank)
            if device is not None and size > device.memory:
                raise PartitionError(
                    f"device {rank} ({device.name}) needs {size:.3g} bytes and has "
                    f"{device.memory:.3g}"
                )


def parareal_row(costs: DeviceCosts, sweep: str, stages: int) -> ForecastRow:
    """Plan a parareal network of that many stages, and simulate a step.

    Raises:
        PartitionError: The model has too few legal cuts.
        SynthesisError: The options make no network of that many stages.
    """
    options = dataclasses.replace(costs.options, stages=stages, sweep=sweep)
    options, _ = for_loop(costs.analysis, options.counted())
    plan = make_plan(costs.analysis, choose_cut(costs.analysis, options), options)
    times = Times.of(plan, **costs.links)
    lists = schedule(plan.placement, Sweep.of(plan), backward=costs.training)
    timeline = simulate(lists, times)
    sequential = costs.sequential
    parts = _critical_parts(timeline)
    speedup = sequential / timeline.time if timeline.time else 1.0
    fine_alone = simulate(lists, _free_links(times, *_PARAREAL_ONLY)).time
    return ForecastRow(
        stages=stages,
        method=plan.sweep,
        time=timeline.time,
        speedup=speedup,
        bound=sequential / fine_alone if fine_alone else 1.0,
        efficiency=speedup / stages,
        memory=_plan_memory(costs, plan),
        link_bytes=_link_bytes(lists, times),
        parts=parts,
        limit=_plan_limit(costs, plan, parts),
    )


def takes_coarse_steps(costs: DeviceCosts, stages: int) -> bool:
    """Return whether a chain of that many stages takes the coarse steps of a loop in time."""
    options = dataclasses.replace(costs.options, stages=stages, sweep="chain")
    try:
        return in_time(for_loop(costs.analysis, options.counted())[0].coarse)
    except (PartitionError, SynthesisError):
        return False


def _plan_memory(costs: DeviceCosts, plan: Plan) -> tuple[float, ...]:
    """Return the bytes of every device; that of the last stage also holds the head."""
    order = costs.analysis.frontiers.order
    index = {node.name: position for position, node in enumerate(order)}
    starts = [index[stage.first] for stage in plan.stages]
    stops = [*starts[1:], len(order)]
    memory = [0.0] * plan.devices
    for number, (stage, device) in enumerate(zip(plan.stages, plan.placement, strict=True)):
        memory[device] += costs.memory.span(starts[number], stops[number])
        if stage.preprocess is not None:
            entering = plan.interfaces[number - 1].bytes
            memory[device] += costs.memory.entry(stage.operator_parameters, entering)
    return tuple(memory)


def _plan_limit(costs: DeviceCosts, plan: Plan, parts: Mapping[str, float]) -> str:
    limit = find_bottleneck(parts, costs.sequential, plan.devices)
    if limit != "fine":
        return limit
    return "block" if slowest_is_block(costs.analysis, plan, costs.total) else "imbalance"


def balanced(work: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut a sequence into parts such that the largest sum of a part is minimal.

    Args:
        work: Cost of every piece.
        stages: Number of parts, at most one a piece.

    Returns:
        The end of every part; the last one ends the sequence.

    >>> balanced([1.0, 2.0, 3.0, 4.0], 2)
    (3, 4)
    """
    totals = [0.0, *accumulate(work)]

    def ends(most: float) -> list[int] | None:
        """Fill every part up to a bound, but leave a piece for each later one; None if too low."""
        stops, start = [], 0
        for parts_left in range(stages - 1, -1, -1):
            stop = start
            while stop < len(work) - parts_left and totals[stop + 1] - totals[start] <= most:
                stop += 1
            if stop == start:
                return None
            stops.append(stop)
            start = stop
        return stops if start == len(work) else None

    low, high = max(max(work), totals[-1] / stages), totals[-1]
    best = ends(low)
    if best is None:
        best = ends(high * (1 + 1e-12))  # the sum itself may exceed `high` by rounding
        assert best is not None
        while high - low > 1e-9 * totals[-1]:
            middle = (low + high) / 2
            stops = ends(middle)
            if stops is None:
                low = middle
            else:
                best, high = stops, middle
    return tuple(best)


def gpipe_lists(
    stages: int, batches: int, *, backward: bool
) -> tuple[tuple[Instruction, ...], ...]:
    """List the instructions of every rank of a pipeline (GPipe; Huang et al. 2019)."""
    lists = []
    for rank in range(stages):
        last = rank == stages - 1
        instructions: list[Instruction] = []
        for batch in range(batches):
            if rank:
                instructions.append(Instruction(Kind.RECEIVE, rank - 1, batch, rank - 1))
            instructions.append(Instruction(Kind.FINE, rank, batch))
            if not last:
                instructions.append(Instruction(Kind.SEND, rank, batch, rank + 1))
        for batch in range(batches) if backward else ():
            if not last:
                instructions.append(Instruction(Kind.RECEIVE_ADJOINT, rank, batch, rank + 1))
            instructions.append(Instruction(Kind.FINE_BACKWARD, rank, batch))
            if rank:
                instructions.append(Instruction(Kind.SEND_ADJOINT, rank - 1, batch, rank - 1))
        lists.append(tuple(instructions))
    return tuple(lists)


def pipeline_row(costs: DeviceCosts, batches: int, stages: int) -> ForecastRow:
    """Forecast a pipeline of the original over the cuts that balance it.

    Raises:
        OptionError: The batch cannot be split into that many equal micro-batches.
        PartitionError: The model has too few legal cuts.
    """
    if costs.batch % batches:
        raise OptionError(f"a batch of {costs.batch} has no {batches} equal micro-batches")
    analysis = costs.analysis
    order = analysis.frontiers.order
    inner = [p for p in analysis.frontiers.positions if 0 < p.index < len(order)]
    if stages > len(inner) + 1:
        raise PartitionError(f"{analysis.program.name} has {len(inner)} legal cuts")
    bounds = [0, *(p.index for p in inner), len(order)]
    pieces = [order[a:b] for a, b in pairwise(bounds)]
    ends = balanced([sum(map(costs.total, piece)) for piece in pieces], stages)
    compute: dict[tuple[Kind, int], float] = {}
    size: dict[tuple[Kind, int], float] = {}
    memory = []
    for rank, (start, stop) in enumerate(pairwise([0, *ends])):
        nodes = [node for piece in pieces[start:stop] for node in piece]
        compute[Kind.FINE, rank] = sum(costs.forward(n, rank) for n in nodes) / batches
        compute[Kind.FINE_BACKWARD, rank] = sum(costs.backward(n, rank) for n in nodes) / batches
        crossing = inner[stop - 1].bytes if rank < stages - 1 else 0
        size[Kind.SEND, rank] = size[Kind.SEND_ADJOINT, rank] = crossing / batches
        memory.append(costs.memory.span(bounds[start], bounds[stop]) + crossing)
    costs.check_memory(memory)
    times = Times(compute, size, **costs.links)
    lists = gpipe_lists(stages, batches, backward=costs.training)
    timeline = simulate(lists, times)
    time, sequential = timeline.time, costs.sequential
    parts = _critical_parts(timeline)
    slowest = max(
        batches * (compute[Kind.FINE, r] + compute[Kind.FINE_BACKWARD, r]) for r in range(stages)
    )
    parts["bubble"] = max(0.0, parts["fine"] - slowest)
    parts["fine"] -= parts["bubble"]
    return ForecastRow(
        stages=stages,
        method=f"gpipe:{batches}",
        time=time,
        speedup=sequential / time,
        bound=sequential / simulate(lists, _free_links(times)).time,
        efficiency=sequential / time / stages,
        memory=tuple(memory),
        link_bytes=_link_bytes(lists, times),
        parts=parts,
        limit=_limit(parts, sequential, stages),
    )


def data_parallel_row(costs: DeviceCosts, stages: int) -> ForecastRow:
    """Forecast the original on equal shares of the batch; a ring reduces the gradients.

    Raises:
        OptionError: The batch cannot be split into that many equal shares.
    """
    if costs.batch % stages:
        raise OptionError(f"a batch of {costs.batch} has no {stages} equal shares")
    analysis = costs.analysis
    order = analysis.frontiers.order
    weights = [p for p in analysis.program.module.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in weights)
    sequential = costs.sequential
    messages = 2 * (stages - 1)  # of a rank in a ring all-reduce, each of size / stages bytes
    crossing = messages * size / stages if costs.training else 0.0
    ring = Times({}, {(Kind.SEND, 0): crossing}, **costs.links)
    occupied, latency = ring.transfer(Instruction(Kind.SEND, 0, 0, peer=0), stages - 1)
    link = occupied + (messages * latency if costs.training else 0.0)
    # Every rank updates all weights; the rest is shared.
    optimizer = sum(analysis.costs[node].optimizer for node in order) if costs.training else 0.0
    whole = max(costs.original(rank) for rank in range(stages))
    compute = (whole - optimizer) / stages + optimizer
    parameters = sum(p.nbytes for p in analysis.program.module.parameters())
    activations = sum(analysis.costs[node].activation_bytes for node in order) / stages
    memory = costs.memory.copies * parameters + activations
    costs.check_memory([memory] * stages)
    parts = dict.fromkeys(("preprocessing", "coarse", "head"), 0.0) | {
        "fine": compute,
        "link": link,
    }
    return ForecastRow(
        stages=stages,
        method="ddp",
        time=compute + link,
        speedup=sequential / (compute + link),
        bound=float(stages),
        efficiency=sequential / (compute + link) / stages,
        memory=(memory,) * stages,
        link_bytes=crossing * stages,
        parts=parts,
        limit=_limit(parts, sequential, stages),
    )


def _limit(parts: dict[str, float], sequential: float, count: int) -> str:
    limit = find_bottleneck(parts, sequential, count)
    return "imbalance" if limit == "fine" else limit


def _free_links(times: Times, *kinds: Kind) -> Times:
    """Return the same times with free links, and without the work of some kinds."""
    return Times({key: value for key, value in times.compute.items() if key[0] not in kinds})


def _link_bytes(lists: Sequence[Sequence[Instruction]], times: Times) -> float:
    """Sum the bytes that cross links in one step."""
    instructions = (instruction for by_rank in lists for instruction in by_rank)
    return sum(times.bytes.get((one.kind, one.stage), 0.0) for one in instructions)


def _critical_parts(timeline: Timeline) -> dict[str, float]:
    """Split the time of a step by kind of work along its critical path."""
    parts = dict.fromkeys(("fine", "preprocessing", "coarse", "head", "link"), 0.0)
    before = 0.0
    for _, span in timeline.critical_path:
        parts[_PART.get(span.instruction.kind, "link")] += span.end - before
        before = span.end
    return parts
