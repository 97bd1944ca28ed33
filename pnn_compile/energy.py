"""Relative errors of tensors that arrive batch by batch."""

from __future__ import annotations

import torch

__all__ = ["Energy"]


class Energy:
    """Root of the energy of an error over the energy of what was wanted."""

    def __init__(self) -> None:
        self._error = 0.0
        self._wanted = 0.0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add one tensor and what it should be."""
        self._error += (found.double() - wanted.double()).square().sum().item()
        self._wanted += wanted.double().square().sum().item()

    @property
    def share(self) -> float:
        """The relative error; 0 where nothing was wanted."""
        return (self._error / self._wanted) ** 0.5 if self._wanted else 0.0
