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
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder, resnet110
from examples.studies.data import Split, fashion_mnist, gated_pairs, load_cifar10, standard_library
from pnn_compile.fit import distillation

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"


@dataclass(frozen=True)
class Preset:
    """How much to train.

    Attributes:
        samples: Training samples.
        tests: Test samples.
        epochs: Epochs of training from scratch.
        units: Residual units per group, or a third of the decoder's layers.
        width: Channels of the first group, or of the decoder.
    """

    samples: int
    tests: int
    epochs: int
    units: int
    width: int


PRESETS = {
    "smoke": Preset(samples=512, tests=256, epochs=1, units=4, width=4),
    "cpu": Preset(samples=20_000, tests=6_000, epochs=3, units=8, width=8),
    "gpu": Preset(samples=50_000, tests=10_000, epochs=60, units=18, width=16),
}
BATCH = 128
_CALIBRATION = 125
STAGES = (3, 6)
Correction = Literal["residual", "difference"]
Sweep = Literal["chain", "collapsed"]
FORMS: tuple[tuple[str, Sweep], ...] = (
    ("units", "chain"),
    ("linear", "chain"),
    ("linear", "collapsed"),
)
"""Coarse family and sweep of the networks trained from scratch."""
CONVERSIONS: tuple[tuple[Correction, str], ...] = (
    ("residual", "lowrank+linear"),
    ("difference", "lowrank+linear+conv"),
)
"""Correction and coarse family of the networks made from a trained original."""


@dataclass(frozen=True)
class Task:
    """A data set with the family of networks for it.

    Attributes:
        train: Training samples.
        test: Test samples.
        build: Makes the network with so many units (or layers) in all.
        units: Units of the original.
    """

    train: Split
    test: Split
    build: Callable[[int], nn.Module]
    units: int


def make_task(name: str, folder: Path | None, preset: Preset) -> Task:
    """Read the data of a task and say which networks learn it."""
    generator = torch.Generator().manual_seed(0)
    units = 3 * preset.units
    if name == "text":
        train, test = standard_library(64, preset.samples)
        test = Split(test.x[: preset.tests], test.y[: preset.tests])
        width = 8 * preset.width
        return Task(train, test, lambda n: _decoder(n, width), units)
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
        if preset.width < 16:
            train, test = _pooled(train), _pooled(test)
    channels = train.x.shape[1]
    return Task(train, test, lambda n: _resnet(n, preset.width, channels), units)


def _pooled(split: Split) -> Split:
    return Split(F.avg_pool2d(split.x, 2), split.y)


def _resnet(units: int, width: int, channels: int) -> nn.Module:
    per_group = [units // 3 + (group < units % 3) for group in range(3)]
    network = resnet110.build_model(max(per_group), width, channels)
    kept = [
        unit
        for index, unit in enumerate(network.trunk)
        if index % max(per_group) < per_group[index // max(per_group)]
    ]
    network.trunk = nn.Sequential(*kept)
    return network


def _decoder(layers: int, width: int) -> nn.Module:
    return decoder.build_model(layers=layers, width=width, heads=4, context=64)


def accuracy(network: nn.Module, split: Split) -> float:
    """Share of labels that the network gets right, in percent."""
    network.eval()
    right = total = 0
    with torch.no_grad():
        for batch in split.batches(250):
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
    rate: float = 3e-3,
) -> None:
    """Train on labels, or to a teacher's outputs without labels; one-cycle AdamW."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    total = epochs * (len(task.train.y) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    network.train()
    for _ in range(epochs):
        for batch in task.train.batches(BATCH, generator):
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


def same_latency(units: int, stages: int) -> int:
    """Units of the sequential network as deep as one stage and the coarse chain."""
    return units // stages + stages - 1


Row = dict[str, object]


def from_scratch(task: Task, preset: Preset, seed: int, only: str = "") -> Iterator[Row]:
    """Train the original, the shorter networks and the parareal networks on the same labels."""
    if only in "original":
        torch.manual_seed(seed)
        yield _trained("original", task.build(task.units), task, preset, seed, stages=1)
    for stages in STAGES:
        if only in "same latency":
            torch.manual_seed(seed)
            short = task.build(same_latency(task.units, stages))
            yield _trained("same latency", short, task, preset, seed, stages=stages)
        for family, sweep in FORMS:
            name = f"parareal, {family}, {sweep}"
            if only in name:
                yield _parareal(name, family, sweep, task, preset, seed, stages)


def _parareal(
    name: str, family: str, sweep: Sweep, task: Task, preset: Preset, seed: int, stages: int
) -> Row:
    torch.manual_seed(seed)
    compiled = pnn.compile(
        task.build(task.units), task.train.x[:2], stages=stages, coarse=family, sweep=sweep,
        coarse_budget=1.0, seed=seed,
    )  # fmt: skip
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
    for stages in STAGES:
        for correction, coarse in CONVERSIONS:
            if only in f"parareal, {correction}, {coarse}":
                yield _converted(task, original, stages, correction, coarse, calibration, seed)
        keep = same_latency(task.units, stages)
        if only in "early exit":
            exit_after = _early_exit(original, task, keep, calibration)
            yield _controlled("early exit", exit_after, task, original, stages, seed)
        if only in "layers dropped":
            dropped = _dropped(original, task, keep)
            yield _controlled("layers dropped", dropped, task, original, stages, seed)


def _row(name: str, stages: int, seed: int, **figures: float) -> Row:
    return {"study": "conversion", "network": name, "stages": stages, "seed": seed, **figures}


def _converted(
    task: Task, original: nn.Module, stages: int, correction: Correction, coarse: str,
    calibration: list[torch.Tensor], seed: int,
) -> Row:  # fmt: skip
    compiled = pnn.compile(
        original, task.train.x[:2], stages=stages, coarse=coarse, rank=32,
        preprocess="lowrank+linear+conv" if task.train.x.is_floating_point() else "linear+conv",
        correction=correction, coarse_budget=1.0, seed=seed,
    )  # fmt: skip
    report = pnn.calibrate(compiled, calibration)
    calibrated = accuracy(compiled.module, task.test)
    train(compiled.module, task, 1, seed, teacher=copy.deepcopy(original), rate=1.5e-3)
    forecast = compiled.plan.forecast
    return _row(
        f"parareal, {correction}, {coarse}", stages, seed,
        calibrated=calibrated, fitted=accuracy(compiled.module, task.test),
        agreement=100 * report.agreement_after,
        speedup=forecast.speedup, serial=forecast.serial_share,
    )  # fmt: skip


def _controlled(
    name: str, network: nn.Module, task: Task, original: nn.Module, stages: int, seed: int
) -> Row:
    before = accuracy(network, task.test)
    train(network, task, 1, seed, teacher=original, rate=1.5e-3)
    return _row(name, stages, seed, calibrated=before, fitted=accuracy(network, task.test))


def _early_exit(
    original: nn.Module, task: Task, keep: int, calibration: list[torch.Tensor]
) -> nn.Module:
    """The first units of the original, a linear map to the trunk's end, and the head.

    The map is of the same families as the parareal network's corrections, and fitted in the same
    closed form to the true states: the output of stage 0 with nothing guessed or corrected.
    """
    from passes.coarse.fitting import MatrixFit
    from passes.coarse.linear import Linear
    from passes.coarse.lowrank import LowRank
    from passes.coarse.sum import Sum

    cut = f"trunk.{keep}" if hasattr(original, "trunk") else f"blocks.{keep}"
    compiled = pnn.compile(original, task.train.x[:2], cuts=[cut], coarse="linear")
    plan = compiled.plan
    entering = [value.spec for value in plan.interfaces[0].state]
    leaving = [value.spec for value in plan.interfaces[1].state]
    parts = [LowRank(entering, leaving, 32, bias=True), Linear(entering, leaving, bias=True)]
    bridge = Sum(parts)
    first, second = compiled.stages.fine
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.zero_()
        for part in parts:
            fit = MatrixFit(part)
            for index, x in enumerate(calibration):
                state = first.eval()(x)
                left = second.eval()(state) - bridge(state)
                fit.add([state], [left], held_out=index % 5 == 4)
            fit.finish()
    return copy.deepcopy(nn.Sequential(first, bridge, compiled.stages.head))


def _dropped(original: nn.Module, task: Task, keep: int) -> nn.Module:
    """The original with evenly spaced units left out; units that change the shape stay."""
    network = copy.deepcopy(original)
    name = "trunk" if hasattr(network, "trunk") else "blocks"
    units = list(getattr(network, name))
    must = [i for i, u in enumerate(units) if isinstance(getattr(u, "shortcut", None), nn.Conv2d)]
    free = [i for i in range(len(units)) if i not in must]
    count = keep - len(must)
    chosen = {free[int(k * len(free) / count)] for k in range(count)}
    kept = [unit for i, unit in enumerate(units) if i in chosen or i in must]
    setattr(network, name, nn.Sequential(*kept) if name == "trunk" else nn.ModuleList(kept))
    return network


def table(path: Path) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        key = row["task"], row["study"], row["network"], row["stages"]
        groups.setdefault(key, []).append(row)
    figures = ("accuracy", "uncorrected", "calibrated", "fitted", "speedup", "serial")
    lines = [
        f"| task | study | network | N | seeds | {' | '.join(figures)} |",
        f"|{'---|' * (5 + len(figures))}",
    ]
    for (task, study, network, stages), found in groups.items():
        cells = [_spread([r[f] for r in found if f in r]) for f in figures]
        lines.append(
            f"| {task} | {study} | {network} | {stages} | {len(found)} | {' | '.join(cells)} |"
        )
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


def main() -> None:
    """Run a study, or print the table of what was run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--task", choices=["gated", "cifar10", "text"], default="gated")
    parser.add_argument("--study", choices=["scratch", "conversion"], default="scratch")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="networks whose name holds this text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.action == "table":
        print(table(options.results))
        return
    torch.set_num_threads(1)
    preset = PRESETS[options.preset]
    task = make_task(options.task, options.data, preset)
    study = from_scratch if options.study == "scratch" else conversion
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for row in study(task, preset, seed, options.only):
            line = json.dumps({"task": options.task, "preset": options.preset, **row})
            with options.results.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
