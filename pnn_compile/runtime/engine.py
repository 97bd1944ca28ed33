"""Run the instruction list of a rank, forward and backward: the engine.

One training step of two stages on two ranks, one micro-batch (x_1 guess, y_j fine output, u_j
corrected state, a_j adjoint of u_j), top to bottom in time:

    rank 0                                    rank 1
    FINE 0             y_0 = g_0(inputs)      GUESS 1            x_1 = C_1(inputs)
                                              FINE 1             y_1 = g_1(x_1)
    CORRECT 0          u_0 = y_0, exact
    SEND 0             ---- u_0 ------------> RECEIVE 0
                                              CORRECT 1          u_1 = y_1 + F_1(u_0 - x_1)
                                              HEAD 1             loss = L(h(u_1))
                                              HEAD_BACKWARD 1    a_1 = dloss / du_1
                                              COARSE_BACKWARD 1  a_0 = F_1'(u_0 - x_1)^T a_1
    RECEIVE_ADJOINT 0  <--- a_0 and loss ---- SEND_ADJOINT 0
    FINE_BACKWARD 0    weights of g_0         FINE_BACKWARD 1    weights of g_1: g_1'(x_1)^T a_1
                                              GUESS_BACKWARD 1   weights of C_1: that minus a_0

Both fine stages run at the same time in both directions; only the lines between them wait for the
other rank. `passes/schedule/lists.py` has the order of the messages for any number of ranks.

Backward is explicit. Every piece is a separate autograd graph: its inputs are detached, and the
engine passes their gradients on. So autograd sends no messages, and their order is the order of the
instructions.

All micro-batches go forward before the first one goes backward. So the loss is computed once, from
the outputs of all of them, after the last head: it is the loss of the whole batch, whatever it
averages over or compares.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault
from passes.ir.direct_call import with_frame_headroom
from passes.schedule.instruction import FORWARD, Instruction, Kind
from passes.schedule.simulate import TimelineSpan
from passes.schedule.verify import execution_order
from passes.transform.executor import State
from pnn_compile.inputs import batch_size
from pnn_compile.runtime import chain, collapsed
from pnn_compile.runtime.rank_pieces import PieceGraph, RankPieces, add_to, as_leaves
from pnn_compile.runtime.transport import InProcess, Transport

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

Loss = Callable[[list[Any]], torch.Tensor]
"""From the outputs of all micro-batches to a scalar."""

StateShapes = Callable[[int, int], dict[str, torch.Tensor]]
"""From a stage and a micro-batch to meta tensors like the state after that stage."""

Handler = Callable[["Engine", Instruction], None]
"""Runs an instruction of one kind."""

_Key = tuple[int, int, int]
"""Stage, micro-batch and iteration."""


class Engine:
    """Run one step of a rank over micro-batches.

    Values are stored by `Instruction.key`, as long as a later instruction needs them.

    Args:
        pieces: The pieces of the rank.
        inputs: Inputs of every micro-batch, by argument name.
        transport: Messages to and from the other ranks.
        shapes: Shapes of the states between stages.
        loss: Loss function, for the last stage; None to run forward only.
        seed: Seed of this step. Every piece draws separate random numbers in training mode, so that
            dropout does not depend on the placement.
        synchronize: Whether to wait for the GPU after every instruction, for exact `seconds`.

    Raises:
        RuntimeFault: A loss, for a network whose coarse steps share the weights of the trunk.

    Attributes:
        guesses: Preprocessing operators that ran here.
        fine: Fine stages that ran here.
        coarse: Corrections that ran here.
        predictions: States after stages by coarse steps, to be corrected here.
        states: States after stages; in a collapsed sweep this rank's share of the last state.
        adjoints: Adjoints of these states, summed so far.
        guess_adjoints: Adjoints of the guesses that were computed here.
        remote_guesses: Collapsed sweep: guesses of other ranks.
        remote_outputs: Collapsed sweep: outputs of fine stages of other ranks.
        output_adjoints: Collapsed sweep: adjoints of outputs, from the corrections that read them.
        outputs: Outputs of the model by micro-batch, on the rank of the last stage.
        objective: Graph of the loss, from the last head to the first backward.
        loss_value: The loss, once it was computed here or arrived with an adjoint.
        exchanging: Whether the last instruction was a message to or from another rank.
        seconds: Seconds by kind of instruction; on a GPU to launch it, unless synchronized.
        spans: Start and end of every instruction, by `time.perf_counter`.
    """

    def __init__(
        self,
        pieces: RankPieces,
        inputs: Sequence[Mapping[str, Any]],
        transport: Transport,
        shapes: StateShapes,
        loss: Loss | None = None,
        seed: int = 0,
        *,
        synchronize: bool = False,
    ) -> None:
        if loss is not None and pieces.plan.predicts:
            raise RuntimeFault(
                "ranks do not train the coarse steps of a loop in time, which share the weights of "
                "the trunk: train the model itself, or compiled.module in one process"
            )
        self.pieces = pieces
        self.plan = pieces.plan
        self.executor = pieces.executor
        self.device = pieces.device
        self.inputs = inputs
        self.transport = transport
        self.shapes = shapes
        self.loss = loss
        self._seed = seed
        self._synchronize = synchronize and torch.cuda.is_available()
        self._handlers = _HANDLERS["collapsed" if self.plan.sweep == "collapsed" else "chain"]
        self.guesses: dict[_Key, PieceGraph] = {}
        self.fine: dict[_Key, PieceGraph] = {}
        self.coarse: dict[_Key, PieceGraph] = {}
        self.predictions: dict[_Key, State] = {}
        self.heads: dict[_Key, PieceGraph] = {}
        self.states: dict[_Key, State] = {}
        self.adjoints: dict[_Key, State] = {}
        self.guess_adjoints: dict[_Key, State] = {}
        self.remote_guesses: dict[_Key, State] = {}
        self.remote_outputs: dict[_Key, State] = {}
        self.output_adjoints: dict[_Key, State] = {}
        self.outputs: dict[int, Any] = {}
        self.objective: torch.Tensor | None = None
        self.loss_value = torch.zeros((), device="cpu")
        self.exchanging = False
        self.seconds: dict[Kind, float] = dict.fromkeys(Kind, 0.0)
        self.spans: list[TimelineSpan] = []

    def run_list(self, instructions: Sequence[Instruction]) -> None:
        """Run the list of this rank.

        Raises:
            RuntimeFault: An instruction failed; it names rank, stage, modules and shapes.
        """
        for instruction in instructions:
            self.exchanging = instruction.peer is not None
            try:
                self.run(instruction)
            except RuntimeFault:
                raise
            except Exception as error:
                raise self._failure(instruction, error) from error

    def run(self, it: Instruction) -> None:
        """Run one instruction."""
        start = time.perf_counter()
        handler = self._handlers[it.kind]
        if it.kind in FORWARD:
            with self._autocast(), self._random_numbers(it):
                with_frame_headroom(handler, self, it)
        else:
            with_frame_headroom(handler, self, it)
        if self._synchronize:
            torch.cuda.synchronize()
        end = time.perf_counter()
        self.seconds[it.kind] += end - start
        self.spans.append(TimelineSpan(it, start, end))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.pieces.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.pieces.autocast)

    @contextmanager
    def _random_numbers(self, it: Instruction) -> Iterator[None]:
        """Seed the generators for one piece in training mode, and restore their states."""
        if not self.pieces.training:
            yield
            return
        text = f"{self._seed} {it.kind.name} {it.stage} {it.batch} {it.iteration}"
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

    # Messages

    def send(self, peer: int | None, state: State, like: Mapping[str, torch.Tensor]) -> None:
        """Send the components that `like` names, in its precision; a missing one is zero."""
        assert peer is not None
        for name, value in like.items():
            if name in state and state[name].shape != value.shape:
                raise RuntimeFault(
                    f"{name} is {[*state[name].shape]}, but rank {peer} expects "
                    f"{[*value.shape]}: the shapes of the inputs are not those of the example"
                )
        self.transport.send(
            peer,
            [
                state[name].to(value.dtype)
                if name in state
                else torch.zeros_like(value, device=self.device)
                for name, value in like.items()
            ],
        )

    def expect(self, peer: int | None, like: Mapping[str, torch.Tensor]) -> None:
        """Post a receive for the components that `like` names; `receive` waits for them."""
        assert peer is not None
        self.transport.expect(peer, [*like.values()])

    def receive(self, peer: int | None, like: Mapping[str, torch.Tensor]) -> State:
        """Wait for the components that `like` names."""
        assert peer is not None
        tensors = self.transport.receive(peer, [*like.values()])
        return dict(zip(like, tensors, strict=True))

    def send_adjoint(self, it: Instruction, adjoint: State) -> None:
        """Send the adjoint of the state after a stage, and the loss with it.

        So every rank has the loss before its fine stages run backward, and none waits for it after
        them.
        """
        like = {**self.shapes(it.stage, it.batch), _LOSS: _NUMBER}
        self.send(it.peer, {**adjoint, _LOSS: self.loss_value}, like)

    def receive_adjoint(self, it: Instruction) -> None:
        """Wait for the adjoint and the loss that `send_adjoint` sends."""
        adjoint = self.receive(it.peer, {**self.shapes(it.stage, it.batch), _LOSS: _NUMBER})
        self.loss_value = adjoint.pop(_LOSS)
        add_to(self.adjoints, it.key, adjoint)

    def _failure(self, it: Instruction, error: Exception) -> RuntimeFault:
        """Describe a failure: rank, instruction, modules and shapes."""
        stage = self.plan.stages[it.stage]
        shapes = {
            name: list(value.shape)
            for name, value in self.inputs[it.batch].items()
            if isinstance(value, torch.Tensor)
        }
        advice = ""
        if _is_memory(error):
            advice = (
                "; out of memory: distribute() with more micro-batches (batches=) or "
                "recompute=True, or compile more stages for more ranks"
            )
        return RuntimeFault(
            f"rank {self.pieces.rank} failed at {it}, modules "
            f"{stage.first_module or stage.first} to {stage.last_module or stage.last}, inputs "
            f"{shapes}: {type(error).__name__}: {error}{advice}"
        )


_LOSS = "the loss"
_NUMBER = torch.empty((), dtype=torch.float64, device="meta")


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out; on the CPU only the message of torch tells."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


# Handlers that all sweeps share


def _guess(engine: Engine, it: Instruction) -> None:
    before = as_leaves(_before_window(engine, it))
    guess = engine.executor.guess(it.stage, engine.inputs[it.batch], before)
    engine.guesses[it.key] = PieceGraph(before, guess)


def _before_window(engine: Engine, it: Instruction) -> State:
    """Return what a guess reads of the state before its window; nothing in the first window."""
    start, spec = engine.plan.window_start(it.stage), engine.plan.stages[it.stage].preprocess
    if not start or spec is None:
        return {}
    state = engine.states[start - 1, it.batch, it.iteration]
    return {name: state[name] for name in spec.options.state}


def _head(engine: Engine, it: Instruction) -> None:
    entering = as_leaves(engine.states.pop(it.key))
    outputs = engine.executor.head(entering, engine.inputs[it.batch])
    engine.outputs[it.batch] = outputs
    if engine.loss is None:
        return
    count = len(engine.inputs)
    # The graph of a single micro-batch goes on into the loss: there is nothing to wait for.
    results, engine.outputs[it.batch] = ({}, outputs) if count == 1 else _cut_off(outputs)
    engine.heads[it.key] = PieceGraph(entering, results)
    if it.batch + 1 == count:
        engine.objective = engine.loss([engine.outputs[number] for number in range(count)])
        engine.loss_value = engine.objective.detach()


def _cut_off(outputs: Any) -> tuple[State, Any]:
    """Return the outputs that have gradients, by number, and all outputs as leaves of the loss."""
    leaves, structure = pytree.tree_flatten(outputs)
    results = {
        str(number): leaf
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    }
    cut = as_leaves(results)
    leaves = [cut.get(str(number), leaf) for number, leaf in enumerate(leaves)]
    return results, pytree.tree_unflatten(leaves, structure)


def _head_backward(engine: Engine, it: Instruction) -> None:
    """Run the loss backward, before the first head, and then this head."""
    if engine.objective is not None and engine.objective.requires_grad:
        engine.objective.backward()  # type: ignore[no-untyped-call]
    engine.objective = None
    graph = engine.heads.pop(it.key)
    gradients = {
        str(number): leaf.grad
        for number, leaf in enumerate(pytree.tree_leaves(engine.outputs[it.batch]))
        if str(number) in graph.outputs and leaf.grad is not None
    }
    engine.adjoints[it.key] = graph.backward(gradients)


def _guess_backward(engine: Engine, it: Instruction) -> None:
    """Run the guess backward, which residual and fine stage both read.

    In a window it goes on to the state before the window.
    """
    adjoint = engine.guesses.pop(it.key).backward(engine.guess_adjoints.pop(it.key))
    if start := engine.plan.window_start(it.stage):
        add_to(engine.adjoints, (start - 1, it.batch, it.iteration), adjoint)


_SHARED: dict[Kind, Handler] = {
    Kind.GUESS: _guess,
    Kind.HEAD: _head,
    Kind.HEAD_BACKWARD: _head_backward,
    Kind.GUESS_BACKWARD: _guess_backward,
}

_HANDLERS: dict[str, dict[Kind, Handler]] = {
    "chain": {**_SHARED, **chain.HANDLERS},
    "collapsed": {**_SHARED, **collapsed.HANDLERS},
}
"""Handlers by sweep, then by kind of instruction."""


def state_shapes(
    compiled: Compiled, inputs: Sequence[Mapping[str, Any]], precision: torch.dtype | None = None
) -> StateShapes:
    """Return a function from a stage and a micro-batch to meta tensors like the state after it.

    Args:
        compiled: The network.
        inputs: Inputs of every micro-batch, by argument name.
        precision: Precision of states between ranks; None for that of the weights.
    """
    example = batch_size(compiled.program.args)
    sizes = [*map(batch_size, inputs)]
    conversion = compiled.conversion

    def type_of(name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, name)
        if conversion is not None and dtype == conversion[0]:
            dtype = conversion[1]
        return dtype if precision is None else precision

    @cache
    def shapes(stage: int, batch: int) -> dict[str, torch.Tensor]:
        state = {}
        for value in compiled.plan.interfaces[stage].state:
            shape = list(value.spec.shape)
            axis = value.spec.batch_axis
            if axis is not None and example:
                shape[axis] = shape[axis] * sizes[batch] // example
            dtype = type_of(value.spec.dtype)
            state[value.name] = torch.empty(shape, dtype=dtype, device="meta")
        return state

    return shapes


def run_in_one_process(
    compiled: Compiled,
    ranks: Sequence[RankPieces],
    inputs: Sequence[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    seed: int = 0,
    synchronize: bool = False,
) -> list[Engine]:
    """Run one step of all ranks in turns in this process: the oracle of the distributed runtime.

    Args:
        compiled: The network.
        ranks: The pieces of every rank.
        inputs: Inputs of every micro-batch, by argument name.
        loss: Loss function, for the last stage; None to run forward only.
        seed: Seed of this step.
        synchronize: Whether to wait for the GPU after every instruction.

    Returns:
        The engine of every rank, with outputs, loss and seconds.
    """
    shapes = state_shapes(compiled, inputs)
    engines = [
        Engine(pieces, inputs, transport, shapes, loss, seed, synchronize=synchronize)
        for pieces, transport in zip(ranks, InProcess.of(len(ranks)), strict=True)
    ]
    lists = ranks[0].instruction_lists(batches=len(inputs), backward=loss is not None)
    for rank, instruction in execution_order(lists):
        engines[rank].run(instruction)
    return engines
