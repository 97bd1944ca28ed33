"""`RankModule`: one rank a process, over torch.distributed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler

from passes.errors import OptionError, RuntimeFault
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.verify import check
from pnn_compile.inputs import argument_names, batch_size, check_shapes, named_batch
from pnn_compile.runtime import sharding
from pnn_compile.runtime.computing import Computing
from pnn_compile.runtime.failure import failure
from pnn_compile.runtime.feed import Feed
from pnn_compile.runtime.groups import Groups
from pnn_compile.runtime.held import Held, refuse_conversion
from pnn_compile.runtime.link import DistributedLink
from pnn_compile.runtime.microbatches import crossing, divide
from pnn_compile.runtime.passing import Passing
from pnn_compile.runtime.rank import RankNetwork
from pnn_compile.runtime.replicas import Replicas
from pnn_compile.runtime.saved import Saved
from pnn_compile.runtime.sharding import local
from pnn_compile.runtime.step import Step
from pnn_compile.runtime.ties import Ties
from pnn_compile.runtime.workspace import Like

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["RankModule"]


class RankModule(nn.Module):
    """This rank's guesses, fine stages, corrections and head, and the steps that it takes part in.

    Its parameters are those of its own pieces: give them to any optimizer. A parameter that several
    ranks hold (a tied embedding) has the same gradient on all of them after `forward_backward`.

    Args:
        compiled: The whole network.
        placement: Rank of every stage.
        groups: The processes of the run.
        batches: Number of micro-batches of a step.
        computing: How the pieces run.
        shard: Whether replicas hold a share of the weights each.
        feed: Whether rank 0 hands the batches out.
        device: Where the pieces are moved to; None to leave them where they are.

    Attributes:
        seconds: How long each kind of instruction took in the last step; a receive waits for other
            ranks. On a GPU that is the time to launch it.
    """

    def __init__(
        self,
        compiled: Compiled,
        placement: Sequence[int],
        groups: Groups,
        batches: int = 1,
        computing: Computing | None = None,
        *,
        shard: bool = False,
        feed: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.network = RankNetwork(compiled, placement, dist.get_rank(groups.stages), device)
        groups.check_backend(self.network.device)
        self._compiled = [compiled]  # a list hides it from nn.Module
        self.groups = groups
        self._group = groups.stages
        self._batches = batches
        self._computing = computing or Computing()
        self._computing.prepare(self.network)
        self._training = self.network.programs(batches=batches)
        self._evaluation = self.network.programs(backward=False)
        for programs in (self._training, self._evaluation):
            check(programs)
        groups.compare(compiled)
        self._ties = Ties(compiled, placement, groups.stages)
        self._replicas = Replicas(self.network, groups.replicas, sharded=shard)
        self.saved = Saved(compiled, self.network, groups, self._replicas)
        self._feed = None
        if feed:
            names = argument_names(compiled.program)
            self._feed = Feed(self.network, names, groups.stages)
        self._sharded = shard
        if shard:
            sharding.shard(compiled, self.network, groups.data)
        self._passing = Passing(groups.stages)
        self._held = Held(self.network)
        self._likes: dict[tuple[int, ...], Like] = {}
        self.seconds: dict[Kind, float] = {}

    @property
    def rank(self) -> int:
        """Number of this rank in its group."""
        return self.network.rank

    @property
    def whole(self) -> Compiled:
        """The network that this rank has a part of."""
        return self._compiled[0]

    @property
    def holds_output(self) -> bool:
        """Whether this rank holds the last stage, and so outputs and loss."""
        return self.network.last in self.network.own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward on what the model takes; outputs on the rank of the last stage, else None.

        Every rank gives the same inputs, or rank 0 alone where it feeds the others. Without
        gradients; `forward_backward` trains.

        Raises:
            RuntimeFault: The step failed on this rank or on one that it waits for.
        """
        inputs = self._inputs(self._fed({**_named(self.whole, args), **kwargs}))
        with self._exchanging("buffers of replicas"):
            self._replicas.share_buffers()
        with torch.no_grad():
            step = self._run([inputs], None, self._evaluation)
        return step.outputs.get(0)

    def forward_backward(
        self,
        batch: Any,
        loss: Callable[[Any, Any], torch.Tensor],
        scaler: GradScaler | None = None,
    ) -> torch.Tensor:
        """Run forward and backward over micro-batches; gradients add up as usual.

        Args:
            batch: Inputs, alike on every rank: a tensor, a tuple (labels may follow), or a dict.
                Where rank 0 feeds the others, theirs is not looked at.
            loss: From outputs and the micro-batch to a mean over samples.
            scaler: Scales the loss, and with it the gradients; not the loss that is returned.

        Returns:
            The mean loss over the micro-batches, on every rank.

        Raises:
            RuntimeFault: The batch cannot be divided, or the step failed on this rank or on one
                that it waits for.
        """
        pieces = divide(self._fed(batch), self._batches)
        inputs = [self._inputs(piece) for piece in pieces]
        shares = [batch_size(each) for each in inputs]
        weights = [share / max(1, sum(shares)) for share in shares]

        scale = self._scale(scaler)

        def weighed(outputs: Any, number: int) -> torch.Tensor:
            return loss(outputs, pieces[number]) * (weights[number] * scale)

        with self._exchanging("buffers of replicas"):
            self._replicas.share_buffers()
        earlier = self._ties.set_aside()
        step = self._run(inputs, weighed, self._training)
        with self._exchanging("gradients"):
            self._ties.sum_gradients(earlier)
            self._replicas.average_gradients()
        losses = [step.losses[number].double() for number in range(self._batches)]
        total = (torch.stack(losses).sum() / scale).float()
        with self._exchanging("the loss"):
            return self._replicas.mean(total)

    def train_step(
        self,
        batch: Any,
        loss: Callable[[Any, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer | None,
        *,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
    ) -> torch.Tensor:
        """Take one optimizer step; give the loss, on every rank.

        Args:
            batch: As in `forward_backward`.
            loss: As in `forward_backward`.
            optimizer: Of this rank's parameters; None for a rank that has none.
            clip_norm: Largest norm of the gradient of the whole network, or None.
            scaler: What `grad_scaler` gave, for float16: where a gradient overflows on one rank,
                no rank takes the step.

        Raises:
            RuntimeFault: As in `forward_backward`; or the loss is not finite, without a scaler:
                then no rank has taken the step.
        """
        self._held.clear_gradients()
        value = self.forward_backward(batch, loss, scaler)
        if scaler is None and not torch.isfinite(value):
            raise RuntimeFault(
                f"the loss of step {self.saved.steps} is {value.item()} on all ranks: lower the "
                "learning rate, or check the inputs; the weights are as they were before"
            )
        if scaler is not None and optimizer is not None:
            with self._exchanging("overflows"):
                scaler.unscale_(optimizer)
        if clip_norm is not None:
            self.clip_gradients(clip_norm)
        if optimizer is not None:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        return value

    def grad_scaler(self, **options: Any) -> GradScaler:
        """Make a gradient scaler that all ranks agree with; options as of torch.amp.GradScaler."""
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        device = self.network.device.type
        return ShardedGradScaler(device, process_group=self.groups.everyone, **options)

    def _scale(self, scaler: GradScaler | None) -> float:
        if scaler is None:
            return 1.0
        if not hasattr(scaler, "process_group"):
            raise RuntimeFault(
                f"a {type(scaler).__name__} of this rank alone does not know of overflows on the "
                "others: make it with module.grad_scaler()"
            )
        scaler.scale(torch.zeros((), device=self.network.device))  # makes its scale
        return scaler.get_scale()

    def clip_gradients(self, most: float) -> torch.Tensor:
        """Scale all gradients to a norm over all ranks of at most `most`; give their norm."""
        held = self._held.parameters
        gradients = {p: local(p.grad) for p in held if p.grad is not None}
        squares = [g.double().square().sum() for p, g in gradients.items() if self._counts(p)]
        total = torch.stack(squares).sum() if squares else torch.zeros(()).double()
        total = total.to(self.network.device)
        with self._exchanging("the norm of the gradient"):
            dist.all_reduce(total, group=self.groups.everyone if self._sharded else self._group)
        norm = total.sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter counts here; no sharded one is tied."""
        return self._sharded or self._ties.counts(parameter)

    def _fed(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            batch = dict(batch)  # torch looks into no other mapping
        if self._feed is None:
            return batch
        with self._exchanging("the batch"):
            return self._feed(batch)

    def _inputs(self, batch: Any) -> dict[str, Any]:
        # Of the whole network the first weights may be those of another rank, without data.
        inputs = named_batch(self.whole, batch, self.network.device)
        try:
            check_shapes(self.whole, inputs)
        except OptionError as error:
            raise RuntimeFault(f"rank {self.rank}: {error}") from error
        return inputs

    @contextmanager
    def _exchanging(self, what: str) -> Iterator[None]:
        """Name rank and stages where an exchange fails because another rank is gone."""
        try:
            yield
        except Exception as error:
            raise RuntimeFault(
                f"rank {self.rank} (stages {self.network.own}) failed to exchange {what}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Collect the weights of the fine stages and the head under the model's own keys.

        Every rank calls it; rank 0 of the network gets all of them, on the CPU, the others none.
        """
        with self._exchanging("weights"):
            return self.saved.original_state_dict()

    def load_original_state_dict(
        self, state: Mapping[str, torch.Tensor], *, strict: bool = True
    ) -> None:
        """Load this rank's part of a checkpoint of the original model; every rank calls it.

        Args:
            state: A state dict with the model's own keys, on every rank.
            strict: Whether every key must be there, and no other.

        Raises:
            OptionError: As `Compiled.load_original_state_dict`.
            RuntimeFault: The weights are sharded.
        """
        if self._sharded:
            raise RuntimeFault(
                "sharded weights take no state dict: load it into the network before distribute()"
            )
        self.whole.load_original_state_dict(state, strict=strict)

    def _run(
        self,
        inputs: Sequence[Mapping[str, Any]],
        loss: Callable[[Any, int], torch.Tensor] | None,
        programs: Sequence[Sequence[Instruction]],
    ) -> Step:
        self._held.check(self.rank)
        device = self.network.device
        link = DistributedLink(self._passing, device)
        seed = self.saved.step_seed()
        step = Step(self.network, inputs, link, loss, self._crossing(inputs), seed)
        self.saved.steps += loss is not None
        self.seconds = dict.fromkeys(Kind, 0.0)
        for instruction in programs[self.rank]:
            start = time.perf_counter()
            try:
                with self._computing.around(instruction.kind, device):
                    step.run(instruction)
            except RuntimeFault:
                raise
            except Exception as error:
                raise failure(self.whole.plan, self.rank, instruction, inputs, error) from error
            self.seconds[instruction.kind] += time.perf_counter() - start
        with self._exchanging("the last messages"):
            link.wait()
        return step

    def _crossing(self, inputs: Sequence[Mapping[str, Any]]) -> Like:
        """What crosses between stages, found once for every size of the micro-batches."""
        sizes = tuple(map(batch_size, inputs))
        if sizes not in self._likes:
            self._likes[sizes] = crossing(self.whole, inputs, self._computing.autocast)
        return self._likes[sizes]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        refuse_conversion(self.network, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _named(compiled: Compiled, args: Sequence[Any]) -> dict[str, Any]:
    names = [str(node.target) for node in compiled.program.inputs]
    return dict(zip(names, args, strict=False))
