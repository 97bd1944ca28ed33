"""`Learner`: parameters with their optimizer, its schedule and, in float16, a scaled loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Learner", "Trainer", "warm_cosine"]

Trainer = Callable[[Sequence[nn.Parameter], int], tuple[torch.optim.Optimizer, LambdaLR]]
"""From parameters and a number of steps to an optimizer with its schedule."""


def warm_cosine(total: int) -> Callable[[int], float]:
    """A schedule of `total` steps: it warms up over a tenth, and falls to zero along a cosine."""
    warm = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos((step - warm) / max(1, total - warm) * math.pi))

    return factor


class Learner:
    """Parameters that learn from a loss; none of them is fine, then nothing happens.

    Args:
        parameters: What learns.
        trainer: Makes the optimizer and its schedule.
        total: Steps to take in all.
        autocast: Precision of the forward pass. The loss is scaled for float16, whose small
            gradients would be zero otherwise; a step whose gradients overflow is left out
            (Micikevicius et al., "Mixed precision training", 2018).
        clip_norm: Largest norm of the gradient, or None.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        trainer: Trainer,
        total: int,
        *,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._clip_norm = clip_norm
        if not self.parameters:
            return
        self._optimizer, self._schedule = trainer(self.parameters, total)
        device = self.parameters[0].device.type
        self._scaler = torch.amp.GradScaler(device, enabled=autocast is torch.float16)

    def learn(self, loss: torch.Tensor) -> None:
        """Take one step; nothing but the parameters gets a gradient."""
        if not self.parameters:
            return
        scaler = self._scaler
        self._optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward(inputs=self.parameters)  # type: ignore[no-untyped-call]
        if self._clip_norm is not None:
            scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        scale = scaler.get_scale()
        scaler.step(self._optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # it falls where the step was left out
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, the parameters left out."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        if not self.parameters:
            return {}
        return {"optimizer": self._optimizer, "schedule": self._schedule, "scaler": self._scaler}
