"""Predicted speed on wide networks and large images, beside what the cuts would allow.

    python -m examples.studies.wide

For ResNet-101, VGG-16 and AmoebaNet-D (18, 32) at 224 x 224: the plan by default, and with options
whose operators cost a share that is asked for. FLOPs, links free; accuracy is not measured here.
"Bound" is the speed-up if guesses and corrections were free, with the cuts of the plan; "even" is
that of the most even legal cuts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from examples import amoebanet, vgg16
from examples.studies.balance import without_serial
from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.node_facts import observe
from passes.errors import PnnError
from passes.options import Options
from passes.partition.choose_cuts import problem_builder
from passes.partition.problem import CutProblem, makespan
from passes.partition.search import solve
from passes.plan.num_stages import cut_and_plan

_NARROW = {"sweep": "collapsed", "preprocess": "narrow", "prologue": 0.02}
_COPIES = {"coarse": "units", "coarse_width": 0.25}
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "chain of copied blocks": {"coarse": "units", "sweep": "chain"},
    "star of last layers": {"coarse": "layers", "sweep": "collapsed"},
    "chain of a quarter of the channels": {**_COPIES, "sweep": "chain"},
    "star of a quarter of the channels": {**_COPIES, "sweep": "collapsed"},
    "channel maps, collapsed": {**_NARROW, "coarse": "linear"},
    "low rank, collapsed": {**_NARROW, "coarse": "lowrank"},
}
"""Options by name; the last two guess by narrow copies for 2 % of the cost."""


class Bottleneck(nn.Module):
    """A residual unit of three convolutions (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *self._convolve(channels, inner, 1, 1), nn.ReLU(),
            *self._convolve(inner, inner, 3, stride), nn.ReLU(),
            *self._convolve(inner, 4 * inner, 1, 1),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if channels != 4 * inner:
            self.shortcut = nn.Sequential(*self._convolve(channels, 4 * inner, 1, stride))
        self.relu = nn.ReLU()

    @staticmethod
    def _convolve(channels: int, out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
        convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        return convolution, nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to `[B, 4 inner, H / stride, W / stride]`."""
        y: torch.Tensor = self.relu(self.shortcut(x) + self.branch(x))
        return y


def resnet101() -> nn.Module:
    """ResNet-101 for images of 224 x 224."""
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    units, channels = list[nn.Module](), 64
    for group, count in enumerate((3, 4, 23, 3)):
        inner = 64 * 2**group
        for index in range(count):
            units.append(Bottleneck(channels, inner, 2 if group and not index else 1))
            channels = 4 * inner
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *units, *head)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-101": resnet101,
    "VGG-16": vgg16.build_imagenet_model,
    "AmoebaNet-D (18, 32)": amoebanet.build_model,
}
"""What builds each model."""


def rows(build: Callable[[], nn.Module], counts: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
    """For every number of stages and form: name, speed, bound, even cuts, smallest stage, note."""
    program = capture(build().eval(), (torch.randn(1, 3, 224, 224),), {})
    analysis = analyze(program, observe(program), "flops")
    for count in counts:
        even = most_even(analysis, count)
        for name, choices in FORMS.items():
            try:
                _, plan = cut_and_plan(analysis, Options(stages=count, **choices))
            except PnnError as error:
                yield str(count), name, "", "", f"{even:.2f}", "", str(error).splitlines()[0]
                continue
            flops = [stage.flops for stage in plan.stages]
            small = " ".join(note for note in plan.notes if "less than half the mean" in note)
            smallest = min(flops) * count / sum(flops)
            forecast = plan.forecast
            figures = f"{forecast.speedup:.2f}", f"{forecast.bound:.2f}", f"{even:.2f}"
            yield str(count), name, *figures, f"{smallest:.0%}", small


def most_even(analysis: Analysis, count: int) -> float:
    """The speed-up of the cuts with the fastest slowest stage, if nothing else took time."""
    builder = problem_builder(analysis, Options(stages=count, coarse="zero"))
    first = without_serial(builder.build(builder.devices(count))).devices[0]
    free = dataclasses.replace(first, entry=[0.0] * len(first.entry))
    problem = CutProblem(devices=(free,) * count)
    return analysis.flops / makespan(problem, solve(problem).cuts)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | N | options | speed-up | bound | even | smallest stage over mean | note |")
    print("|---|---|---|---|---|---|---|---|")
    for name, build in MODELS.items():
        for row in rows(build, (4, 8)):
            print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
