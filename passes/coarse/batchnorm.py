"""Recalibrate the BatchNorm statistics of a coarse network on the states that it is called with.

A network of copied blocks carries the statistics of the trunk, but it takes larger steps and is
called on guesses and residuals. `recalibrate` replaces them by the average over sample calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate(network: nn.Module, calls: Iterable[tuple[Any, ...]]) -> int:
    """Set the running statistics of every BatchNorm to their average over calls.

    Each layer normalizes by the statistics of the current batch, so later layers are calibrated on
    the outputs of layers that are calibrated already. Modes, momentum, weights and gradients do not
    change, dropout is off, and layers without running statistics are left alone. Without calls,
    nothing changes.

    Args:
        network: The network, such as a coarse propagator; its BatchNorm layers are changed.
        calls: The positional arguments of each call, one batch each; iterated once, so a generator
            holds one batch at a time.

    Returns:
        The number of layers that were recalibrated.

    Raises:
        ValueError: A batch gives a layer one value per channel only, too few for a variance.
    """
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    called = False
    with _averaging(network, layers), torch.no_grad():
        for arguments in calls:
            if not called:
                for layer in layers:
                    layer.reset_running_stats()
            called = True
            network(*arguments)
    return len(layers) if called else 0


@contextmanager
def _averaging(network: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Put only these layers into training mode, with a cumulative average (momentum None)."""
    modes = {module: module.training for module in network.modules()}
    momenta = [layer.momentum for layer in layers]
    try:
        network.eval()
        for layer in layers:
            layer.train()
            layer.momentum = None
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
