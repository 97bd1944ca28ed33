"""BatchNorm statistics of a coarse network, measured on the states that it really sees.

A network made of copied blocks carries the statistics of the trunk, but it takes larger steps and
is called on guesses and residuals. Its statistics are replaced by the average over given calls.
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

    The first call sees the first layer's new statistics at once (it runs on those of the batch), so
    layers one after another are consistent. Nothing else changes: modes, momentum, weights and
    gradients are as they were, layers that draw random numbers are quiet, and layers without
    running statistics are left alone. Without calls, and for a network without such layers,
    nothing changes at all.

    Args:
        network: The network, such as the correction of a stage; its BatchNorm layers are changed.
        calls: The positional arguments of each call: one batch each, iterated once, so that a
            generator never holds more than one.

    Returns:
        The number of layers that were recalibrated.

    Raises:
        ValueError: A batch gives a layer one value per channel only, too few for a variance.
    """
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    seen = False
    with _averaging(network, layers), torch.no_grad():
        for arguments in calls:
            if not seen:
                for layer in layers:
                    layer.reset_running_stats()
            seen = True
            network(*arguments)
    return len(layers) if seen else 0


@contextmanager
def _averaging(network: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let these layers alone run in training mode, with a cumulative average (no momentum)."""
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
