"""`Instruction`: one operation of a rank, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kind of an instruction: a computation, or one side of a message."""

    GUESS = "guess"
    FINE = "fine"
    PREDICT = "predict"
    CORRECT = "correct"
    HEAD = "head"
    HEAD_BACKWARD = "head backward"
    COARSE_BACKWARD = "coarse backward"
    FINE_BACKWARD = "fine backward"
    GUESS_BACKWARD = "guess backward"

    # Messages of a chain: the corrected state after a stage.
    SEND = "send state"
    RECEIVE = "receive state"
    SEND_ADJOINT = "send adjoint"
    RECEIVE_ADJOINT = "receive adjoint"

    # Messages of a collapsed sweep: the parts of a residual, and partial sums of the last state.
    # EXPECT posts a receive and returns at once; the RECEIVE that follows waits for the message.
    SEND_GUESS = "send guess"
    EXPECT_GUESS = "expect guess"
    RECEIVE_GUESS = "receive guess"
    SEND_OUTPUT = "send output"
    EXPECT_OUTPUT = "expect output"
    RECEIVE_OUTPUT = "receive output"
    SEND_SUM = "send sum"
    RECEIVE_SUM = "receive sum"
    SEND_SUM_ADJOINT = "send adjoint of the sum"
    RECEIVE_SUM_ADJOINT = "receive adjoint of the sum"
    SEND_OUTPUT_ADJOINT = "send adjoint of an output"
    EXPECT_OUTPUT_ADJOINT = "expect adjoint of an output"
    RECEIVE_OUTPUT_ADJOINT = "receive adjoint of an output"
    SEND_GUESS_ADJOINT = "send adjoint of a guess"
    EXPECT_GUESS_ADJOINT = "expect adjoint of a guess"
    RECEIVE_GUESS_ADJOINT = "receive adjoint of a guess"


SENDS = {
    Kind.SEND: Kind.RECEIVE,
    Kind.SEND_ADJOINT: Kind.RECEIVE_ADJOINT,
    Kind.SEND_GUESS: Kind.RECEIVE_GUESS,
    Kind.SEND_OUTPUT: Kind.RECEIVE_OUTPUT,
    Kind.SEND_SUM: Kind.RECEIVE_SUM,
    Kind.SEND_SUM_ADJOINT: Kind.RECEIVE_SUM_ADJOINT,
    Kind.SEND_OUTPUT_ADJOINT: Kind.RECEIVE_OUTPUT_ADJOINT,
    Kind.SEND_GUESS_ADJOINT: Kind.RECEIVE_GUESS_ADJOINT,
}
"""Every kind that sends, and the kind that receives its message."""

EXPECTS = {
    Kind.EXPECT_GUESS: Kind.RECEIVE_GUESS,
    Kind.EXPECT_OUTPUT: Kind.RECEIVE_OUTPUT,
    Kind.EXPECT_OUTPUT_ADJOINT: Kind.RECEIVE_OUTPUT_ADJOINT,
    Kind.EXPECT_GUESS_ADJOINT: Kind.RECEIVE_GUESS_ADJOINT,
}
"""Every kind that posts a receive, and the kind that waits for the message later."""

FORWARD = (Kind.GUESS, Kind.FINE, Kind.PREDICT, Kind.CORRECT, Kind.HEAD)
"""Kinds that run a network forward, which may draw random numbers."""

RECEIVES = frozenset(SENDS.values())
"""Kinds that wait for a message."""


@dataclass(frozen=True)
class Instruction:
    """One operation of a rank.

    Attributes:
        kind: What it does.
        stage: Number of the stage; for the head, the last one. A message carries the state after
            this stage, the output of the stage, or the guess of its input, or the adjoint of one
            of these.
        batch: Number of the micro-batch.
        peer: The other rank of a message.
        iteration: Number of the parareal iteration, from 0.
    """

    kind: Kind
    stage: int
    batch: int
    peer: int | None = None
    iteration: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """Stage, micro-batch and iteration."""
        return self.stage, self.batch, self.iteration

    def __str__(self) -> str:
        iteration = f", iteration {self.iteration + 1}" if self.iteration else ""
        peer = f", rank {self.peer}" if self.peer is not None else ""
        return f"{self.kind.value} (stage {self.stage}, micro-batch {self.batch}{iteration}{peer})"
