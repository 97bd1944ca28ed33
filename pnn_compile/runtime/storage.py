"""Reads and writes checkpoint directories of torch.distributed.checkpoint, which is slow to import.

Every rank gives or wants some of the values; those of several ranks are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from passes.errors import RuntimeFault

__all__ = ["read", "write"]

Selection = Callable[[Iterable[str]], Iterable[str]]

Empty = Callable[[str, torch.Size, torch.dtype], torch.Tensor]
"""From key, shape and type to a tensor to read into."""


def write(folder: Path, values: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Write the values of all ranks of a group."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    save(values, checkpoint_id=folder, planner=planner, process_group=group)


def read(
    folder: Path,
    values: dict[str, Any],
    group: dist.ProcessGroup,
    select: Selection = lambda _: (),
    empty: Empty = lambda _, size, dtype: torch.empty(size, dtype=dtype),
) -> dict[str, Any]:
    """Read values into the tensors that are given, in place, and what is selected besides.

    Args:
        folder: The checkpoint.
        values: Tensors to read into, and None for values that are no tensors.
        group: All its ranks call this alike.
        select: From all keys of the checkpoint to further ones to read.
        empty: Makes what a further tensor is read into.

    Raises:
        RuntimeFault: A key is missing.
    """
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    missing = sorted(values.keys() - stored.keys())
    if missing:
        raise RuntimeFault(
            f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} in all): it is no checkpoint "
            "of this run"
        )
    wanted = dict(values)
    for key in select(stored):
        described = stored[key]
        wanted[key] = None
        if isinstance(described, TensorStorageMetadata):
            wanted[key] = empty(key, described.size, described.properties.dtype)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    load(wanted, checkpoint_id=folder, planner=planner, process_group=group)
    return wanted
