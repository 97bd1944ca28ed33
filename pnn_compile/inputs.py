"""Inputs of users: example inputs, batches of a loader, files of samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import OptionError
from passes.ir.program import Program

__all__ = [
    "CalibrationBatches",
    "argument_names",
    "batch_size",
    "check_batch_size",
    "check_shapes",
    "device_of",
    "example",
    "named_batch",
    "read_batches",
    "resized",
]


def example(
    model: nn.Module,
    example_inputs: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Bring example inputs, as users give them, to positional and keyword arguments.

    Raises:
        OptionError: There are none, or they are given in two ways.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module (got {type(model).__name__})")
    if example_inputs is None and not args and not kwargs:
        raise OptionError(
            f"{type(model).__name__} needs example inputs: "
            "pnn.compile(model, torch.randn(2, 3, 32, 32)), or args=..., kwargs=..."
        )
    if example_inputs is None:
        return tuple(args), dict(kwargs or {})
    if args or kwargs:
        raise OptionError("give either example_inputs or args and kwargs, not both")
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

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
    compiled: Compiled, batch: Any, device: torch.device | None = None
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


def check_batch_size(compiled: Compiled, batch: int) -> None:
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


def check_shapes(compiled: Compiled, inputs: Mapping[str, Any]) -> None:
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


def resized(compiled: Compiled, batch: int, device: torch.device) -> dict[str, Any]:
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

    def __init__(self, compiled: Compiled, inputs: Iterable[Any]) -> None:
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


def read_batches(
    path: Path,
    program: Program,
    size: int,
    *,
    shuffle_seed: int | None = None,
    least: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """Read a `.safetensors` or `.npz` file and cut it into batches.

    Args:
        path: File with one array per argument of the program, by name; a single array may have
            any name. Dimension 0 counts the samples, the others are those of the example inputs.
            Numbers are brought to the precision of the example inputs.
        program: What takes them.
        size: Samples per batch; a smaller rest is dropped where there is more than one batch.
        shuffle_seed: Shuffles the samples if given.
        least: Smallest number of batches; they are smaller where the samples are few.

    Raises:
        OptionError: The file cannot be read, an argument is missing, an array has other sizes
            or another kind of numbers than the example input, or the arrays differ in their
            number of samples.
    """
    arrays = _read(path)
    names = argument_names(program)
    if len(arrays) == 1 and len(names) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    missing = [name for name in names if name not in arrays]
    if missing:
        raise OptionError(
            f"{path} lacks {', '.join(missing)}: it holds {', '.join(arrays)}, the network takes "
            f"{', '.join(names)}"
        )
    arrays = {n: _fitted(path, n, arrays[n], program.args[n]) for n in names}
    counts = {name: len(arrays[name]) for name in names}
    if len(set(counts.values())) != 1:
        raise OptionError(f"{path} has arrays of different lengths ({counts})")
    count = next(iter(counts.values()))
    if not count:
        raise OptionError(f"{path} holds no samples: its arrays have 0 rows")
    order = torch.arange(count)
    if shuffle_seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle_seed))
    size = min(size, max(1, count // least))
    chunks = torch.split(order, size)
    if len(chunks) > 1 and len(chunks[-1]) < size:
        chunks = chunks[:-1]
    return [{name: arrays[name][chunk] for name in names} for chunk in chunks]


def _fitted(path: Path, name: str, array: torch.Tensor, example: Any) -> torch.Tensor:
    """Check an array against the example input of its argument, and give it that dtype."""
    if not isinstance(example, torch.Tensor):
        raise OptionError(
            f"{name} is a {type(example).__name__} of tensors, which a file of samples cannot "
            "give: use pnn.calibrate or pnn.fit with batches in Python"
        )
    shape = f"{path}: {name} has shape {list(array.shape)}"
    wanted = ", ".join(["samples", *map(str, example.shape[1:])])
    if not array.dim() or not example.dim() or array.shape[1:] != example.shape[1:]:
        raise OptionError(f"{shape}, the network takes [{wanted}]: give one row per sample")
    if _kind(array.dtype) != _kind(example.dtype):
        raise OptionError(
            f"{path}: {name} holds {array.dtype}, the network takes {example.dtype}: convert the "
            "array (and scale it as in training) before you save it"
        )
    return array.to(example.dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "fraction" if dtype.is_floating_point else "whole"


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix not in (".safetensors", ".npz"):
        raise OptionError(f"{path} must be a .safetensors or .npz file of samples")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
