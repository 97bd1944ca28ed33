"""Samples from a file, for calibration and fits on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from passes.errors import OptionError
from passes.program import Program
from pnn_compile.batches import argument_names

__all__ = ["read_batches"]


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
