"""Hold the pieces of a rank, call them, and run each as a separate autograd graph.

A piece is a preprocessing operator C_j ("guess"), a fine stage, a coarse propagator F_j
("correction") or the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from passes.errors import RuntimeFault
from passes.ir.direct_call import DirectCaller
from passes.schedule.instruction import Instruction
from passes.schedule.lists import Sweep, schedule
from passes.transform.executor import Executor, State
from pnn_compile.inputs import device_of

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


class RankPieces(nn.Module):
    """The preprocessing operators, fine stages, coarse propagators and head of one rank.

    Args:
        compiled: The whole network; the pieces are shared with it, not copied.
        placement: Rank of every stage.
        rank: This rank.
        device: Device to move the pieces to; None to leave them where they are.

    Attributes:
        stages: Numbers of the stages on this rank.
        guessed: Numbers of the stages whose guess is computed here.
        corrected: Numbers of the stages whose correction is computed here; in a collapsed sweep
            that is the rank of the stage before.
        producers: By name of a value, the stage that computes it.
        residuals: By rank, names of the values whose residuals the corrections there read.
        autocast: Precision of torch.autocast around every piece; None without.

    Raises:
        RuntimeFault: The placement does not fit the network.
    """

    def __init__(
        self,
        compiled: Compiled,
        placement: Sequence[int],
        rank: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check_placement(compiled, placement)
        self.plan = compiled.plan
        self.placement = tuple(placement)
        self.rank = rank
        self.sweep = Sweep.of(compiled.plan)
        self.executor = Executor(compiled)
        self.autocast: torch.dtype | None = None
        self.producers = {
            name: number for number, stage in enumerate(self.plan.stages) for name in stage.produces
        }
        self.residuals: dict[int, set[str]] = {rank: set() for rank in placement}
        for stage in range(1, len(placement)):
            corrector = placement[self.sweep.corrector(stage)]
            self.residuals[corrector].update(self.plan.stages[stage].consumes)
        count = len(placement)
        computed = self.sweep.computed(count, 0)
        corrected = {
            stage for k in range(self.sweep.iterations) for stage in self.sweep.corrected(count, k)
        }
        self.stages = [stage for stage, place in enumerate(placement) if place == rank]
        guessed = [n for n, stage in enumerate(self.plan.stages) if stage.preprocess is not None]
        self.guessed = [stage for stage in self.stages if stage in guessed and stage in computed]
        self.corrected = [
            stage for stage in sorted(corrected) if placement[self.sweep.corrector(stage)] == rank
        ]
        for stage in self.stages:
            self.add_module(f"fine_{stage}", compiled.stages.fine[stage])
            if stage in self.guessed:
                self.add_module(f"preprocess_{stage}", self.executor.guesses[stage].network)
        for stage in self.corrected:
            self.add_module(f"coarse_{stage}", self.executor.corrections[stage].network)
        if self.holds_head:
            self.add_module("head", compiled.stages.head)
        if device is not None:
            self.to(device)
        home = device or device_of(compiled.module)
        self._home = torch.device("cpu") if home.type == "meta" else home

    @property
    def device(self) -> torch.device:
        """Device of the rank: that of its tensors, if it has any."""
        return device_of(self, self._home)

    @property
    def last(self) -> int:
        """Number of the last stage of the network."""
        return len(self.plan.stages) - 1

    @property
    def holds_head(self) -> bool:
        """Whether the last stage is on this rank, and with it the head."""
        return self.last in self.stages

    def instruction_lists(
        self, *, batches: int = 1, backward: bool = True
    ) -> tuple[tuple[Instruction, ...], ...]:
        """Return the instructions of every rank for a step (`passes.schedule.lists.schedule`)."""
        return schedule(self.placement, self.sweep, batches=batches, backward=backward)


def _check_placement(compiled: Compiled, placement: Sequence[int]) -> None:
    plan = compiled.plan
    if len(placement) != len(plan.stages):
        raise RuntimeFault(
            f"{plan.model} has {len(plan.stages)} stages, but {len(placement)} were placed"
        )
    if sorted(set(placement)) != list(range(max(placement) + 1)):
        raise RuntimeFault(f"every rank needs a stage (stages were placed on {list(placement)})")


@dataclass(frozen=True)
class PieceOptions:
    """Options to call the pieces of a rank.

    Attributes:
        autocast: Precision of torch.autocast around every piece, and of the states that cross
            between ranks; None for that of the weights.
        recompute: Whether fine stages save only their inputs and run again in the backward pass
            (activation checkpointing), with the same random numbers and without a second update
            of statistics.
        backend: Backend of torch.compile, which compiles every piece separately; None to call
            its layers one by one (`passes.ir.direct_call`).

    Raises:
        RuntimeFault: Autocast does not support the type.
    """

    autocast: torch.dtype | None = None
    recompute: bool = False
    backend: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise RuntimeFault(
                f"autocast takes torch.bfloat16 or torch.float16 (got {self.autocast})"
            )

    def apply(self, pieces: RankPieces) -> None:
        """Make a rank call its pieces with these options; parameters keep their names."""
        pieces.autocast = self.autocast
        executor, local = pieces.executor, set(pieces.children())
        for operators in (executor.guesses, executor.corrections):
            for number, operator in operators.items():
                if operator.network in local:
                    operators[number] = replace(operator, network=self._callable(operator.network))
        fine: list[Any] = list(executor.stages.fine)
        for number in pieces.stages:
            run = self._callable(fine[number])
            fine[number] = _Recomputed(fine[number], run) if self.recompute else run
        head = executor.stages.head
        if head in local:
            head = self._callable(head)
        executor.stages = replace(executor.stages, fine=tuple(fine), head=head)

    def _callable(self, piece: nn.Module) -> Any:
        if self.backend is not None:
            return torch.compile(piece, backend=self.backend)
        return DirectCaller(piece) if isinstance(piece, fx.GraphModule) else piece


class _Recomputed:
    """Run a piece that saves its inputs and buffers instead of its activations.

    Args:
        module: The piece.
        run: Function that calls it.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self._module = module
        self._run = run

    def __call__(self, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*arguments)
        before = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        again = False

        def run(*inputs: Any) -> Any:
            nonlocal again
            with _other_buffers(self._module, before) if again else nullcontext():
                again = True
                return self._run(*inputs)

        return checkpoint(run, *arguments, use_reentrant=False)


@contextmanager
def _other_buffers(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace the buffers of a module, so that a second run does not update its statistics."""
    places = {
        name: (module.get_submodule(name.rpartition(".")[0])._buffers, name.rpartition(".")[2])
        for name in values
    }
    before = dict(module.named_buffers())
    try:
        for name, (buffers, leaf) in places.items():
            buffers[leaf] = values[name]
        yield
    finally:
        for name, (buffers, leaf) in places.items():
            buffers[leaf] = before[name]


class PieceGraph:
    """Autograd graph of one piece, detached at both ends.

    Args:
        leaves: Its inputs, as leaves of the graph.
        outputs: Its outputs.

    Attributes:
        gradients: After `backward`, the gradients of the leaves by name.
    """

    def __init__(self, leaves: State, outputs: State) -> None:
        self.leaves = leaves
        self.outputs = outputs
        self.gradients: State = {}

    def backward(self, adjoint: State) -> State:
        """Run backward from the adjoints of the outputs; a missing one is zero."""
        pairs = [
            (value, adjoint[name])
            for name, value in self.outputs.items()
            if value.requires_grad and name in adjoint
        ]
        if pairs:
            values, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(values, gradients)
        self.gradients = {n: leaf.grad for n, leaf in self.leaves.items() if leaf.grad is not None}
        self.leaves, self.outputs = {}, {}
        return self.gradients


def as_leaves(state: State) -> State:
    """Return the same values as leaves of a new autograd graph."""
    return {
        name: value.detach().requires_grad_(torch.is_grad_enabled())
        for name, value in state.items()
    }


def detached(state: State) -> State:
    """Return the same values, detached from their graph."""
    return {name: value.detach() for name, value in state.items()}


def added(state: State, other: State) -> State:
    """Add two states; a component that one of them lacks is zero there."""
    both = {n: state[n] + value if n in state else value for n, value in other.items()}
    return {**state, **both}


def add_to(sums: dict[tuple[int, int, int], State], key: tuple[int, int, int], more: State) -> None:
    """Add a state to the sum under a key."""
    sums[key] = added(sums.get(key, {}), more)
