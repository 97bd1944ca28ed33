"""Does a parareal network keep the accuracy? From scratch, and from a trained original.

    python -m examples.studies.accuracy run --task gated --data FOLDER --preset cpu --seeds 0 1 2
    python -m examples.studies.accuracy table

`run` appends one JSON line per network to `examples/studies/results/accuracy.jsonl`; `table` prints
the mean and the spread (standard deviation) over seeds as Markdown. Beside every parareal network
stand the controls: the original; the sequential network of the same latency; from a trained
original also an early exit and dropped layers at that latency, with the same fit.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples.studies.data import Split, fashion_mnist, gated_pairs, load_cifar10, standard_library
from examples.studies.networks import build_decoder, build_resnet, build_vgg, shortened
from pnn_compile.batches import CalibrationBatches
from pnn_compile.early_exit import fit_early_exit
from pnn_compile.fit import distillation

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"


@dataclass(frozen=True)
class Preset:
    """How much to train.

    Attributes:
        samples: Training samples.
        tests: Test samples.
        epochs: Epochs of training from scratch.
        units: Residual units in all.
        width: Channels of the first group of units.
        stages: Numbers N of stages.
        texts: Training samples of the text task, windows of 64 bytes.
        layers: Layers of the decoder.
        embedding: Width of the decoder.
    """

    samples: int
    tests: int
    epochs: int
    units: int
    width: int
    stages: tuple[int, ...]
    texts: int
    layers: int
    embedding: int


PRESETS = {
    "smoke": Preset(512, 256, 1, units=12, width=4, stages=(3,), texts=256, layers=4, embedding=16),
    "cpu": Preset(
        20_000, 6_000, 3, units=24, width=8, stages=(3, 6, 12), texts=6_000, layers=12, embedding=32
    ),
    "gpu": Preset(
        50_000, 10_000, 60, units=54, width=16, stages=(3, 6, 12, 18),
        texts=200_000, layers=36, embedding=256,
    ),
}  # fmt: skip
_CALIBRATION = 125
Sweep = Literal["chain", "collapsed"]
FORMS: tuple[tuple[str, Sweep], ...] = (
    ("units", "chain"),
    ("linear", "chain"),
    ("linear", "collapsed"),
)
"""Coarse family and sweep of the networks trained from scratch."""
CONVERSIONS: dict[str, dict[str, Any]] = {
    "parareal, fixed rank": {"coarse": "lowrank+linear", "preprocess": "lowrank+linear"},
    "parareal, auto": {"prologue": 0.07},
}
"""How networks are made from a trained original: guesses from the input and rank 32 everywhere, or
the measured choice within a coarse budget of 5 %, with 7 % of first layers copied into guesses."""


@dataclass(frozen=True)
class Task:
    """A data set with the family of networks for it.

    Attributes:
        train: Training samples.
        test: Test samples.
        build: Makes the network with so many units (or layers) in all.
        units: Units of the original.
        batch: Samples per step of the training from scratch.
        fit_batch: Samples per step of the fit of a converted network.
    """

    train: Split
    test: Split
    build: Callable[[int], nn.Module]
    units: int
    batch: int = 128
    fit_batch: int = 64


def make_task(name: str, folder: Path | None, preset: Preset) -> Task:
    """Read the data of a task and say which networks learn it."""
    generator = torch.Generator().manual_seed(0)
    if name == "text":
        train, test = standard_library(64, preset.texts)
        test = Split(test.x[: preset.tests], test.y[: preset.tests])
        build = partial(build_decoder, width=preset.embedding)
        return Task(train, test, build, preset.layers, batch=32, fit_batch=32)
    if folder is None:
        raise SystemExit(f"task {name} needs --data FOLDER; see examples/studies/data.py")
    if name == "gated":
        train, test = fashion_mnist(folder)
        train = _pooled(gated_pairs(train, preset.samples, generator))
        test = _pooled(gated_pairs(test, preset.tests, generator))
    else:
        train, test = load_cifar10(folder)
        train = Split(train.x[: preset.samples], train.y[: preset.samples])
        test = Split(test.x[: preset.tests], test.y[: preset.tests])
        if name == "cifar10" and preset.width < 16:
            train, test = _pooled(train), _pooled(test)
    if name == "vgg":
        return Task(train, test, partial(build_vgg, width=preset.width), 13)
    channels = train.x.shape[1]
    build = partial(build_resnet, width=preset.width, channels=channels)
    return Task(train, test, build, preset.units)


def _pooled(split: Split) -> Split:
    return Split(F.avg_pool2d(split.x, 2), split.y)


def accuracy(network: nn.Module, split: Split) -> float:
    """Share of labels that the network gets right, in percent."""
    network.eval()
    right = total = 0
    with torch.no_grad():
        for batch in split.batches(min(250, len(split.y))):
            found = network(split.x[batch]).argmax(-1)
            right += int((found == split.y[batch]).sum())
            total += split.y[batch].numel()
    return 100 * right / total


def train(
    network: nn.Module,
    task: Task,
    epochs: int,
    seed: int,
    *,
    teacher: nn.Module | None = None,
) -> None:
    """Train on labels, or to a teacher's outputs without labels; one-cycle AdamW."""
    size, rate = (task.batch, 3e-3) if teacher is None else (task.fit_batch, 2e-3)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    total = epochs * (len(task.train.y) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    network.train()
    for _ in range(epochs):
        for batch in task.train.batches(size, generator):
            x, y = task.train.x[batch], task.train.y[batch]
            found = network(x)
            if teacher is None:
                loss = F.cross_entropy(found.flatten(0, -2), y.flatten())
            else:
                with torch.no_grad():
                    wanted = teacher(x)
                loss = distillation(found, wanted, None)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def same_latency(units: int, compiled: pnn.Compiled) -> int:
    """Units of a sequential network that takes at least the predicted time of a parareal one."""
    return math.ceil(units / compiled.plan.forecast.speedup)


Row = dict[str, object]


def from_scratch(task: Task, preset: Preset, seed: int, only: str = "") -> Iterator[Row]:
    """Train the original, the shorter networks and the parareal networks on the same labels."""
    if only in "original":
        torch.manual_seed(seed)
        yield _trained("original", task.build(task.units), task, preset, seed, stages=1)
    for stages in preset.stages:
        if only in "same latency":
            units = same_latency(task.units, _compiled("linear", "chain", task, seed, stages))
            torch.manual_seed(seed)
            row = _trained("same latency", task.build(units), task, preset, seed, stages=stages)
            yield row | {"units": units}
        for family, sweep in FORMS:
            name = f"parareal, {family}, {sweep}"
            if only in name:
                compiled = _compiled(family, sweep, task, seed, stages)
                yield _parareal(name, compiled, task, preset, seed, stages)


def _compiled(family: str, sweep: Sweep, task: Task, seed: int, stages: int) -> pnn.Compiled:
    torch.manual_seed(seed)
    return pnn.compile(
        task.build(task.units), task.train.x[:2], stages=stages, coarse=family, sweep=sweep,
        coarse_budget=1.0, seed=seed,
    )  # fmt: skip


def _parareal(
    name: str, compiled: pnn.Compiled, task: Task, preset: Preset, seed: int, stages: int
) -> Row:
    row = _trained(name, compiled.module, task, preset, seed, stages=stages)
    return row | {
        "speedup": compiled.plan.forecast.speedup,
        "serial": compiled.plan.forecast.serial_share,
        "uncorrected": accuracy(uncorrected(compiled), task.test),
    }


def _trained(
    name: str, network: nn.Module, task: Task, preset: Preset, seed: int, *, stages: int
) -> Row:
    start = time.perf_counter()
    train(network, task, preset.epochs, seed)
    seconds = time.perf_counter() - start
    return {
        "study": "scratch", "network": name, "stages": stages, "seed": seed,
        "accuracy": accuracy(network, task.test), "seconds": seconds,
    }  # fmt: skip


def uncorrected(compiled: pnn.Compiled) -> nn.Module:
    """The same network without its corrections: h(y_N)."""
    network = copy.deepcopy(compiled.module)
    for name, child in network.named_children():
        if name.startswith("coarse_"):
            child.register_forward_hook(lambda *call: _zeroed(call[-1]))
    return network


def _zeroed(value: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
    return tuple(v * 0 for v in value) if isinstance(value, tuple) else value * 0


def conversion(task: Task, preset: Preset, seed: int, only: str = "") -> Iterator[Row]:
    """Convert a trained original; the controls get the same fit of one epoch."""
    torch.manual_seed(seed)
    original = task.build(task.units)
    train(original, task, preset.epochs, seed)
    original.eval()
    yield _row("original", 1, seed, fitted=accuracy(original, task.test))
    calibration = [task.train.x[batch] for batch in task.train.batches(_CALIBRATION)[:64]]
    for stages in preset.stages:
        for name, options in CONVERSIONS.items():
            start = time.perf_counter()
            compiled = pnn.compile(
                original, task.train.x[:2], stages=stages, seed=seed, calibration=calibration,
                **options,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            if only in name:
                yield _converted(name, compiled, task, original, seed) | {"compiled": seconds}
        if only in "early exit":
            batches = CalibrationBatches(compiled, calibration)
            network = fit_early_exit(compiled, batches, 1 / compiled.plan.forecast.speedup)
            if network is not None:
                row = _controlled("early exit", network, task, original, stages, seed)
                yield row | {"units": network.share * task.units}
        keep = same_latency(task.units, compiled)
        if only in "layers dropped":
            dropped = shortened(original, keep)
            row = _controlled("layers dropped", dropped, task, original, stages, seed)
            yield row | {"units": keep}


def _row(name: str, stages: int, seed: int, **figures: float) -> Row:
    return {"study": "conversion", "network": name, "stages": stages, "seed": seed, **figures}


def iterations(task: Task, preset: Preset, seed: int, only: str = "") -> Iterator[Row]:
    """Convert a trained original, closed form alone, and measure it at every K from 1 to N."""
    torch.manual_seed(seed)
    original = task.build(task.units)
    train(original, task, preset.epochs, seed)
    original.eval()
    right = accuracy(original, task.test)
    yield _row("original", 1, seed, accuracy=right) | {"study": "iterations"}
    calibration = [task.train.x[batch] for batch in task.train.batches(_CALIBRATION)[:64]]
    for stages in preset.stages:
        compiled = pnn.compile(
            original, task.train.x[:2], stages=stages, seed=seed, calibration=calibration,
            **CONVERSIONS["parareal, auto"],
        )  # fmt: skip
        tests = [task.test.x[batch] for batch in task.test.batches(min(250, len(task.test.y)))]
        for row in pnn.dial(compiled, tests):
            if only in f"K = {row.iterations}":
                network = _Iterated(compiled, row.iterations)
                yield _row(
                    f"K = {row.iterations}", stages, seed,
                    accuracy=accuracy(network, task.test), agreement=100 * (row.agreement or 0.0),
                    estimate=row.estimate_mean, error=row.output_error,
                    speedup=row.speedup, serial=row.serial_share,
                ) | {"study": "iterations"}  # fmt: skip


class _Iterated(nn.Module):
    def __init__(self, compiled: pnn.Compiled, count: int) -> None:
        super().__init__()
        self._compiled, self._count = compiled, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._compiled.module.eval()
        outputs: torch.Tensor = self._compiled.iterate(x, iterations=self._count).outputs
        return outputs


def _converted(
    name: str, compiled: pnn.Compiled, task: Task, original: nn.Module, seed: int
) -> Row:
    assert compiled.calibration is not None
    calibrated, without = accuracy(compiled.module, task.test), uncorrected(compiled)
    train(compiled.module, task, 1, seed, teacher=copy.deepcopy(original))
    forecast = compiled.plan.forecast
    return _row(
        name, len(compiled.plan.stages), seed, uncorrected=accuracy(without, task.test),
        calibrated=calibrated, fitted=accuracy(compiled.module, task.test),
        agreement=100 * (compiled.calibration.agreement_after or 0.0),
        speedup=forecast.speedup, serial=forecast.serial_share,
    )  # fmt: skip


def _controlled(
    name: str, network: nn.Module, task: Task, original: nn.Module, stages: int, seed: int
) -> Row:
    before = accuracy(network, task.test)
    train(network, task, 1, seed, teacher=original)
    return _row(name, stages, seed, calibrated=before, fitted=accuracy(network, task.test))


def table(path: Path) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("preset", "task", "study", "network", "stages")
    latest = {tuple(row.get(key) for key in (*keys, "seed")): row for row in rows}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest.values():  # of a network that was run again the later row counts
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    figures = (
        "accuracy", "uncorrected", "calibrated", "fitted", "agreement", "speedup", "serial",
    )  # fmt: skip
    lines = [
        f"| preset | task | study | network | N | seeds | {' | '.join(figures)} |",
        f"|{'---|' * (6 + len(figures))}",
    ]
    for key, found in groups.items():
        cells = [_spread([r[f] for r in found if f in r]) for f in figures]
        lines.append(f"| {' | '.join(map(str, key))} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[object]) -> str:
    numbers = [float(str(value)) for value in values]
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    digits = 3 if abs(mean) < 1 else 2
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


STUDIES = {"scratch": from_scratch, "conversion": conversion, "iterations": iterations}
"""The studies by name."""


def main() -> None:
    """Run a study, or print the table of what was run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--task", choices=["gated", "cifar10", "vgg", "text"], default="gated")
    parser.add_argument("--study", choices=list(STUDIES), default="scratch")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--stages", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="networks whose name holds this text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.action == "table":
        print(table(options.results))
        return
    torch.set_num_threads(1)
    preset = PRESETS[options.preset]
    if options.stages:
        preset = replace(preset, stages=tuple(options.stages))
    task = make_task(options.task, options.data, preset)
    study = STUDIES[options.study]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for row in study(task, preset, seed, options.only):
            line = json.dumps({"task": options.task, "preset": options.preset, **row})
            with options.results.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
