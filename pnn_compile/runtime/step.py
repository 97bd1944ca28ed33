"""`Step`: runs a rank's instructions, forward and backward.

Backward is explicit. Every piece (guess, fine stage, correction, head) is its own autograd graph:
its inputs are cut off from what came before, and their gradients are carried on by hand. So no
communication hides in autograd, and the order of messages is the order of the instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from passes.ir.frame_stack import with_room
from passes.schedule.instruction import FORWARD, Instruction, Kind
from pnn_compile.runtime.chain import ChainSweep
from pnn_compile.runtime.collapsed import CollapsedSweep
from pnn_compile.runtime.piece import Piece, leaves
from pnn_compile.runtime.rank import RankNetwork
from pnn_compile.runtime.workspace import Action, Like, Link, Workspace

__all__ = ["Loss", "Step"]


Loss = Callable[[Any, int], torch.Tensor]
"""From the outputs of one micro-batch, and its number, to a scalar."""


class Step(Workspace):
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
        super().__init__(network, inputs, link, like)
        self.loss = loss
        self.seed = seed
        self.outputs: dict[int, Any] = {}
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
            with_room(self._actions[instruction.kind], instruction)

    @contextmanager
    def _random(self, it: Instruction) -> Iterator[None]:
        """Give a piece random numbers of its own."""
        if it.kind not in FORWARD or not self.network.training:
            yield
            return
        text = f"{self.seed} {it.kind.name} {it.stage} {it.batch} {it.iteration}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        # torch.manual_seed would take a millisecond: it looks for every kind of device.
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        before = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(int.from_bytes(digest))
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)

    # What every kind of sweep begins and ends with

    def _guess_forward(self, it: Instruction) -> None:
        self.guess[it.key] = Piece({}, self.executor.guess(it.stage, self.inputs[it.batch]))

    def _head_forward(self, it: Instruction) -> None:
        entering = leaves(self.state.pop(it.key))
        outputs = self.executor.head(entering, self.inputs[it.batch])
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
