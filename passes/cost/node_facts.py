"""Run a program and record facts that static analysis cannot tell: shapes, aliases, writes, work.

No cut may separate nodes that share memory which one of them writes (`passes.ir.observer`). What
the runs of capture showed of the same graph is not looked for again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from passes.cost.flops import WorkMode, is_recurrent, plain_attention, plain_recurrence
from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs, bind, scaled
from passes.ir.isolation import preserved, same_values
from passes.ir.module_walk import set_mode, submodule
from passes.ir.observer import Fact, Observations, Observer, Own, ShapeRecorder, Work
from passes.ir.program import Interpreter, Program, is_compute, provenance, tensors_in
from passes.ir.tensor_spec import TensorSpec

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
)  # fmt: skip
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
_MAX_DISTANCE = 4
"""Largest number of nodes to a layer that tells which axis of a tensor holds the channels."""


class _Interpreter(Interpreter):
    """Run recurrent layers by plain operators, as the observed run does: values are compared."""

    def run_node(self, n: fx.Node) -> Any:
        with plain_recurrence() if is_recurrent(self.module, n) else nullcontext():
            return super().run_node(n)


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
        found, unaligned = _sequence_axes(program, inputs, observer, batch_size)
        sequences = {n: axis for causal in reversed(found) for n, axis in causal.axes.items()}
        tracked = _tracked_axes(program, inputs, observer, batch_size)
    facts: dict[fx.Node, Fact] = {}
    for node, fact in evaluated.items():
        value = observer.values[node]
        spec = None
        if isinstance(value, torch.Tensor):
            larger_shape = larger[node] if larger is not None else None
            spec = _spec(program, node, value, larger_shape, batch_size)
            if node in tracked:
                spec = replace(spec, batch_axis=_batch_axis(spec, tracked[node]))
            if node in sequences:
                spec = replace(spec, channel_axis=_unmixed(spec, sequences[node]))
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
            hidden = _hidden_positions(program, inputs, observer.values, specs, found)
        facts |= {node: replace(facts[node], hides=hides) for node, hides in hidden.items()}
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


class _MixedError(Exception):
    """No value that is still needed can have a sequence axis."""


class _SequenceProbe(_Interpreter):
    """Compare the values of a run on inputs that differ in later positions with those of another.

    Args:
        module: The program.
        expected: The values of the other run.
        size: Number of positions; the second half differs.

    Attributes:
        axes: The axis of every value whose first half alone is the same.
        others: Values that differ and have no such axis, nor rows along one.
    """

    def __init__(self, module: fx.GraphModule, expected: Mapping[fx.Node, Any], size: int) -> None:
        super().__init__(module)
        self.expected = expected
        self.size = size
        self.axes: dict[fx.Node, int] = {}
        self.others: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value, other = super().run_node(n), self.expected[n]
        if not isinstance(value, torch.Tensor) or not is_compute(n):
            return value
        if value.shape == other.shape and not same_values(value, other):
            found = dict(_axes_of_size(self.size, value, other))
            whole = [axis for axis in found if value.shape[axis] == self.size]
            if value.dim() > 2 and whole:
                self.axes[n] = whole[-1]
            elif not found:
                self.others.add(n)
        if value.dim() > 2 and n not in self.axes and self._is_mixed(n, value, other):
            raise _MixedError
        return value

    def _is_mixed(self, n: fx.Node, value: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether the rest of the run depends on later positions through one mixed value alone.

        Most networks mix all positions in their first layer, and running the others takes seconds.
        """
        for axis, size in enumerate(value.shape):
            half = min(size, self.size) // 2  # a padded sequence is longer
            if size > 1 and same_values(*(t.narrow(axis, 0, half) for t in (value, other))):
                return False
        last = self.user_to_last_uses.get(n, [])
        needed = [m for m in self.env if m not in last and m.op != "get_attr"]
        pairs = [(tensors_in(self.env[m]), tensors_in(self.expected[m])) for m in needed]
        return all(all(map(same_values, *pair)) for pair in pairs)


def _axes_of_size(size: int, *values: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Find the axes of this size along which two values have the same first half.

    Returns:
        The axes; an axis of rows is tried as two axes, of which the inner one (1) or the outer one
        (0) has this size.
    """
    for axis, rows in enumerate(values[0].shape):
        count = rows // size
        for inner in ((0, 1) if count > 1 else (0,)) if rows == count * size else ():
            sizes = (count, size) if inner else (size, count)
            split = [v.reshape(*v.shape[:axis], *sizes, *v.shape[axis + 1 :]) for v in values]
            if same_values(*(v.narrow(axis + inner, 0, size // 2) for v in split)):
                yield axis, inner


class _Causal(NamedTuple):
    """An axis of an input, and the axes of values along which they read no later position of it."""

    number: int
    axis: int
    axes: Mapping[fx.Node, int]


def _sequence_axes(
    program: Program, inputs: ExampleInputs, evaluated: _WorkObserver, batch_size: int | None
) -> tuple[list[_Causal], set[fx.Node]]:
    """Find the axis of every value along which it reads no later position of the inputs.

    A causal network is run once more on inputs of which the later half differs: what the earlier
    half of a value reads, an approximation of it may read.

    Returns:
        The axes by input, the first one that has any first. And the values without one from which a
        value with one is computed, such as a padded sequence: an approximation cannot tell which of
        its positions come later.
    """
    found: list[_Causal] = []
    unaligned: set[fx.Node] = set()
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        for index, tensor in enumerate(inputs.tensors()):
            for axis, size in enumerate(tensor.shape if tensor.dim() > 1 else ()):
                if size < 2 or tensor.is_meta or (axis == 0 and size == batch_size):
                    continue
                probe = _SequenceProbe(program.module, evaluated.values, size)
                values = _change_later_half(inputs, index, axis)
                try:
                    probe.run_by_name(values)
                except (RuntimeError, ValueError, IndexError):
                    continue
                except _MixedError:
                    pass
                if probe.axes:
                    found.append(_Causal(index, axis, probe.axes))
                in_order = {source for node in probe.axes for source in node.all_input_nodes}
                for node in reversed(program.order):
                    if node in probe.others & in_order:
                        unaligned.add(node)
                        in_order.update(node.all_input_nodes)
    return found, unaligned.difference(*(causal.axes for causal in found))


class _PositionProbe(_Interpreter):
    """Compare the values of a run on inputs that differ in one position with those of another.

    Args:
        module: The program.
        expected: The values of the other run.
        places: The same position in values.

    Attributes:
        plain: Inputs that differ, and values that follow from them by functions alone.
        hidden: Values that differ, and not in that position.
    """

    def __init__(
        self, module: fx.GraphModule, expected: Mapping[fx.Node, Any], places: Mapping[fx.Node, Any]
    ) -> None:
        super().__init__(module)
        self.expected = expected
        self.places = places
        self.plain: set[fx.Node] = set()
        self.hidden: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value, other = super().run_node(n), self.expected[n]
        if isinstance(value, torch.Tensor) and not same_values(value, other):
            if n.op != "call_module" and self.plain.issuperset(n.all_input_nodes):
                self.plain.add(n)
            if n in self.places and same_values(*(v[self.places[n]] for v in (value, other))):
                self.hidden.add(n)
        return value


def _hidden_positions(
    program: Program,
    inputs: ExampleInputs,
    values: Mapping[fx.Node, Any],
    specs: Mapping[fx.Node, TensorSpec],
    found: Sequence[_Causal],
) -> Mapping[fx.Node, frozenset[Own]]:
    """Find the values that depend on earlier positions of an input, and not on their own.

    A causal network is run once more on inputs that differ in one position, and once on inputs that
    differ in a row of them.
    """
    hidden: dict[fx.Node, frozenset[Own]] = {}
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        for number, axis, axes in found:
            tensor = inputs.tensors()[number]
            read = (n for n in specs if n not in axes and same_values(values[n], tensor))
            if (node := next(read, None)) is None:
                continue
            others = _other_sizes(specs[node], axis)
            for row in (None, axis) if others else (None,):
                sizes = others if row is None else {}
                tensors = [value.detach().clone() for value in inputs.tensors()]
                position = tensors[number][_middle(specs[node], axis, sizes)]
                position.copy_(_replaced(position, tensor))
                places = {n: _middle(specs[n], axes[n], sizes) for n in axes}
                probe = _PositionProbe(program.module, values, places)
                try:
                    probe.run_by_name(inputs.with_leaves(tensors)[1])
                except (RuntimeError, ValueError, IndexError):
                    continue
                for n in probe.hidden:
                    own = (Own(leaf, row) for leaf in probe.plain)
                    hidden[n] = hidden.get(n, frozenset()).union(own)
    return hidden


def _other_sizes(spec: TensorSpec, axis: int) -> dict[int, int]:
    """Return the sizes of the axes of positions, beside one of them."""
    used = (axis, spec.batch_axis, spec.channel_axis % len(spec.shape))
    return {other: size for other, size in enumerate(spec.shape) if other not in used}


def _middle(spec: TensorSpec, axis: int, others: Mapping[int, int]) -> tuple[slice, ...]:
    """Return the place of the middle position along an axis, and along others of these sizes."""
    sizes = {axis: spec.shape[axis]}
    if [*_other_sizes(spec, axis).values()] == [*others.values()]:
        sizes |= _other_sizes(spec, axis)
    middle = {other: slice(size // 2, size // 2 + 1) for other, size in sizes.items()}
    return tuple(middle.get(other, slice(None)) for other in range(len(spec.shape)))


def _replaced(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return other values for a part of a tensor: for integers, others of the tensor."""
    if part.is_floating_point() or part.is_complex():
        return scaled(part)
    known = torch.unique(whole.long())
    following = torch.searchsorted(known, part.long().contiguous()) + 1
    other: torch.Tensor = known[following % len(known)]
    return other.to(part.dtype)


_Tracks = list[tuple[bool, list[tuple[int, int]]]]
"""Whether an axis of an input counts samples, and what it became in a value, for each such axis."""


class _AxisProbe(_Interpreter):
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
            self.axes[n] = [*_axes_of_size(self.size, value, other)]
        return value


def _tracked_axes(
    program: Program, inputs: ExampleInputs, evaluated: _WorkObserver, batch_size: int | None
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
                    probe.run_by_name(values)
                except (RuntimeError, ValueError, IndexError):
                    continue
                samples = axis == 0 and size == batch_size
                outer = [any(not inner for _, inner in found) for found in probe.axes.values()]
                for node, axes in probe.axes.items():
                    result.setdefault(node, []).append((samples, axes))
                if samples and not square and all(outer):
                    break  # no other axis can be in its place
    return result


def _batch_axis(spec: TensorSpec, tracked: _Tracks) -> int | None:
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
