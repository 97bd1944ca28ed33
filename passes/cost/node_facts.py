"""Run a program and record facts that static analysis cannot tell: shapes, aliases, writes, work.

No cut may separate nodes that share memory which one of them writes (`passes.ir.observer`). What
the runs of capture showed of the same graph is not looked for again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from passes.cost.axes import (
    hidden_positions,
    rearranged,
    sequence_axes,
    tracked_axes,
    tracked_batch_axis,
    unmixed,
)
from passes.cost.flops import WorkMode, is_recurrent, plain_attention, plain_recurrence
from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs, bind
from passes.ir.isolation import preserved
from passes.ir.module_walk import set_mode, submodule
from passes.ir.observer import Fact, Observations, Observer, ShapeRecorder, Work
from passes.ir.program import Interpreter, Program, is_compute, provenance, tensors_in
from passes.ir.tensor_spec import TensorSpec

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
)  # fmt: skip
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
_MAX_DISTANCE = 4
"""Largest number of nodes to a layer that tells which axis of a tensor holds the channels."""


class _WorkObserver(Observer):
    """Keep the value of every node, and count its work.

    Attributes:
        values: The values of all nodes.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self._mode = WorkMode()

    def compute(self, n: fx.Node) -> tuple[Any, Work]:
        before = self._mode.work
        with self._mode, plain_recurrence() if is_recurrent(self.module, n) else nullcontext():
            value, _ = super().compute(n)
        self.values[n] = value
        return value, Work(*map(operator.sub, self._mode.work, before))


def observe(program: Program, observations: Observations | None = None) -> Mapping[fx.Node, Fact]:
    """Run a program and return the facts of every node.

    The program runs in evaluation mode and, if possible, in training mode, where layers update
    statistics and draw random numbers; memory counts as shared if it is in either mode. If the
    batch size is free, the program runs once more with another one, to find the batch axes.

    Args:
        program: The program.
        observations: What earlier runs of its graph on the same inputs showed; those runs are not
            made again.

    Raises:
        CaptureError: The rank of a tensor depends on the batch size.
    """
    if observations is None or not observations.are_of(program):
        observations = Observations(program.graph)
    inputs = bind(program.module, (), dict(program.args))
    with plain_attention():
        observer = _WorkObserver(program.module)
        _run(program, inputs, observer, train=False)
        evaluated = observer.facts()
        larger = observations.larger
        if "batch" in program.dynamic and larger is None:
            larger = _shapes(program, inputs.varied(grow=True))
        trained = observations.trained or _run_training(program, inputs) or evaluated
        batch_size = _batch_size(inputs, observer)
        found, unaligned = sequence_axes(program, inputs, observer.values, batch_size)
        sequences = {n: axis for causal in reversed(found) for n, axis in causal.axes.items()}
        tracked = tracked_axes(program, inputs, observer.values, batch_size)
    facts: dict[fx.Node, Fact] = {}
    for node, fact in evaluated.items():
        value = observer.values[node]
        spec = None
        if isinstance(value, torch.Tensor):
            larger_shape = larger[node] if larger is not None else None
            spec = _spec(program, node, value, larger_shape, batch_size)
            if node in tracked:
                spec = replace(spec, batch_axis=tracked_batch_axis(spec, tracked[node]))
            if node in sequences:
                spec = replace(spec, channel_axis=unmixed(spec, sequences[node]))
        facts[node] = Fact(
            spec=spec,
            storages=fact.storages | trained[node].storages,
            writes=fact.writes | trained[node].writes,
            random=trained[node].random,
            unaligned=node in unaligned,
            bytes=fact.bytes,
            work=fact.work,
        )
    if found:
        specs = {node: fact.spec for node, fact in facts.items() if fact.spec is not None}
        with plain_attention():
            hidden = hidden_positions(program, inputs, observer.values, specs, found)
        facts |= {node: replace(facts[node], hides=hides) for node, hides in hidden.items()}
        mixed = rearranged(specs, found)
        facts |= {node: replace(facts[node], unaligned=True) for node in mixed}
    return facts


def _shapes(program: Program, inputs: ExampleInputs) -> Mapping[fx.Node, torch.Size]:
    """Run in evaluation mode and return the shapes of all tensors."""
    recorder = ShapeRecorder(program.module)
    _run(program, inputs, recorder, train=False)
    return recorder.shapes


def _run_training(program: Program, inputs: ExampleInputs) -> Mapping[fx.Node, Fact] | None:
    """Run in training mode, with one more sample if it fails: BatchNorm may refuse a batch of 1."""
    for candidate in (inputs, inputs.varied(grow="batch" in program.dynamic)):
        observer = Observer(program.module)
        try:
            _run(program, candidate, observer, train=True)
        except (RuntimeError, ValueError):
            continue
        return observer.facts()
    return None


def _run(program: Program, inputs: ExampleInputs, interpreter: Interpreter, *, train: bool) -> None:
    _, kwargs = inputs.copied()
    with preserved(program.module), torch.no_grad():
        set_mode(program.module, train)
        interpreter.run_by_name(kwargs)


def _batch_size(inputs: ExampleInputs, observer: _WorkObserver) -> int | None:
    """Return the number of samples: that of the first output that counts as an input does.

    The first input may be a flat list of the tokens of all samples, whose offsets are another one.
    """
    sizes = [tensor.shape[0] for tensor in inputs.tensors() if tensor.dim()]
    (outputs,) = fx.node.map_arg(observer.graph.output_node().args, observer.values.__getitem__)
    counts = [tensor.shape[0] for tensor in tensors_in(outputs) if tensor.dim()]
    return next((count for count in counts if count in sizes), inputs.batch_size)


def _spec(
    program: Program,
    node: fx.Node,
    value: torch.Tensor,
    larger_shape: torch.Size | None,
    batch_size: int | None,
) -> TensorSpec:
    """Describe a tensor; the batch axis is the first one that differs in the larger batch.

    Args:
        program: The program.
        node: The node that computes the tensor.
        value: The tensor.
        larger_shape: Its shape at a larger batch; None if the batch size is fixed.
        batch_size: The batch size; if it is fixed, dimension 0 of this size is the batch axis.
    """
    axis: int | None = 0 if value.dim() and value.shape[0] == batch_size else None
    if larger_shape is not None and len(larger_shape) != value.dim():
        raise CaptureError(
            f"the rank of {node.name!r} ({provenance(node).source or 'no source'}) depends on the "
            "batch size: give an example of at least two samples"
        )
    if larger_shape is not None:
        pairs = zip(value.shape, larger_shape, strict=True)
        axis = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    return TensorSpec(
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        batch_axis=axis,
        channel_axis=_channel_axis(program, node, value.dim()),
    )


def _channel_axis(program: Program, node: fx.Node, rank: int) -> int:
    """Find the axis that layers mix, by a breadth-first search for the nearest layer with one."""
    if rank < 3:
        return max(rank - 1, 0)
    frontier, visited = [node], {node}
    for _ in range(_MAX_DISTANCE):
        for candidate in frontier:
            if (axis := _mixed_axis(program.module, candidate, rank)) is not None:
                return axis
        neighbors = [
            neighbor
            for candidate in frontier
            for neighbor in (*candidate.users, *candidate.all_input_nodes)
            if neighbor not in visited and is_compute(neighbor)
        ]
        frontier = list(dict.fromkeys(neighbors))
        visited.update(frontier)
    return 1 if rank >= 4 else rank - 1


def _mixed_axis(module: fx.GraphModule, node: fx.Node, rank: int) -> int | None:
    """Return the axis that a layer mixes; None if it mixes none."""
    if node.op == "call_module":
        layer = submodule(module, str(node.target))
        if isinstance(layer, _CHANNELS_FIRST):
            return 1
        if isinstance(layer, _CHANNELS_LAST):
            return rank - 1
    name = getattr(node.target, "__name__", str(node.target))
    if "conv" in name or "batch_norm" in name:
        return 1
    if "linear" in name or "layer_norm" in name or "embedding" in name:
        return rank - 1
    return None
