"""Tensors of an artifact: one record in JSON per name, values in safetensors stored once.

A record says what the name is (`kind`), shape and dtype, and only where they are not the usual
ones `key` (the name under which the values are stored), `same_as` (the name of the very same
tensor object), `stride`, `meta`, `requires_grad` and `persistent`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from passes.errors import ArtifactError
from pnn_compile.artifact.values import DTYPES

__all__ = ["Record", "TensorReader", "TensorWriter", "assign"]

Record = dict[str, Any]

_STORABLE = (torch.Tensor, nn.Parameter)


class TensorWriter:
    """Collects tensors and describes them.

    Attributes:
        values: What to store, by key: contiguous, on the CPU, none sharing memory with another.
        records: The description of every name.
    """

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.records: list[Record] = []
        self._objects: dict[int, str] = {}
        self._views: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()
        self._alive: list[torch.Tensor] = []

    def add(self, name: str, kind: str, tensor: torch.Tensor, *, persistent: bool = True) -> str:
        """Add a tensor under a name.

        Args:
            name: Its name.
            kind: What it is: "parameter", "buffer", "unused" or "input".
            tensor: The tensor, on any device.
            persistent: Whether it belongs to the state dict.

        Returns:
            The name.

        Raises:
            ArtifactError: It is not a plain dense tensor.
        """
        record: Record = {"name": name, "kind": kind}
        if not persistent:
            record["persistent"] = False
        if id(tensor) in self._objects:
            record["same_as"] = self._objects[id(tensor)]
        else:
            self._alive.append(tensor)  # so that no other tensor gets its identity
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
        key = self._store(name, tensor.detach())
        return record if key == name else {**record, "key": key}

    def _store(self, name: str, tensor: torch.Tensor) -> str:
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


class TensorReader:
    """Makes tensors from records; the same record gives the same object every time."""

    def __init__(self, records: Iterable[Record], values: Mapping[str, torch.Tensor]) -> None:
        self._records = {str(record["name"]): record for record in records}
        self._values = values
        self._stored: dict[str, torch.Tensor] = {}
        self._made: dict[str, torch.Tensor] = {}
        missing = [key for key in self._keys() if key not in values]
        if missing:
            raise ArtifactError(
                f"{len(missing)} tensors are missing ({', '.join(missing[:3])}): restore the file, "
                "or save the artifact again"
            )

    def _keys(self) -> Iterable[str]:
        own = [r for r in self._records.values() if "same_as" not in r and not r.get("meta")]
        return dict.fromkeys(str(record.get("key", record["name"])) for record in own)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor of a record: a Parameter where the record says so.

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
        if name not in self._made:
            self._made[name] = self._make(name, record)
        return self._made[name]

    def _make(self, name: str, record: Record) -> torch.Tensor:
        shape, dtype = tuple(record["shape"]), DTYPES[record["dtype"]]
        if record.get("meta"):
            value = torch.empty(shape, dtype=dtype, device="meta")
        else:
            value = self._load(str(record.get("key", name)), shape, dtype)
        if (value.shape, value.dtype) != (shape, dtype):
            raise ArtifactError(
                f"{name} should be {list(shape)} {dtype}, found {list(value.shape)} {value.dtype}"
            )
        if "stride" in record:
            value = _restride(value, record["stride"])
        is_parameter = record["kind"] == "parameter"
        gradient = bool(record.get("requires_grad", is_parameter))
        if is_parameter:
            return nn.Parameter(value, requires_grad=gradient)
        return value.detach().requires_grad_(gradient)

    def _load(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if key not in self._stored:
            # A copy: the values may be a view of the file, which has another alignment.
            value = self._values[key].clone()
            paired = dtype.is_complex and value.dim() == len(shape) + 1 and value.shape[-1] == 2
            self._stored[key] = torch.view_as_complex(value) if paired else value
        return self._stored[key]


def _restride(value: torch.Tensor, stride: list[int]) -> torch.Tensor:
    if len(stride) != value.dim() or not _is_permuted(value.shape, stride):
        raise ArtifactError(f"strides {stride} do not fit the shape {list(value.shape)}")
    result = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    return result.copy_(value)


def assign(targets: Mapping[str, torch.Tensor], records: Iterable[Record], reader: TensorReader,
           owner: str) -> None:  # fmt: skip
    """Give existing tensors the recorded values, in place, so that sharing is kept.

    Args:
        targets: The tensors by name.
        records: What to assign.
        reader: Where the values are.
        owner: What the tensors belong to, for the message.

    Raises:
        ArtifactError: A name does not exist or has another shape; nothing is assigned then.
    """
    pairs = []
    for record in records:
        name = str(record["name"])
        value = reader.read(name)
        if name not in targets or targets[name].shape != value.shape:
            found = list(targets[name].shape) if name in targets else "nothing"
            raise ArtifactError(
                f"the artifact holds {name} {list(value.shape)}, where {owner} has {found}"
            )
        pairs.append((targets[name], value))
    for target, value in pairs:
        if not value.is_meta:
            target.data = value.detach().to(target.device)
        if target.is_leaf:
            target.requires_grad_(value.requires_grad)
