"""One optimizer step with its learning rate schedule and, in float16, a scaled loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

MakeOptimizer = Callable[[Sequence[nn.Parameter], int], tuple[torch.optim.Optimizer, LambdaLR]]
"""From parameters and a number of steps to an optimizer with its learning rate schedule."""


def warm_cosine(total: int) -> Callable[[int], float]:
    """Return a learning rate factor by step: linear warm-up over a tenth, then a cosine to zero.

    >>> factor = warm_cosine(20)
    >>> [round(factor(step), 2) for step in (0, 1, 2, 11, 20)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos((step - warm) / max(1, total - warm) * math.pi))

    return factor


class OptimizerStep:
    """Optimizer, schedule and gradient scaler of a parameter list; a no-op if the list is empty.

    Args:
        parameters: The parameters to train.
        make_optimizer: Makes the optimizer and its schedule.
        total: Number of training steps.
        autocast: Precision of the forward pass. The loss is scaled for float16, whose small
            gradients would be zero otherwise; a step whose gradients overflow is skipped
            (Micikevicius et al., "Mixed precision training", 2018).
        clip_norm: Largest norm of the gradient, or None.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
        total: int,
        *,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._clip_norm = clip_norm
        if not self.parameters:
            return
        self._optimizer, self._schedule = make_optimizer(self.parameters, total)
        device = self.parameters[0].device.type
        self._scaler = torch.amp.GradScaler(device, enabled=autocast is torch.float16)

    def step(self, loss: torch.Tensor) -> None:
        """Take one step; no tensor but the parameters receives a gradient."""
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
        if scaler.get_scale() >= scale:  # it falls where the step was skipped
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, schedule and scaler; the parameters are not in it."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        if not self.parameters:
            return {}
        return {"optimizer": self._optimizer, "schedule": self._schedule, "scaler": self._scaler}
