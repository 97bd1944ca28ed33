"""Shapes of every value that flows through a parareal network, and how they follow the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.errors import ExportError
from passes.ir.example_inputs import as_plain
from passes.ir.run_step import output_leaves
from pnn_compile.inputs import batch_size, resized

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["BATCH", "Observed", "Spec", "leaves", "observe"]

BATCH = "batch"
"""Name of the dimension that follows the number of samples."""

_SIZES = (3, 5)
"""Batch sizes that are compared; no exporter takes them for constants, as it may do with 1."""


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor.

    Attributes:
        shape: Sizes at the smaller of the two batch sizes that were observed.
        dtype: Type of its elements.
        dims: The sizes; text such as "batch" or "16*batch" where they follow the batch.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    @property
    def dynamic(self) -> tuple[int, ...]:
        """Axes that follow the batch."""
        return tuple(axis for axis, size in enumerate(self.dims) if isinstance(size, str))


@dataclass(frozen=True)
class Observed:
    """What flows through a network.

    Attributes:
        arguments: Arguments of each child of the network, tensors replaced by their `Spec`.
        values: Value of each node of each child that is a graph, tensors replaced by their `Spec`.
            Under "" stand the nodes of the network itself.
        outputs: The tensors that the network gives, in order, each with a readable name.
    """

    arguments: Mapping[str, tuple[Any, ...]]
    values: Mapping[str, Mapping[str, Any]]
    outputs: tuple[tuple[str, Spec], ...]


def observe(compiled: Compiled) -> Observed:
    """Run the network in the mode it is in, at two batch sizes where its batch is free.

    Raises:
        ExportError: A shape does not follow the batch in a straight line.
    """
    sizes = _SIZES if compiled.program.dynamic_batch else (batch_size(compiled.program.args),)
    runs = []
    for size in sizes:
        inputs = resized(compiled, size, compiled.program.device)
        recorder = _Recorder(compiled.module)
        with torch.no_grad():
            recorder.run(*(inputs[str(node.target)] for node in compiled.program.inputs))
        runs.append((recorder.arguments, recorder.values, tuple(recorder.outputs)))
    merged: Any = runs[0] if len(runs) == 1 else _merge(runs[0], runs[1])
    return Observed(*merged)


class _Recorder(fx.Interpreter):
    """Runs a network and keeps the types of what its children take and of what their nodes give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.values: dict[str, dict[str, Any]] = {"": {}}
        self.outputs: list[tuple[str, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and keep the types of what it gives."""
        value = super().run_node(n)
        if n.op == "output":
            self.outputs = _named(value)
        else:
            self.values[""][n.name] = _sketch(value)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a child, node by node where it is a graph."""
        child: nn.Module = self.fetch_attr(target)
        self.arguments[target] = tuple(_sketch(list(args)))
        if not isinstance(child, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        inner = _Values(child)
        result = inner.run(*args)
        self.values[target] = inner.values
        return result


class _Values(fx.Interpreter):
    """Runs a graph and keeps the types of all its values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        self.values[n.name] = _sketch(value) if n.op != "output" else None
        return value


def _named(output: Any) -> list[tuple[str, Any]]:
    """Types of the tensors of an output, under the keys that they have in it."""
    found, _ = pytree.tree_flatten_with_path(output)
    if all(isinstance(leaf, torch.Tensor) or as_plain(leaf) is leaf for _, leaf in found):
        pairs = [(path, leaf) for path, leaf in found if isinstance(leaf, torch.Tensor)]
    else:
        tensors = [leaf for leaf in output_leaves(output) if isinstance(leaf, torch.Tensor)]
        pairs = [((pytree.SequenceKey(index),), leaf) for index, leaf in enumerate(tensors)]
    return [(_path_name(path), _sketch(leaf)) for path, leaf in pairs]


def _path_name(path: tuple[Any, ...]) -> str:
    words = [_word(key) for key in path]
    if not words or words[0].isdigit():
        words.insert(0, "output")
    return ".".join(words)


def leaves(value: Any) -> list[Any]:
    """Leaves of nested containers, an empty spec being one leaf."""
    return pytree.tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, Spec))


def _word(key: Any) -> str:
    """The name or number that an entry has in its container."""
    found = (getattr(key, attribute, None) for attribute in ("key", "idx", "name"))
    return str(next((word for word in found if word is not None), key))


def _sketch(value: Any) -> Any:
    def sketch(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return Spec(tuple(leaf.shape), leaf.dtype, tuple(leaf.shape))
        return leaf

    return pytree.tree_map(sketch, value)


def _merge(first: Any, second: Any) -> Any:
    """Put two sketches of the same structure together; what differs between them is dynamic."""
    ours, structure = pytree.tree_flatten(first, is_leaf=lambda leaf: isinstance(leaf, Spec))
    theirs = leaves(second)
    if len(ours) != len(theirs):
        raise ExportError(
            f"the structure of what flows through the network changes with the batch size "
            f"({len(ours)} values at {_SIZES[0]}, {len(theirs)} at {_SIZES[1]}): compile it with "
            "dynamic_batch=False"
        )
    merged = [_merge_leaf(a, b) for a, b in zip(ours, theirs, strict=True)]
    return pytree.tree_unflatten(merged, structure)


def _merge_leaf(first: Any, second: Any) -> Any:
    if not isinstance(first, Spec) or not isinstance(second, Spec):
        return first
    sizes = zip(first.shape, second.shape, strict=True)
    return Spec(first.shape, first.dtype, tuple(_dimension(*pair) for pair in sizes))


def _dimension(first: int, second: int) -> int | str:
    """Write a size as a straight line over the batch size."""
    if first == second:
        return first
    slope, rest = divmod(second - first, _SIZES[1] - _SIZES[0])
    if rest:
        raise ExportError(
            f"a size does not follow the batch ({first} at batch {_SIZES[0]}, {second} at batch "
            f"{_SIZES[1]}): compile the model with dynamic_batch=False to export it"
        )
    offset = first - slope * _SIZES[0]
    term = BATCH if slope == 1 else f"{slope}*{BATCH}"
    return term if not offset else f"{term} + {offset}" if offset > 0 else f"{term} - {-offset}"
