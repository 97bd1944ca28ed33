"""Measure stages on streams of one GPU beside the original network on that GPU.

Every contender is one CUDA graph, so that none waits for Python; the original also runs as usual,
as "original". All take turns, round after round:

    original                      PyTorch launches every kernel
    original, CUDA graph          the baseline
    parareal N = 4, one stream    the stages one after another, in one CUDA graph
    parareal N = 4, streams       the stages at the same time, in one CUDA graph
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import OptionError, RuntimeFault
from pnn_compile.bench.contenders import StepFunction, step_of
from pnn_compile.bench.measurements import mean_square, optimizer_of, turns
from pnn_compile.inputs import check_batch_size, device_of, resized
from pnn_compile.runtime import CapturedForward, CapturedStep, StreamNetwork

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

BASELINE = "original, CUDA graph"
_REPEATS = 5
"""Steps per timing."""


@dataclass(frozen=True)
class StreamTiming:
    """The steps of one contender at one batch size.

    Attributes:
        contender: Its name.
        batch: Samples of a step.
        seconds: Of a step, by round.
        error: Largest difference of its outputs from those of the same network without streams and
            CUDA graph, relative to the largest output; None for the original.
    """

    contender: str
    batch: int
    seconds: tuple[float, ...]
    error: float | None

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class StreamBench:
    """Timings of one model on one GPU.

    Attributes:
        model: Name of the model.
        training: Whether a step is forward, backward and optimizer; else forward alone.
        device: Name of the GPU.
        timings: One per contender and batch size.
        bounds: Predicted speed-up by number of stages, with one device a stage.
    """

    model: str
    training: bool
    device: str
    timings: tuple[StreamTiming, ...]
    bounds: dict[int, float]

    def ratios(self, timing: StreamTiming) -> tuple[float, ...]:
        """Return the speed-up over the original in a CUDA graph, round by round."""
        baseline = next(
            t for t in self.timings if (t.contender, t.batch) == (BASELINE, timing.batch)
        )
        return tuple(a / b for a, b in zip(baseline.seconds, timing.seconds, strict=True))


def bench_streams(
    networks: Sequence[Compiled],
    *,
    batches: Iterable[int] = (1,),
    training: bool = False,
    rounds: int = 7,
) -> StreamBench:
    """Measure one model, compiled into several numbers of stages, on one GPU.

    Args:
        networks: The same model, compiled; moved to the current CUDA device.
        batches: Sizes of a batch.
        training: Whether to measure training steps (SGD with momentum at learning rate 0); else
            the forward pass.
        rounds: Timings of each contender, of five steps each.

    Returns:
        The timings.

    Raises:
        RuntimeFault: There is no CUDA device, or a network cannot be captured in a CUDA graph.
        OptionError: A number is too small, or the network was compiled for another batch size.
    """
    sizes = tuple(batches)
    if not networks or rounds < 1 or not sizes or min(sizes) < 1:
        raise OptionError("bench_streams needs at least one network, one round and one sample")
    if not torch.cuda.is_available():
        raise RuntimeFault("streams need a CUDA device, and torch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    timings: list[StreamTiming] = []
    for batch in sizes:
        for network in networks:
            check_batch_size(network, batch)
            network.module.to(device)
        timings += _take_turns(networks, batch, training, rounds)
        torch.cuda.empty_cache()
    return StreamBench(
        networks[0].plan.model, training, torch.cuda.get_device_name(device), tuple(timings),
        {len(n.plan.stages): n.plan.forecast.speedup for n in networks},
    )  # fmt: skip


def _take_turns(
    networks: Sequence[Compiled], batch: int, training: bool, rounds: int
) -> list[StreamTiming]:
    steps: dict[str, StepFunction] = {}
    errors: dict[str, float | None] = {}
    original = networks[0].current_program().module
    inputs = resized(networks[0], batch, device_of(original))
    steps["original"] = step_of(copy.deepcopy(original), inputs, training)
    steps[BASELINE] = _captured(copy.deepcopy(original), inputs, training)
    errors["original"] = errors[BASELINE] = None
    for network in networks:
        count = len(network.plan.stages)
        plain = copy.deepcopy(network.module)
        streams = StreamNetwork(replace(network, module=copy.deepcopy(network.module)))
        error = _difference(plain, streams, inputs)
        for name, module in (("one stream", plain), ("streams", streams)):
            key = f"parareal N = {count}, {name}"
            steps[key], errors[key] = _captured(module, inputs, training), error
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in turns(steps, rounds):
        for name in turn:
            seconds[name].append(_timed(steps[name]))
    return [StreamTiming(n, batch, tuple(seconds[n]), errors[n]) for n in steps]


def _captured(module: nn.Module, inputs: dict[str, Any], training: bool) -> StepFunction:
    module.train(training)
    if not training:
        run = CapturedForward(module, **inputs)
        return lambda: run(**inputs)
    optimizer = optimizer_of(module)
    if optimizer is None:
        raise OptionError("the model has no parameters to train: measure the forward pass")
    arguments = tuple(inputs.values())
    target = torch.zeros((), device=device_of(module))
    step = CapturedStep(module, arguments, target, mean_square, optimizer)
    return lambda: step(arguments, target)


@torch.no_grad()
def _difference(plain: nn.Module, streams: nn.Module, inputs: dict[str, Any]) -> float:
    """Return the largest difference of streams in a CUDA graph from the plain network, relative."""
    plain.eval()
    streams.eval()
    expected = pytree.tree_leaves(plain(**inputs))
    outputs = pytree.tree_leaves(CapturedForward(streams, **inputs)(**inputs))
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(b, torch.Tensor)]
    scale = max((b.abs().max().item() for _, b in pairs), default=0.0)
    largest = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
    return largest / scale if scale else largest


def _timed(step: StepFunction) -> float:
    """Return the seconds of a step, averaged over a few."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    step()
    start.record()
    for _ in range(_REPEATS):
        step()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / _REPEATS
