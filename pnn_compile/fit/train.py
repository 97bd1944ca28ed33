"""Fit a compiled network to its original: interface by interface, then end to end.

The original's states and outputs are the targets, so no labels are needed; a task loss may take
the place of the outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import _pytree as pytree

from passes.errors import OptionError
from passes.transform.executor import Executor
from pnn_compile.fit.calibrate import calibrate_by_choice
from pnn_compile.fit.checkpoint import FitState, checkpoint_file
from pnn_compile.fit.distill import Distiller, InterfaceLoss, train_mode
from pnn_compile.fit.optimizer import Learner, Trainer, warm_cosine
from pnn_compile.fit.regression_sweep import Given
from pnn_compile.inputs import batch_size, device_of, named_batch

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["FitReport", "Loss", "distillation", "fit"]

_TEMPERATURE = 2.0
_SAMPLES, _BYTES = 8_192, 2**29
"""What the closed form between the two parts of a fit sees at most: samples, bytes of a state."""
_FEWEST = 5
"""Batches that it needs: every fifth one judges."""

Loss = Callable[[Any, Any, Any], torch.Tensor]
"""From the network's outputs, the original's outputs and the batch to a scalar."""


@dataclass(frozen=True)
class FitReport:
    """What a fit did.

    Attributes:
        steps: Optimizer steps taken end to end, those of an interrupted fit included.
        samples: Samples seen by them.
        first_loss: Mean loss over the first tenth of the steps.
        last_loss: Mean loss over the last tenth.
        interface_steps: Steps taken at every interface before that.
        interfaces: What those did, by stage; empty without `interface_epochs`.
    """

    steps: int
    samples: int
    first_loss: float
    last_loss: float
    interface_steps: int = 0
    interfaces: tuple[InterfaceLoss, ...] = ()


def distillation(outputs: Any, wanted: Any, batch: Any) -> torch.Tensor:
    """Compare outputs with the original's: by divergence if they look like class scores.

    The Kullback-Leibler divergence at temperature 2 over the last axis of `[B, C]` and `[B, T, C]`
    tensors (Hinton, Vinyals, Dean 2015), the squared error over the target's energy otherwise.
    """
    del batch
    losses = []
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(wanted), strict=True)
    for found, target in pairs:
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            continue
        if found.dim() in (2, 3) and found.shape[-1] > 1:
            scores = F.log_softmax(found.flatten(0, -2) / _TEMPERATURE, -1)
            goal = F.log_softmax(target.flatten(0, -2) / _TEMPERATURE, -1)
            divergence = F.kl_div(scores, goal, reduction="batchmean", log_target=True)
            losses.append(divergence * _TEMPERATURE**2)
        else:
            energy = target.square().mean().clamp_min(1e-12)
            losses.append(F.mse_loss(found, target) / energy)
    if not losses:
        raise OptionError("the network has no floating-point output to fit: pass a loss")
    return torch.stack(losses).sum()


def fit(
    compiled: Compiled,
    loader: Iterable[Any],
    *,
    epochs: float = 1,
    interface_epochs: float = 0,
    loss: Loss | None = None,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 1e-2,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = 1.0,
    dropout: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: Callable[[int, int, float], None] | None = None,
) -> FitReport:
    """Train a network to its original: every interface by itself if asked, then end to end.

    The original is the state of the fine stages when the fit starts; a copy of it stays fixed.
    In `interface_epochs` passes each guess learns the true state that it stands for, and each
    correction the error that is left behind its stage (`pnn_compile.fit.distill`); the fine stages
    and their statistics stay as they are. What is linear in them is then solved in closed form for
    the guesses as they are now, where that lowers the error on held-out ones of the first batches
    (five at least). Then every parameter trains against the original's outputs. In either part the
    learning rate warms up over a tenth of the steps and falls to zero along a cosine.

    Args:
        compiled: The network; changed in place.
        loader: Batches, as in `calibrate`; a pair (inputs, labels) if `loss` reads labels. Must
            have a length.
        epochs: Times to go through the loader end to end, going on where the interfaces stopped:
            half an epoch for each sees every sample once.
        interface_epochs: Times to go through it before, for the interfaces.
        loss: From (outputs, original's outputs, batch) to a scalar; `distillation` if None.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's weight decay.
        optimizer: Makes another optimizer from the parameters; called once for each guess and
            each correction with `interface_epochs`, and once for the whole.
        autocast: Lower precision to run the forward pass in; the loss is scaled for float16.
        clip_norm: Largest norm of the gradient, or None.
        dropout: Whether dropout is active. A converted network starts at its target, and noise
            takes it away from there (measured in examples/studies).
        checkpoint: File to save the fit to, and to resume it from if it exists.
        checkpoint_every: Steps between saves.
        progress: Called with (step, steps, loss); steps of both parts count.

    Raises:
        OptionError: The loader is empty or has no length, a batch does not fit, nothing trains,
            a number is out of range, the folder of the checkpoint does not exist, or the loss is
            not finite.
    """
    network = compiled.module
    _check_numbers(epochs, interface_epochs, learning_rate, checkpoint_every)
    file = checkpoint_file(checkpoint)
    parameters = _trainable(compiled)
    teacher = copy.deepcopy(compiled.sequential).eval().requires_grad_(False)
    length = _length(loader)
    trainer = _trainer(
        optimizer
        or (lambda given: torch.optim.AdamW(given, learning_rate, weight_decay=weight_decay))
    )
    before = max(1, round(interface_epochs * length)) if interface_epochs else 0
    total = max(1, round((interface_epochs + epochs) * length) - before)
    learner = Learner(parameters, trainer, total, autocast=autocast, clip_norm=clip_norm)
    parts: dict[str, Any] = {"teacher": teacher, "learner": learner}
    distiller = None
    if interface_epochs:
        distiller = Distiller(
            compiled, teacher, trainer, before, autocast=autocast, clip_norm=clip_norm
        )
        parts["interfaces"] = distiller
    state = FitState(network, parts, file)
    measure = loss or distillation

    def done(step: int, last: int, value: float) -> None:
        if progress is not None:
            progress(step, before + total, value)
        if step % checkpoint_every == 0 or step == last:
            state.save()

    first: list[dict[str, Any]] = []
    taken = (distiller.step if distiller else 0) + state.step
    with _training(network, compiled.operators.named(), dropout=dropout), state.random():
        if distiller is not None and distiller.step < before:
            distiller.train(dropout=dropout)
        for step, batch in _rounds(loader, before + total):
            if taken < before and step < before and not _enough(compiled, first):
                first.append(named_batch(compiled, batch))
            if step < taken:
                continue
            if distiller is not None and step < before:
                value = distiller.take(batch)
                if step + 1 == before:
                    _solve(compiled, first)
                    train_mode(network, dropout=dropout)
            else:
                value, size = _step(compiled, teacher, batch, measure, learner, autocast)
                state.record(step - before + 1, value, size)
            done(step + 1, before if step < before else before + total, value)
    return _report(state, distiller)


def _trainable(compiled: Compiled) -> list[nn.Parameter]:
    parameters = [p for p in compiled.module.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(
            f"{compiled.plan.model} has no parameter that requires a gradient: there is nothing to "
            "fit (compiled.module.requires_grad_() thaws a frozen one)"
        )
    return parameters


def _report(state: FitState, distiller: Distiller | None) -> FitReport:
    tenth = max(1, len(state.losses) // 10)
    return FitReport(
        steps=state.step,
        samples=state.samples,
        first_loss=sum(state.losses[:tenth]) / tenth,
        last_loss=sum(state.losses[-tenth:]) / tenth,
        interface_steps=distiller.total if distiller else 0,
        interfaces=distiller.report() if distiller else (),
    )


def _check_numbers(
    epochs: float, interface_epochs: float, learning_rate: float, checkpoint_every: int
) -> None:
    if not 0 < learning_rate < math.inf:
        raise OptionError(
            f"the learning rate must be above 0 (got {learning_rate}); the default is 1.5e-3"
        )
    if not 0 < epochs < math.inf:
        raise OptionError(f"epochs must be above 0, parts of one too (got {epochs})")
    for name, number, least in (
        ("interface_epochs", interface_epochs, 0),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if not least <= number < math.inf:
            raise OptionError(f"{name} must be finite and at least {least} (got {number})")


def _trainer(optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> Trainer:
    def make(
        parameters: Sequence[nn.Parameter], steps: int
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        made = optimizer(parameters)
        return made, LambdaLR(made, warm_cosine(steps))

    return make


@contextmanager
def _training(network: nn.Module, operators: nn.Module, *, dropout: bool) -> Iterator[None]:
    """Train every module; leave the modes as they were, and no gradients."""
    whole = nn.ModuleList([network, operators])
    modes = [(module, module.training) for module in whole.modules()]
    recurrent = [(m, m.dropout) for m in whole.modules() if isinstance(m, nn.RNNBase)]
    for layer, _ in () if dropout else recurrent:
        layer.dropout = 0.0  # cuDNN goes back in training mode only
    train_mode(network, dropout=dropout)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, share in recurrent:
            layer.dropout = share
        whole.zero_grad(set_to_none=True)


def _length(loader: Iterable[Any]) -> int:
    try:
        length = len(loader)  # type: ignore[arg-type]  # asked for; the error says so
    except TypeError as error:
        raise OptionError("fit needs a loader with a length: a list or a DataLoader") from error
    if not length:
        raise OptionError("fit needs at least one batch; the loader is empty")
    return length


def _rounds(loader: Iterable[Any], total: int) -> Iterator[tuple[int, Any]]:
    """Number and batch of so many steps, round after round of the loader."""
    step = 0
    while step < total:
        begin = step
        for batch in loader:
            yield step, batch
            step += 1
            if step == total:
                return
        if step == begin:
            raise OptionError(
                f"the loader gave nothing after {step} of {total} steps: it must give its batches "
                "anew every time that it is gone through"
            )


def _enough(compiled: Compiled, batches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a closed form has enough to go on, by samples or by the size of the states."""
    samples = sum(batch_size(batch) for batch in batches)
    largest = max(sum(v.spec.bytes for v in face.state) for face in compiled.plan.interfaces)
    example = batch_size(compiled.program.args)
    size = samples * largest / example
    return len(batches) >= _FEWEST and (samples >= _SAMPLES or size >= _BYTES)


def _solve(compiled: Compiled, batches: Sequence[Mapping[str, Any]]) -> None:
    """Fit the linear parts in closed form, where that lowers their errors on held-out batches."""
    if len(batches) >= _FEWEST:
        executor = Executor(compiled)
        calibrate_by_choice(compiled, batches, executor, Given(executor), keep_better=True)


def _step(
    compiled: Compiled,
    teacher: nn.Module,
    batch: Any,
    loss: Loss,
    learner: Learner,
    autocast: torch.dtype | None,
) -> tuple[float, int]:
    """Take one optimizer step; give the loss and the number of samples."""
    inputs = named_batch(compiled, batch)
    size, device = batch_size(inputs), device_of(compiled.module)
    with torch.no_grad():
        wanted = teacher(**named_batch(compiled, batch))  # copies of its own: it may change them
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        value = loss(compiled.module(**inputs), wanted, batch)
    if not torch.isfinite(value):
        raise OptionError(
            f"the loss is {value.item()}: lower the learning rate, or check the inputs"
        )
    learner.learn(value)
    return value.item(), size
