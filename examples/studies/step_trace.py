"""A training step as two processes take it, beside the simulation of the same step, as one picture.

    python -m examples.studies.step_trace                # docs/step_trace.svg
    python -m examples.studies.step_trace --steps 200

ResNet-110 at batch 1 in two stages, cut by measured seconds. Of all steps the shortest is drawn, by
the clock that the processes share. The simulation takes the seconds of every computation in that
step, and free links: what it lacks are the time of messages and what lies between instructions. The
step of the optimizer is in neither.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import pnn_compile as pnn
from examples import resnet110
from passes.schedule.instruction import EXPECTS, RECEIVES, SENDS
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, TimelineSpan, Times, simulate
from pnn_compile.bench.measurements import mean_square, optimizer_of
from pnn_compile.runtime.local_ranks import run_on_ranks

PICTURE = Path(__file__).parents[2] / "docs" / "step_trace.svg"
COLORS = {
    "guess": "#b58900",
    "fine": "#268bd2",
    "correct": "#d33682",
    "coarse": "#d33682",
    "head": "#6c71c4",
    "send": "#555",
    "wait": "#ddd",
}
"""By the first word of an instruction; `correct` and `coarse backward` are one network."""
_WARM_UP = 4


def rank_steps(device: torch.device, artifact: Path, steps: int) -> list[list[TimelineSpan]]:
    """Take training steps on this rank; return what it did in each."""
    module = pnn.runtime.distribute(artifact).train()
    optimizer, inputs = optimizer_of(module), dict(module.whole.program.args)
    taken = []
    for _ in range(_WARM_UP + steps):
        dist.barrier()
        module.train_step(inputs, mean_square, optimizer)
        taken.append(module.spans)
    return taken[_WARM_UP:]


def traced(steps: Sequence[Sequence[Sequence[TimelineSpan]]]) -> Timeline:
    """Return the shortest step, from the moment at which its first rank begins.

    Args:
        steps: By step and rank.
    """

    def bounds(step: Sequence[Sequence[TimelineSpan]]) -> tuple[float, float]:
        return min(spans[0].start for spans in step), max(spans[-1].end for spans in step)

    step = min(steps, key=lambda step: bounds(step)[1] - bounds(step)[0])
    first, _ = bounds(step)
    return Timeline(
        tuple(
            tuple(TimelineSpan(s.instruction, s.start - first, s.end - first) for s in spans)
            for spans in step
        )
    )


def times_of(step: Timeline) -> Times:
    """Return the seconds of every computation of a step; links are free."""
    return Times(
        {
            (span.instruction.kind, span.instruction.stage): span.end - span.start
            for spans in step.spans
            for span in spans
            if span.instruction.peer is None
        }
    )


def picture(panels: Sequence[tuple[str, Timeline]]) -> str:
    """Draw timelines below each other on one scale of milliseconds, a row a rank, as SVG."""
    width, left, right, row, gap = 780, 62, 30, 34, 30
    most = max(timeline.time for _, timeline in panels)
    scale = (width - left - right) / most
    parts: list[str] = []
    top = 34.0

    def text(x: float, y: float, words: str, more: str = "") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>')

    for title, timeline in panels:
        text(left, top, f"{title}: {timeline.time * 1e3:.1f} ms", 'font-weight="bold"')
        top += 10
        for rank, spans in enumerate(timeline.spans):
            text(left - 8, top + 17, f"rank {rank}", 'text-anchor="end"')
            for span in spans:
                parts += _bar(span, left, top, scale, row - 8)
            top += row
        top += gap
    for tick in range(0, int(most * 1e3) + 1, _spacing(most * 1e3)):
        x = left + tick / 1e3 * scale
        parts.append(f'<path d="M{x:.1f} 40V{top - gap:.1f}" stroke="#0002"/>')
        text(x, top - gap + 14, f"{tick} ms", 'text-anchor="middle"')
    x = float(left)
    for words in ("guess", "fine", "correct", "head", "send", "wait"):
        parts.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{COLORS[words]}"/>')
        text(x + 16, 16, words)
        x += 76
    text(x, 16, "dark: forward, light: backward")
    height = top
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height:.0f}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _bar(
    span: TimelineSpan, left: float, top: float, scale: float, height: float
) -> tuple[str, ...]:
    """Draw an instruction, with its name as a tooltip; nothing if it is too short to be seen."""
    kind = span.instruction.kind
    wide = (span.end - span.start) * scale
    if wide < 0.1:
        return ()
    waits, sends = kind in RECEIVES or kind in EXPECTS, kind in SENDS
    color = COLORS["wait" if waits else "send" if sends else kind.value.partition(" ")[0]]
    light = ' fill-opacity="0.55"' if kind.name.endswith("BACKWARD") else ""
    name = f"{kind.value} {span.instruction.stage}: {(span.end - span.start) * 1e3:.2f} ms"
    return (
        f'<rect x="{left + span.start * scale:.1f}" y="{top:.0f}" width="{wide:.1f}" '
        f'height="{height:.0f}" fill="{color}"{light}><title>{name}</title></rect>',
    )


def _spacing(most: float) -> int:
    """Return a round number that divides a range into at most ten."""
    numbers = (n * 10**power for power in itertools.count() for n in (1, 2, 5))
    return next(number for number in numbers if most / number <= 10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the steps, and draw the picture."""
    parser = argparse.ArgumentParser(description="A step on two processes beside its simulation.")
    parser.add_argument("--steps", type=int, default=40, help="steps of which one is drawn")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    image = torch.randn(1, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "resnet110"
        compiled = pnn.compile(
            resnet110.build_model(), image, stages=2, cost="measured", cache=False
        )
        compiled.save(artifact)
        by_rank = run_on_ranks(rank_steps, 2, artifact, options.steps)
    step = traced([*zip(*by_rank, strict=True)])
    simulated = simulate(schedule(range(2), Sweep.of(compiled.plan)), times_of(step))
    panels = [("on two processes", step), ("simulated, free links", simulated)]
    options.output.write_text(picture(panels))


if __name__ == "__main__":
    main()
