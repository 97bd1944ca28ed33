"""Store tensors: one record in JSON per name, the values once in a safetensors file.

A record has `name`, `kind`, `shape` and `dtype`, and only where they differ from the default `key`
(name of the stored values), `same_as` (name of the same tensor object), `stride`, `meta`,
`requires_grad` and `persistent`; `crc32` tells damaged values. Two tied weights and a buffer on the
same memory:

    {"name": "embedding.weight", "kind": "parameter", "shape": [10, 4], "dtype": "float32"}
    {"name": "head.weight", "kind": "parameter", "same_as": "embedding.weight"}
    {"name": "table", "kind": "buffer", "shape": [10, 4], "dtype": "float32",
     "key": "embedding.weight"}
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from safetensors import safe_open
from torch import nn

from passes.errors import ArtifactError
from passes.ir.program import Program, share_memory, storage_id
from pnn_compile.artifact.values import DTYPES

Record = dict[str, Any]


class TensorRecord(TypedDict):
    """Types of the fields of a record."""

    name: str
    kind: Literal["parameter", "buffer", "unused", "input"]
    shape: NotRequired[tuple[int, ...]]
    dtype: NotRequired[str]
    key: NotRequired[str]
    same_as: NotRequired[str]
    stride: NotRequired[list[int]]
    crc32: NotRequired[int]
    meta: NotRequired[bool]
    requires_grad: NotRequired[bool]
    persistent: NotRequired[bool]


_STORABLE = (torch.Tensor, nn.Parameter)


class TensorWriter:
    """Collects tensors and describes them as records.

    Args:
        is_written: Whether a network writes into the memory of a buffer.

    Attributes:
        values: Tensors to store, by key: contiguous, on the CPU, in separate memory.
        records: One record per name.
    """

    def __init__(self, is_written: Callable[[torch.Tensor], bool] = lambda _: False) -> None:
        self._is_written = is_written
        self.values: dict[str, torch.Tensor] = {}
        self.records: list[Record] = []
        self._objects: dict[int, str] = {}
        self._views: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()
        self._alive: list[torch.Tensor] = []
        self._by_storage: dict[int | None, list[tuple[str, str, torch.Tensor]]] = {}

    def add(self, name: str, kind: str, tensor: torch.Tensor, *, persistent: bool = True) -> str:
        """Add a tensor under a name.

        Args:
            name: Its name.
            kind: "parameter", "buffer", "unused" or "input".
            tensor: The tensor, on any device.
            persistent: Whether it belongs to the state dict.

        Returns:
            The name.

        Raises:
            ArtifactError: The tensor is not plain and dense.
        """
        record: Record = {"name": name, "kind": kind}
        if not persistent:
            record["persistent"] = False
        if id(tensor) in self._objects:
            record["same_as"] = self._objects[id(tensor)]
        else:
            self._alive.append(tensor)  # a freed tensor would pass on its id()
            self._objects[id(tensor)] = name
            record |= self._describe(name, kind, tensor)
        self.records.append(record)
        return name

    def _describe(self, name: str, kind: str, tensor: torch.Tensor) -> Record:
        if type(tensor) not in _STORABLE or tensor.layout != torch.strided or tensor.is_quantized:
            raise ArtifactError(
                f"{name} is a {type(tensor).__name__} ({getattr(tensor, 'layout', 'no tensor')}), "
                "which an artifact cannot hold; convert it to a plain dense tensor first"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        record: Record = {"shape": list(tensor.shape), "dtype": dtype}
        if tensor.requires_grad != (kind == "parameter"):
            record["requires_grad"] = tensor.requires_grad
        if tensor.is_meta:
            return {**record, "meta": True}
        if not tensor.is_contiguous() and _is_permuted(tensor.shape, tensor.stride()):
            record["stride"] = list(tensor.stride())
        self._check_overlap(name, kind, tensor)
        key = self._store(name, tensor.detach())
        if key != name:
            return {**record, "key": key}
        return {**record, "crc32": _checksum(self.values[key])}

    def _check_overlap(self, name: str, kind: str, tensor: torch.Tensor) -> None:
        """Refuse two views of one memory that changes: of a parameter, or a buffer that is written.

        Two tensors that are one view of it are fine.
        """
        for other, other_kind, others in self._by_storage.get(storage_id(tensor), ()):
            same = (tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()) == (
                others.shape, others.stride(), others.dtype, others.storage_offset()
            )  # fmt: skip
            if same or not share_memory(tensor, others):
                continue
            learned = "parameter" in (kind, other_kind)
            if learned or self._is_written(tensor):
                which = "of which one is a parameter" if learned else "which forward writes into"
                raise ArtifactError(
                    f"{name} and {other} are different views of one memory, {which}; "
                    "an artifact cannot hold that: give one of them memory of its own "
                    "(.clone()), or let forward compute it from the other"
                )
        self._by_storage.setdefault(storage_id(tensor), []).append((name, kind, tensor))

    def _store(self, name: str, tensor: torch.Tensor) -> str:
        # Tensors of the same memory and type share their stored values.
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        view = (*memory, tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and view in self._views:
            return self._views[view]
        self._views[view] = name
        value = tensor.cpu().resolve_conj().resolve_neg()
        value = torch.view_as_real(value) if value.is_complex() else value
        value = value.contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in self._storages:
            value = value.clone()
        self._storages.add(storage)
        self.values[name] = value
        return name


def _is_permuted(shape: Iterable[int], stride: Iterable[int]) -> bool:
    """Whether strides are those of a contiguous tensor with its dimensions permuted."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True)):
        if size == 0 or (size > 1 and step != expected):
            return False
        expected *= size
    return True


class TensorFile(Mapping[str, torch.Tensor]):
    """A safetensors file as a mapping that reads each tensor when it is accessed.

    Args:
        file: The file; it stays open.
    """

    def __init__(self, file: Path) -> None:
        opened: Any = safe_open(file, framework="pt")  # its methods are untyped
        self._file = opened
        self._keys = frozenset(self._file.keys())

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: torch.Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class TensorReader:
    """Creates tensors from records; reading a name twice returns the same object.

    Args:
        records: The records.
        values: The stored values, by key.

    Raises:
        ArtifactError: Values are missing.
    """

    def __init__(self, records: Iterable[Record], values: Mapping[str, torch.Tensor]) -> None:
        self._records = {str(record["name"]): record for record in records}
        self._values = values
        self._stored: dict[str, torch.Tensor] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        missing = [key for key in self._keys() if key not in values]
        if missing:
            raise ArtifactError(
                f"{len(missing)} tensors are missing ({', '.join(missing[:3])}): restore the file, "
                "or save the artifact again"
            )

    def _keys(self) -> Iterable[str]:
        stored = [r for r in self._records.values() if "same_as" not in r and not r.get("meta")]
        return dict.fromkeys(str(record.get("key", record["name"])) for record in stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor of a record; that of its values where they are read."""
        record = self._records[name]
        record = self._records.get(str(record.get("same_as", name)), record)
        return tuple(record["shape"]) if record.get("meta") else tuple(self.read(name).shape)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor of a record, a Parameter if its kind is "parameter".

        Raises:
            ArtifactError: There is no such record, or the stored values do not fit it.
        """
        record = self._records.get(name)
        if record is None:
            raise ArtifactError(f"no tensor is recorded under the name {name!r}")
        if "same_as" in record:
            if "same_as" in self._records.get(record["same_as"], record):
                raise ArtifactError(f"{name} is the same as {record['same_as']!r}, which is none")
            return self.read(record["same_as"])
        if name not in self._tensors:
            self._tensors[name] = self._make(name, record)
        return self._tensors[name]

    def _make(self, name: str, record: Record) -> torch.Tensor:
        shape, dtype = tuple(record["shape"]), DTYPES[record["dtype"]]
        key = str(record.get("key", name))
        if record.get("meta"):
            value = self._stored.setdefault(key, torch.empty(shape, dtype=dtype, device="meta"))
        else:
            value = self._load(key, shape, dtype)
        if (value.shape, value.dtype) != (shape, dtype):
            raise ArtifactError(
                f"{name} should be {list(shape)} {dtype}, found {list(value.shape)} {value.dtype}"
            )
        crc32 = self._records.get(str(record.get("key", name)), record).get("crc32")
        if not value.is_meta and crc32 is not None and crc32 != _checksum(value):
            raise ArtifactError(f"the values of {name} are not those that were saved")
        if "stride" in record:
            key = f"{key} {record['stride']}"  # tensors of one key and stride stay one memory
            value = self._stored.setdefault(key, _restride(value, record["stride"]))
        is_parameter = record["kind"] == "parameter"
        gradient = bool(record.get("requires_grad", is_parameter))
        if is_parameter:
            return nn.Parameter(value, requires_grad=gradient)
        return value.detach().requires_grad_(gradient)

    def _load(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if key not in self._stored:
            # Copy: the values may be a view of the file, which is not aligned like a new tensor.
            value = self._values[key].clone()
            paired = dtype.is_complex and value.dim() == len(shape) + 1 and value.shape[-1] == 2
            self._stored[key] = torch.view_as_complex(value) if paired else value
        return self._stored[key]


def _checksum(value: torch.Tensor) -> int:
    """Return the CRC-32 of the bytes of a contiguous tensor on the CPU."""
    size = value.numel() * value.element_size()
    return zlib.crc32((ctypes.c_char * size).from_address(value.data_ptr()) if size else b"")


def _restride(value: torch.Tensor, stride: list[int]) -> torch.Tensor:
    if len(stride) != value.dim() or not _is_permuted(value.shape, stride):
        raise ArtifactError(f"strides {stride} do not fit the shape {list(value.shape)}")
    result = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    return result.copy_(value)


def assign(targets: Mapping[str, torch.Tensor], records: Iterable[Record], reader: TensorReader,
           owner: str) -> None:  # fmt: skip
    """Set existing tensors to the recorded values, in place, so that tied tensors stay tied.

    Args:
        targets: The tensors by name.
        records: Records of the tensors to assign.
        reader: Reader of their values.
        owner: Name of the program or network of the tensors, for the message.

    Raises:
        ArtifactError: A name does not exist or has another shape; nothing is assigned then.
    """
    pairs = []
    for record in records:
        name = str(record["name"])
        value = reader.read(name)
        if name not in targets or targets[name].shape != value.shape:
            shape = list(targets[name].shape) if name in targets else "nothing"
            raise ArtifactError(
                f"the artifact has {name} {list(value.shape)}, where {owner} has {shape}"
            )
        pairs.append((targets[name], value))
    for target, value in pairs:
        if not value.is_meta:
            target.data = value.detach().to(target.device)
        if target.is_leaf:
            target.requires_grad_(value.requires_grad)


def describe_no_tensor(program: Program, name: str, value: Any) -> str:
    """Describe an entry of a state dict that is not a tensor, with the module that saves it."""
    message = f"{name} is a {type(value).__name__}, no tensor, which an artifact cannot hold"
    path = name.rpartition(".")[0]
    while path and program.model is not None and path not in dict(program.model.named_modules()):
        path = path.rpartition(".")[0]
    if program.model is None or not path:
        return message
    kind = type(program.model.get_submodule(path))
    return (
        f"{message}: it belongs to {path}, a {kind.__module__}.{kind.__qualname__} (quantized "
        "modules and the like are not saved: compile and save the model before it is converted)"
    )
