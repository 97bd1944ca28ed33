"""How a network is called in training: in parallel, one stage after another, or with a penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch

import pnn_compile as pnn

__all__ = ["REGIMES", "Interfaces", "Regime", "Serial"]


class Regime:
    """The network as it is.

    Args:
        network: The network.
    """

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self.network = network

    def __call__(self, x: torch.Tensor, progress: float) -> torch.Tensor:
        """Return the outputs; `progress` is the share of the training that is done."""
        return self.network(x)

    def penalty(self) -> torch.Tensor | float:
        """Return what the last call adds to the loss."""
        return 0.0

    def compile(self) -> None:
        """Compile the network."""
        self.network = torch.compile(self.network)


class Interfaces(Regime):
    """A penalty that draws guesses to the states they stand for, lambda mean |x_j - y_(j-1)|^2.

    Relative to the mean square of y_(j-1), to which no gradient goes; the mean is over interfaces.

    Args:
        compiled: The network, with states of one tensor.
        weight: lambda.
    """

    def __init__(self, compiled: pnn.Compiled, weight: float) -> None:
        super().__init__(compiled.module)
        self._weight = weight
        self._outputs: dict[str, torch.Tensor] = {}
        self._faces = range(1, len(compiled.plan.stages))
        for name, module in compiled.module.named_children():
            if name.startswith(("fine_", "preprocess_")):
                module.register_forward_hook(self._keep(name))

    def penalty(self) -> torch.Tensor:
        """Return the weighted penalty of the last call."""
        errors = []
        for stage in self._faces:
            state = self._outputs[f"fine_{stage - 1}"].detach()
            error = self._outputs[f"preprocess_{stage}"] - state
            errors.append(error.square().mean() / state.square().mean())
        return self._weight * torch.stack(errors).mean()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(*call: torch.Tensor) -> None:
            self._outputs[name] = call[-1]

        return hook


class Serial(Regime):
    """One stage after another for a part of the training, which leaves the operators untrained.

    Args:
        compiled: The network.
        first: Share of the training at its beginning.
        last: Share of the training at its end.
    """

    def __init__(self, compiled: pnn.Compiled, first: float = 0.0, last: float = 0.0) -> None:
        super().__init__(compiled.module)
        self._sequential: Callable[..., torch.Tensor] = compiled.sequential.train()
        self._first, self._last = first, 1 - last

    def __call__(self, x: torch.Tensor, progress: float) -> torch.Tensor:
        """Return the outputs of the network that is trained at that time."""
        serial = progress < self._first or progress >= self._last
        outputs = (self._sequential if serial else self.network)(x)
        return outputs

    def compile(self) -> None:
        """Compile both ways to call the network."""
        super().compile()
        self._sequential = torch.compile(self._sequential)


REGIMES: dict[str, Callable[[pnn.Compiled], Regime]] = {
    "guesses drawn to states, 0.01": lambda compiled: Interfaces(compiled, 0.01),
    "guesses drawn to states, 0.1": lambda compiled: Interfaces(compiled, 0.1),
    "guesses drawn to states, 1": lambda compiled: Interfaces(compiled, 1),
    "serial for the first half": lambda compiled: Serial(compiled, first=0.5),
    "serial for the last tenth": lambda compiled: Serial(compiled, last=0.1),
    "serial for the last quarter": lambda compiled: Serial(compiled, last=0.25),
}
"""Regimes of a network with copied blocks, by name."""
