"""Probe how well forms of a parareal network learn: train them side by side for a few minutes.

The original, parareal networks and early exits of the same predicted time start from the weights
that the model has, see the same batches, and are compared on every fifth batch, which none of them
is trained on. A short training favors networks of few layers in a row; what it shows is the order
among networks of one latency.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from passes.errors import OptionError, PartitionError, SynthesisError, first_line
from passes.ir.isolation import seeded
from passes.ir.module_walk import num_parameters
from passes.options import Options
from passes.plan.build import operators_of
from pnn_compile.compiled import Compiled, compile_program
from pnn_compile.fit.early_exit import EarlyExit, build_early_exit
from pnn_compile.fit.metrics import main_output
from pnn_compile.fit.optimizer import OptimizerStep, warm_cosine
from pnn_compile.inputs import batch_size, device_of, named_batch

FORMS: Mapping[str, Mapping[str, Any]] = {
    "copied blocks": {"coarse": "units"},
    "a quarter of the channels": {"coarse": "units", "coarse_width": 0.25},
    "star": {"coarse": "units", "sweep": "collapsed"},
    "star, a quarter of the channels": {
        "coarse": "units", "sweep": "collapsed", "coarse_width": 0.25,
    },
    "channel maps": {"coarse": "linear"},
}  # fmt: skip
"""Forms to try: options of `compile` by name."""

_HELD_OUT = 5
_POINTS = 8
_CLIP = 1.0

ProbeLoss = Callable[[Any, Any], torch.Tensor]
"""From outputs and targets to a scalar."""


@dataclass(frozen=True)
class ProbeRow:
    """A network and how it learned.

    Attributes:
        network: What it is: "original", a form, or an early exit as fast as a form.
        speedup: Predicted speed-up over the original.
        early_exit: Whether it is an early exit.
        parameters: Number of its parameters.
        scores: Accuracy on held-out samples after each eighth of the training; the loss where the
            targets are not classes.
        seconds: Time of one training step on this device, which runs the stages in turn.
        refused: Why this form was not trained; "" if it was.
    """

    network: str
    speedup: float
    early_exit: bool = False
    parameters: int = 0
    scores: tuple[float, ...] = ()
    seconds: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Probe:
    """What a short training shows, in numbers and in words.

    Attributes:
        rows: The original, then every form after the early exit that is as fast.
        steps: Training steps of each network.
        samples: Samples to train on.
        held_out: Samples of the measurement.
        accuracy: Whether scores are accuracies; losses if not.
        sentence: Conclusion.
    """

    rows: tuple[ProbeRow, ...]
    steps: int
    samples: int
    held_out: int
    accuracy: bool
    sentence: str = ""


def probe(
    compiled: Compiled,
    batches: Sequence[Any],
    *,
    forms: Mapping[str, Mapping[str, Any]] = FORMS,
    labels: str | None = None,
    minutes: float = 5.0,
    steps: int | None = None,
    learning_rate: float = 3e-3,
    loss: ProbeLoss | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Probe:
    """Train the original, its parareal forms and early exits of the same latency side by side.

    AdamW with a warm-up and a cosine, as many steps for each network as the time allows.

    Args:
        compiled: The network, which is copied; all trainings start from the weights that its fine
            stages have, and every form has as many stages.
        batches: At least five pairs of inputs (as in `calibrate`) and targets, or dicts that hold
            the targets too.
        forms: Options of `compile` by name, to try beside the network itself.
        labels: Name of the targets in batches that are dicts.
        minutes: Time for all trainings together.
        steps: Steps of each network, in place of a time.
        learning_rate: Peak learning rate.
        loss: From outputs and targets to a scalar; cross-entropy for targets that are classes, the
            squared error for others, if None.
        seed: Seed of new weights and of the order of the batches.
        progress: Called with (step, steps, loss of the original).

    Returns:
        The curves, and what follows from them.

    Raises:
        OptionError: There are fewer than five batches, the targets fit no output, a number is out
            of range, or the loss of the original is not finite.
    """
    if len(batches) < _HELD_OUT:
        raise OptionError(f"probe needs at least {_HELD_OUT} batches (got {len(batches)})")
    if not 0 < minutes < math.inf or not 0 < learning_rate < math.inf:
        raise OptionError("minutes and learning_rate must be above 0")
    pairs = [(b, b[labels]) for b in batches] if labels is not None else batches
    judge = _Judge(compiled, pairs, loss)
    rows = _learners(compiled, forms, seed)
    learners = [one for one in rows if one.network is not None]
    train = [b for number, b in enumerate(judge.batches) if number % _HELD_OUT != _HELD_OUT - 1]
    seconds = sum(one.time_step(judge, train[0]) for one in learners)
    steps = max(_POINTS, int(minutes * 60 / seconds) if steps is None else steps)
    for one in learners:
        one.prepare(learning_rate, steps)
    marks = {round(steps * (n + 1) / _POINTS) for n in range(_POINTS)}
    with seeded(seed):
        for step, batch in enumerate(_forever(train, steps, seed), 1):
            losses = [one.step(judge, batch) for one in learners]
            if not math.isfinite(losses[0]):
                raise OptionError(
                    f"the loss of the original is {losses[0]}: lower the learning rate, or check "
                    "the batches"
                )
            if progress is not None:
                progress(step, steps, losses[0])
            if step in marks:
                for one in learners:
                    one.scores.append(judge.score(one.network))
    results = tuple(one.row() for one in rows)
    samples = sum(judge.size(batch) for batch in train)
    probed = Probe(results, steps, samples, judge.held_out, judge.accuracy)
    return replace(probed, sentence=_conclusion(probed))


@dataclass
class _Learner:
    """A network in training; none where its form was refused."""

    name: str
    speedup: float
    network: Any = None
    refused: str = ""
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)
    optimizer: OptimizerStep | None = None

    def time_step(self, judge: _Judge, batch: tuple[dict[str, Any], torch.Tensor]) -> float:
        """Time one training step, after one to warm up; weights and statistics do not change."""
        before = copy.deepcopy(self.network.state_dict())
        for _ in range(2):
            start = time.perf_counter()
            torch.autograd.backward(judge.loss(self.network.train(), batch))
            if batch[1].is_cuda:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - start
        self.network.zero_grad()
        self.network.load_state_dict(before)
        return self.seconds

    def prepare(self, rate: float, steps: int) -> None:
        """Make the optimizer."""

        def make(
            parameters: Sequence[nn.Parameter], steps: int
        ) -> tuple[torch.optim.Optimizer, LambdaLR]:
            adam = torch.optim.AdamW(parameters, rate, weight_decay=1e-2)
            return adam, LambdaLR(adam, warm_cosine(steps))

        trainable = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = OptimizerStep(trainable, make, steps, clip_norm=_CLIP)

    def step(self, judge: _Judge, batch: tuple[dict[str, Any], torch.Tensor]) -> float:
        """Take a training step."""
        assert self.optimizer is not None
        value = judge.loss(self.network.train(), batch)
        self.optimizer.step(value)
        return value.item()

    def row(self) -> ProbeRow:
        """Return the result."""
        if self.network is None:
            return ProbeRow(self.name, self.speedup, refused=self.refused)
        count = num_parameters(self.network)
        early_exit = isinstance(self.network, EarlyExit)
        scores = tuple(self.scores)
        return ProbeRow(self.name, self.speedup, early_exit, count, scores, self.seconds)


def _learners(
    compiled: Compiled, forms: Mapping[str, Mapping[str, Any]], seed: int
) -> list[_Learner]:
    """Compile every form that is not the network itself, and build an early exit for each."""
    plan = compiled.plan
    rows = [_Learner("original", 1.0, copy.deepcopy(compiled.sequential))]
    networks = {"as compiled": compiled}  # unless that is one of the forms
    start = Options(stages=plan.devices, correction=plan.correction, seed=seed)
    for form, options in forms.items():
        try:
            network = compile_program(compiled.program, Options.of(start, options))
        except (PartitionError, SynthesisError) as error:
            rows.append(_Learner(form, math.nan, refused=first_line(error)))
            continue
        if operators_of(network.plan) == operators_of(plan):
            networks.pop("as compiled", None)
        elif (speedup := network.plan.forecast.speedup) <= 1:
            rows.append(_Learner(form, speedup, refused="it is predicted no faster"))
            continue
        networks[form] = network
    lengths: set[float] = set()
    for form, network in networks.items():
        speedup = network.plan.forecast.speedup
        early = build_early_exit(network, 1 / speedup)
        if early is not None and early.share not in lengths:
            lengths.add(early.share)
            name = "the compiled network" if form == "as compiled" else form
            rows.append(_Learner(f"early exit, as fast as {name}", speedup, early))
        rows.append(_Learner(form, speedup, copy.deepcopy(network.module)))
    return rows


class _Judge:
    """The batches, the loss, and the score on those that are held out."""

    def __init__(
        self,
        compiled: Compiled,
        batches: Sequence[Any],
        loss: ProbeLoss | None,
    ) -> None:
        device = device_of(compiled.module)
        self.batches = [(named_batch(compiled, x), y.to(device)) for x, y in batches]
        self._last = self.batches[_HELD_OUT - 1 :: _HELD_OUT]
        self._loss = loss or _default_loss
        self.accuracy = loss is None and not self.batches[0][1].is_floating_point()
        self.held_out = sum(map(self.size, self._last))

    @staticmethod
    def size(batch: tuple[dict[str, Any], torch.Tensor]) -> int:
        """Return the number of samples of a batch."""
        return batch_size(batch[0])

    def loss(self, network: nn.Module, batch: tuple[dict[str, Any], torch.Tensor]) -> torch.Tensor:
        """Return the loss of a network on a batch."""
        inputs, targets = batch
        return self._loss(network(**inputs), targets)

    def score(self, network: nn.Module) -> float:
        """Return the accuracy on the held-out batches, or the loss."""
        total = 0.0
        network.eval()
        with torch.no_grad():
            for batch in self._last:
                inputs, targets = batch
                if self.accuracy:
                    scores, labels = _as_classes(main_output(network(**inputs)), targets)
                    value = (scores.argmax(-1) == labels).double().mean().item()
                else:
                    value = self.loss(network, batch).item()
                total += value * self.size(batch)
        return total / self.held_out


def _default_loss(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    output = main_output(outputs)
    if not targets.is_floating_point():
        return F.cross_entropy(*_as_classes(output, targets))
    if output.shape != targets.shape:
        raise OptionError(
            f"targets {[*targets.shape]} do not fit the output {[*output.shape]}: pass a loss"
        )
    return F.mse_loss(output, targets)


def _as_classes(output: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores `[M, C]` and classes `[M]`; classes lie on the last axis, or on axis 1."""
    if output.shape[:-1] == targets.shape:
        return output.flatten(0, -2), targets.flatten()
    if output.dim() > 1 and (output.shape[0], *output.shape[2:]) == targets.shape:
        return output.movedim(1, -1).flatten(0, -2), targets.flatten()
    raise OptionError(
        f"targets {[*targets.shape]} are not classes of the output {[*output.shape]}: pass a loss"
    )


def _forever(batches: Sequence[Any], steps: int, seed: int) -> Iterator[Any]:
    """Yield batches in an order that changes from epoch to epoch."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator, device="cpu").tolist()
        yield batches[order.pop()]


def _conclusion(probe: Probe) -> str:
    """Set the best form beside the original and the best early exit."""
    original, *others = [row for row in probe.rows if row.scores]
    sign = 1 if probe.accuracy else -1

    def best_of(rows: Sequence[ProbeRow]) -> ProbeRow:
        finite = [row for row in rows if math.isfinite(row.scores[-1])]
        return max(finite or rows, key=lambda row: sign * row.scores[-1])

    def shown(row: ProbeRow) -> str:
        return f"{row.scores[-1]:.1%}" if probe.accuracy else f"a loss of {row.scores[-1]:.4g}"

    def lead(row: ProbeRow) -> float:
        return sign * (best.scores[-1] - row.scores[-1])

    best = best_of([row for row in others if not row.early_exit])
    exits = [row for row in others if row.early_exit]
    words = (
        f"After {probe.steps} steps each, the best form, {best.network!r}, has {shown(best)} on "
        f"{probe.held_out} held-out samples at {best.speedup:.2f} times the predicted speed; the "
        f"original has {shown(original)}"
    )
    if exits:
        words += f", the best early exit {shown(best_of(exits))}"
    margin = 0.0
    if probe.accuracy:  # twice the standard error of a difference of two shares
        share = best.scores[-1]
        margin = 2 * math.sqrt(2 * share * (1 - share) / probe.held_out)
    if best.speedup <= 1:
        return f"{words}. No form is faster than the original."
    if exits and lead(best_of(exits)) <= margin:
        return (
            f"{words}. A shorter network learns as much so far, as it often does in a short "
            "training: give more minutes, or take the shorter network."
        )
    if lead(original) < -margin:
        return f"{words}. It learns less than the original so far; train both longer to see more."
    return f"{words}. It keeps what the original learns; train both to the end before you decide."
