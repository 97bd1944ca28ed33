"""Count the FLOPs of a cheap network, or time it, on a state of zeros."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.coarse.spec import Span, zeros
from passes.cost.flops import count_work
from passes.cost.measured import Seconds, measure_network
from passes.errors import PnnError, SynthesisError, first_line
from passes.ir.program import tensor_leaves
from passes.ir.tensor_spec import TensorSpec


def measure_call(
    analysis: Analysis,
    module: nn.Module,
    state: Sequence[TensorSpec],
    inputs: Sequence[Any],
    *,
    corrects: bool = False,
) -> dict[str, Any]:
    """Measure one call: FLOPs and, if the costs of nodes are seconds, seconds.

    A coarse propagator reads a residual, and its correction is added to a state: two passes over
    memory, which are in its seconds but not in its FLOPs.

    Args:
        analysis: Unit of the costs, and the device.
        module: The network.
        state: Types of the tensors that it reads.
        inputs: Inputs of the program that it reads.
        corrects: Whether it is a coarse propagator.
    """
    device = analysis.program.device
    values = [zeros(spec, device) for spec in state]
    module.to(device).eval()

    def call(*tensors: torch.Tensor) -> Any:
        return module(*tensors, *inputs)

    def correct(*tensors: torch.Tensor) -> Any:
        result = call(*(a - b for a, b in zip(tensors, values, strict=True)))
        return [x + x.detach() for x in tensor_leaves(result)]

    flops, moved, operators = count_work(lambda: call(*values))
    work: dict[str, Any] = {"flops": flops}
    if analysis.unit != "seconds":
        return work
    backward = bool(analysis.backward)
    if analysis.device is None:
        seconds = measure_network(correct if corrects else call, values, device, backward=backward)
    else:
        if corrects:
            _, moved, operators = count_work(lambda: correct(*values))
        tensor = next(iter((*values, *module.parameters())), torch.zeros(()))
        dtype = str(tensor.dtype).removeprefix("torch.")
        once = analysis.device.seconds(flops, moved, dtype, operators)
        twice = analysis.device.seconds(2 * flops, 2 * moved, dtype, 2 * operators)
        seconds = Seconds(once, twice if backward else 0.0)
    return work | {"seconds": seconds.total, "backward_seconds": seconds.backward}


@contextlib.contextmanager
def failing_by_name(role: str, family: str, types: Sequence[TensorSpec]) -> Iterator[None]:
    """Name the operator that cannot be built or run, as copies of a model's layers may not.

    Raises:
        SynthesisError: The code in the block raised something else than an error for users.
    """
    try:
        yield
    except PnnError:
        raise
    except Exception as error:
        state, reason = ", ".join(map(str, types)), first_line(error).rstrip(".")
        raise SynthesisError(
            f"{role}={family!r} fails on a state of zeros ({state}): {type(error).__name__}: "
            f"{reason}; use {role}='linear', or other cuts"
        ) from error


def stage_work(span: Span) -> dict[str, Any]:
    """Return FLOPs and seconds of the fine stage."""
    return sum_work(
        span.analysis, span.analysis.frontiers.order[span.start.index : span.stop.index]
    )


def sum_work(analysis: Analysis, nodes: Iterable[fx.Node]) -> dict[str, Any]:
    """Return the sum of the FLOPs, and seconds, of nodes of the program."""
    costs = [analysis.costs[node] for node in nodes]
    work: dict[str, Any] = {"flops": sum(cost.flops for cost in costs)}
    if analysis.unit == "seconds":
        work["seconds"] = sum(cost.cost for cost in costs)
        work["backward_seconds"] = sum(cost.backward for cost in costs)
    return work
