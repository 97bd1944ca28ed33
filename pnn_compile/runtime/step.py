"""`Step`: runs a rank's instructions, forward and backward.

Backward is explicit. Every piece (guess, fine stage, correction, head) is its own autograd graph:
its inputs are cut off from what came before, and their gradients are carried on by hand. So no
communication hides in autograd, and the order of messages is the order of the instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from pnn_compile.runtime.chain import ChainSweep
from pnn_compile.runtime.collapsed import CollapsedSweep
from pnn_compile.runtime.instruction import Instruction, Kind
from pnn_compile.runtime.piece import Piece, leaves
from pnn_compile.runtime.rank import RankNetwork
from pnn_compile.walk import State

__all__ = ["Action", "Like", "Link", "Loss", "Step"]


class Link(Protocol):
    """How a rank passes named tensors to others; messages of two ranks stay in order."""

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send, without waiting for the receiver."""

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types; `like` is on the meta device."""


Loss = Callable[[Any, int], torch.Tensor]
"""From the outputs of one micro-batch, and its number, to a scalar."""

Like = Callable[[int, int], dict[str, torch.Tensor]]
"""From a stage and a micro-batch to tensors like those that cross behind it, without data."""

Action = Callable[[Instruction], None]
"""Runs an instruction of one kind."""

_Key = tuple[int, int, int]
"""Stage, micro-batch and iteration."""


class Step:
    """One forward and backward pass of a rank over micro-batches.

    Args:
        network: What the rank owns.
        inputs: Inputs of every micro-batch, by argument name.
        link: How it reaches the other ranks.
        loss: Of the last stage; None to run forward alone.
        like: From a stage and a micro-batch to tensors like those that cross behind it.
        seed: Of the random numbers of this step. Every piece draws its own in training mode, so
            that dropout does not depend on which rank a piece is on.

    Attributes:
        outputs: Of the model, by micro-batch, where the last stage is.
        losses: By micro-batch, there too.
        guess: The guesses that were made here, by stage, micro-batch and iteration.
        fine: The fine stages that ran here.
        coarse: The corrections that ran here.
        state: The states behind stages that are at hand.
        adjoint: Their adjoints, as far as they are known.
        guess_adjoint: What the guesses of stages here go backward from.
    """

    def __init__(
        self,
        network: RankNetwork,
        inputs: Sequence[Mapping[str, Any]],
        link: Link,
        loss: Loss | None,
        like: Like,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.seed = seed
        self.walker = network.walker
        self.plan = network.plan
        self.inputs = inputs
        self.link = link
        self.loss = loss
        self.like = like
        self.outputs: dict[int, Any] = {}
        self.losses: dict[int, torch.Tensor] = {}
        self.guess: dict[_Key, Piece] = {}
        self.fine: dict[_Key, Piece] = {}
        self.coarse: dict[_Key, Piece] = {}
        self.state: dict[_Key, State] = {}
        self.adjoint: dict[_Key, State] = {}
        self.guess_adjoint: dict[_Key, State] = {}
        self._head: dict[int, Piece] = {}
        sweep = CollapsedSweep(self) if self.plan.sweep == "collapsed" else ChainSweep(self)
        self._actions: dict[Kind, Action] = {
            Kind.GUESS: self._guess_forward,
            Kind.HEAD: self._head_forward,
            Kind.HEAD_BACKWARD: self._head_backward,
            Kind.GUESS_BACKWARD: self._guess_backward,
            **sweep.actions,
        }

    def run(self, instruction: Instruction) -> None:
        """Run one instruction."""
        with self._random(instruction):
            self._actions[instruction.kind](instruction)

    @contextmanager
    def _random(self, it: Instruction) -> Iterator[None]:
        """Give a piece random numbers of its own."""
        if it.kind not in _DRAWING or not self.network.training:
            yield
            return
        device = _device(self.network)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            text = f"{self.seed} {it.kind.name} {it.stage} {it.batch} {it.iteration}"
            digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(digest))
            yield

    # Messages

    def send(self, peer: int | None, state: State, like: Mapping[str, torch.Tensor]) -> None:
        """Send the components that `like` names, as it says; one that is not there is zero."""
        assert peer is not None
        device = _device(self.network)
        self.link.send(
            peer,
            [
                state[name].to(value.dtype)
                if name in state
                else torch.zeros_like(value, device=device)
                for name, value in like.items()
            ],
        )

    def receive(self, peer: int | None, like: Mapping[str, torch.Tensor]) -> State:
        """Wait for the components that `like` names."""
        assert peer is not None
        found = self.link.receive(peer, list(like.values()))
        return dict(zip(like, found, strict=True))

    # What every kind of sweep begins and ends with

    def _guess_forward(self, it: Instruction) -> None:
        self.guess[it.key] = Piece({}, self.walker.guess(it.stage, self.inputs[it.batch]))

    def _head_forward(self, it: Instruction) -> None:
        entering = leaves(self.state.pop(it.key))
        outputs = self.walker.head(entering, self.inputs[it.batch])
        self.outputs[it.batch] = outputs
        if self.loss is not None:
            loss = self.loss(outputs, it.batch)
            self.losses[it.batch] = loss.detach()
            self._head[it.batch] = Piece(entering, {"loss": loss})

    def _head_backward(self, it: Instruction) -> None:
        piece = self._head.pop(it.batch)
        one = torch.ones_like(self.losses[it.batch])
        self.adjoint[it.key] = piece.backward({"loss": one})

    def _guess_backward(self, it: Instruction) -> None:
        """Run the guess backward, which residual and fine stage both read."""
        self.guess.pop(it.key).backward(self.guess_adjoint.pop(it.key))


_DRAWING = (Kind.GUESS, Kind.FINE, Kind.CORRECT, Kind.HEAD)
"""Instructions that run a network, which may draw random numbers."""


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))
