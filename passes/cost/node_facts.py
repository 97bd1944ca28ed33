"""Run a program and record facts that static analysis cannot tell: shapes, aliases and writes.

Memory is identified by the storage of tensors. In `y = x.view(-1); y.add_(1)` the nodes `x`, `view`
and `add_` have one storage in common, and `add_` writes it: no cut may separate them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs, bind, scaled
from passes.ir.isolation import preserved, same_values
from passes.ir.module_walk import named_buffers, named_parameters, set_mode, submodule
from passes.ir.program import Interpreter, Program, is_compute, provenance, tensors_in
from passes.ir.tensor_spec import TensorSpec

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
)  # fmt: skip
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
_MAYBE_VIEWS = ("contiguous", "flatten", "ravel", "reshape")
"""Operators that copy or make a view depending on the strides of their operand. The strides of a
preprocessing operator's output may differ from those observed."""
TRUSTED_PACKAGES = ("torch.nn.", "passes.")
"""Packages whose modules alias memory in the same way for all values of their inputs."""
_MAX_DISTANCE = 4
"""Largest number of nodes to a layer that tells which axis of a tensor holds the channels."""


@dataclass(frozen=True)
class Fact:
    """Observed facts of one node.

    Attributes:
        spec: Type of its value if that is a single tensor, else None.
        storages: Identities of the memory that its value occupies, or may occupy if the strides of
            its operands decide whether it is a view.
        writes: Identities of the memory that it wrote, in either mode.
        random: Whether it drew random numbers in training mode.
        bytes: Bytes of the tensors in its value.
    """

    spec: TensorSpec | None
    storages: frozenset[int]
    writes: frozenset[int]
    random: bool
    bytes: int


class _Observer(Interpreter):
    """Record one `Fact` per node; keep every value alive, so that no memory is used twice."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.facts: dict[fx.Node, Fact] = {}
        self.values: dict[fx.Node, Any] = {}
        self._random_state = _random_state()

    def run_node(self, n: fx.Node) -> Any:
        # Every tensor that the node reads, with the memory that it may occupy.
        reads = [
            (self.facts[source].storages, tensor)
            for source in n.all_input_nodes
            for tensor in tensors_in(self.env[source])
        ]
        if n.op == "call_module":
            owner = submodule(self.module, str(n.target))
            state = (*named_parameters(owner), *named_buffers(owner))
            reads += [(frozenset({memory_of(tensor)}), tensor) for _, tensor in state]
        versions = [tensor._version for _, tensor in reads]
        value = super().run_node(n)
        random_state = _random_state()
        random = not all(map(torch.equal, self._random_state, random_state))
        self._random_state = random_state
        written = [
            memory
            for (memory, tensor), version in zip(reads, versions, strict=True)
            if tensor._version != version
        ]
        tensors = tensors_in(value)
        storages = frozenset(map(memory_of, tensors))
        uncertain = self._may_be_view(n)
        shared = [memory for memory, _ in reads if uncertain or memory & storages]
        self.values[n] = value
        self.facts[n] = Fact(
            spec=None,
            storages=storages.union(*shared),
            writes=frozenset[int]().union(*written),
            random=random,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        )
        return value

    def _may_be_view(self, n: fx.Node) -> bool:
        """Whether strides or values decide if the result of a node shares memory with an input."""
        if n.op == "call_module":
            layer = submodule(self.module, str(n.target))
            # An opaque module may return its argument or a copy, depending on values.
            trusted = type(layer).__module__.startswith(TRUSTED_PACKAGES)
            return isinstance(layer, nn.Flatten) or not trusted
        name = getattr(n.target, "__name__", str(n.target))
        return name.partition(".")[0] in _MAYBE_VIEWS


def observe(program: Program) -> Mapping[fx.Node, Fact]:
    """Run a program and return the facts of every node.

    The program runs in evaluation mode and, if possible, in training mode, where layers update
    statistics and draw random numbers; memory counts as shared if it is in either mode. If the
    batch size is free, the program runs once more with another one, to find the batch axes.

    Raises:
        CaptureError: The rank of a tensor depends on the batch size.
    """
    inputs = bind(program.module, (), dict(program.args))
    evaluated = _observed(program, inputs, train=False)
    larger = None
    if "batch" in program.dynamic:
        larger = _shapes(program, inputs.varied(grow=True))
    trained = _run_training(program, inputs) or evaluated
    batch_size = _batch_size(inputs, evaluated)
    sequences = _sequence_axes(program, inputs, evaluated, batch_size)
    tracked = _tracked_axes(program, inputs, evaluated, batch_size)
    facts: dict[fx.Node, Fact] = {}
    for node, fact in trained.facts.items():
        value = evaluated.values[node]
        spec = None
        if isinstance(value, torch.Tensor):
            larger_shape = larger[node] if larger is not None else None
            spec = _spec(program, node, value, larger_shape, batch_size)
            if node in tracked:
                spec = replace(spec, batch_axis=_batch_axis(spec, tracked[node], batch_size or 1))
            if node in sequences:
                spec = replace(spec, channel_axis=_unmixed(spec, sequences[node]))
        facts[node] = Fact(
            spec=spec,
            storages=fact.storages | evaluated.facts[node].storages,
            writes=fact.writes | evaluated.facts[node].writes,
            random=fact.random,
            bytes=evaluated.facts[node].bytes,
        )
    return facts


class _ShapeRecorder(Interpreter):
    """Record the shape of every value that is a tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = value.shape
        return value


def _shapes(program: Program, inputs: ExampleInputs) -> Mapping[fx.Node, torch.Size]:
    """Run in evaluation mode and return the shapes of all tensors."""
    recorder = _ShapeRecorder(program.module)
    _run(program, inputs, recorder, train=False)
    return recorder.shapes


def _run_training(program: Program, inputs: ExampleInputs) -> _Observer | None:
    """Run in training mode, with one more sample if it fails: BatchNorm may refuse a batch of 1."""
    for candidate in (inputs, inputs.varied(grow="batch" in program.dynamic)):
        try:
            return _observed(program, candidate, train=True)
        except (RuntimeError, ValueError):
            continue
    return None


class _MixedError(Exception):
    """No value that is still needed can have a sequence axis."""


class _SequenceProbe(Interpreter):
    """Compare the values of a run on inputs that differ in later positions with those of another.

    Args:
        module: The program.
        expected: The values of the other run.
        size: Number of positions; the second half differs.

    Attributes:
        axes: The axis of every value whose first half alone is the same.
    """

    def __init__(self, module: fx.GraphModule, expected: Mapping[fx.Node, Any], size: int) -> None:
        super().__init__(module)
        self.expected = expected
        self.size = size
        self.axes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.dim() > 2 and is_compute(n):
            other = self.expected[n]
            axes = [axis for axis in range(value.dim()) if value.shape[axis] == self.size]
            for axis in axes if value.shape == other.shape else []:
                halves = (tensor.narrow(axis, 0, self.size // 2) for tensor in (value, other))
                if same_values(*halves) and not same_values(value, other):
                    self.axes[n] = axis
            if n not in self.axes and self._is_mixed(n, value, other):
                raise _MixedError
        return value

    def _is_mixed(self, n: fx.Node, value: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether the rest of the run depends on later positions through one mixed value alone.

        Most networks mix all positions in their first layer, and running the others takes seconds.
        """
        for axis, size in enumerate(value.shape):
            if size > 1 and same_values(*(t.narrow(axis, 0, size // 2) for t in (value, other))):
                return False
        last = self.user_to_last_uses.get(n, [])
        needed = [m for m in self.env if m not in last and m.op != "get_attr"]
        pairs = [(tensors_in(self.env[m]), tensors_in(self.expected[m])) for m in needed]
        return all(all(map(same_values, *pair)) for pair in pairs)


def _sequence_axes(
    program: Program, inputs: ExampleInputs, evaluated: _Observer, batch_size: int | None
) -> Mapping[fx.Node, int]:
    """Find the axis of every value along which it reads no later position of the inputs.

    A causal network is run once more on inputs of which the later half differs: what the earlier
    half of a value reads, an approximation of it may read.
    """
    axes: dict[fx.Node, int] = {}
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        for index, tensor in enumerate(inputs.tensors()):
            for axis, size in enumerate(tensor.shape if tensor.dim() > 1 else ()):
                if size < 2 or tensor.is_meta or (axis == 0 and size == batch_size):
                    continue
                probe = _SequenceProbe(program.module, evaluated.values, size)
                values = _change_later_half(inputs, index, axis)
                try:
                    probe.run(*(values[str(node.target)] for node in program.inputs))
                except (RuntimeError, ValueError, IndexError):
                    continue
                except _MixedError:
                    pass
                axes = probe.axes | axes
    return axes


_Tracks = list[tuple[bool, list[tuple[int, int]]]]
"""Whether an axis of an input counts samples, and what it became in a value, for each such axis."""


class _AxisProbe(Interpreter):
    """Find the axis of every value that an axis of an input becomes.

    Two runs differ in the later half of that axis; so does a value along what became of it, while
    its first half is the same. Axes of rows that hold several samples are tried as two axes, in
    both orders: `(0, 1)` is the inner one of `[4, 2]` in an axis 0 of eight rows.

    Args:
        module: The program.
        expected: The values of the other run.
        size: Size of the axis.

    Attributes:
        axes: Every such axis of every value, and whether it is the inner one of two.
    """

    def __init__(self, module: fx.GraphModule, expected: Mapping[fx.Node, Any], size: int) -> None:
        super().__init__(module)
        self.expected = expected
        self.size = size
        self.axes: dict[fx.Node, list[tuple[int, int]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value, other = super().run_node(n), self.expected[n]
        tensors = isinstance(value, torch.Tensor) and value.shape == other.shape
        if tensors and not same_values(value, other):
            self.axes[n] = [*self._axes(value, other)]
        return value

    def _axes(self, *values: torch.Tensor) -> Iterator[tuple[int, int]]:
        for axis, rows in enumerate(values[0].shape):
            count = rows // self.size
            for inner in ((0, 1) if count > 1 else (0,)) if rows == count * self.size else ():
                sizes = (count, self.size) if inner else (self.size, count)
                split = [v.reshape(*v.shape[:axis], *sizes, *v.shape[axis + 1 :]) for v in values]
                if same_values(*(v.narrow(axis + inner, 0, self.size // 2) for v in split)):
                    yield axis, inner


def _tracked_axes(
    program: Program, inputs: ExampleInputs, evaluated: _Observer, batch_size: int | None
) -> Mapping[fx.Node, _Tracks]:
    """Find what became of the axes of the inputs where the sizes alone cannot tell.

    They cannot if the batch is fixed and another axis has its size, or a value holds several rows
    for a sample: of `[T, B]` with T = B, or of the rows of windows, either axis may come first.

    Returns:
        For every value, the axes of the inputs that it has: whether one is the first axis of an
        input with this number of samples, and what it became.
    """
    if batch_size is None or batch_size < 2:
        return {}
    result: dict[fx.Node, _Tracks] = {}
    shapes = [value.shape for value in evaluated.values.values() if isinstance(value, torch.Tensor)]
    grouped = any(s and s[0] > batch_size and s[0] % batch_size == 0 for s in shapes)
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        fixed = "batch" not in program.dynamic
        for index, tensor in enumerate(inputs.tensors()):
            square = fixed and list(tensor.shape).count(batch_size) > 1
            if tensor.is_meta or not (square or grouped):
                continue
            for axis, size in enumerate(tensor.shape[: max(1, tensor.dim() - 1)]):
                if size < 2:
                    continue
                probe = _AxisProbe(program.module, evaluated.values, size)
                values = _change_later_half(inputs, index, axis)
                try:
                    probe.run(*(values[str(node.target)] for node in program.inputs))
                except (RuntimeError, ValueError, IndexError):
                    continue
                samples = axis == 0 and size == batch_size
                outer = [any(not inner for _, inner in found) for found in probe.axes.values()]
                for node, axes in probe.axes.items():
                    result.setdefault(node, []).append((samples, axes))
                if samples and not square and all(outer):
                    break  # no other axis can be in its place
    return result


def _batch_axis(spec: TensorSpec, tracked: _Tracks, batch_size: int) -> int | None:
    """Return the batch axis of a value of which it is known what the axes of the inputs became.

    None if the value has its samples where no layout looks for them: inside of rows, or not at all
    while its batch axis was another axis of an input.
    """
    axis = spec.batch_axis
    for samples, axes in tracked:
        if samples and axes and axis is not None:
            outer = [found for found, inner in axes if not inner]
            if axis not in outer:
                axis = outer[0] if outer else None
    for samples, axes in tracked:
        if not samples and [found for found, inner in axes if not inner] == [axis]:
            return None
    return axis


def _change_later_half(inputs: ExampleInputs, index: int, axis: int) -> Mapping[str, Any]:
    """Return copies of the inputs, one of which has other values in the later half of an axis."""
    values = [value.detach().clone() for value in inputs.tensors()]
    size = values[index].shape[axis]
    later = values[index].narrow(axis, size // 2, size - size // 2)
    changed = later.roll(1, axis if size > 3 else 0)
    later.copy_(scaled(changed) if changed.is_floating_point() else changed)
    _, kwargs = inputs.with_leaves(values)
    return kwargs


def _unmixed(spec: TensorSpec, sequence: int) -> int:
    """Return the channel axis of a value whose positions along an axis must not be mixed."""
    rank, axis = len(spec.shape), spec.channel_axis
    if axis == sequence:
        others = [other for other in range(rank) if other not in (sequence, spec.batch_axis)]
        axis = others[-1] if others else axis
    return axis - rank if axis == 1 else axis


def _observed(program: Program, inputs: ExampleInputs, *, train: bool) -> _Observer:
    observer = _Observer(program.module)
    _run(program, inputs, observer, train=train)
    return observer


def _run(program: Program, inputs: ExampleInputs, interpreter: Interpreter, *, train: bool) -> None:
    values = [tensor.detach().clone() for tensor in inputs.tensors()]
    _, kwargs = inputs.with_leaves(values)
    with preserved(program.module), torch.no_grad():
        set_mode(program.module, train)
        interpreter.run(*(kwargs[str(node.target)] for node in program.inputs))


def _batch_size(inputs: ExampleInputs, observer: _Observer) -> int | None:
    """Return the number of samples: that of the first output that counts as an input does.

    The first input may be a flat list of the tokens of all samples, whose offsets are another one.
    """
    sizes = [tensor.shape[0] for tensor in inputs.tensors() if tensor.dim()]
    (outputs,) = fx.node.map_arg(observer.graph.output_node().args, observer.values.__getitem__)
    counts = [tensor.shape[0] for tensor in tensors_in(outputs) if tensor.dim()]
    return next((count for count in counts if count in sizes), inputs.batch_size)


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def memory_of(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's memory; of a sparse one, that of its values."""
    if tensor.layout is not torch.strided:
        tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    return int(tensor.untyped_storage()._cdata)


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
