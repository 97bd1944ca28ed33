"""Read what users pass in: example inputs, batches, files of samples."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import OptionError, why
from passes.ir.program import Program, tensor_leaves
from passes.transform.constants import check_constant, check_constants
from passes.transform.network import Call, match_arguments

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_HELD_OUT = 5
"""Every fifth batch is held out: errors are measured on it, and it is never fitted."""


def example(
    model: nn.Module,
    example_inputs: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Sort example inputs, as users pass them, into positional and keyword arguments.

    Raises:
        OptionError: There are none, or they are passed both as `example_inputs` and as `args` or
            `kwargs`.
    """
    if not isinstance(model, nn.Module):
        advice = {"ExportedProgram": ": pass its .module(), or the file it was saved to"}
        kind = type(model).__name__
        raise OptionError(f"model must be a torch.nn.Module (got {kind}){advice.get(kind, '')}")
    if example_inputs is None and not args and not kwargs:
        example_inputs = getattr(model, "example_input_array", None)  # of a LightningModule
    if example_inputs is None and not args and not kwargs:
        raise OptionError(
            f"{type(model).__name__} needs example inputs: "
            "pnn.compile(model, torch.randn(2, 3, 32, 32)), or args=..., kwargs=..."
        )
    if example_inputs is None:
        return tuple(args), dict(kwargs or {})
    if args or kwargs:
        raise OptionError("pass either example_inputs or args and kwargs, not both")
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def argument_names(program: Program) -> list[str]:
    """Return the names of the arguments of a program, those of the model's forward."""
    return [str(node.target) for node in program.inputs]


def device_of(module: nn.Module, otherwise: torch.device | None = None) -> torch.device:
    """Return the device of the first parameter or buffer; `otherwise`, or the CPU, without any."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), otherwise or torch.device("cpu"))


def named_batch(
    compiled: Compiled, batch: Any, device: torch.device | None = None
) -> dict[str, Any]:
    """Return one batch as a dict by argument name, with its tensors copied to a device.

    Args:
        compiled: The network.
        batch: As in `by_argument`.
        device: The device; that of the network if None.

    Raises:
        OptionError: As `by_argument`.
    """
    named = by_argument(compiled.program, batch)
    target = device_of(compiled.module) if device is None else device

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
            return leaf
        # A model may write into its inputs; the user's tensors must not change.
        return leaf.detach().to(target, copy=True)

    return {name: pytree.tree_map(copied, value) for name, value in named.items()}


def by_argument(program: Program, batch: Any) -> dict[str, Any]:
    """Return the arguments of a program, by name.

    Args:
        program: The program.
        batch: A tensor, a tuple of positional arguments (labels may follow; they are dropped), or
            a dict of arguments by name. Values that are not tensors are constants of the graph:
            they may be left out of a tuple or dict.

    Raises:
        OptionError: An argument is missing, or a constant is not the one of the example inputs.
    """
    names = argument_names(program)
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, (tuple, list)):
        pairs = zip(arguments_of(program, batch), batch, strict=True)
        named = {name: value for name, value in pairs if name is not None}
    else:
        named = {names[0]: batch}
    missing = [name for name in names if name not in named]
    if missing:
        raise OptionError(
            f"a batch lacks {', '.join(missing)}: pass ({', '.join(names)}) or a dict of them"
        )
    for name, constant in program.fixed.items():
        if name in named:
            check_constant(program.name, name, named[name], constant)
    for name in names:
        check_constants(program.name, name, named[name], program.args[name])
    return {name: named[name] for name in names}


def call_arguments(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call, by name; as `by_argument`, but nothing may follow them.

    Raises:
        OptionError: As `by_argument`, or there is no such argument.
    """
    names = arguments_of(program, args)
    pairs = [*zip(names, args, strict=True)]
    further = {str(at): value for at, (name, value) in enumerate(pairs) if name is None}
    taken = program.args.keys() | program.fixed.keys()
    further |= {name: value for name, value in kwargs.items() if name not in taken}
    Call.of(program).check_others(further)
    named = {name: value for name, value in pairs if name is not None}
    return named | dict(kwargs)


def arguments_of(program: Program, elements: Iterable[Any]) -> list[str | None]:
    """Return the argument that every element of a tuple is; None for the labels after them.

    Elements with tensors are the arguments with tensors, in order, and the others the constants.
    """
    return match_arguments(argument_names(program), program.fixed, elements)


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples: size of dimension 0 of the first tensor with dimensions."""
    tensors = tensor_leaves(dict(batch))
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.dim()), 0)


def check_batch_size(compiled: Compiled, batch: int) -> None:
    """Check that a network was compiled for batches of this size.

    Raises:
        OptionError: The batch size is fixed, and it is another one.
    """
    example = batch_size(compiled.program.args)
    if batch != example and "batch" not in compiled.program.dynamic:
        raise OptionError(
            f"{compiled.plan.model} was compiled for batches of {example} only: use that size, or "
            "compile with 'batch' in dynamic"
        )


def check_shapes(compiled: Compiled, inputs: Mapping[str, Any]) -> None:
    """Check that inputs have the shapes of the example inputs, except for the number of samples.

    Args:
        compiled: The network.
        inputs: Inputs by argument name.

    Raises:
        OptionError: A tensor has another shape, or integers where the example has floating-point
            numbers.
    """
    if reason := Call.of(compiled.program).other_shape(inputs):
        raise OptionError(reason)


@contextmanager
def explained(compiled: Compiled, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Tell of an error in a run on inputs of another shape that they have one.

    Raises:
        OptionError: The block fails, and the inputs have other shapes than the example inputs.
    """
    try:
        yield
    except Exception as error:
        if reason := Call.of(compiled.program).other_shape(inputs):
            raise OptionError(reason) from error
        raise


def resized(
    compiled: Compiled, batch: int, device: torch.device, length: int = 0
) -> dict[str, Any]:
    """Return the example inputs by argument name, repeated or cut to a number of samples.

    Args:
        compiled: The network.
        batch: The number of samples.
        device: Device of the results.
        length: Length of the sequences, if they are free; 0 for that of the example.
    """
    size, sequence = batch_size(compiled.program.args), compiled.program.sequence

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dim() and leaf.shape[0] == size:
            leaf = leaf[torch.arange(batch, device="cpu") % size]
        for axis in range(1, leaf.dim()):
            if length and sequence and leaf.shape[axis] == sequence:
                positions = torch.arange(length, device=leaf.device) % sequence
                leaf = leaf.index_select(axis, positions)
        return leaf.to(device)

    return {name: pytree.tree_map(resize, value) for name, value in compiled.program.args.items()}


_LARGE, _PACKED = 2**30, 100
"""Bytes that any file of samples may unpack to, and how many times its size a larger one may."""


class CalibrationBatches:
    """Calibration inputs as dicts by argument name; every fifth batch is held out.

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
        several: object = inputs
        if not isinstance(several, Iterable):
            raise OptionError(f"calibration needs a list of batches of inputs (got {inputs!r})")
        if isinstance(inputs, Iterator):
            raise OptionError(
                f"calibration goes through its batches several times (got a "
                f"{type(inputs).__name__}, which ends after the first): pass list(batches)"
            )
        self._checksums: list[float] = []
        sizes = [batch_size(batch) for batch in self]
        if len(sizes) < 2:
            raise OptionError(
                f"calibration needs at least two batches, one to fit and one to "
                f"measure the errors on (got {len(sizes)}); pass smaller batches"
            )
        self._sizes = sizes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(self._inputs):
            named = named_batch(self._compiled, batch)
            checksum = _checksum(named)
            if index == len(self._checksums):
                self._checksums.append(checksum)
            elif checksum != self._checksums[index] and not math.isnan(checksum):
                raise OptionError(
                    "calibration goes through its batches several times, and they differ from "
                    "pass to pass: use a DataLoader that does not shuffle, or list(batches)"
                )
            yield named

    def split(self) -> Iterator[tuple[bool, dict[str, Any]]]:
        """Iterate over pairs of whether a batch is held out, and the batch.

        Of fewer than five batches the last one is held out.
        """
        last = len(self._sizes) - 1
        for index, batch in enumerate(self):
            fifth = index % _HELD_OUT == _HELD_OUT - 1
            yield fifth or (last < _HELD_OUT - 1 and index == last), batch

    def count(self, *, held_out: bool) -> int:
        """Return the number of samples that are held out, or that are not."""
        flags = [flag for flag, _ in self.split()]
        pairs = zip(flags, self._sizes, strict=True)
        return sum(size for flag, size in pairs if flag == held_out)


def _checksum(batch: Mapping[str, Any]) -> float:
    """Return the sum of all values, which differs between batches."""
    tensors = tensor_leaves(dict(batch))
    return sum(tensor.double().sum().item() for tensor in tensors if not tensor.is_complex())


def read_batches(
    path: Path,
    program: Program,
    size: int,
    *,
    shuffle_seed: int | None = None,
    least: int = 1,
    labels: str | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Read a `.safetensors` or `.npz` file and cut it into batches.

    Args:
        path: File with one array per argument of the program, by name; a single array may have
            any name. Dimension 0 counts the samples, the others are those of the example inputs.
            Numbers are converted to the precision of the example inputs.
        program: The program that takes them.
        size: Samples of a batch; a smaller last batch is dropped unless it is the only one.
        shuffle_seed: Seed to shuffle the samples with; None to keep their order.
        least: Smallest number of batches; with few samples the batches are smaller.
        labels: An array that comes along as it is, beside the arguments.

    Returns:
        The batches, by argument name.

    Raises:
        OptionError: The file cannot be read, an argument is missing, an array has other sizes
            or another kind of numbers than the example input, or the arrays differ in their
            number of samples.
    """
    arrays = _read(path)
    names = argument_names(program)
    beside = [] if labels is None or labels in names else [labels]
    inputs = [name for name in arrays if name not in beside]
    if len(inputs) == 1 and len(names) == 1:
        arrays[names[0]] = arrays.pop(inputs[0])
    missing = [name for name in (*names, *beside) if name not in arrays]
    if missing:
        raise OptionError(
            f"{path} lacks {', '.join(missing)}: it has {', '.join(arrays)}, the network takes "
            f"{', '.join(names)}"
        )
    arrays |= {n: _converted(path, n, arrays[n], program.args[n]) for n in names}
    names += beside
    counts = {name: len(arrays[name]) for name in names}
    if len(set(counts.values())) != 1:
        raise OptionError(f"{path} has arrays of different lengths ({counts})")
    count = next(iter(counts.values()))
    if not count:
        raise OptionError(f"{path} has no samples: its arrays have 0 rows")
    order = torch.arange(count, device="cpu")
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
        order = torch.randperm(count, generator=generator, device="cpu")
    size = min(size, max(1, count // least))
    chunks = torch.split(order, size)
    if len(chunks) > 1 and len(chunks[-1]) < size:
        chunks = chunks[:-1]
    return [{name: arrays[name][chunk] for name in names} for chunk in chunks]


def _converted(path: Path, name: str, array: torch.Tensor, example: Any) -> torch.Tensor:
    """Check an array against the example input of its argument; convert it to that dtype."""
    if not isinstance(example, torch.Tensor):
        raise OptionError(
            f"{name} is a {type(example).__name__} of tensors, which a file of samples cannot "
            "contain: use pnn.calibrate or pnn.fit with batches in Python"
        )
    shape = f"{path}: {name} has shape {list(array.shape)}"
    expected = ", ".join(["samples", *map(str, example.shape[1:])])
    if not array.dim() or not example.dim() or array.shape[1:] != example.shape[1:]:
        raise OptionError(f"{shape}, the network takes [{expected}]: save one row per sample")
    if _kind(array.dtype) != _kind(example.dtype):
        raise OptionError(
            f"{path}: {name} is {array.dtype}, the network takes {example.dtype}: convert the "
            "array (and scale it as in training) before you save it"
        )
    return array.to(example.dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating-point" if dtype.is_floating_point else "integer"


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Read the arrays of a file by name."""
    if path.suffix not in (".safetensors", ".npz"):
        raise OptionError(f"{path} must be a .safetensors or .npz file of samples")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        import numpy as np

        with zipfile.ZipFile(path):
            pass  # np.load takes anything else for a pickle
        with np.load(path, allow_pickle=False) as archive:
            unpacked = sum(member.file_size for member in archive.zip.infolist())
            if unpacked > max(_LARGE, _PACKED * path.stat().st_size):
                raise OptionError(
                    f"{path} unpacks to {unpacked / 2**30:.1f} GiB, more than {_PACKED} times its "
                    "size: save such samples with np.savez, not compressed"
                )
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except OptionError:
        raise
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {why(error)}") from error
    except Exception as error:
        reason = f"it is no {path.suffix} file, or a damaged one ({error})"
        raise OptionError(f"{path} cannot be read: {reason}") from error
