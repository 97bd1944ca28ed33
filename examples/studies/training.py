"""Training and measuring on one device: one-cycle AdamW on labels, or to a teacher's outputs."""

from __future__ import annotations

import fcntl
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from examples.studies.data import Split
from examples.studies.presets import Preset
from examples.studies.regimes import Regime
from examples.studies.tasks import Task
from pnn_compile.fit.optimizer import warm_cosine
from pnn_compile.fit.train import distillation

__all__ = ["Originals", "Shuffled", "accuracy", "augmented", "quality", "train"]

_SHIFT = 4


def accuracy(network: nn.Module, split: Split) -> float:
    """Share of labels that the network gets right, in percent."""
    network.eval().to(split.y.device)
    right = torch.zeros((), dtype=torch.int64, device=split.y.device)
    total = 0
    size = 1000 if split.y.is_cuda else 250
    with torch.no_grad():
        for batch in split.batches(min(size, len(split.y))):
            found = network(split.x[batch]).argmax(-1)
            right += (found == split.y[batch]).sum()
            total += split.y[batch].numel()
    return 100 * int(right) / total


def quality(network: nn.Module, split: Split) -> dict[str, float]:
    """The accuracy, and where every position has a label the perplexity, exp of the mean loss."""
    found = {"accuracy": accuracy(network, split)}
    if split.y.ndim > 1:
        with torch.no_grad():
            total, count = 0.0, 0
            for batch in split.batches(min(250, len(split.y))):
                outputs, labels = network(split.x[batch]).flatten(0, -2), split.y[batch].flatten()
                total += F.cross_entropy(outputs, labels, reduction="sum").item()
                count += labels.numel()
        found["perplexity"] = math.exp(total / count)
    return found


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift images `[B, C, H, W]` by up to four pixels and mirror half of them (He et al. 2016)."""
    device = images.device
    count, _, height, width = images.shape

    def drawn(high: int) -> torch.Tensor:
        return torch.randint(high, (count, 1), device=device, generator=generator)

    rows = drawn(2 * _SHIFT + 1) + torch.arange(height, device=device)
    columns = drawn(2 * _SHIFT + 1) + torch.arange(width, device=device)
    columns = torch.where(drawn(2) == 0, columns, columns.flip(1))
    padded = F.pad(images, (_SHIFT,) * 4).movedim(1, 3)
    samples = torch.arange(count, device=device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


class Shuffled:
    """The training samples of a task in batches, in a new order every time, shifted and mirrored.

    Args:
        task: The task.
        size: Samples of a batch.
        seed: Seed of the order and of the shifts.
    """

    def __init__(self, task: Task, size: int, seed: int) -> None:
        self._task = task
        self._size = size
        self._order = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator(task.train.y.device).manual_seed(seed)

    @property
    def generators(self) -> tuple[torch.Generator, torch.Generator]:
        """The generators of the order and of the shifts."""
        return self._order, self._noise

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._task.train.y) // self._size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give inputs and labels."""
        train = self._task.train
        for batch in train.batches(self._size, self._order):
            x = train.x[batch]
            yield (augmented(x, self._noise) if self._task.augment else x), train.y[batch]


def train(
    network: nn.Module,
    task: Task,
    preset: Preset,
    seed: int,
    *,
    epochs: float | None = None,
    rate: float | None = None,
    teacher: nn.Module | None = None,
    dropout: bool = True,
    state: Path | None = None,
    regime: Regime | None = None,
) -> float:
    """Train on labels, or to a teacher's outputs without labels; one-cycle AdamW.

    Args:
        network: What to train; it is moved to the device of the task.
        task: The samples.
        preset: How to train.
        seed: Seed of the order of the samples and of their augmentation.
        epochs: Times to go through the samples; the preset's, or once to a teacher, if None.
        rate: Peak learning rate; the preset's if None.
        teacher: Gives the outputs to learn.
        dropout: Whether dropout is active.
        state: File for the state after every epoch, from which an interrupted training goes on.
        regime: How the network is called; as it is if None.

    Returns:
        Seconds that it took; those of the last start where it was interrupted.
    """
    size, peak = (task.batch, preset.rate) if teacher is None else (task.fit_batch, preset.fit_rate)
    count = epochs or (preset.epochs if teacher is None else 1)
    device = task.train.y.device
    network.to(device)
    regime = regime or Regime(network)
    if preset.compiled and teacher is None:
        regime.compile()
    start = time.perf_counter()
    with _quick(network, device), _quick(teacher, device), _modes(network, dropout=dropout):
        peak = rate or peak
        optimizer = torch.optim.AdamW(
            network.parameters(), peak, weight_decay=1e-2, fused=device.type == "cuda"
        )
        samples = Shuffled(task, size, seed)
        steps = max(1, round(count * len(samples)))
        schedule = (
            torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
            if teacher is None
            else torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
        )
        first = _restore(state, network, optimizer, schedule, samples)
        for epoch in range(first, math.ceil(count)):
            done = epoch * len(samples)
            for step, (x, y) in enumerate(itertools.islice(samples, steps - done), done):
                with torch.autocast(device.type, torch.bfloat16, enabled=preset.bfloat16):
                    loss = _loss(regime(x, step / steps), x, y, teacher) + regime.penalty()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            if state is not None:
                _save(state, epoch + 1, network, optimizer, schedule, samples)
        if device.type == "cuda":
            torch.cuda.synchronize()
    if state is not None:
        state.unlink(missing_ok=True)
    return time.perf_counter() - start


def _save(file: Path, epochs: int, *parts: Any) -> None:
    """Write the state after so many epochs."""
    *stateful, samples = parts
    generators = [torch.default_generator, *samples.generators]
    states = [part.state_dict() for part in stateful], [g.get_state() for g in generators]
    torch.save((epochs, *states), file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def _restore(file: Path | None, *parts: Any) -> int:
    """Read the state that `_save` wrote; return how many epochs are done."""
    if file is None or not file.exists():
        return 0
    *stateful, samples = parts
    epochs, states, generators = torch.load(file, map_location="cpu", weights_only=True)
    for part, content in zip(stateful, states, strict=True):
        part.load_state_dict(content)
    for generator, content in zip(
        [torch.default_generator, *samples.generators], generators, strict=True
    ):
        generator.set_state(content)
    return int(epochs)


def _loss(
    outputs: torch.Tensor, x: torch.Tensor, y: torch.Tensor, teacher: nn.Module | None
) -> torch.Tensor:
    if teacher is None:
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())
    with torch.no_grad():
        wanted = teacher(x)
    return distillation(outputs, wanted, None)


@contextmanager
def _quick(network: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Keep the weights of convolutions in the order that tensor cores read, on a GPU."""
    if network is None or device.type != "cuda":
        yield
        return
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    yield
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def _modes(network: nn.Module, *, dropout: bool) -> Iterator[None]:
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and not dropout:
            module.eval()
    yield


@dataclass(frozen=True)
class Originals:
    """Trained originals, kept in a folder so that several studies and processes share them.

    Attributes:
        folder: Where they are kept; trained anew every time if None.
    """

    folder: Path | None = None

    def state(self, *names: object) -> Path | None:
        """Return the file for the state of a training of this name, if there is a folder."""
        return self.folder and self.folder / f"{'-'.join(map(str, names))}.state".replace(" ", "_")

    def trained(self, task: Task, preset: Preset, seed: int) -> tuple[nn.Module, float]:
        """The original of a seed in evaluation mode, and the seconds it took if just trained."""
        torch.manual_seed(seed)
        network = task.build(task.units)
        if self.folder is None:
            seconds = train(network, task, preset, seed)
            return network.eval(), seconds
        file = self.folder / f"{task.name}-{seed}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if file.exists():
                network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
                return network.to(task.train.y.device).eval(), 0.0
            seconds = train(network, task, preset, seed, state=file.with_suffix(".state"))
            torch.save(network.state_dict(), file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
            return network.eval(), seconds
