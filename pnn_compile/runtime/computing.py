"""`Computing`: how a rank runs its pieces: autocast, activation checkpointing, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from passes.errors import RuntimeFault
from passes.ir.direct_call import Direct
from passes.schedule.instruction import FORWARD, Kind
from pnn_compile.runtime.rank import RankNetwork

__all__ = ["Computing"]

Run = Callable[..., Any]


@dataclass(frozen=True)
class Computing:
    """How a rank runs its pieces.

    Attributes:
        autocast: Precision of torch.autocast around every piece, and of the states that cross
            between ranks; None for that of the weights.
        recompute: Whether fine stages keep their inputs alone and run again in the backward pass.
            They draw the same random numbers then, and leave statistics as they are.
        backend: Of torch.compile, which every piece goes through by itself; None to call its layers
            one by one (`passes.ir.direct_call`).

    Raises:
        RuntimeFault: `autocast` is no type that autocast takes.
    """

    autocast: torch.dtype | None = None
    recompute: bool = False
    backend: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise RuntimeFault(
                f"autocast takes torch.bfloat16 or torch.float16 (got {self.autocast})"
            )

    def prepare(self, network: RankNetwork) -> None:
        """Let a rank call its pieces in this way; its parameters and their names stay."""
        executor, held = network.executor, set(network.children())
        for operators in (executor.guesses, executor.corrections):
            for number, own in operators.items():
                if own.network in held:
                    operators[number] = replace(own, network=self._run(own.network))
        fine: list[Any] = list(executor.stages.fine)
        for number in network.own:
            run = self._run(fine[number])
            fine[number] = _Recomputed(fine[number], run) if self.recompute else run
        head = executor.stages.head
        if head in held:
            head = self._run(head)
        executor.stages = replace(executor.stages, fine=tuple(fine), head=head)

    def _run(self, piece: nn.Module) -> Any:
        """How a piece is called."""
        if self.backend is not None:
            return torch.compile(piece, backend=self.backend)
        return Direct(piece) if isinstance(piece, fx.GraphModule) else piece

    def around(self, kind: Kind, device: torch.device) -> AbstractContextManager[Any]:
        """What an instruction of this kind runs in."""
        if self.autocast is None or kind not in FORWARD:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)


class _Recomputed:
    """A piece that keeps its inputs and buffers in place of its activations.

    Args:
        module: The piece.
        run: How it is called.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        self._module = module
        self._run = run

    def __call__(self, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*arguments)
        before = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        again = False

        def run(*given: Any) -> Any:
            nonlocal again
            with _buffers(self._module, before) if again else nullcontext():
                again = True
                return self._run(*given)

        return checkpoint(run, *arguments, use_reentrant=False)


@contextmanager
def _buffers(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a module have other buffers for a while, so that its own are not written."""
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in values}
    own = dict(module.named_buffers())
    try:
        for name, value in values.items():
            owners[name]._buffers[name.rpartition(".")[2]] = value
        yield
    finally:
        for name in values:
            owners[name]._buffers[name.rpartition(".")[2]] = own[name]
