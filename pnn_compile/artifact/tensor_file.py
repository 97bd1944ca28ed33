"""`TensorFile`: the tensors of a safetensors file, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["TensorFile"]


class TensorFile(Mapping[str, torch.Tensor]):
    """A safetensors file as a mapping that holds no data.

    Args:
        file: The file; it stays open.
    """

    def __init__(self, file: Path) -> None:
        opened: Any = safe_open(file, framework="pt")
        self._file = opened
        self._keys = frozenset(self._file.keys())

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        found: torch.Tensor = self._file.get_tensor(key)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
