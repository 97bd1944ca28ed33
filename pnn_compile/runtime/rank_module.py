"""`RankModule`: the part of a parareal network on one rank of torch.distributed, and its steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler

from passes.capture.refold import batch_norms, dropouts
from passes.errors import OptionError, RuntimeFault
from passes.ir.isolation import preserved
from passes.ir.output_types import typed
from passes.ir.program import clone_tensors
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.simulate import TimelineSpan
from passes.schedule.verify import check
from passes.transform.network import check_mode
from pnn_compile.inputs import (
    batch_size,
    by_argument,
    call_arguments,
    check_shapes,
    named_batch,
)
from pnn_compile.runtime.checkpoint import gather_original_weights
from pnn_compile.runtime.data_parallel import Groups, Replicas, local, plan_digest, shard_weights
from pnn_compile.runtime.engine import Engine, Loss, StateShapes, state_shapes
from pnn_compile.runtime.input_scatter import InputScatter
from pnn_compile.runtime.lost_ranks import Peers
from pnn_compile.runtime.micro_batches import Joiner, divide, part
from pnn_compile.runtime.rank_pieces import PieceOptions, RankPieces
from pnn_compile.runtime.tied_weights import TiedWeights
from pnn_compile.runtime.transport import PointToPoint

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_ADVICE = (
    "convert the network before distribute(), or pass distribute(autocast=torch.bfloat16), which "
    "does not convert the weights"
)


StepLoss = Callable[[Any, Any], torch.Tensor | tuple[torch.Tensor, torch.Tensor | float]]
"""From the outputs and the batch to a scalar, or to a sum and its weight."""


class RankModule(nn.Module):
    """The pieces of one rank, and the training steps that it takes together with the others.

    Its parameters are those of its pieces: pass them to any optimizer. A parameter of several ranks
    (a tied embedding) has the same gradient on all of them after `forward_backward`.

    Args:
        compiled: The whole network.
        placement: Rank of every stage.
        groups: The processes of the run.
        batches: Number of micro-batches of a step.
        options: Options to call the pieces.
        shard: Whether every replica stores a shard of the weights only.
        scatter: Whether rank 0 sends the batches to the others.
        device: Device to move the pieces to; None to leave them where they are.

    Attributes:
        network: The pieces of this rank.
        groups: The processes of the run.
        peers: The other processes of the run.
        replicas: Other processes with the same pieces.
        steps: Number of training steps that were started.
        seed: Seed of the run.
        plan_digest: Digest of the plan.
        seconds: Seconds by kind of instruction in the last step; a receive waits for other ranks.
            On a GPU that is the time to launch it.
        spans: Start and end of every instruction of the last step, by `time.perf_counter`, which
            the processes of one machine share.
    """

    def __init__(
        self,
        compiled: Compiled,
        placement: Sequence[int],
        groups: Groups,
        batches: int = 1,
        options: PieceOptions | None = None,
        *,
        shard: bool = False,
        scatter: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.network = RankPieces(compiled, placement, dist.get_rank(groups.stages), device)
        groups.check_backend(self.network.device)
        self._compiled = [compiled]  # a list hides it from nn.Module
        self.groups = groups
        self._batches = batches
        (options or PieceOptions()).apply(self.network)
        self._training = self.network.instruction_lists(batches=batches)
        self._evaluation = self.network.instruction_lists(backward=False)
        for lists in (self._training, self._evaluation):
            check(lists)
        self.plan_digest = plan_digest(compiled)
        groups.check_plan(self.plan_digest)
        self.peers = Peers(groups.everyone, (groups.stages, groups.replicas))
        self._tied = TiedWeights(compiled, placement, groups.stages)
        self.replicas = Replicas(self.network, groups.replicas, sharded=shard)
        self.steps = 0
        self.seed = groups.common_seed()
        self._scatter = None
        if scatter:
            self._scatter = InputScatter(self.network, compiled.program, groups.stages)
        self._sharded = shard
        if shard:
            shard_weights(compiled, self.network, groups.data)
        # Listed once: to walk through a thousand modules takes longer than some training steps.
        self._parameters_here = tuple(self.network.parameters())
        self._precisions = tuple(parameter.dtype for parameter in self._parameters_here)
        self._shapes: dict[tuple[int, ...], StateShapes] = {}
        self._divisible = False  # unless two micro-batches were tried
        self._joiner: Joiner | None = None
        self.seconds: dict[Kind, float] = {}
        self.spans: list[TimelineSpan] = []

    @property
    def rank(self) -> int:
        """Number of this rank in its group."""
        return self.network.rank

    @property
    def whole(self) -> Compiled:
        """The whole network."""
        return self._compiled[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward, without gradients; return the outputs on the last stage's rank, else None.

        Every rank passes the same inputs, those of the model; or rank 0 alone, with
        `inputs="rank 0"`.

        Raises:
            RuntimeFault: The step failed on this rank or on one that it waits for.
        """
        with self._refusing():
            batch = call_arguments(self.whole.program, args, kwargs)
        (inputs,) = self._inputs(self._scattered(batch), 1)
        with self.exchanging("buffers of replicas"):
            self.replicas.share_buffers()
        with torch.no_grad():
            engine = self._run([inputs], None, self._evaluation)
        return typed(engine.outputs.get(0), self.whole.program.output_types)

    def forward_backward(
        self,
        batch: Any,
        loss: StepLoss,
        scaler: GradScaler | None = None,
    ) -> torch.Tensor:
        """Run forward and backward over micro-batches; gradients accumulate as usual.

        With several micro-batches, the first call also runs two of them apart and together, in both
        modes, and refuses a model that mixes samples, except by BatchNorm.

        Args:
            batch: Inputs, the same on every rank: a tensor, a tuple (labels may follow), or a dict.
                With `inputs="rank 0"`, those of other ranks are ignored.
            loss: From the outputs of all micro-batches, put together, and the batch to a scalar;
                called once, on the rank of the last stage. Replicas take the mean of their losses.
                Where they count unequally (tokens, `ignore_index`), return a pair instead, a sum
                and its weight: the loss is then the total sum by the total weight of all replicas.
            scaler: Scales the loss, and so the gradients, but not the returned loss.

        Returns:
            The loss, on every rank.

        Raises:
            RuntimeFault: The batch cannot be divided, or the step failed on this rank or on one
                that it waits for.
        """
        batch = self._scattered(batch)
        inputs = self._inputs(batch, self._batches)
        sizes = [*map(batch_size, inputs)]
        scale = self._scale(scaler)
        with self.exchanging("buffers of replicas"):
            self.replicas.share_buffers()
        if self._batches > 1 and not self._divisible:
            self._try_division(batch, inputs)

        def scaled(outputs: list[Any]) -> torch.Tensor:
            whole = outputs[0] if self._joiner is None else self._joiner(outputs, sizes)
            whole = typed(whole, self.whole.program.output_types)
            return self.replicas.combine(loss(whole, batch)) * scale

        earlier = self._tied.set_aside()
        engine = self._run(inputs, scaled, self._training)
        with self.exchanging("gradients"):
            self._tied.sum_gradients(earlier)
            self.replicas.average_gradients()
        value = (engine.loss_value.double() / scale).float()
        with self.exchanging("the loss"):
            return self.replicas.mean(value)

    def train_step(
        self,
        batch: Any,
        loss: StepLoss,
        optimizer: torch.optim.Optimizer | None,
        *,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
    ) -> torch.Tensor:
        """Take one optimizer step; return the loss, on every rank.

        Args:
            batch: As in `forward_backward`.
            loss: As in `forward_backward`.
            optimizer: Of this rank's parameters; None for a rank that has none.
            clip_norm: Largest norm of the gradient of the whole network, or None.
            scaler: Made by `grad_scaler`, for float16: if a gradient overflows on one rank, no rank
                takes the step.

        Raises:
            RuntimeFault: As in `forward_backward`; or the loss is not finite, without a scaler; no
                rank has taken the step then.
        """
        self.peers.check_present()
        for parameter in self._parameters_here:
            parameter.grad = None
        value = self.forward_backward(batch, loss, scaler)
        if scaler is None and not torch.isfinite(value):
            raise RuntimeFault(
                f"the loss of step {self.steps} is {value.item()} on all ranks: lower the "
                "learning rate, or check the inputs (a mean over no labels is NaN: on replicas, "
                "return a sum and its weight); the weights are as they were before"
            )
        if scaler is not None and optimizer is not None:
            with self.exchanging("overflows"):
                scaler.unscale_(optimizer)
        if clip_norm is not None:
            self.clip_gradients(clip_norm)
        with self._leaving_on_error():
            if optimizer is not None:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
        return value

    def grad_scaler(self, **options: Any) -> GradScaler:
        """Create a gradient scaler for all ranks; options as for torch.amp.GradScaler."""
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        device = self.network.device.type
        return ShardedGradScaler(device, process_group=self.groups.everyone, **options)

    def _scale(self, scaler: GradScaler | None) -> float:
        if scaler is None:
            return 1.0
        if not hasattr(scaler, "process_group"):
            raise RuntimeFault(
                f"a {type(scaler).__name__} of this rank alone does not see overflows on the "
                "others: create it with module.grad_scaler()"
            )
        scaler.scale(torch.zeros((), device=self.network.device))  # creates its scale
        return scaler.get_scale()

    def clip_gradients(self, most: float) -> torch.Tensor:
        """Scale all gradients to a norm over all ranks of at most `most`; return their norm."""
        gradients = {p: local(p.grad) for p in self._parameters_here if p.grad is not None}
        # A tied parameter counts on one of its ranks; no sharded one is tied.
        squares = [
            gradient.double().square().sum()
            for parameter, gradient in gradients.items()
            if self._sharded or self._tied.counts(parameter)
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device="cpu").double()
        total = total.to(self.network.device)
        group = self.groups.everyone if self._sharded else self.groups.stages
        with self.exchanging("the norm of the gradient"):
            dist.all_reduce(total, group=group)
        norm = total.sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Collect the weights of the fine stages and the head under the model's own keys.

        All ranks must call it; rank 0 of the network returns all weights, on the CPU, the others
        none.
        """
        with self.exchanging("weights"):
            return gather_original_weights(self)

    def load_original_state_dict(
        self, state: Mapping[str, torch.Tensor], *, strict: bool = True
    ) -> None:
        """Load this rank's part of a checkpoint of the original model; all ranks must call it.

        Args:
            state: A state dict with the model's own keys, on every rank.
            strict: Whether all keys of the model must be there, and no others.

        Raises:
            OptionError: As `Compiled.load_original_state_dict`.
            RuntimeFault: The weights are sharded.
        """
        if self._sharded:
            raise RuntimeFault(
                "sharded weights cannot load a state dict: load it before distribute()"
            )
        self.whole.load_original_state_dict(state, strict=strict)

    def _scattered(self, batch: Any) -> Any:
        """Return the batch of this rank, received from rank 0 if that scatters the batches."""
        if isinstance(batch, Mapping):
            batch = dict(batch)  # torch does not look into other mappings
        if self._scatter is None:
            return batch
        with self.exchanging("the batch"):
            return self._scatter(batch)

    def _inputs(self, batch: Any, count: int) -> list[dict[str, Any]]:
        """Return the arguments of every micro-batch, on the device of this rank."""
        program, device = self.whole.program, self.network.device
        if count > 1 and "batch" not in program.dynamic:
            raise RuntimeFault(
                f"{program.name} was compiled for batches of {batch_size(program.args)} only, so "
                f"that {count} micro-batches cannot be compared with one batch: pass "
                "distribute(batches=1); gradients add up over calls of forward_backward"
            )
        with self._refusing():
            pieces = divide(by_argument(program, batch), count, program.args)
            # Not the device of the whole network, whose first weights may be of another rank.
            inputs = [named_batch(self.whole, piece, device) for piece in pieces]
            for piece in inputs:
                check_shapes(self.whole, piece)
        return inputs

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Refuse a batch before a step begins; where other ranks begin it, leave the run."""
        self.peers.check_present()
        try:
            yield
        except Exception as error:
            if not self.peers.all_refuse():
                self.peers.leave(error)
            if isinstance(error, OptionError):
                raise RuntimeFault(f"rank {self.rank}: {error}") from error
            raise

    @contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        """Leave the run if anything fails in this context: other ranks would wait for this one."""
        try:
            yield
        except KeyboardInterrupt as error:
            self.peers.leave(error)
            # Where this rank was does not matter; torchrun shows the tracebacks of all ranks.
            raise KeyboardInterrupt(*error.args) from None
        except BaseException as error:
            self.peers.leave(error)
            raise

    def _try_division(self, batch: Any, inputs: Sequence[dict[str, Any]]) -> None:
        """Run two micro-batches apart and together, in both modes; learn to join their outputs.

        Raises:
            RuntimeFault: The outputs differ, on all ranks.
        """
        program = self.whole.program
        sizes = [*map(batch_size, inputs[:2])]
        both = part(by_argument(program, batch), 0, sum(sizes), program.args)
        both = named_batch(self.whole, both, self.network.device)
        training, messages = self.network.training, []
        for mode in (False, True):
            runs = [self._trial(piece, train=mode) for piece in (*inputs[:2], both)]
            outputs, drawn = [output for output, _ in runs], any(random for _, random in runs)
            draws: list[Any] = [None] * dist.get_world_size(self.groups.stages)
            with self.exchanging("the outputs of two micro-batches"):
                dist.all_gather_object(draws, drawn, group=self.groups.stages)
            if not self.network.holds_head:
                continue
            try:
                joiner = Joiner(outputs[:2], sizes, outputs[2], random=any(draws))
            except RuntimeFault as error:
                messages.append(f"in {'training' if mode else 'evaluation'} mode, {error}")
            else:
                self._joiner = joiner if mode == training else self._joiner
        everyone: list[Any] = [None] * dist.get_world_size(self.groups.everyone)
        with self.exchanging("the outputs of two micro-batches"):
            dist.all_gather_object(everyone, messages[:1], group=self.groups.everyone)
        if faults := [*itertools.chain(*everyone)]:
            raise RuntimeFault(faults[0])
        self._divisible = True

    def _trial(self, inputs: dict[str, Any], *, train: bool) -> tuple[Any, bool]:
        """Run forward in a mode, with dropout off and the statistics of BatchNorm as they are.

        Returns:
            The outputs, on the rank that has them, and whether numbers were drawn all the same.
        """
        with preserved(self.network), torch.no_grad():
            self.network.train(train)
            # A network in training mode hides its draws: the engine seeds every piece.
            for module in (self.network, *dropouts(self.network), *batch_norms(self.network)):
                module.training = False
            before, copies = self._random_state(), clone_tensors(inputs)  # a model may write there
            outputs = self._run([copies], None, self._evaluation).outputs.get(0)
            return outputs, not torch.equal(before, self._random_state())

    def _random_state(self) -> torch.Tensor:
        device = self.network.device
        if device.type != "cuda":
            return torch.get_rng_state()
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])

    def _run(
        self,
        inputs: Sequence[Mapping[str, Any]],
        loss: Loss | None,
        lists: Sequence[Sequence[Instruction]],
    ) -> Engine:
        """Run this rank's list on micro-batches."""
        transport = PointToPoint(self.groups.stages, self.network.device)
        seed = self.seed + self.steps + (self.groups.replica << 50)  # replicas draw others
        only = self.whole.program.capture.only_mode
        with self._refusing():
            check_mode(self.whole.program.name, only, training=self.training)
            self._check_precision()
            shapes = self._state_shapes(inputs)
            engine = Engine(self.network, inputs, transport, shapes, loss, seed)
        self.steps += loss is not None
        self.seconds, self.spans = engine.seconds, engine.spans
        with self._leaving_on_error():
            try:
                engine.run_list(lists[self.rank])
            except RuntimeFault as error:
                raise self.peers.explain(error, exchange=engine.exchanging) from error.__cause__
        with self.exchanging("the last messages"):
            transport.wait()
        return engine

    def _state_shapes(self, inputs: Sequence[Mapping[str, Any]]) -> StateShapes:
        """Return the shapes of states, computed once per sizes of the micro-batches."""
        sizes = tuple(map(batch_size, inputs))
        if sizes not in self._shapes:
            self._shapes[sizes] = state_shapes(self.whole, inputs, self.network.autocast)
        return self._shapes[sizes]

    @contextmanager
    def exchanging(self, what: str) -> Iterator[None]:
        """Add rank and stages to the error of an exchange, as when another rank has died."""
        self.peers.check_present()
        with self._leaving_on_error():
            try:
                yield
            except Exception as error:
                fault = RuntimeFault(
                    f"rank {self.rank} (stages {self.network.stages}) failed to exchange {what}: "
                    f"{type(error).__name__}: {error}"
                )
                fault.__cause__ = error
                raise self.peers.explain(fault) from error

    def _check_precision(self) -> None:
        """Check that weights were not converted: other ranks expect states of the old precision."""
        for parameter, dtype in zip(self._parameters_here, self._precisions, strict=True):
            if parameter.dtype is not dtype:
                raise RuntimeFault(
                    f"rank {self.rank}: weights were converted from {dtype} to {parameter.dtype} "
                    f"after distribute(): {_ADVICE}"
                )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Refuse another precision, or a device without data, before it happens."""
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        for dtype in {tensor.dtype for tensor in tensors}:
            converted = fn(torch.empty(0, dtype=dtype, device="cpu"))
            if converted.is_meta:
                raise RuntimeFault(
                    "a rank cannot go on without the data of its weights: do not move it to the "
                    "meta device"
                )
            after = converted.dtype
            if after != dtype:
                raise RuntimeFault(
                    f"the ranks agreed on states of {dtype}, which cannot become {after} after "
                    f"distribute(): {_ADVICE}"
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
