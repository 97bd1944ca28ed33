"""Does a parareal network keep the accuracy? From scratch, and from a trained original.

    python -m examples.studies.accuracy run --task gated --data FOLDER --preset cpu --seeds 0 1 2
    python -m examples.studies.accuracy run --task vgg --data FOLDER --preset gpu --device cuda
    python -m examples.studies.accuracy table

`run` appends one JSON line per network to `examples/studies/results/accuracy.jsonl`; `table` prints
the mean and the spread (standard deviation) over seeds as Markdown, `summary` what is lost against
the original. Beside every parareal network
stand the controls: the original; the sequential network of the same latency; from a trained
original also an early exit, dropped layers and layers in parallel at that latency, with the same
fit. Many networks at
once on one GPU: `examples.studies.queue`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples.studies.conversions import (
    AT_CONVERGENCE,
    ATTEMPTS,
    AUTO,
    CONVERSIONS,
    LENGTHS,
    Conversion,
)
from examples.studies.networks import in_groups, shortened
from examples.studies.presets import PRESETS, Preset
from examples.studies.regimes import REGIMES, Regime
from examples.studies.table import Row, summary, table
from examples.studies.tasks import TASKS, Task, make_task
from examples.studies.training import Originals, Shuffled, accuracy, quality, train
from passes.errors import PartitionError, SynthesisError
from pnn_compile.fit.early_exit import fit_early_exit
from pnn_compile.fit.train import distillation
from pnn_compile.inputs import CalibrationBatches

__all__ = ["RESULTS", "STUDIES", "Study", "append", "main"]

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
_SAMPLES = 8000
_STAR = {"coarse": "units", "sweep": "collapsed"}
_WIDE = {"sweep": "collapsed", "preprocess": "narrow", "prologue": 0.02}
FORMS: dict[str, dict[str, Any]] = {
    "what the compiler chooses": {"coarse_budget": None},
    "parareal, units, chain": {"coarse": "units"},
    "parareal, linear, chain": {"coarse": "linear"},
    "parareal, linear, collapsed": {"coarse": "linear", "sweep": "collapsed"},
    "maps and convolutions, collapsed": {"coarse": "linear+conv", "sweep": "collapsed"},
    "units, half the channels": {"coarse": "units", "coarse_width": 0.5},
    "units, a quarter of the channels": {"coarse": "units", "coarse_width": 0.25},
    "copied last layers": {"coarse": "layers"},
    "last layers at a quarter": {"coarse": "layers", "coarse_width": 0.25},
    "star of last layers": {"coarse": "layers", "sweep": "collapsed"},
    "star, all channels": _STAR,
    "star, half the channels": {**_STAR, "coarse_width": 0.5},
    "star, a quarter of the channels": {**_STAR, "coarse_width": 0.25},
    "star, two blocks": {**_STAR, "units": 2},
    "units with thinned guesses": {"coarse": "units", "preprocess": "thinned"},
    "units with narrow guesses": {"coarse": "units", "preprocess": "narrow"},
    "star with narrow guesses": {**_STAR, "preprocess": "narrow"},
    "units with first layers in guesses": {"coarse": "units", "prologue": 0.2},
    "low rank, narrow guesses, collapsed": {**_WIDE, "coarse": "lowrank"},
    "quarter star, narrow guesses": {**_WIDE, "coarse": "units", "coarse_width": 0.25},
    "linear, cuts inside blocks": {"coarse": "linear", "cut_inside_blocks": True},
}
"""Options of the networks trained from scratch, by a name that is no part of another one.

A star is a collapsed sweep through copied blocks; those with narrow guesses are for wide networks.
Cuts lie where blocks begin but in the last.
"""


@dataclass(frozen=True)
class Study:
    """One seed of a task.

    Attributes:
        task: The data and the networks for it.
        preset: How much to train.
        seed: Seed of the weights and of the order of the samples.
        only: Networks whose name holds one of these texts; all if empty.
        originals: The trained originals.
        lengths: Fits of the study of lengths, as shares of the training.
    """

    task: Task
    preset: Preset
    seed: int
    only: tuple[str, ...] = ()
    originals: Originals = field(default_factory=Originals)
    lengths: Sequence[float] = LENGTHS

    def wants(self, name: str) -> bool:
        """Whether a network is asked for."""
        return not self.only or any(text in name for text in self.only)

    def original(self) -> nn.Module:
        """The trained original."""
        return self.originals.trained(self.task, self.preset, self.seed)[0]

    def samples(self) -> list[torch.Tensor]:
        """Batches to calibrate on."""
        size = self.preset.calibration
        batches = self.task.train.batches(size)[: _SAMPLES // size]
        return [self.task.train.x[batch] for batch in batches]

    def row(self, study: str, network: str, stages: int, **figures: object) -> Row:
        """One line of the results."""
        names = {"study": study, "network": network, "stages": stages, "seed": self.seed}
        device = self.task.train.y.device
        if device.type == "cuda":
            figures["device"] = torch.cuda.get_device_name(device)
        return names | figures


def same_latency(units: int, compiled: pnn.Compiled) -> int:
    """Units of a sequential network that takes at least the predicted time of a parareal one."""
    return math.ceil(units / compiled.plan.forecast.speedup)


def from_scratch(study: Study) -> Iterator[Row]:
    """Train the original, the shorter networks and the parareal networks on the same labels."""
    task = study.task
    if study.wants("original"):
        network, seconds = study.originals.trained(task, study.preset, study.seed)
        reached = quality(network, task.test)
        yield study.row("scratch", "original", 1, **reached, seconds=seconds)
    for stages in study.preset.stages:
        for family, name in (("linear", "same latency"), ("units", "latency of units")):
            if study.wants(name):
                units = same_latency(task.units, _compiled({"coarse": family}, study, stages))
                torch.manual_seed(study.seed)
                row = _trained(name, task.build(units), study, stages)
                yield row | {"units": units}
        for name, options in FORMS.items():
            if not study.wants(name):
                continue
            try:
                compiled = _compiled(options, study, stages)
            except (PartitionError, SynthesisError) as error:
                print(f"{name}, N = {stages}: {error}", file=sys.stderr)
                continue
            yield _parareal(name, compiled, study, stages)
        for name, regime in REGIMES.items():
            if study.wants(name):
                compiled = _compiled({"coarse": "units"}, study, stages)
                yield _parareal(name, compiled, study, stages, regime(compiled))


def _compiled(options: dict[str, Any], study: Study, stages: int) -> pnn.Compiled:
    torch.manual_seed(study.seed)
    return pnn.compile(
        study.task.build(study.task.units), study.task.train.x[:2].cpu(), stages=stages,
        seed=study.seed, **{"coarse_budget": 1.0, **options},
    )  # fmt: skip


def _parareal(
    name: str, compiled: pnn.Compiled, study: Study, stages: int, regime: Regime | None = None
) -> Row:
    row = _trained(name, compiled.module, study, stages, regime)
    test = study.task.test
    if compiled.plan.sweep == "chain":
        row["iterated"] = accuracy(_Iterated(compiled, 2), test)
    return row | {
        "speedup": compiled.plan.forecast.speedup,
        "serial": compiled.plan.forecast.serial_share,
        "uncorrected": accuracy(uncorrected(compiled), test),
        "sequential": accuracy(compiled.sequential, test),
    }


def _trained(
    name: str, network: nn.Module, study: Study, stages: int, regime: Regime | None = None
) -> Row:
    state = study.originals.state(study.task.name, study.seed, name, stages)
    seconds = train(network, study.task, study.preset, study.seed, state=state, regime=regime)
    reached = quality(network, study.task.test)
    return study.row("scratch", name, stages, **reached, seconds=seconds)


def uncorrected(compiled: pnn.Compiled) -> nn.Module:
    """The same network without its corrections: h(y_N)."""
    network = copy.deepcopy(compiled.module)
    for name, child in network.named_children():
        if name.startswith("coarse_"):
            child.register_forward_hook(lambda *call: _zeroed(call[-1]))
    return network


def _zeroed(value: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
    return tuple(v * 0 for v in value) if isinstance(value, tuple) else value * 0


def conversion(study: Study) -> Iterator[Row]:
    """Convert a trained original; the controls get the same fit of one epoch."""
    original = study.original()
    yield study.row("conversion", "original", 1, **_after(original, study))
    for stages in study.preset.stages:
        for name, how in CONVERSIONS.items():
            if study.wants(name) or how is AUTO:
                try:
                    compiled, seconds = _convert(original, study, stages, how)
                except SynthesisError as error:
                    print(f"{name}, N = {stages}: {error}", file=sys.stderr)
                    continue
                every = study if how is AUTO else replace(study, only=())
                controls = _controls(compiled, every, original) if how.controls else []
                if study.wants(name):
                    row = _fitted("conversion", name, compiled, study, how)
                    yield row | {"compiled": seconds}
                for control in controls:
                    if how is not AUTO:
                        control = replace(control, name=f"{control.name}, as fast as {name}")
                    yield _controlled("conversion", control, stages, study, original, how)


def lengths(study: Study) -> Iterator[Row]:
    """Convert a trained original by fits of several lengths, beside controls of the same fit."""
    original = study.original()
    yield study.row("lengths", "original", 1, **_after(original, study))
    for stages in study.preset.stages:
        for share in study.lengths:
            for name, how in AT_CONVERGENCE.items():
                if not study.wants(name):
                    continue
                total = share * study.preset.epochs / (how.epochs + how.interfaces)
                how = replace(how, epochs=total * how.epochs, interfaces=total * how.interfaces)
                after = f"after {share:.1%} of the training"
                try:
                    compiled, _ = _convert(original, study, stages, how)
                except (PartitionError, SynthesisError) as error:
                    print(f"{name}, N = {stages}: {error}", file=sys.stderr)
                    continue
                controls = _controls(compiled, study, original)
                yield _fitted("lengths", f"{name}, {after}", compiled, study, how)
                for control in controls:
                    control = replace(control, name=f"{control.name}, as fast as {name}, {after}")
                    yield _controlled("lengths", control, stages, study, original, how)


def attempts(study: Study) -> Iterator[Row]:
    """Convert a trained original in several ways, each with its own fit."""
    original = study.original()
    yield study.row("attempts", "original", 1, **_after(original, study))
    for stages in study.preset.stages:
        for name, how in ATTEMPTS.items():
            if not study.wants(name) or (stages != 3 and "cuts" in how.options):
                continue
            compiled, _ = _convert(original, study, stages, how)
            every = replace(study, only=())
            controls = _controls(compiled, every, original) if how.controls else []
            yield _fitted("attempts", name, compiled, study, how)
            for control in controls:
                control = replace(control, name=f"{control.name}, {name}")
                yield _controlled("attempts", control, stages, study, original, how)


def _convert(
    original: nn.Module, study: Study, stages: int, how: Conversion
) -> tuple[pnn.Compiled, float]:
    start = time.perf_counter()
    compiled = pnn.compile(
        original, study.task.train.x[:2], seed=study.seed, calibration=study.samples(),
        **{"stages": stages} | how.options,
    )  # fmt: skip
    return compiled, time.perf_counter() - start


def _fitted(
    study_name: str,
    name: str,
    compiled: pnn.Compiled,
    study: Study,
    how: Conversion,
) -> Row:
    assert compiled.calibration is not None
    test, without = study.task.test, uncorrected(compiled)
    calibrated = accuracy(compiled.module, test)
    compiled.module.to(study.task.train.y.device)
    pnn.fit(
        compiled, Shuffled(study.task, study.task.fit_batch, study.seed), epochs=how.epochs,
        interface_epochs=how.interfaces, dropout=how.dropout,
        learning_rate=how.rate * study.preset.fit_rate, loss=_loss(how),
        optimizer=_optimizer(compiled, how, study) if how.slow != 1 else None,
        autocast=torch.bfloat16 if study.preset.bfloat16 else None,
    )  # fmt: skip
    forecast = compiled.plan.forecast
    return study.row(
        study_name, name, compiled.plan.devices, uncorrected=accuracy(without, test),
        calibrated=calibrated, **_after(compiled.module, study),
        agreement=100 * (compiled.calibration.agreement_after or 0.0),
        speedup=forecast.speedup, serial=forecast.serial_share,
    )  # fmt: skip


def _after(network: nn.Module, study: Study) -> dict[str, float]:
    """What a network reaches after the fit."""
    reached = quality(network, study.task.test)
    return {"fitted": reached.pop("accuracy"), **reached}


def _loss(how: Conversion) -> Callable[[Any, Any, Any], torch.Tensor]:
    def loss(outputs: Any, targets: Any, batch: Any) -> torch.Tensor:
        distance = distillation(outputs, targets, batch)
        if not how.labels:
            return distance
        right = F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())
        return distance + how.labels * right

    return loss


def _optimizer(
    compiled: pnn.Compiled, how: Conversion, study: Study
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    stages = nn.ModuleList([*compiled.stages.fine, compiled.stages.head])
    fine, rate = set(stages.parameters()), how.rate * study.preset.fit_rate

    def make(trained: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in trained:
            groups.setdefault(rate * (how.slow if parameter in fine else 1), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": group, "lr": rate} for rate, group in groups.items()], weight_decay=1e-2
        )

    return make


def _fit(network: nn.Module, study: Study, original: nn.Module, how: Conversion) -> None:
    train(
        network, study.task, study.preset, study.seed,
        epochs=how.epochs + how.interfaces,
        rate=how.rate * study.preset.fit_rate, dropout=how.dropout,
        teacher=copy.deepcopy(original),
    )  # fmt: skip


@dataclass(frozen=True)
class _Control:
    """What a user could do instead, at the same latency: so many units of the original."""

    name: str
    network: nn.Module
    units: float


def _controls(compiled: pnn.Compiled, study: Study, original: nn.Module) -> list[_Control]:
    """Early exit, dropped and parallel layers; made before the fit, which changes the stages."""
    units, found = study.task.units, []
    keep = same_latency(units, compiled)
    if study.wants("early exit"):
        batches = CalibrationBatches(compiled, study.samples())
        early = fit_early_exit(compiled, batches, 1 / compiled.plan.forecast.speedup)
        if early is not None:
            found.append(_Control("early exit", early, early.share * units))
    if study.wants("layers dropped"):
        found.append(_Control("layers dropped", shortened(original, keep), keep))
    parallel = in_groups(original, keep) if study.wants("layers in parallel") else None
    if parallel is not None:
        found.append(_Control("layers in parallel", parallel, keep))
    return found


def _controlled(
    name: str, control: _Control, stages: int, study: Study, original: nn.Module, how: Conversion
) -> Row:
    before = accuracy(control.network, study.task.test)
    _fit(control.network, study, original, how)
    after = _after(control.network, study)
    return study.row(name, control.name, stages, calibrated=before, **after, units=control.units)


def iterations(study: Study) -> Iterator[Row]:
    """Convert a trained original, closed form alone, and measure it at every K from 1 to N."""
    original, test = study.original(), study.task.test
    yield study.row("iterations", "original", 1, accuracy=accuracy(original, test))
    for stages in study.preset.stages:
        compiled, _ = _convert(original, study, stages, AUTO)
        tests = [test.x[batch] for batch in test.batches(min(250, len(test.y)))]
        for row in pnn.dial(compiled, tests):
            name = f"K = {row.iterations}"
            if study.wants(name):
                network = _Iterated(compiled, row.iterations)
                yield study.row(
                    "iterations", name, stages, accuracy=accuracy(network, test),
                    agreement=100 * (row.agreement or 0.0), estimate=row.estimate_mean,
                    error=row.output_error, speedup=row.speedup, serial=row.serial_share,
                )  # fmt: skip


class _Iterated(nn.Module):
    def __init__(self, compiled: pnn.Compiled, count: int) -> None:
        super().__init__()
        self._compiled, self._count = compiled, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._compiled.module.eval()
        outputs: torch.Tensor = self._compiled.iterate(x, iterations=self._count).outputs
        return outputs


STUDIES = {
    "scratch": from_scratch,
    "conversion": conversion,
    "lengths": lengths,
    "iterations": iterations,
    "attempts": attempts,
}
"""The studies by name."""


def append(file: Path, row: Row) -> None:
    """Add one line to the results, in one write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row)
    with file.open("a") as results:
        results.write(line + "\n")
    print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description="Does a parareal network keep the accuracy?")
    found.add_argument("action", choices=["run", "table", "summary"])
    found.add_argument("--task", choices=TASKS, default="gated")
    found.add_argument("--study", choices=list(STUDIES), default="scratch")
    found.add_argument("--data", type=Path)
    found.add_argument("--preset", choices=list(PRESETS), default="cpu")
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument("--stages", type=int, nargs="+", help="instead of the preset's")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--only", nargs="+", default=(), help="parts of the networks' names")
    found.add_argument("--lengths", type=float, nargs="+", default=LENGTHS, help="shares of fits")
    found.add_argument("--originals", type=Path, help="folder that keeps the trained originals")
    found.add_argument("--results", type=Path, default=RESULTS)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study, or print a table of what was run."""
    options = parser().parse_args(arguments)
    if options.action != "run":
        print((table if options.action == "table" else summary)(options.results))
        return
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if options.device == "cuda" else "highest")
    preset = PRESETS[options.preset]
    if options.stages:
        preset = replace(preset, stages=tuple(options.stages))
    task = make_task(options.task, options.data, preset, options.device)
    for seed in options.seeds:
        originals = Originals(options.originals)
        study = Study(task, preset, seed, tuple(options.only), originals, options.lengths)
        for row in STUDIES[options.study](study):
            append(options.results, {"task": options.task, "preset": options.preset, **row})


if __name__ == "__main__":
    main()
