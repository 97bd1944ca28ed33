"""Find what becomes of the axes of the inputs, by runs on inputs that differ along one of them.

- `sequence_axes`: axes along which a causal network reads no later position.
- `hidden_positions`, `rearranged`: causal values that are shifted, or in another order.
- `tracked_axes`: axes that count samples where the sizes alone cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import fx

from passes.cost.flops import is_recurrent, plain_recurrence
from passes.ir.example_inputs import ExampleInputs, scaled
from passes.ir.isolation import preserved, same_values
from passes.ir.observer import Own
from passes.ir.program import Interpreter, Program, is_compute, tensors_in
from passes.ir.tensor_spec import TensorSpec

_ROUNDING = 1e-5
"""Largest difference, beside the largest value, that is rounding of a Fourier transform."""


class _Probe(Interpreter):
    """Run a program on other inputs, to compare its values with those of an earlier run.

    Recurrent layers run by plain operators, as they did in that run. Fourier transforms spread the
    rounding of every value to all others: what differs by that alone is set back.

    Args:
        module: The program.
        expected: The values of the other run.
    """

    def __init__(self, module: fx.GraphModule, expected: Mapping[fx.Node, Any]) -> None:
        super().__init__(module)
        self.expected = expected

    def run_node(self, n: fx.Node) -> Any:
        with plain_recurrence() if is_recurrent(self.module, n) else nullcontext():
            value = super().run_node(n)
        if n.op != "call_function" or "fft" not in str(n.target) or n not in self.expected:
            return value
        other: torch.Tensor = self.expected[n]
        if not isinstance(value, torch.Tensor) or value.shape != other.shape:
            return value
        return torch.where((value - other).abs() <= _ROUNDING * other.abs().max(), other, value)


class _MixedError(Exception):
    """No value that is still needed can have a sequence axis."""


class _SequenceProbe(_Probe):
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
        super().__init__(module, expected)
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
        if value.is_complex():  # frequencies mix all positions, until the inverse transform
            return False
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


class Causal(NamedTuple):
    """An axis of an input, and the axes of values along which they read no later position of it.

    Attributes:
        number: Number of the input.
        value: What it is in the program; None if that writes to it.
        axis: Its axis.
        axes: The axes of values.
    """

    number: int
    value: fx.Node | None
    axis: int
    axes: Mapping[fx.Node, int]


def sequence_axes(
    program: Program,
    inputs: ExampleInputs,
    evaluated: Mapping[fx.Node, Any],
    batch_size: int | None,
) -> tuple[list[Causal], set[fx.Node]]:
    """Find the axis of every value along which it reads no later position of the inputs.

    A causal network is run once more on inputs of which the later half differs: what the earlier
    half of a value reads, an approximation of it may read.

    Returns:
        The axes by input, the first one that has any first. And the values without one from which a
        value with one is computed, such as a padded sequence: an approximation cannot tell which of
        its positions come later.
    """
    found: list[Causal] = []
    unaligned: set[fx.Node] = set()
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        for index, tensor in enumerate(inputs.tensors()):
            for axis, size in enumerate(tensor.shape if tensor.dim() > 1 else ()):
                if size < 2 or tensor.is_meta or (axis == 0 and size == batch_size):
                    continue
                probe = _SequenceProbe(program.module, evaluated, size)
                values = _change_later_half(inputs, index, axis)
                try:
                    probe.run_by_name(values)
                except (RuntimeError, ValueError, IndexError):
                    continue
                except _MixedError:
                    pass
                if probe.axes:
                    value = _equal(tensor, evaluated)
                    found.append(Causal(index, value, axis, probe.axes))
                in_order = {source for node in probe.axes for source in node.all_input_nodes}
                for node in reversed(program.order):
                    if node in probe.others & in_order:
                        unaligned.add(node)
                        in_order.update(node.all_input_nodes)
    return found, unaligned.difference(*(causal.axes for causal in found))


def _equal(tensor: torch.Tensor, values: Mapping[fx.Node, Any]) -> fx.Node | None:
    """Return the first value that equals a tensor."""
    tensors = ((node, value) for node, value in values.items() if isinstance(value, torch.Tensor))
    return next((node for node, value in tensors if same_values(value, tensor)), None)


def rearranged(specs: Mapping[fx.Node, TensorSpec], found: Sequence[Causal]) -> set[fx.Node]:
    """Find the causal values whose positions what resizes the input to them would mix.

    Heads of attention `[B, 2, T, 8]` have all positions of one head in front of those of the next.
    """
    result: set[fx.Node] = set()
    for _, value, start, axes in found:
        if value is None:
            continue
        first = _positions(specs[value], start)
        for node, axis in axes.items():
            second = _positions(specs[node], axis)
            result |= set() if _in_order(first, second) else {node}
    return result


def _positions(spec: TensorSpec, axis: int) -> tuple[int, list[int]]:
    """Return which of the axes of positions is a given axis, and the sizes of all."""
    sizes = {axis: spec.shape[axis]} | _other_sizes(spec, axis)
    return sorted(sizes).index(axis), [sizes[other] for other in sorted(sizes)]


def _in_order(first: tuple[int, list[int]], second: tuple[int, list[int]]) -> bool:
    """Whether positions along an axis stay apart when all are resized, as flat rows if need be."""
    (index, sizes), (other_index, others) = first, second
    if len(sizes) == len(others):
        return index == other_index
    rows = [math.prod(sizes[index + 1 :]), math.prod(others[other_index + 1 :])]
    return index == other_index == 0 and max(rows) % min(rows) == 0


class _PositionProbe(_Probe):
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
        super().__init__(module, expected)
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


def hidden_positions(
    program: Program,
    inputs: ExampleInputs,
    values: Mapping[fx.Node, Any],
    specs: Mapping[fx.Node, TensorSpec],
    found: Sequence[Causal],
) -> Mapping[fx.Node, frozenset[Own]]:
    """Find the values that depend on earlier positions of an input, and not on their own.

    A causal network is run once more on inputs that differ in one position, and once on inputs that
    differ in a row of them.
    """
    hidden: dict[fx.Node, frozenset[Own]] = {}
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        for number, value, axis, axes in found:
            if value is None:
                continue
            tensor = inputs.tensors()[number]
            others = _other_sizes(specs[value], axis)
            for row in (None, axis) if others else (None,):
                sizes = others if row is None else {}
                tensors = [leaf.detach().clone() for leaf in inputs.tensors()]
                position = tensors[number][_middle(specs[value], axis, sizes)]
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
    """Return other values for a part of a tensor: for integers, others of the tensor if it has any.

    Equal integers, as in an example of zeros, get their neighbor towards zero: every table has it.
    """
    if part.is_floating_point() or part.is_complex():
        return scaled(part)
    known = torch.unique(whole.long())
    if len(known) == 1:
        return torch.where(part > 0, part.long() - 1, part.long() + 1).to(part.dtype)
    following = torch.searchsorted(known, part.long().contiguous()) + 1
    other: torch.Tensor = known[following % len(known)]
    return other.to(part.dtype)


Tracks = list[tuple[bool, list[tuple[int, int]]]]
"""Whether an axis of an input counts samples, and what it became in a value, for each such axis."""


class _AxisProbe(_Probe):
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
        super().__init__(module, expected)
        self.size = size
        self.axes: dict[fx.Node, list[tuple[int, int]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value, other = super().run_node(n), self.expected[n]
        tensors = isinstance(value, torch.Tensor) and value.shape == other.shape
        if tensors and not same_values(value, other):
            self.axes[n] = [*_axes_of_size(self.size, value, other)]
        return value


def tracked_axes(
    program: Program,
    inputs: ExampleInputs,
    evaluated: Mapping[fx.Node, Any],
    batch_size: int | None,
) -> Mapping[fx.Node, Tracks]:
    """Find what became of the axes of the inputs where the sizes alone cannot tell.

    They cannot if the batch is fixed and another axis has its size, or a value holds several rows
    for a sample: of `[T, B]` with T = B, or of the rows of windows, either axis may come first.

    Returns:
        For every value, the axes of the inputs that it has: whether one is the first axis of an
        input with this number of samples, and what it became.
    """
    if batch_size is None or batch_size < 2:
        return {}
    result: dict[fx.Node, Tracks] = {}
    shapes = [value.shape for value in evaluated.values() if isinstance(value, torch.Tensor)]
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
                probe = _AxisProbe(program.module, evaluated, size)
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


def tracked_batch_axis(spec: TensorSpec, tracked: Tracks) -> int | None:
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
    later.copy_(
        _replaced(later.roll(1, axis) if later.is_floating_point() else later, values[index])
    )
    _, kwargs = inputs.with_leaves(values)
    return kwargs


def unmixed(spec: TensorSpec, sequence: int) -> int:
    """Return the channel axis of a value whose positions along an axis must not be mixed."""
    rank, axis = len(spec.shape), spec.channel_axis
    if axis == sequence:
        others = [other for other in range(rank) if other not in (sequence, spec.batch_axis)]
        axis = others[-1] if others else axis
    return axis - rank if axis == 1 else axis
