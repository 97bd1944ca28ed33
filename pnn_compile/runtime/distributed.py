"""One rank a process, over torch.distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RuntimeFault
from pnn_compile.batches import batch_size, device_of, named_batch
from pnn_compile.runtime.instruction import Instruction
from pnn_compile.runtime.link import DistributedLink
from pnn_compile.runtime.microbatches import crossing, divide
from pnn_compile.runtime.order import check
from pnn_compile.runtime.rank import RankNetwork
from pnn_compile.runtime.step import Step
from pnn_compile.runtime.ties import Ties

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["RankModule", "distribute", "place"]


def place(stages: int, ranks: int) -> tuple[int, ...]:
    """Rank of every stage: neighbours together, as evenly as can be.

    Raises:
        RuntimeFault: There are more ranks than stages.
    """
    if ranks > stages:
        raise RuntimeFault(
            f"{ranks} ranks for {stages} stages: compile with stages={ranks}, or start {stages} "
            "ranks"
        )
    return tuple(stage * ranks // stages for stage in range(stages))


def distribute(
    compiled: Network,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Sequence[int] | None = None,
    batches: int = 1,
) -> RankModule:
    """Take this rank's part of a network, on every rank of a process group.

    Args:
        compiled: The whole network, made alike on every rank.
        group: Process group with one process a rank; the default one if None.
        placement: Rank of every stage; neighbours together, evenly, if None.
        batches: Number of micro-batches of a step.

    Raises:
        RuntimeFault: torch.distributed is not initialised, the ranks hold different networks, or
            the placement does not fit.
    """
    if not dist.is_initialized():
        raise RuntimeFault(
            "torch.distributed is not initialised: call dist.init_process_group() first, in a "
            "script that torchrun starts"
        )
    group = group or dist.group.WORLD
    assert group is not None
    ranks = dist.get_world_size(group)
    if placement is None:
        placement = place(len(compiled.plan.stages), ranks)
    if max(placement) + 1 != ranks:
        raise RuntimeFault(f"{max(placement) + 1} ranks are placed, the group has {ranks}")
    return RankModule(compiled, placement, group, batches)


class RankModule(nn.Module):
    """This rank's guesses, fine stages, corrections and head, and the steps that it takes part in.

    Its parameters are those of its own pieces: give them to any optimizer. A parameter that several
    ranks hold (a tied embedding) has the same gradient on all of them after `backward_step`.

    Args:
        compiled: The whole network.
        placement: Rank of every stage.
        group: Process group with one process a rank.
        batches: Number of micro-batches of a step.
    """

    def __init__(
        self,
        compiled: Network,
        placement: Sequence[int],
        group: dist.ProcessGroup,
        batches: int = 1,
    ) -> None:
        super().__init__()
        self.network = RankNetwork(compiled, placement, dist.get_rank(group))
        self._compiled = [compiled]  # a list hides it from nn.Module
        self._group = group
        self._batches = batches
        self._programs = {
            backward: self.network.programs(batches=batches, backward=backward)
            for backward in (True, False)
        }
        for programs in self._programs.values():
            check(programs)
        _compare(compiled, group)
        self._ties = Ties(compiled, placement, group)
        self._seed = _common_seed(group)
        self._steps = 0

    @property
    def rank(self) -> int:
        """Number of this rank in its group."""
        return self.network.rank

    @property
    def holds_output(self) -> bool:
        """Whether this rank holds the last stage, and so outputs and loss."""
        return self.network.last in self.network.own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward on what the model takes; outputs on the rank of the last stage, else None.

        Every rank gives the same inputs. Without gradients; `forward_backward` trains.

        Raises:
            RuntimeFault: The step failed on this rank or on one that it waits for.
        """
        inputs = named_batch(self._compiled[0], {**_named(self._compiled[0], args), **kwargs})
        with torch.no_grad():
            step = self._run([inputs], None, self.network.programs(backward=False))
        return step.outputs.get(0)

    def forward_backward(
        self, batch: Any, loss: Callable[[Any, Any], torch.Tensor]
    ) -> torch.Tensor:
        """Run forward and backward over micro-batches; gradients add up as usual.

        Args:
            batch: Inputs, alike on every rank: a tensor, a tuple (labels may follow), or a dict.
            loss: From outputs and the micro-batch to a mean over samples.

        Returns:
            The mean loss over the micro-batches, on every rank.

        Raises:
            RuntimeFault: The batch cannot be divided, or the step failed on this rank or on one
                that it waits for.
        """
        pieces = divide(batch, self._batches)
        inputs = [named_batch(self._compiled[0], piece) for piece in pieces]
        shares = [batch_size(each) for each in inputs]
        weights = [share / max(1, sum(shares)) for share in shares]

        def weighed(outputs: Any, number: int) -> torch.Tensor:
            return loss(outputs, pieces[number]) * weights[number]

        step = self._run(inputs, weighed, self._programs[True])
        self._ties.sum_gradients()
        total = torch.zeros((), device=device_of(self.network))
        if self.holds_output:
            total += torch.stack([*step.losses.values()]).sum()
        source = dist.get_global_rank(self._group, self.network.placement[-1])
        dist.broadcast(total, source, self._group)
        return total

    def train_step(
        self,
        batch: Any,
        loss: Callable[[Any, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> torch.Tensor:
        """Take one optimizer step; give the loss, on every rank.

        Args:
            batch: As in `forward_backward`.
            loss: As in `forward_backward`.
            optimizer: Of this rank's parameters.
            clip_norm: Largest norm of the gradient of the whole network, or None.

        Raises:
            RuntimeFault: As in `forward_backward`.
        """
        optimizer.zero_grad(set_to_none=True)
        value = self.forward_backward(batch, loss)
        if clip_norm is not None:
            self.clip_gradients(clip_norm)
        optimizer.step()
        return value

    def clip_gradients(self, most: float) -> torch.Tensor:
        """Scale all gradients to a norm over all ranks of at most `most`; give their norm."""
        own = [p for p in self.parameters() if p.grad is not None and self._ties.counts(p)]
        squares = [p.grad.detach().double().square().sum() for p in own if p.grad is not None]
        total = torch.stack(squares).sum() if squares else torch.zeros(()).double()
        total = total.to(device_of(self.network))
        dist.all_reduce(total, group=self._group)
        norm = total.sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
        return norm

    def _run(
        self,
        inputs: Sequence[Mapping[str, Any]],
        loss: Callable[[Any, int], torch.Tensor] | None,
        programs: Sequence[Sequence[Instruction]],
    ) -> Step:
        link = DistributedLink(self._group, device_of(self.network))
        compiled = self._compiled[0]
        seed = self._seed + self._steps
        step = Step(self.network, inputs, link, loss, crossing(compiled, inputs), seed)
        self._steps += loss is not None
        for instruction in programs[self.rank]:
            try:
                step.run(instruction)
            except RuntimeFault:
                raise
            except Exception as error:
                raise _fault(compiled, self.rank, instruction, inputs, error) from error
        link.wait()
        return step


def _fault(
    compiled: Network,
    rank: int,
    instruction: Instruction,
    inputs: Sequence[Mapping[str, Any]],
    error: Exception,
) -> RuntimeFault:
    stage = compiled.plan.stages[instruction.stage]
    shapes = {
        name: list(value.shape)
        for name, value in inputs[instruction.batch].items()
        if isinstance(value, torch.Tensor)
    }
    return RuntimeFault(
        f"rank {rank} failed at {instruction}, modules {stage.first_module} to "
        f"{stage.last_module}, inputs {shapes}: {type(error).__name__}: {error}"
    )


def _common_seed(group: dist.ProcessGroup) -> int:
    """The seed of rank 0, for all ranks."""
    found = [torch.initial_seed() % 2**48]
    dist.broadcast_object_list(found, dist.get_global_rank(group, 0), group)
    return found[0]


def _compare(compiled: Network, group: dist.ProcessGroup) -> None:
    """Refuse ranks that hold different networks."""
    text = compiled.plan.to_json()
    digest = hashlib.sha256(text.encode()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, digest, group=group)
    if len(set(found)) > 1:
        different = [rank for rank, each in enumerate(found) if each != found[0]]
        raise RuntimeFault(
            f"ranks {different} hold another plan than rank 0: compile with the same model, "
            "options and seed on all of them, or load one artifact"
        )


def _named(compiled: Network, args: Sequence[Any]) -> dict[str, Any]:
    names = [str(node.target) for node in compiled.program.inputs]
    return dict(zip(names, args, strict=False))
