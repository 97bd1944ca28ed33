"""Train a compiled network towards its original: interface by interface, then end to end.

The targets are the original's states and outputs, so that no labels are needed; a task loss may
replace the outputs. With 10 batches, `interface_epochs=0.5` and `epochs=1` the steps are

    0 to 4      distillation: every operator is trained alone (`pnn_compile.fit.distill`)
    after 4     closed form: the linear parts are solved again, on the first batches
    5 to 14     end to end: all parameters, against the original's outputs
"""

from __future__ import annotations

import copy
import itertools
import logging
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
from pnn_compile.fit.calibrate import calibrate_candidates
from pnn_compile.fit.distill import Distiller, InterfaceLoss, train_mode
from pnn_compile.fit.optimizer import (
    FitState,
    MakeOptimizer,
    OptimizerStep,
    checkpoint_file,
    warm_cosine,
)
from pnn_compile.fit.regression_sweep import CurrentOperators
from pnn_compile.inputs import batch_size, device_of, named_batch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from pnn_compile.compiled import Compiled

_LOG = logging.getLogger(__name__)

_TEMPERATURE = 2.0

_MAX_SAMPLES, _MAX_BYTES = 8_192, 2**29
"""Limits of the closed form between the two parts of a fit: samples, and bytes of a state."""

_NEGLIGIBLE = 1e-4
"""Distillation loss below which a rise is noise: the outputs are those of the original."""

_MIN_BATCHES = 5
"""Smallest number of batches for it: every fifth one is held out."""

Loss = Callable[[Any, Any, Any], torch.Tensor]
"""From the network's outputs, the original's outputs and the batch to a scalar."""


Log = Callable[[int, Mapping[str, float]], object]
"""Takes a step and what was measured in it, by name."""


@dataclass(frozen=True)
class FitReport:
    """Steps and losses of a fit.

    Attributes:
        steps: Optimizer steps taken end to end, those of an interrupted fit included.
        samples: Number of samples in them.
        first_loss: Mean loss over the first tenth of the steps.
        last_loss: Mean loss over the last tenth.
        interface_steps: Steps taken at every interface before that.
        interfaces: Losses of those, by stage; empty without `interface_epochs`.
    """

    steps: int
    samples: int
    first_loss: float
    last_loss: float
    interface_steps: int = 0
    interfaces: tuple[InterfaceLoss, ...] = ()


def distillation(outputs: Any, targets: Any, batch: Any) -> torch.Tensor:
    """Compute the distance of outputs from the original's; the default loss of `fit`.

    Of `[B, C]` and `[B, T, C]` tensors, taken as class scores, it is the Kullback-Leibler
    divergence at temperature 2 over the last axis (Hinton, Vinyals, Dean 2015); of others the
    squared error relative to the squared norm of the target.

    Returns:
        The sum over all floating-point outputs, a scalar.

    Raises:
        OptionError: No output is of floating point.
    """
    del batch
    losses = []
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(targets), strict=True)
    for output, target in pairs:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            continue
        if output.dim() in (2, 3) and output.shape[-1] > 1:
            scores = F.log_softmax(output.flatten(0, -2) / _TEMPERATURE, -1)
            target_scores = F.log_softmax(target.flatten(0, -2) / _TEMPERATURE, -1)
            divergence = F.kl_div(scores, target_scores, reduction="batchmean", log_target=True)
            losses.append(divergence * _TEMPERATURE**2)
        else:
            energy = target.square().mean().clamp_min(1e-12)
            losses.append(F.mse_loss(output, target) / energy)
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
    log: Log | SummaryWriter | None = None,
) -> FitReport:
    """Train a network towards its original: every interface alone if asked, then end to end.

    The original is the network of the fine stages when the fit starts; a copy of it stays fixed.
    During `interface_epochs`, each preprocessing operator is trained towards the true state that it
    approximates and each coarse propagator towards the error that remains after its stage
    (`pnn_compile.fit.distill`); the fine stages and their statistics do not change. Then the
    linear parts are solved in closed form on the first batches (at least five), and kept where that
    lowers the error on held-out ones. Finally all parameters are trained against the original's
    outputs. In either part the learning rate warms up over a tenth of the steps and falls to zero
    along a cosine.

    Args:
        compiled: The network; changed in place.
        loader: Batches, as in `calibrate`; a pair (inputs, labels) if `loss` reads labels. Must
            have a length.
        epochs: Epochs of the end-to-end part. It starts at the batch where the interfaces stopped:
            half an epoch for each part sees every sample once.
        interface_epochs: Epochs for the interfaces before it.
        loss: From (outputs, original's outputs, batch) to a scalar; `distillation` if None.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's weight decay.
        optimizer: Makes another optimizer from the parameters; called once for each operator with
            `interface_epochs`, and once for the whole network.
        autocast: Lower precision to run the forward pass in; the loss is scaled for float16.
        clip_norm: Largest norm of the gradient, or None.
        dropout: Whether dropout is active. A converted network starts at its target, and noise
            moves it away (measured in examples/studies).
        checkpoint: File to save the fit to, and to resume it from if it exists.
        checkpoint_every: Steps between saves.
        progress: Called with (step, steps, loss); both parts count.
        log: Called with (step, {"fit/loss": ..., "fit/learning_rate": ...}) after every step; or a
            `SummaryWriter` of TensorBoard.

    Returns:
        Steps and losses.

    Raises:
        OptionError: The loader is empty or has no length, a batch does not fit, no parameter
            requires a gradient, a number is out of range, the folder of the checkpoint does not
            exist, or the loss is not finite.
    """
    network = compiled.module
    _check_numbers(epochs, interface_epochs, learning_rate, clip_norm, checkpoint_every)
    file = checkpoint_file(checkpoint)
    parameters = _trainable(compiled)
    teacher = copy.deepcopy(compiled.sequential).eval().requires_grad_(False)
    length = _length(loader)
    make_optimizer = _with_schedule(
        optimizer
        or (lambda trained: torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay))
    )
    interface_steps = max(1, round(interface_epochs * length)) if interface_epochs else 0
    steps = max(1, round((interface_epochs + epochs) * length) - interface_steps)
    precision: dict[str, Any] = {"autocast": autocast, "clip_norm": clip_norm}
    whole = OptimizerStep(parameters, make_optimizer, steps, **precision)
    parts: dict[str, Any] = {"teacher": teacher, "learner": whole}
    distiller = None
    if interface_epochs:
        distiller = Distiller(compiled, teacher, make_optimizer, interface_steps, **precision)
        parts["interfaces"] = distiller
    state = FitState(network, parts, file)
    done, total = (distiller.step if distiller else 0) + state.step, interface_steps + steps

    def after_step(step: int, last: int, value: float) -> None:
        if progress is not None:
            progress(step, total, value)
        if log is not None:
            rate = {"fit/learning_rate": whole.learning_rate} if step > interface_steps else {}
            _write(log, step, {"fit/loss": value, **rate})
        if step % checkpoint_every == 0 or step == last:
            state.save()

    numbered = _cycle(loader, total)  # a fit that is resumed draws the batches of its past again
    with _training(network, compiled.operators.named(), dropout=dropout), state.random():
        if distiller is not None:
            first = itertools.islice(numbered, interface_steps)
            _train_interfaces(compiled, distiller, first, dropout, after_step)
        for step, batch in numbered:
            if step >= done:
                value, size = _train_step(
                    compiled, teacher, batch, loss or distillation, whole, autocast
                )
                state.record(step - interface_steps + 1, value, size)
                after_step(step + 1, total, value)
    return _report(state, distiller, _NEGLIGIBLE if loss is None else 0.0)


def _train_interfaces(
    compiled: Compiled,
    distiller: Distiller,
    numbered: Iterable[tuple[int, Any]],
    dropout: bool,
    after_step: Callable[[int, int, float], None],
) -> None:
    """Train every operator alone, then solve the linear parts on the first batches."""
    done, total = distiller.step, distiller.total
    first_batches: list[dict[str, Any]] = []
    if done < total:
        distiller.train(dropout=dropout)
    for step, batch in numbered:
        if done < total:
            _collect(compiled, first_batches, batch)
        if step < done:
            continue
        value = distiller.train_step(batch)
        if step + 1 == total:
            _solve_linear_parts(compiled, first_batches)
            train_mode(compiled.module, dropout=dropout)
        after_step(step + 1, total, value)


def _write(log: Log | SummaryWriter, step: int, values: Mapping[str, float]) -> None:
    """Call a logger, or add scalars to a TensorBoard."""
    if callable(log):
        log(step, values)
        return
    for name, value in values.items():
        log.add_scalar(name, value, step)


def _trainable(compiled: Compiled) -> list[nn.Parameter]:
    parameters = [p for p in compiled.module.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(
            f"{compiled.plan.model} has no parameter that requires a gradient: there is nothing to "
            "fit (compiled.module.requires_grad_() thaws a frozen one)"
        )
    return parameters


def _report(state: FitState, distiller: Distiller | None, negligible: float) -> FitReport:
    tenth = max(1, len(state.losses) // 10)
    first, last = (sum(losses) / tenth for losses in (state.losses[:tenth], state.losses[-tenth:]))
    if last > max(first, negligible):
        _LOG.warning(
            "the loss rose from %.3g to %.3g in %d steps: the network was closer to the original "
            "before; take a lower learning rate, or more samples or epochs",
            first, last, state.step,
        )  # fmt: skip
    return FitReport(
        steps=state.step,
        samples=state.samples,
        first_loss=first,
        last_loss=last,
        interface_steps=distiller.total if distiller else 0,
        interfaces=distiller.report() if distiller else (),
    )


def _check_numbers(
    epochs: float,
    interface_epochs: float,
    learning_rate: float,
    clip_norm: float | None,
    checkpoint_every: int,
) -> None:
    def within(number: object) -> bool:
        return isinstance(number, int | float) and 0 < number < math.inf

    if not within(learning_rate):
        raise OptionError(
            f"the learning rate must be above 0 (got {learning_rate!r}); the default is 1.5e-3"
        )
    if not within(epochs):
        raise OptionError(f"epochs must be above 0, parts of one too (got {epochs!r})")
    if clip_norm is not None and not within(clip_norm):
        raise OptionError(f"clip_norm must be above 0, or None (got {clip_norm!r})")
    for name, number, least in (
        ("interface_epochs", interface_epochs, 0),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if number != least and not (within(number) and number > least):
            raise OptionError(f"{name} must be finite and at least {least} (got {number!r})")


def _with_schedule(
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> MakeOptimizer:
    def make(
        parameters: Sequence[nn.Parameter], steps: int
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        instance = optimizer(parameters)
        return instance, LambdaLR(instance, warm_cosine(steps))

    return make


@contextmanager
def _training(network: nn.Module, operators: nn.Module, *, dropout: bool) -> Iterator[None]:
    """Put all modules into training mode; on exit restore their modes and clear gradients."""
    whole = nn.ModuleList([network, operators])
    modes = [(module, module.training) for module in whole.modules()]
    recurrent = [(m, m.dropout) for m in whole.modules() if isinstance(m, nn.RNNBase)]
    for layer, _ in () if dropout else recurrent:
        layer.dropout = 0.0  # cuDNN's backward needs training mode, which would drop
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


def _cycle(loader: Iterable[Any], total: int) -> Iterator[tuple[int, Any]]:
    """Yield step number and batch, epoch after epoch of the loader, up to `total` steps."""
    step = 0
    while step < total:
        epoch_start = step
        for batch in loader:
            yield step, batch
            step += 1
            if step == total:
                return
        if step == epoch_start:
            raise OptionError(
                f"the loader has no batches after {step} of {total} steps: every iteration over "
                "it must start anew"
            )


def _collect(compiled: Compiled, batches: list[dict[str, Any]], batch: Any) -> None:
    """Add a batch for the closed form, unless samples or states of those here are enough."""
    samples = sum(batch_size(inputs) for inputs in batches)
    largest = max(sum(v.spec.bytes for v in face.state) for face in compiled.plan.interfaces)
    size = samples * largest / batch_size(compiled.program.args)
    enough = samples >= _MAX_SAMPLES or size >= _MAX_BYTES
    if len(batches) < _MIN_BATCHES or not enough:
        batches.append(named_batch(compiled, batch))


def _solve_linear_parts(compiled: Compiled, batches: Sequence[Mapping[str, Any]]) -> None:
    """Fit the linear parts in closed form, where that lowers their errors on held-out batches."""
    if len(batches) >= _MIN_BATCHES:
        executor = Executor(compiled)
        calibrate_candidates(
            compiled, batches, executor, CurrentOperators(executor), keep_better=True
        )


def _train_step(
    compiled: Compiled,
    teacher: nn.Module,
    batch: Any,
    loss: Loss,
    optimizer: OptimizerStep,
    autocast: torch.dtype | None,
) -> tuple[float, int]:
    """Take one end-to-end training step; return the loss and the number of samples."""
    inputs = named_batch(compiled, batch)
    size, device = batch_size(inputs), device_of(compiled.module)
    with torch.no_grad():
        targets = teacher(**named_batch(compiled, batch))  # copies: it may write into them
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        value = loss(compiled.module(**inputs), targets, batch)
    if not torch.isfinite(value):
        raise OptionError(
            f"the loss is {value.item()}: lower the learning rate, or check the inputs"
        )
    optimizer.step(value)
    return value.item(), size
