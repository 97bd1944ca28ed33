"""Example inputs of a model: bind them to its signature, flatten them, vary them for validation.

>>> class Model(nn.Module):
...     def forward(self, x, batch, scale=1.0): ...
>>> inputs = bind(Model(), (torch.zeros(3, 4), {"mask": torch.ones(3)}), {"scale": 2.0})
>>> [(leaf.argument, leaf.path) for leaf in inputs.leaves]
[('x', ()), ('batch', ('mask',))]
>>> placeholder_names(inputs), inputs.constants(), inputs.batch_size
(['x', 'batch'], {'scale': 2.0}, 3)
>>> [tuple(tensor.shape) for tensor in inputs.varied(grow=True).tensors()]
[(4, 4), (4,)]
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import CaptureError, OptionError
from passes.ir.module_walk import named_tensors
from passes.ir.program import DIMENSIONS, sequence_length, storage_id


class AttributeKey(str):
    """Key of a nested argument that is read as an attribute: a field of a dataclass."""

    __slots__ = ()


@dataclass(frozen=True)
class Leaf:
    """One tensor of the example inputs.

    Attributes:
        argument: Name of the argument of forward that holds the tensor.
        path: Keys and indices that lead to it inside a nested argument; empty for a plain tensor.
        value: The tensor.
    """

    argument: str
    path: tuple[Any, ...]
    value: torch.Tensor


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of the example call `model(*args, **kwargs)`.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        names: Name of each positional argument in the signature.
        leaves: Every tensor in the arguments, in order.
        dynamic: Dimensions that are to be free: "batch", dimension 0 of every tensor that has as
            many elements there as the first; "sequence", all others of length `sequence`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    dynamic: tuple[str, ...] = ("batch",)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the call, in order."""
        return [leaf.value for leaf in self.leaves]

    def with_leaves(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with other values in place of the tensors.

        Args:
            values: One value for each of `leaves`, tensors or not.
        """
        remaining = iter(values)

        def replace(value: Any) -> Any:
            return next(remaining) if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(replace, (tuple(self.args), dict(self.kwargs)))
        return args, kwargs

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with copies of the tensors, as a model may write into these."""
        return self.with_leaves([tensor.detach().clone() for tensor in self.tensors()])

    def tensor_arguments(self) -> dict[str, Any]:
        """Return the arguments that hold tensors, by name: the inputs of the captured graph."""
        holders = set(placeholder_names(self))
        return {name: value for name, value in self._named().items() if name in holders}

    def fixed_arguments(self) -> dict[str, Any]:
        """Return the arguments without a tensor, by name; the captured graph does not take them."""
        holders = set(placeholder_names(self))
        return {name: value for name, value in self._named().items() if name not in holders}

    def _named(self) -> dict[str, Any]:
        return dict(zip(self.names, self.args, strict=True)) | dict(self.kwargs)

    def constants(self) -> dict[str, Any]:
        """Return all values but tensors, by name (`batch['scale']`): the graph fixes them."""
        constants = self.fixed_arguments()
        for name, value in self.tensor_arguments().items():
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if not isinstance(leaf, torch.Tensor):
                    constants[f"{name}{pytree.keystr(path)}"] = leaf
        return constants

    @property
    def batch_size(self) -> int | None:
        """Size of dimension 0 of the first tensor that has dimensions; None if there is none."""
        return next((leaf.value.shape[0] for leaf in self.leaves if leaf.value.dim()), None)

    @property
    def sequence(self) -> int | None:
        """Size of dimension 1 of the first tensor that has one, if it is to be free; else None."""
        return sequence_length(self.tensors()) if "sequence" in self.dynamic else None

    def varied(self, grow: bool) -> ExampleInputs:
        """Return another call of the same kind: other values, and one more sample if `grow`.

        Values are permuted along dimension 0 and the last dimension, so that they stay legal
        (token ids stay inside the vocabulary).

        Args:
            grow: Whether to add a sample to every tensor whose dimension 0 has the batch size; the
                other tensors keep their shape.
        """
        size = self.batch_size

        def vary(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or tensor.shape[0] != size:
                return tensor.clone()
            rolled = tensor.detach().roll(1, 0) if tensor.dim() > 1 else tensor.clone()
            if tensor.dim() > 1:  # types without arithmetic, as float8, have no `flip`
                rolled = rolled[..., torch.arange(tensor.shape[-1], device="cpu").flip(0)]
            return torch.cat([rolled, rolled[:1]]) if grow else rolled

        return self.replaced([vary(leaf.value) for leaf in self.leaves])

    def resized(self, count: int) -> ExampleInputs:
        """Return another call with `count` samples, which are those of the example, repeated."""
        size = self.batch_size or 1
        return self.replaced(
            [
                leaf.value[torch.arange(count, device="cpu") % size]
                if leaf.value.dim() and leaf.value.shape[0] == size
                else leaf.value.clone()
                for leaf in self.leaves
            ]
        )

    def with_dynamic(self, dynamic: Collection[str]) -> ExampleInputs:
        """Return the same call with other free dimensions.

        Raises:
            OptionError: A dimension has another name, or no input has a dimension 1 of more than
                one element for "sequence".
        """
        several: object = dynamic
        if (
            isinstance(several, str)
            or not isinstance(several, Iterable)
            or not {*several} <= {*DIMENSIONS}
        ):
            raise OptionError(
                "dynamic takes a list of 'batch' and 'sequence', empty for inputs of the example's "
                f"shapes alone (got {dynamic!r})"
            )
        if "sequence" in dynamic and (sequence_length(self.tensors()) or 0) < 2:
            raise OptionError(
                "'sequence' in dynamic frees dimension 1 of the inputs: give an example in which "
                "the first input that has it holds at least 2 elements along it"
            )
        return replace(self, dynamic=tuple(name for name in DIMENSIONS if name in dynamic))

    def free_axes(self, tensor: torch.Tensor) -> list[int]:
        """Return the dimensions of an input that are free."""
        batch = self.batch_size if "batch" in self.dynamic else None
        sizes = (batch, *[self.sequence] * (tensor.dim() - 1))
        return [
            axis for axis, free in enumerate(sizes[: tensor.dim()]) if tensor.shape[axis] == free
        ]

    def shortened(self, size: int, length: int) -> ExampleInputs:
        """Return another call with the first elements of every axis of a size, but the first axis.

        Args:
            size: Size of the axes.
            length: Their new size.
        """

        def shorten(tensor: torch.Tensor) -> torch.Tensor:
            for axis in range(1, tensor.dim()):
                if tensor.shape[axis] == size:
                    tensor = tensor.narrow(axis, 0, length)
            return tensor.clone()

        return self.replaced([shorten(leaf.value) for leaf in self.leaves])

    def other_lengths(self) -> list[ExampleInputs]:
        """Return the call at other lengths of the sequences: one less, and half of it.

        Where positions are merged, one less may leave as many: of 8 and of 7, pairs are 4.
        """
        size = self.sequence
        if size is None:
            return []
        lengths = dict.fromkeys((size - 1, max(2, size // 2)))
        return [self.shortened(size, length) for length in lengths if length < size]

    def varied_alone(self, index: int) -> ExampleInputs:
        """Return another call in which a single tensor has other values, which stay legal.

        Integers are permuted; if all of them are equal, one is lowered by 1. Floating-point values
        are scaled and shifted as well.

        Args:
            index: Position of the tensor among `leaves`.
        """
        values = self.tensors()
        changed = self.varied(grow=False).tensors()[index]
        if changed.is_floating_point() or changed.is_complex():
            changed = scaled(changed)
        elif changed.numel() and not changed.is_meta and torch.equal(changed, values[index]):
            changed.view(-1)[-1] = (changed.view(-1)[-1].long() - 1).clamp(min=0)
        values[index] = changed
        return self.replaced(values)

    def replaced(self, values: Sequence[torch.Tensor]) -> ExampleInputs:
        """Return the same call with other tensors, one for each of `leaves`."""
        args, kwargs = self.with_leaves(values)
        leaves = tuple(
            Leaf(leaf.argument, leaf.path, value)
            for leaf, value in zip(self.leaves, values, strict=True)
        )
        return ExampleInputs(args, kwargs, self.names, leaves, self.dynamic)


def scaled(tensor: torch.Tensor) -> torch.Tensor:
    """Scale and shift a tensor a little; float8 has no arithmetic of its own.

    Values in [0, 1] stay there, and all but 0.47 change.
    """
    exact = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return (exact * 0.9 + 0.047).to(tensor.dtype)


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExampleInputs:
    """Bind example inputs to the signature of the model's forward.

    Tensors that share memory with each other or with the model are copied: a tracer mistakes two
    arguments that are the same tensor (`labels=input_ids`) for one argument.

    Raises:
        CaptureError: The inputs do not fit the signature, or hold no tensor.
    """
    names = _positional_names(model, args, kwargs)
    leaves: list[Leaf] = []
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                _check_name(model, name)
                leaves.append(Leaf(name, tuple(_key(entry) for entry in path), leaf))
            elif isinstance(leaf, Mapping | Sequence) and not isinstance(leaf, str | bytes | range):
                raise CaptureError(
                    f"argument {name!r} holds a {type(leaf).__name__}, which torch cannot look "
                    "into: give a plain dict, list or tuple of the same tensors"
                )
            elif held := _tensors_inside(leaf):
                raise CaptureError(
                    f"argument {name!r} is or holds a {type(leaf).__name__} with the tensor "
                    f"{held[0]!r}, which torch cannot look into, so that it would become a "
                    "constant: give its tensors in a dict, list or tuple, or as arguments of their "
                    "own, or make the class a node of torch.utils._pytree"
                )
    if not leaves:
        raise CaptureError(
            f"the example inputs of {type(model).__name__} hold no tensor: give at least one "
            "(example_inputs=(tensor, ...) or --input 1x3x32x32)"
        )
    inputs = ExampleInputs(tuple(args), dict(kwargs), tuple(names), tuple(leaves))
    if inputs.batch_size == 0:
        raise CaptureError(
            f"the example inputs of {type(model).__name__} hold no sample ({leaves[0].argument} is "
            f"{[*leaves[0].value.shape]}): give at least one, best two"
        )
    return inputs.replaced(_without_aliases(model, inputs.tensors()))


def call_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a call: of forward, or of the `__call__` that a class overrides."""
    forward = inspect.signature(model.forward)
    if type(model).__call__ is nn.Module.__call__:
        return forward
    signature = inspect.signature(model.__call__)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    passes_on = kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return forward if passes_on else signature


def _positional_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """Return the name of every positional argument; those of `*rest` are `rest_0`, `rest_1`, ..."""
    signature = call_signature(model)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    names: list[str] = []
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(value))]
        else:
            names.append(name)
    return names[: len(args)]


def constant_arguments(model: nn.Module, inputs: ExampleInputs) -> dict[str, Any]:
    """Return the arguments without a tensor and the plain defaults, by name, in signature order."""
    parameters = inspect.signature(model.forward).parameters
    constants = {
        name: parameter.default
        for name, parameter in parameters.items()
        if isinstance(parameter.default, (bool, int, float, str))
    }
    constants |= inputs.fixed_arguments()
    tensors, order = placeholder_names(inputs), [*parameters, *constants]
    return {name: constants[name] for name in sorted(constants.keys() - tensors, key=order.index)}


def _without_aliases(model: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy the tensors that share memory with the model or with an earlier tensor."""
    memories = {storage_id(tensor) for _, tensor in named_tensors(model)}
    separate = []
    for tensor in tensors:
        memory = storage_id(tensor)
        if memory in memories and memory is not None:
            tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        memories.add(memory)
        separate.append(tensor)
    return separate


def _check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
        raise CaptureError(
            f"argument {name!r} of {type(model).__name__} cannot be the name of an argument in "
            "Python: rename it, or wrap the model in a module that takes another name"
        )


def _key(entry: Any) -> Any:
    if isinstance(entry, pytree.SequenceKey):
        return entry.idx
    if isinstance(entry, pytree.MappingKey):
        return entry.key
    return AttributeKey(entry.name)


def _tensors_inside(value: Any, depth: int = 3) -> list[str]:
    """Return the paths of the tensors in the attributes of an object."""
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return []
    paths = []
    for name, attribute in vars(value).items():
        for path, leaf in pytree.tree_flatten_with_path(attribute)[0]:
            place = name + pytree.keystr(path)
            if isinstance(leaf, torch.Tensor):
                paths.append(place)
            elif depth:
                paths += [f"{place}.{inner}" for inner in _tensors_inside(leaf, depth - 1)]
    return paths


def as_plain(value: Any) -> Any:
    """Convert a mapping or dataclass that is not a pytree node to a dict; return others as is."""
    if type(value) in pytree.SUPPORTED_NODES:
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value


def placeholder_names(inputs: ExampleInputs) -> list[str]:
    """Return the names of the placeholders of the captured graph, in order, without repeats."""
    return list(dict.fromkeys(leaf.argument for leaf in inputs.leaves))
