"""Runs the pieces of a network to measure them, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from passes.ir.isolation import preserved
from pnn_compile.inputs import device_of

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["evaluating", "measuring"]


@contextmanager
def evaluating(compiled: Compiled) -> Iterator[None]:
    """Put all pieces into evaluation mode, without gradients; modes come back on exit.

    Buffers of the fine stages and of the head come back too; those of guesses and corrections may
    be changed for good (their statistics can be measured anew).
    """
    pieces = (compiled.module, compiled.sequential, compiled.operators.named())
    modes = {module: module.training for piece in pieces for module in piece.modules()}
    with preserved(compiled.sequential), torch.no_grad():
        for piece in pieces:
            piece.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def measuring(compiled: Compiled) -> Iterator[None]:
    """Run pieces in the mode of the network, without gradients; everything comes back on exit.

    A network of several iterations does not hold the operators whose results it does not need
    (the guess of its last stage): they follow its mode and device.
    """
    operators = compiled.operators.named()
    with preserved(compiled.module, operators), torch.no_grad():
        held = set(compiled.module.modules())
        for operator in operators.children():
            operator.to(device_of(compiled.module))
            for module in set(operator.modules()) - held:
                module.training = compiled.module.training
        yield
