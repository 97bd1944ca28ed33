"""Batches of inputs as users give them, brought to the arguments of the network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import OptionError
from passes.program import Program

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = [
    "CalibrationBatches", "argument_names", "batch_size", "check_batch_size", "check_shapes",
    "device_of", "named_batch", "resized",
]  # fmt: skip

_HELD_OUT = 5
"""Every fifth batch is held out: it judges, and is never fitted."""


def argument_names(program: Program) -> list[str]:
    """Names of the arguments of a program, as the model's forward calls them."""
    return [str(node.target) for node in program.inputs]


def device_of(module: nn.Module, otherwise: torch.device | None = None) -> torch.device:
    """Device of the first parameter or buffer of a module; that or the CPU if it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), otherwise or torch.device("cpu"))


def named_batch(
    compiled: Network, batch: Any, device: torch.device | None = None
) -> dict[str, Any]:
    """Name the arguments of one batch; its tensors are copied to a device.

    Args:
        compiled: The network.
        batch: A tensor, a tuple of positional arguments (labels may follow; they are dropped), or
            a dict of arguments by name.
        device: Where they are copied to; that of the network if None.

    Raises:
        OptionError: An argument of the network is missing.
    """
    names = argument_names(compiled.program)
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, (tuple, list)):
        named = dict(zip(names, batch, strict=False))
    else:
        named = {names[0]: batch}
    missing = [name for name in names if name not in named]
    if missing:
        raise OptionError(
            f"a batch lacks {', '.join(missing)}: give ({', '.join(names)}) or a dict of them"
        )
    target = device_of(compiled.module) if device is None else device

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
            return leaf
        # A model may write into its inputs: those of the user stay as they are.
        return leaf.detach().to(target, copy=True)

    return {name: pytree.tree_map(copied, named[name]) for name in names}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Number of samples: size of dimension 0 of the first tensor that has dimensions."""
    leaves = pytree.tree_leaves(dict(batch))
    return next(
        (int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), 0
    )


def check_batch_size(compiled: Network, batch: int) -> None:
    """Refuse a number of samples that a network was not compiled for.

    Raises:
        OptionError: The batch size is fixed, and another one.
    """
    example = batch_size(compiled.program.args)
    if batch != example and not compiled.program.dynamic_batch:
        raise OptionError(
            f"{compiled.plan.model} was compiled for batches of {example} only: take that size, or "
            "compile with dynamic_batch=True"
        )


def check_shapes(compiled: Network, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of another shape than the example's, samples apart.

    Args:
        compiled: The network.
        inputs: Inputs by argument name.

    Raises:
        OptionError: A tensor has another shape, or integers stand for floating-point numbers.
    """
    size = batch_size(compiled.program.args) if compiled.program.dynamic_batch else None
    for name, example in compiled.program.args.items():
        leaves = zip(pytree.tree_leaves(inputs[name]), pytree.tree_leaves(example), strict=False)
        for found, wanted in leaves:
            if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
                continue
            first = 1 if wanted.dim() and wanted.shape[0] == size else 0
            same_kind = found.is_floating_point() == wanted.is_floating_point()
            fits = found.dim() == wanted.dim() and found.shape[first:] == wanted.shape[first:]
            if not fits or not same_kind:
                shape = ["any number", *wanted.shape[1:]] if first else [*wanted.shape]
                raise OptionError(
                    f"{name} is {[*found.shape]} {found.dtype}, but {compiled.plan.model} was "
                    f"compiled for [{', '.join(map(str, shape))}] {wanted.dtype}: compile it with "
                    "an example like what it is to run on"
                )


def resized(compiled: Network, batch: int, device: torch.device) -> dict[str, Any]:
    """The example inputs with so many samples, repeated or cut, by argument name."""
    size = batch_size(compiled.program.args)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dim() and leaf.shape[0] == size:
            leaf = leaf[torch.arange(batch) % size]
        return leaf.to(device)

    return {name: pytree.tree_map(resize, value) for name, value in compiled.program.args.items()}


class CalibrationBatches:
    """Calibration inputs as dicts by argument name; every fifth batch is held out to judge.

    Args:
        compiled: The network.
        inputs: Batches, as `named_batch` takes them.

    Raises:
        OptionError: There are fewer than two batches, they come from a generator, or a batch does
            not fit the model.
    """

    def __init__(self, compiled: Network, inputs: Iterable[Any]) -> None:
        self._compiled = compiled
        self._inputs = inputs
        if isinstance(inputs, Iterator):
            raise OptionError(
                f"calibration goes through its batches several times (got a "
                f"{type(inputs).__name__}, which ends after the first): give list(batches)"
            )
        self._marks: list[float] = []
        counted = [batch_size(batch) for batch in self]
        if len(counted) < 2:
            raise OptionError(
                f"calibration needs at least two batches, one to fit and one to judge "
                f"(got {len(counted)}); give smaller batches"
            )
        self._counted = counted

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(self._inputs):
            named = named_batch(self._compiled, batch)
            mark = _mark(named)
            if index == len(self._marks):
                self._marks.append(mark)
            elif mark != self._marks[index] and mark == mark:
                raise OptionError(
                    "calibration goes through its batches several times, and they differ from "
                    "pass to pass: give a DataLoader that does not shuffle, or list(batches)"
                )
            yield named

    def split(self) -> Iterator[tuple[bool, dict[str, Any]]]:
        """Each batch, and whether it is held out."""
        last = len(self._counted) - 1
        for index, batch in enumerate(self):
            held = index % _HELD_OUT == _HELD_OUT - 1 or (last < _HELD_OUT - 1 and index == last)
            yield held, batch

    def count(self, *, held_out: bool) -> int:
        """Number of samples of either kind."""
        flags = [held for held, _ in self.split()]
        pairs = zip(flags, self._counted, strict=True)
        return sum(size for held, size in pairs if held == held_out)


def _mark(batch: Mapping[str, Any]) -> float:
    """A number that tells batches apart."""
    leaves = [x for x in pytree.tree_leaves(dict(batch)) if isinstance(x, torch.Tensor)]
    return sum(leaf.double().sum().item() for leaf in leaves if not leaf.is_complex())
