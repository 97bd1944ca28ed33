"""`RankNetwork`: the part of a parareal network that one rank owns, forward and backward.

Backward is explicit. Every piece (guess, fine stage, correction, head) is its own autograd graph:
its inputs are cut off from what came before, and their gradients are carried on by hand. So no
communication hides in autograd, and the order of messages is the order of the instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from passes.assemble import reads_guess
from passes.errors import RuntimeFault
from pnn_compile.runtime.schedule import Instruction, Kind
from pnn_compile.walk import State, Walker, plus

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["Link", "RankNetwork", "Step"]


class Link(Protocol):
    """How a rank passes named tensors to others; messages of two ranks stay in order."""

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send, without waiting for the receiver."""

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types; `like` is on the meta device."""


Loss = Callable[[Any, int], torch.Tensor]
"""From the outputs of one micro-batch, and its number, to a scalar."""


class RankNetwork(nn.Module):
    """The guesses, fine stages, corrections and head that live on one rank.

    Args:
        compiled: The whole network; the rank's pieces are shared with it, not copied.
        placement: Rank of every stage.
        rank: This rank.

    Raises:
        RuntimeFault: The network is of a kind that does not run on several ranks yet.
    """

    def __init__(self, compiled: Network, placement: Sequence[int], rank: int) -> None:
        super().__init__()
        _check(compiled, placement)
        self.plan = compiled.plan
        self.placement = tuple(placement)
        self.rank = rank
        self.walker = Walker(compiled)
        self.own = [stage for stage, place in enumerate(placement) if place == rank]
        for stage in self.own:
            self.add_module(f"fine_{stage}", compiled.stages.fine[stage])
            if stage:
                self.add_module(f"preprocess_{stage}", self.walker.guesses[stage].network)
                self.add_module(f"coarse_{stage}", self.walker.corrections[stage].network)
        if self.last in self.own:
            self.add_module("head", compiled.stages.head)

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.plan.stages) - 1


def _check(compiled: Network, placement: Sequence[int]) -> None:
    plan = compiled.plan
    if len(placement) != len(plan.stages):
        raise RuntimeFault(
            f"{plan.model} has {len(plan.stages)} stages, but {len(placement)} were placed"
        )
    if sorted(set(placement)) != list(range(max(placement) + 1)):
        raise RuntimeFault(f"every rank needs a stage (stages were placed on {list(placement)})")
    if plan.sweep != "chain" or plan.iterations != 1:
        raise RuntimeFault(
            f"ranks run the chain sweep with one iteration (the plan has sweep {plan.sweep!r}, "
            f"K = {plan.iterations}): compile with sweep='chain', iterations=1"
        )


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
    """

    def __init__(
        self,
        network: RankNetwork,
        inputs: Sequence[Mapping[str, Any]],
        link: Link,
        loss: Loss | None,
        like: Callable[[int, int], dict[str, torch.Tensor]],
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
        self._guess: dict[tuple[int, int], _Piece] = {}
        self._fine: dict[tuple[int, int], _Piece] = {}
        self._coarse: dict[tuple[int, int], _Piece] = {}
        self._head: dict[int, _Piece] = {}
        self._state: dict[tuple[int, int], State] = {}
        self._adjoint: dict[tuple[int, int], State] = {}
        self._actions: dict[Kind, Callable[[Instruction], None]] = {
            Kind.GUESS: self._guess_forward,
            Kind.FINE: self._fine_forward,
            Kind.RECEIVE: self._receive,
            Kind.CORRECT: self._correct,
            Kind.SEND: self._send,
            Kind.HEAD: self._head_forward,
            Kind.HEAD_BACKWARD: self._head_backward,
            Kind.RECEIVE_ADJOINT: self._receive_adjoint,
            Kind.COARSE_BACKWARD: self._coarse_backward,
            Kind.SEND_ADJOINT: self._send_adjoint,
            Kind.FINE_BACKWARD: self._fine_backward,
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
            text = f"{self.seed} {it.kind.name} {it.stage} {it.batch}"
            digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(digest))
            yield

    # Forward

    def _guess_forward(self, it: Instruction) -> None:
        guess = self.walker.guess(it.stage, self.inputs[it.batch])
        self._guess[it.stage, it.batch] = _Piece({}, guess)

    def _fine_forward(self, it: Instruction) -> None:
        entering = {}
        if it.stage:
            entering = _leaves(self._guess[it.stage, it.batch].outputs)
        produced = self.walker.fine(it.stage, entering, self.inputs[it.batch])
        self._fine[it.stage, it.batch] = _Piece(entering, produced)

    def _receive(self, it: Instruction) -> None:
        assert it.peer is not None
        like = self.like(it.stage, it.batch)
        found = self.link.receive(it.peer, list(like.values()))
        self._state[it.stage, it.batch] = dict(zip(like, found, strict=True))

    def _correct(self, it: Instruction) -> None:
        stage, key = self.plan.stages[it.stage], (it.stage, it.batch)
        produced = _detached(self._fine[key].outputs)
        entering: State = {}
        if it.stage:
            entering = self._state.pop((it.stage - 1, it.batch))
            guess = _leaves(self._guess[key].outputs)
            residual = _leaves({n: entering[n] - guess[n].detach() for n in stage.consumes})
            arguments = self.walker.correction_arguments(
                it.stage, guess, list(residual.values()), self.inputs[it.batch]
            )
            names = tuple(value.name for value in self.plan.corrects(it.stage))
            correction = _named(names, self.walker.corrections[it.stage].network(*arguments))
            read = reads_guess(self.plan, self.walker.corrections[it.stage].spec)
            self._coarse[key] = _Piece({**_tagged(guess if read else {}), **residual}, correction)
            produced = plus(produced, _detached(correction))
        self._state[key] = self.walker.advance(it.stage, entering, produced)

    def _send(self, it: Instruction) -> None:
        assert it.peer is not None
        like = self.like(it.stage, it.batch)
        state = self._state.pop((it.stage, it.batch))
        self.link.send(it.peer, [state[name].to(value.dtype) for name, value in like.items()])

    def _head_forward(self, it: Instruction) -> None:
        entering = _leaves(self._state.pop((it.stage, it.batch)))
        outputs = self.walker.head(entering, self.inputs[it.batch])
        self.outputs[it.batch] = outputs
        if self.loss is not None:
            loss = self.loss(outputs, it.batch)
            self.losses[it.batch] = loss.detach()
            self._head[it.batch] = _Piece(entering, {"loss": loss})

    # Backward

    def _head_backward(self, it: Instruction) -> None:
        piece = self._head.pop(it.batch)
        self._adjoint[it.stage, it.batch] = piece.backward({})

    def _receive_adjoint(self, it: Instruction) -> None:
        assert it.peer is not None
        like = self.like(it.stage, it.batch)
        found = self.link.receive(it.peer, list(like.values()))
        self._adjoint[it.stage, it.batch] = dict(zip(like, found, strict=True))

    def _coarse_backward(self, it: Instruction) -> None:
        """Carry the adjoint through the coarse network to the state behind the stage before."""
        key, stage = (it.stage, it.batch), self.plan.stages[it.stage]
        adjoint = self._adjoint[key]
        moved = self._coarse[key].backward(adjoint)
        # What crosses without being computed here goes on as it is.
        carried = {name: a for name, a in adjoint.items() if name not in stage.produces}
        before = dict(carried)
        for name in stage.consumes:
            if name in moved:
                before[name] = before[name] + moved[name] if name in before else moved[name]
        self._adjoint[it.stage - 1, it.batch] = before

    def _send_adjoint(self, it: Instruction) -> None:
        assert it.peer is not None
        adjoint = self._adjoint.pop((it.stage, it.batch))
        self.link.send(
            it.peer,
            [
                adjoint[name].to(value.dtype)
                if name in adjoint
                else torch.zeros_like(value, device=_device(self.network))
                for name, value in self.like(it.stage, it.batch).items()
            ],
        )

    def _fine_backward(self, it: Instruction) -> None:
        """Run the fine stage backward, then its guess, which residual and fine stage both read."""
        key = (it.stage, it.batch)
        entering = self._fine.pop(key).backward(self._adjoint.pop(key))
        if not it.stage:
            return
        coarse = self._coarse.pop(key).gradients
        total: State = dict(entering)
        for name in self.plan.stages[it.stage].consumes:
            if _TAG + name in coarse:
                total = _add(total, name, coarse[_TAG + name])
            if name in coarse:
                total = _add(total, name, -coarse[name])
        self._guess.pop(key).backward(total)


_DRAWING = (Kind.GUESS, Kind.FINE, Kind.CORRECT, Kind.HEAD)
"""Instructions that run a network, which may draw random numbers."""

_TAG = "guess of "


def _tagged(state: State) -> State:
    return {_TAG + name: value for name, value in state.items()}


def _add(state: State, name: str, value: torch.Tensor) -> State:
    return {**state, name: state[name] + value if name in state else value}


class _Piece:
    """One autograd graph: its leaves, its outputs, and after backward the leaves' gradients."""

    def __init__(self, leaves: State, outputs: State) -> None:
        self.leaves = leaves
        self.outputs = outputs
        self.gradients: State = {}

    def backward(self, adjoint: State) -> State:
        """Run backward from the adjoints of the outputs; a missing one is zero."""
        pairs = [
            (value, adjoint.get(name))
            for name, value in self.outputs.items()
            if value.requires_grad and (name in adjoint or not value.dim())
        ]
        if pairs:
            values, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(values, gradients)
        self.gradients = {n: leaf.grad for n, leaf in self.leaves.items() if leaf.grad is not None}
        self.leaves, self.outputs = {}, {}
        return self.gradients


def _leaves(state: State) -> State:
    return {
        name: value.detach().requires_grad_(torch.is_grad_enabled())
        for name, value in state.items()
    }


def _detached(state: State) -> State:
    return {name: value.detach() for name, value in state.items()}


def _named(names: tuple[str, ...], result: Any) -> State:
    return dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))
