"""Fit a compiled network to its original: interface by interface, then end to end.

The original's outputs are the targets, so no labels are needed; a task loss may take their place.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from passes.errors import OptionError
from pnn_compile.batches import batch_size, device_of, named_batch

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["FitReport", "Loss", "distillation", "fit"]

_log = logging.getLogger(__name__)
_TEMPERATURE = 2.0

Loss = Callable[[Any, Any, Any], torch.Tensor]
"""From the network's outputs, the original's outputs and the batch to a scalar."""


@dataclass(frozen=True)
class FitReport:
    """What a fit did.

    Attributes:
        steps: Optimizer steps taken, those of an interrupted fit included.
        samples: Samples seen.
        first_loss: Mean loss over the first tenth of the steps.
        last_loss: Mean loss over the last tenth.
    """

    steps: int
    samples: int
    first_loss: float
    last_loss: float


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
    compiled: Network,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    loss: Loss | None = None,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 1e-2,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = 1.0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: Callable[[int, int, float], None] | None = None,
) -> FitReport:
    """Train the whole network end to end against the original's outputs.

    The original is the state of the fine stages when the fit starts; a copy of it stays fixed.
    Every parameter trains. The learning rate warms up over a tenth of the steps and falls to zero
    along a cosine.

    Args:
        compiled: The network; changed in place.
        loader: Batches, as in `calibrate`; a pair (inputs, labels) if `loss` reads labels. Must
            have a length.
        epochs: Times to go through the loader.
        loss: From (outputs, original's outputs, batch) to a scalar; `distillation` if None.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's weight decay.
        optimizer: Makes another optimizer from the parameters.
        autocast: Lower precision to run the forward pass in.
        clip_norm: Largest norm of the gradient, or None.
        checkpoint: File to save the fit to, and to resume it from if it exists.
        checkpoint_every: Steps between saves.
        progress: Called with (step, steps, loss).

    Raises:
        OptionError: The loader is empty or has no length, a batch does not fit, nothing trains,
            a number is out of range, the folder of the checkpoint does not exist, or the loss is
            not finite.
    """
    network = compiled.module
    _check_numbers(epochs, learning_rate, checkpoint_every)
    file = _checkpoint_file(checkpoint)
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(
            f"{compiled.plan.model} has no parameter that requires a gradient: there is nothing to "
            "fit (compiled.module.requires_grad_() thaws a frozen one)"
        )
    teacher = copy.deepcopy(compiled.sequential).eval().requires_grad_(False)
    total = epochs * _length(loader)
    make = optimizer or (
        lambda params: torch.optim.AdamW(params, learning_rate, weight_decay=weight_decay)
    )
    trained = make(parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(trained, _warm_cosine(total))
    state = _State(network, teacher, trained, schedule, file)
    measure = loss or distillation
    with _training(network), _random_state_of(state):
        for step, batch in _remaining(loader, epochs, state.step):
            value, size = _step(compiled, teacher, batch, measure, trained, autocast, clip_norm)
            schedule.step()
            state.record(step + 1, value, size)
            if progress is not None:
                progress(step + 1, total, value)
            if (step + 1) % checkpoint_every == 0 or step + 1 == total:
                state.save()
    tenth = max(1, len(state.losses) // 10)
    return FitReport(
        steps=state.step,
        samples=state.samples,
        first_loss=sum(state.losses[:tenth]) / tenth,
        last_loss=sum(state.losses[-tenth:]) / tenth,
    )


def _check_numbers(epochs: int, learning_rate: float, checkpoint_every: int) -> None:
    if not 0 < learning_rate < math.inf:
        raise OptionError(
            f"the learning rate must be above 0 (got {learning_rate}); the default is 1.5e-3"
        )
    for name, number in (("epochs", epochs), ("checkpoint_every", checkpoint_every)):
        if number < 1:
            raise OptionError(f"{name} must be at least 1 (got {number})")


def _checkpoint_file(checkpoint: str | Path | None) -> Path | None:
    if checkpoint is None:
        return None
    file = Path(checkpoint)
    if not file.parent.is_dir():
        raise OptionError(
            f"the fit cannot be saved to {file}: {file.parent} is no directory, make it first"
        )
    if file.is_dir():
        raise OptionError(f"the fit cannot be saved to {file}, a directory: name a file in it")
    return file


@contextmanager
def _training(network: nn.Module) -> Iterator[None]:
    """Train every module; leave the modes as they were, and no gradients."""
    modes = [(module, module.training) for module in network.modules()]
    network.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        network.zero_grad(set_to_none=True)


@contextmanager
def _random_state_of(state: _State) -> Iterator[None]:
    """Go on with the random state of an interrupted fit, and put the caller's back behind it."""
    with torch.random.fork_rng(devices=[], enabled=state.random is not None):
        if state.random is not None:
            torch.set_rng_state(state.random)
        yield


def _length(loader: Iterable[Any]) -> int:
    try:
        length = len(loader)  # type: ignore[arg-type]  # asked for; the error says so
    except TypeError as error:
        raise OptionError("fit needs a loader with a length: a list or a DataLoader") from error
    if not length:
        raise OptionError("fit needs at least one batch; the loader is empty")
    return length


def _warm_cosine(total: int) -> Callable[[int], float]:
    warm = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = torch.tensor((step - warm) / max(1, total - warm) * torch.pi)
        return float(0.5 * (1 + torch.cos(done)))

    return factor


def _remaining(loader: Iterable[Any], epochs: int, done: int) -> Iterator[tuple[int, Any]]:
    """Number and batch of every step that is still to take."""
    step = 0
    for _ in range(epochs):
        for batch in loader:
            if step >= done:
                yield step, batch
            step += 1


def _step(
    compiled: Network,
    teacher: nn.Module,
    batch: Any,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    autocast: torch.dtype | None,
    clip_norm: float | None,
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
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]  # torch is untyped here
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(compiled.module.parameters(), clip_norm)
    optimizer.step()
    return value.item(), size


class _State:
    """What a fit needs to go on where it stopped: saved as tensors and numbers, no code."""

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        file: Path | None,
    ) -> None:
        self._parts: Mapping[str, Any] = {
            "network": network,
            "teacher": teacher,
            "optimizer": optimizer,
            "schedule": schedule,
        }
        self._file = file
        self.step = 0
        self.samples = 0
        self.losses: list[float] = []
        self.random: torch.Tensor | None = None
        if self._file is not None and self._file.exists():
            self._load(self._file)

    def record(self, step: int, loss: float, samples: int) -> None:
        self.step = step
        self.samples += samples
        self.losses.append(loss)

    def save(self) -> None:
        if self._file is None:
            return
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        numbers = {"step": self.step, "samples": self.samples, "losses": self.losses}
        draft = self._file.with_name(self._file.name + ".part")
        torch.save({**parts, **numbers, "random": torch.get_rng_state()}, draft)
        os.replace(draft, self._file)

    def _load(self, file: Path) -> None:
        try:
            found = torch.load(file, weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(found[name])
            self.random = found["random"]
        except Exception as error:
            raise OptionError(
                f"{file} does not continue this fit ({error}): delete it to start anew"
            ) from error
        self.step, self.samples = found["step"], found["samples"]
        self.losses = list(found["losses"])
        _log.info("resuming at step %d from %s", self.step, file)
