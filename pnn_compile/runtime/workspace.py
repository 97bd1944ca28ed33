"""`Workspace`: what a rank holds of a step while it runs, and its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from passes.errors import RuntimeFault
from passes.schedule.instruction import Instruction
from passes.transform.executor import State
from pnn_compile.runtime.piece import Piece
from pnn_compile.runtime.rank import RankNetwork

__all__ = ["Action", "Like", "Link", "Workspace"]


class Link(Protocol):
    """How a rank passes named tensors to others; messages of two ranks stay in order."""

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send, without waiting for the receiver."""

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Give room for tensors of these shapes and types, without waiting for them."""

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types; `like` is on the meta device."""


Like = Callable[[int, int], dict[str, torch.Tensor]]
"""From a stage and a micro-batch to tensors like those that cross behind it, without data."""

Action = Callable[[Instruction], None]
"""Runs an instruction of one kind."""

_Key = tuple[int, int, int]
"""Stage, micro-batch and iteration."""


class Workspace:
    """What a rank has computed and received of a step, as far as it is still needed.

    Args:
        network: What the rank owns.
        inputs: Inputs of every micro-batch, by argument name.
        link: How it reaches the other ranks.
        like: From a stage and a micro-batch to tensors like those that cross behind it.

    Attributes:
        guess: The guesses that were made here, by stage, micro-batch and iteration.
        fine: The fine stages that ran here.
        coarse: The corrections that ran here.
        state: The states behind stages that are at hand.
        adjoint: Their adjoints, as far as they are known.
        guess_adjoint: What the guesses of stages here go backward from.
        losses: By micro-batch, from when the last stage, or an adjoint behind it, is there.
    """

    def __init__(
        self,
        network: RankNetwork,
        inputs: Sequence[Mapping[str, Any]],
        link: Link,
        like: Like,
    ) -> None:
        self.network = network
        self.executor = network.executor
        self.plan = network.plan
        self.inputs = inputs
        self.link = link
        self.like = like
        self.guess: dict[_Key, Piece] = {}
        self.fine: dict[_Key, Piece] = {}
        self.coarse: dict[_Key, Piece] = {}
        self.state: dict[_Key, State] = {}
        self.adjoint: dict[_Key, State] = {}
        self.guess_adjoint: dict[_Key, State] = {}
        self.losses: dict[int, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return self.network.device

    def send(self, peer: int | None, state: State, like: Mapping[str, torch.Tensor]) -> None:
        """Send the components that `like` names, as it says; one that is not there is zero."""
        assert peer is not None
        for name, value in like.items():
            if name in state and state[name].shape != value.shape:
                raise RuntimeFault(
                    f"{name} is {[*state[name].shape]}, but rank {peer} waits for "
                    f"{[*value.shape]}: the shapes of the inputs are not those of the example"
                )
        self.link.send(
            peer,
            [
                state[name].to(value.dtype)
                if name in state
                else torch.zeros_like(value, device=self.device)
                for name, value in like.items()
            ],
        )

    def expect(self, peer: int | None, like: Mapping[str, torch.Tensor]) -> None:
        """Give room for the components that `like` names; `receive` waits for them."""
        assert peer is not None
        self.link.expect(peer, list(like.values()))

    def receive(self, peer: int | None, like: Mapping[str, torch.Tensor]) -> State:
        """Wait for the components that `like` names."""
        assert peer is not None
        found = self.link.receive(peer, list(like.values()))
        return dict(zip(like, found, strict=True))

    def send_adjoint(self, it: Instruction, adjoint: State) -> None:
        """Send the adjoint of what crosses behind a stage, and the loss with it.

        So the loss is known everywhere before the fine stages run backward, and no rank waits for
        it behind them.
        """
        like = self.like(it.stage, it.batch)
        self.send(it.peer, {**adjoint, _LOSS: self.losses[it.batch]}, {**like, _LOSS: _NUMBER})

    def receive_adjoint(self, it: Instruction) -> State:
        """Wait for what `send_adjoint` sends."""
        found = self.receive(it.peer, {**self.like(it.stage, it.batch), _LOSS: _NUMBER})
        self.losses[it.batch] = found.pop(_LOSS)
        return found


_LOSS = "the loss"
_NUMBER = torch.empty((), dtype=torch.float64, device="meta")
