"""What else N devices could do with the original: a pipeline, or shares of the batch.

Both are forecast by the same costs and the same simulator as parareal networks. A smaller batch is
taken to take its share of the time: in favour of the rivals, as launches cost the same. Devices
that differ get the cuts that balance the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from passes.errors import OptionError, PartitionError
from passes.plan.estimate import find_bottleneck
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.simulate import Times, simulate
from pnn_compile.forecast.setting import Setting, free, parts_of, sent
from pnn_compile.forecast.table import ForecastRow

__all__ = ["balanced", "data_parallel_row", "gpipe_lists", "pipeline_row"]


def balanced(work: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut a sequence into parts whose largest sum is the least that can be.

    Args:
        work: Cost of every piece.
        stages: Number of parts, at most one a piece.

    Returns:
        Where every part ends, the last one at the end of the sequence.
    """
    totals = [0.0, *accumulate(work)]

    def ends(most: float) -> list[int] | None:
        """Fill every part as far as the bound allows; leave a piece for each part to come."""
        found, start = [], 0
        for left in range(stages - 1, -1, -1):
            stop = start
            while stop < len(work) - left and totals[stop + 1] - totals[start] <= most:
                stop += 1
            if stop == start:
                return None
            found.append(stop)
            start = stop
        return found if start == len(work) else None

    low, high = max(max(work), totals[-1] / stages), totals[-1]
    best = ends(low)
    if best is None:
        best = ends(high * (1 + 1e-12))
        assert best is not None
        while high - low > 1e-9 * totals[-1]:
            middle = (low + high) / 2
            tried = ends(middle)
            if tried is None:
                low = middle
            else:
                best, high = tried, middle
    return tuple(best)


def gpipe_lists(
    stages: int, batches: int, *, backward: bool
) -> tuple[tuple[Instruction, ...], ...]:
    """What every rank of a pipeline does (Huang et al. 2019), micro-batch behind micro-batch."""
    lists = []
    for rank in range(stages):
        last = rank == stages - 1
        own: list[Instruction] = []
        for batch in range(batches):
            if rank:
                own.append(Instruction(Kind.RECEIVE, rank - 1, batch, rank - 1))
            own.append(Instruction(Kind.FINE, rank, batch))
            if not last:
                own.append(Instruction(Kind.SEND, rank, batch, rank + 1))
        for batch in range(batches) if backward else ():
            if not last:
                own.append(Instruction(Kind.RECEIVE_ADJOINT, rank, batch, rank + 1))
            own.append(Instruction(Kind.FINE_BACKWARD, rank, batch))
            if rank:
                own.append(Instruction(Kind.SEND_ADJOINT, rank - 1, batch, rank - 1))
        lists.append(tuple(own))
    return tuple(lists)


def pipeline_row(setting: Setting, batches: int, stages: int) -> ForecastRow:
    """A pipeline of the original over its own best cuts, in micro-batches.

    Raises:
        OptionError: The batch has no so many equal micro-batches.
        PartitionError: The model has too few legal cuts.
    """
    if setting.batch % batches:
        raise OptionError(f"a batch of {setting.batch} has no {batches} equal micro-batches")
    analysis = setting.analysis
    order = analysis.frontiers.order
    inner = [p for p in analysis.frontiers.positions if 0 < p.index < len(order)]
    if stages > len(inner) + 1:
        raise PartitionError(f"{analysis.program.name} has {len(inner)} legal cuts")
    bounds = [0, *(p.index for p in inner), len(order)]
    pieces = [order[a:b] for a, b in pairwise(bounds)]
    ends = balanced([sum(map(setting.whole, piece)) for piece in pieces], stages)
    compute: dict[tuple[Kind, int], float] = {}
    size: dict[tuple[Kind, int], float] = {}
    memory = []
    for rank, (start, stop) in enumerate(pairwise([0, *ends])):
        nodes = [node for piece in pieces[start:stop] for node in piece]
        compute[Kind.FINE, rank] = sum(setting.forward(n, rank) for n in nodes) / batches
        compute[Kind.FINE_BACKWARD, rank] = sum(setting.backward(n, rank) for n in nodes) / batches
        crossing = inner[stop - 1].bytes if rank < stages - 1 else 0
        size[Kind.SEND, rank] = size[Kind.SEND_ADJOINT, rank] = crossing / batches
        memory.append(setting.memory.span(bounds[start], bounds[stop]) + crossing)
    setting.check_memory(memory)
    times = Times(compute, size, setting.latency, setting.bandwidth)
    lists = gpipe_lists(stages, batches, backward=setting.training)
    timeline = simulate(lists, times)
    time, sequential = timeline.time, setting.sequential
    parts = parts_of(timeline)
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
        bound=sequential / simulate(lists, free(times)).time,
        efficiency=sequential / time / stages,
        memory=tuple(memory),
        link_bytes=sent(lists, times),
        parts=parts,
        limit=_limit(parts, sequential, stages),
    )


def data_parallel_row(setting: Setting, stages: int) -> ForecastRow:
    """The original on equal shares of the batch; gradients are added up around a ring.

    Raises:
        OptionError: The batch has no so many equal shares.
    """
    if setting.batch % stages:
        raise OptionError(f"a batch of {setting.batch} has no {stages} equal shares")
    analysis = setting.analysis
    order = analysis.frontiers.order
    weights = [p for p in analysis.program.module.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in weights)
    sequential = setting.sequential
    around = 2 * (stages - 1)
    crossing = around * size / stages if setting.training else 0.0
    link = crossing / setting.bandwidth
    if setting.training:
        link += around * setting.latency
    own = max(setting.alone(rank) for rank in range(stages)) / stages
    held = sum(p.nbytes for p in analysis.program.module.parameters())
    written = sum(analysis.costs[node].activation_bytes for node in order) / stages
    memory = setting.memory.copies * held + written
    setting.check_memory([memory] * stages)
    parts = dict.fromkeys(("preprocessing", "coarse", "head"), 0.0) | {"fine": own, "link": link}
    return ForecastRow(
        stages=stages,
        method="ddp",
        time=own + link,
        speedup=sequential / (own + link),
        bound=float(stages),
        efficiency=sequential / (own + link) / stages,
        memory=(memory,) * stages,
        link_bytes=crossing * stages,
        parts=parts,
        limit=_limit(parts, sequential, stages),
    )


def _limit(parts: dict[str, float], sequential: float, count: int) -> str:
    found = find_bottleneck(parts, sequential, count)
    return "imbalance" if found == "fine" else found
