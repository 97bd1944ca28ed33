"""Files of a checkpoint: those of torch.distributed.checkpoint, read without running anything.

torch unpickles two parts of such a directory: `.metadata`, which says what is where, and values
that are not tensors. Here the first may hold nothing but torch's own records, and the second what
`torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from passes.errors import RuntimeFault, first_line

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata


class Further(Protocol):
    """What else to read, depending on what is stored: the state of an optimizer."""

    def keys_in(self, stored: Iterable[str]) -> list[str]:
        """Select keys to read."""

    def empty(self, key: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor to read a key into."""


def check_plain(values: Mapping[str, Any]) -> None:
    """Check that values can be read without unpickling objects.

    Raises:
        RuntimeFault: One cannot; it is named.
    """
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            continue
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise RuntimeFault(
                f"the state of {name} holds objects, which no checkpoint reads back, as that could "
                f"run any code ({first_line(error)}): its state_dict() must be tensors, "
                "numbers and texts in lists and dicts"
            ) from error


# torch.distributed.checkpoint is slow to import: the functions below do it when they are called.


@contextmanager
def _errors_of_ranks() -> Iterator[None]:
    """Turn the errors of all ranks, which torch collects in a BaseException, into one Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items())
        raise RuntimeError(f"on rank {rank}, {type(first).__name__}: {first}") from error


def write(folder: Path, values: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Write the values of all ranks of a group; those of several ranks are written once."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _errors_of_ranks():
        save(values, checkpoint_id=folder, planner=planner, process_group=group)


def read(
    folder: Path,
    values: dict[str, Any],
    group: dist.ProcessGroup,
    further: Further | None = None,
) -> dict[str, Any]:
    """Read values, on all ranks of a group alike.

    Args:
        folder: The checkpoint.
        values: Tensors to read into, in place, and None for values that are not tensors.
        group: All its ranks call this alike.
        further: Says which further values to read.

    Returns:
        All that was read, by key.

    Raises:
        RuntimeFault: A key is missing.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = _reader_class()(folder)
    stored = reader.read_metadata().state_dict_metadata
    missing = sorted(values.keys() - stored.keys())
    if missing:
        raise RuntimeFault(
            f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} in all): it is not a "
            "checkpoint of this run"
        )
    values = dict(values)
    for key in further.keys_in(stored) if further is not None else ():
        described = stored[key]
        values[key] = None
        if further is not None and isinstance(described, TensorStorageMetadata):
            values[key] = further.empty(key, described.size, described.properties.dtype)
    planner = _planner_class()(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _errors_of_ranks():
        load(values, storage_reader=reader, planner=planner, process_group=group)
    return values


_RECORDS = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
    "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"
)
_DATA_FILE = re.compile(r"[\w.-]+\.distcp")


class _Unpickler(pickle.Unpickler):
    """Reads records of torch.distributed.checkpoint, and nothing else."""

    def find_class(self, module: str, name: str, /) -> Any:
        """Return a class of the list."""
        from torch.distributed.checkpoint import filesystem, metadata

        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, (torch.dtype, torch.layout)) or value is torch.Size:
            return value
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module == metadata.__name__ and name in _RECORDS.split():
            return getattr(metadata, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if (module, name) in (("pathlib", "PosixPath"), ("pathlib", "WindowsPath")):
            return lambda *parts: parts  # where it was written, which nothing reads
        if (module, name) == ("builtins", "getattr"):
            return _member  # Python before 3.11.4 writes members of an Enum as getattr(kind, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no record of a checkpoint")


def _member(kind: object, name: str) -> Enum:
    """Return a member of an Enum by its name, and no attribute of anything else.

    Raises:
        pickle.UnpicklingError: It is none.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{name!r} of {kind!r} is no record of a checkpoint")
    return kind[name]


@cache
def _reader_class() -> type[FileSystemReader]:
    """Return a reader whose metadata run nothing; torch's module is slow to import."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            folder = Path(self.path)
            with (folder / ".metadata").open("rb") as file:
                metadata: Metadata = _Unpickler(file).load()
            _check_metadata(metadata, folder)
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    return Reader


def _check_metadata(metadata: Metadata, folder: Path) -> None:
    """Check that files lie in the directory, and that no tensor is larger than all of them."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    files = {info.relative_path for info in metadata.storage_data.values()}
    if any(info.transform_descriptors for info in metadata.storage_data.values()):
        raise ValueError("its files are packed, which no checkpoint of this program is")
    for name in files:
        if not _DATA_FILE.fullmatch(name):
            raise ValueError(f"it names the file {name!r}")
    there = sum((folder / name).stat().st_size for name in files)
    for key, record in metadata.state_dict_metadata.items():
        if isinstance(record, BytesStorageMetadata):
            continue
        size = record.size
        if math.prod(size) * record.properties.dtype.itemsize > there:
            raise ValueError(f"{key} has the shape {list(size)}, more than its files hold")


@cache
def _planner_class() -> type[Any]:
    """Return a planner that reads values that are not tensors without unpickling objects."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    return Planner
