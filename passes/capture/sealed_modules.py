"""Modules that stay whole in an exported graph: one operator each, which becomes their call.

torch.export runs the Python code of every module with tensors that have no values. A module whose
code asks for a value is sealed: in its place an operator is recorded that has no code, and whose
results have the shapes that the module was seen to give on two inputs. The operator becomes a call
of the module again in the graph. Nothing is believed here: the graph is validated as any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.errors import CaptureError
from passes.ir.example_inputs import Arguments, Field
from passes.ir.isolation import masks_kept, preserved
from passes.ir.program import Provenance, set_provenance

__all__ = ["OPERATOR", "Seals", "seal"]

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
"""What an argument of a sealed module may be besides a tensor: the graph holds it as it is."""


@torch.library.custom_op("pnn_compile::sealed", mutates_args=())
def _sealed(tensors: Sequence[torch.Tensor], sizes: Sequence[int], key: int) -> list[torch.Tensor]:
    """Stand for a call of a module; never run."""
    raise RuntimeError("a sealed call stands for a module in an exported graph and is never run")


OPERATOR: Any = torch.ops.pnn_compile.sealed.default
_calls: dict[int, Call] = {}
"""The calls of the export that is under way, by the number in the graph."""


@_sealed.register_fake
def _shapes(tensors: Sequence[torch.Tensor], sizes: Sequence[int], key: int) -> list[torch.Tensor]:
    return _calls[key].imagine(tensors)


@dataclass(frozen=True)
class _Seen:
    """Shapes of one call of a module: of the tensors it was given and of those it gave."""

    given: list[torch.Size]
    gave: list[torch.Tensor]
    output: Any


@dataclass
class Call:
    """One call of a sealed module.

    Attributes:
        path: Qualified name of the module.
        seen: The call on the example inputs, and on others with one more sample.
        arguments: Its flat arguments, with the place of each tensor and symbolic size among those.
        structure: How the arguments are nested.
    """

    path: str
    seen: tuple[_Seen, _Seen]
    arguments: list[Any] = field(default_factory=list)
    structure: pytree.TreeSpec | None = None

    def imagine(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Make results without values, whose sizes follow those of `tensors`."""
        first, other = self.seen
        results = []
        for small, large in zip(first.gave, other.gave, strict=True):
            sizes = [
                a if a == b else self._following(a, b, tensors)
                for a, b in zip(small.shape, large.shape, strict=True)
            ]
            results.append(torch.empty(sizes, dtype=small.dtype, device=small.device))
        return results

    def _following(self, small: int, large: int, tensors: Sequence[torch.Tensor]) -> Any:
        """A size that is a linear function of a size that the tensors have."""
        first, other = self.seen
        for tensor, a, b in zip(tensors, first.given, other.given, strict=True):
            for size, i, j in zip(tensor.shape, a, b, strict=True):
                if i != j and (large - small) % (j - i) == 0:
                    step = (large - small) // (j - i)
                    return small - step * i + step * size
        raise CaptureError(f"a size that {self.path} gives follows none that it is given")

    def read(self, graph: fx.Graph, values: Mapping[type, Sequence[Any]]) -> list[Any]:
        """Put the call of the module into a graph; give its tensors.

        Args:
            graph: The graph.
            values: The tensors and symbolic sizes of the call, by the class of their places.
        """
        assert self.structure is not None
        flat = [
            place.read(graph, values[type(place)]) if isinstance(place, _Place) else place
            for place in self.arguments
        ]
        args, kwargs = pytree.tree_unflatten(flat, self.structure)
        call = graph.call_module(self.path, args, kwargs)
        set_provenance(call, Provenance(self.path))
        return [self._at(graph, call, path) for path in _tensor_paths(self.seen[0].output)]

    def _at(self, graph: fx.Graph, value: fx.Node, path: pytree.KeyPath) -> fx.Node:
        for entry in path:
            if isinstance(entry, pytree.SequenceKey):
                value = graph.call_function(operator.getitem, (value, entry.idx))
            elif isinstance(entry, pytree.MappingKey):
                value = graph.call_function(operator.getitem, (value, entry.key))
            else:
                name = cast("pytree.GetAttrKey", entry).name
                value = graph.call_function(getattr, (value, Field(name)))
            set_provenance(value, Provenance(self.path))
        return value


@dataclass(frozen=True)
class _Place:
    """Where an argument is among those of its class."""

    number: int

    def read(self, graph: fx.Graph, values: Sequence[Any]) -> Any:
        """The value of the graph that is given to the module."""
        return values[self.number]


class _Tensor(_Place):
    """A tensor."""


class _Size(_Place):
    """A number that is not known before the model runs."""


class _Flag(_Size):
    """A truth value that is not known before the model runs; the operator has it as 0 or 1."""

    def read(self, graph: fx.Graph, values: Sequence[Any]) -> Any:
        """The truth value."""
        return graph.call_function(bool, (super().read(graph, values),))


def _tensor_paths(output: Any) -> list[pytree.KeyPath]:
    leaves, _ = pytree.tree_flatten_with_path(output)
    return [path for path, leaf in leaves if isinstance(leaf, torch.Tensor)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Seals:
    """The calls of the sealed modules of one export."""

    def __init__(self, calls: Mapping[int, Call]) -> None:
        self._calls = calls

    def read(self, graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Put the module call that an operator stands for into a graph; give its tensors."""
        tensors, sizes, key = cast("tuple[Sequence[Any], Sequence[Any], int]", node.args)
        given = fx.node.map_arg((list(tensors), list(sizes)), values.__getitem__)
        return tuple(
            self._calls[key].read(graph, {_Tensor: given[0], _Size: given[1], _Flag: given[1]})
        )


@contextmanager
def seal(
    model: nn.Module, arguments: Arguments, kinds: Collection[type[nn.Module]]
) -> Iterator[Seals]:
    """Seal the modules of some classes while a model is exported.

    Args:
        model: The model, in the mode in which it is exported.
        arguments: Its example inputs.
        kinds: The classes.

    Raises:
        CaptureError: A sealed module takes or gives what no graph can hold.
    """
    paths = [path for path, module in model.named_modules() if path and type(module) in kinds]
    first = _watch(model, paths, arguments)
    try:
        other = _watch(model, paths, arguments.varied(grow=True))
    except Exception:  # the model takes no other batch size
        other = first
    calls: dict[int, Call] = {}
    with ExitStack() as stack:
        for path in paths:
            pairs = list(zip(first[path], other[path], strict=True))
            module = model.get_submodule(path)
            module.forward = _recorder(path, pairs, calls)
            stack.callback(delattr, module, "forward")
        stack.callback(_calls.clear)
        yield Seals(calls)


def _watch(
    model: nn.Module, paths: Sequence[str], arguments: Arguments
) -> Mapping[str, list[_Seen]]:
    """Run the model and note the shapes of every call of some modules."""
    seen: dict[str, list[_Seen]] = {path: [] for path in paths}

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [tensor.shape for tensor in _tensors((args, kwargs))]
            seen[path].append(_Seen(given, _tensors(output), output))

        return note

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(preserved(model))
        stack.enter_context(masks_kept())
        stack.enter_context(torch.no_grad())
        values = [tensor.detach().clone() for tensor in arguments.tensors()]
        args, kwargs = arguments.with_leaves(values)
        model(*args, **kwargs)
    return seen


def _recorder(
    path: str, pairs: Sequence[tuple[_Seen, _Seen]], calls: dict[int, Call]
) -> Callable[..., Any]:
    """What stands in the place of a forward: the operator, and the structure of the output."""
    count = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        flat, structure = pytree.tree_flatten((args, kwargs))
        tensors: list[torch.Tensor] = []
        sizes: list[Any] = []
        places = [_place(path, leaf, tensors, sizes) for leaf in flat]
        if not tensors:
            raise CaptureError(f"{path} is called without a tensor")
        key = len(_calls)
        calls[key] = _calls[key] = Call(path, pairs[count % len(pairs)], places, structure)
        count += 1
        results = iter(OPERATOR(tensors, sizes, key))

        def replace(leaf: Any) -> Any:
            return next(results) if isinstance(leaf, torch.Tensor) else leaf

        return pytree.tree_map(replace, calls[key].seen[0].output)

    return forward


def _place(path: str, leaf: Any, tensors: list[torch.Tensor], sizes: list[Any]) -> Any:
    """Put an argument where it belongs, and give its place; what is known is its own place."""
    if isinstance(leaf, torch.Tensor):
        tensors.append(leaf)
        return _Tensor(len(tensors) - 1)
    if isinstance(leaf, torch.SymInt):
        sizes.append(leaf)
        return _Size(len(sizes) - 1)
    if isinstance(leaf, torch.SymBool):
        sizes.append(torch.sym_ite(leaf, 1, 0))  # type: ignore[no-untyped-call]
        return _Flag(len(sizes) - 1)
    if isinstance(leaf, _PLAIN):
        return leaf
    raise CaptureError(f"{path} is called with a {type(leaf).__name__}, which no graph can hold")
