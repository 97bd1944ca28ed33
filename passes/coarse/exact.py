"""Family `exact`: the fine stage itself, the oracle.

In difference form a parareal network with this family equals the original whatever the guesses
are; in residual form it does where the stages are linear and have no bias (the consistency theorem
of Lee, Park, Lee 2022). It saves nothing: it is for tests and verification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Exact"]


class Exact(nn.Module):
    """Calls the fine stage; its parameters are the stage's own."""

    def __init__(self, fine: nn.Module) -> None:
        super().__init__()
        self.fine = fine

    def forward(self, *arguments: torch.Tensor) -> Any:
        """Propagate (state, inputs) as the fine stage does."""
        return self.fine(*arguments)
