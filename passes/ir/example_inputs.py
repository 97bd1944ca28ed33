"""Example inputs of a model: bound to its signature, flattened, and varied for validation."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import CaptureError

__all__ = ["Arguments", "Field", "Leaf", "as_plain", "bind", "placeholders"]


class Field(str):
    """A key of a nested argument that is read as an attribute: a field of a dataclass."""

    __slots__ = ()


@dataclass(frozen=True)
class Leaf:
    """One tensor of the example inputs.

    Attributes:
        argument: Name of the argument of forward that holds it.
        path: Keys and indices that lead to it inside a nested argument; empty for a plain tensor.
        value: The tensor.
    """

    argument: str
    path: tuple[Any, ...]
    value: torch.Tensor


@dataclass(frozen=True)
class Arguments:
    """The example call `model(*args, **kwargs)`.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        names: Name of each positional argument in the signature.
        leaves: Every tensor inside them, in order.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors of the call, in order."""
        return [leaf.value for leaf in self.leaves]

    def with_leaves(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the same call with other values in place of the tensors."""
        remaining = iter(values)

        def replace(value: Any) -> Any:
            return next(remaining) if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(replace, (tuple(self.args), dict(self.kwargs)))
        return args, kwargs

    def tensor_arguments(self) -> dict[str, Any]:
        """The arguments that hold tensors, by name: what the captured graph takes."""
        named = dict(zip(self.names, self.args, strict=True)) | dict(self.kwargs)
        holders = {leaf.argument for leaf in self.leaves}
        return {name: value for name, value in named.items() if name in holders}

    def fixed_arguments(self) -> dict[str, Any]:
        """The arguments that hold no tensor, by name: those that the captured graph has not."""
        named = dict(zip(self.names, self.args, strict=True)) | dict(self.kwargs)
        holders = {leaf.argument for leaf in self.leaves}
        return {name: value for name, value in named.items() if name not in holders}

    def constants(self) -> dict[str, Any]:
        """What is no tensor, by name (`batch['scale']`): the captured graph fixes these values."""
        found = self.fixed_arguments()
        for name, value in self.tensor_arguments().items():
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if not isinstance(leaf, torch.Tensor):
                    found[f"{name}{pytree.keystr(path)}"] = leaf
        return found

    @property
    def batch(self) -> int | None:
        """Size of dimension 0 of the first tensor that has dimensions, or None."""
        return next((leaf.value.shape[0] for leaf in self.leaves if leaf.value.dim()), None)

    def varied(self, grow: bool) -> Arguments:
        """Return another call of the same kind: other values, and one more sample if `grow`.

        Every tensor whose dimension 0 has the batch size grows; the others keep their shape.
        Values are permuted along dimension 0 and the last dimension, so that they stay legal.
        """
        size = self.batch

        def vary(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or tensor.shape[0] != size:
                return tensor.clone()
            rolled = tensor.detach().roll(1, 0).flip(-1) if tensor.dim() > 1 else tensor.clone()
            return torch.cat([rolled, rolled[:1]]) if grow else rolled

        return self.replaced([vary(leaf.value) for leaf in self.leaves])

    def varied_alone(self, index: int) -> Arguments:
        """Return another call in which one tensor alone has other values, which stay legal.

        Integers are permuted, or one of them lowered where all are equal; numbers are scaled and
        shifted too.
        """
        values = self.tensors()
        changed = self.varied(grow=False).tensors()[index]
        if changed.is_floating_point() or changed.is_complex():
            changed = changed * 0.9 + 0.05
        elif changed.numel() and not changed.is_meta and torch.equal(changed, values[index]):
            changed.view(-1)[-1] = (changed.view(-1)[-1].long() - 1).clamp(min=0)
        values[index] = changed
        return self.replaced(values)

    def replaced(self, values: Sequence[torch.Tensor]) -> Arguments:
        """Return the same call with other tensors."""
        args, kwargs = self.with_leaves(values)
        leaves = tuple(
            Leaf(leaf.argument, leaf.path, value)
            for leaf, value in zip(self.leaves, values, strict=True)
        )
        return Arguments(args, kwargs, self.names, leaves)


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Bind example inputs to the signature of the model's forward.

    Tensors that share memory with each other or with the model are copied: a tracer takes two
    arguments that are one tensor (`labels=input_ids`) for one argument.

    Raises:
        CaptureError: The inputs do not fit the signature, or hold no tensor.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(value))]
        else:
            names.append(name)
    names = names[: len(args)]
    leaves: list[Leaf] = []
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                _check_name(model, name)
                leaves.append(Leaf(name, tuple(_key(entry) for entry in path), leaf))
            elif isinstance(leaf, Mapping | Sequence) and not isinstance(leaf, str | bytes):
                raise CaptureError(
                    f"argument {name!r} holds a {type(leaf).__name__}, which torch cannot look "
                    "into: give a plain dict, list or tuple of the same tensors"
                )
    if not leaves:
        raise CaptureError(
            f"the example inputs of {type(model).__name__} hold no tensor: give at least one "
            "(example_inputs=(tensor, ...) or --input 1x3x32x32)"
        )
    arguments = Arguments(tuple(args), dict(kwargs), tuple(names), tuple(leaves))
    return arguments.replaced(_apart(model, arguments.tensors()))


def _apart(model: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, with copies in place of those whose memory another one or the model has."""
    seen = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = []
    for tensor in tensors:
        memory = _memory(tensor)
        if memory in seen and memory is not None:
            tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        seen.add(memory)
        found.append(tensor)
    return found


def _memory(tensor: torch.Tensor) -> int | None:
    """Identity of the memory of a tensor; None where it has none (sparse tensors)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise CaptureError(
            f"argument {name!r} of {type(model).__name__} cannot be the name of an argument in "
            "Python: rename it, or wrap the model in a module that takes another name"
        )


def _key(entry: Any) -> Any:
    if isinstance(entry, pytree.SequenceKey):
        return entry.idx
    if isinstance(entry, pytree.MappingKey):
        return entry.key
    return Field(entry.name)


def as_plain(value: Any) -> Any:
    """Return a container that torch does not know as a dict of its fields; others as they are."""
    if type(value) in pytree.SUPPORTED_NODES:
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value


def placeholders(arguments: Arguments) -> list[str]:
    """Names of the placeholders of the captured graph, in order, without repeats."""
    return list(dict.fromkeys(leaf.argument for leaf in arguments.leaves))
