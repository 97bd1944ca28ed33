"""How far each sweep grows: a trunk of 4,096 equal blocks on up to 1,024 devices, simulated.

    python -m examples.studies.growth            # the table of examples/studies/growth.md
    python -m examples.studies.growth picture    # docs/growth.svg

A block is one of a transformer: 4,096 tokens of width 4,096 in bfloat16. Devices are a built-in
profile, at its peak rate, in nodes of eight. Instruction lists, and the simulator, are those of
`pnn-compile forecast`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pnn_compile as pnn
from passes.cost.device_profile import DeviceProfile
from passes.schedule.instruction import Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Times, simulate

BLOCKS = 4096
TOKENS = WIDTH = 4096
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
PICTURE = Path(__file__).parents[2] / "docs" / "growth.svg"

_BLOCK = 24 * TOKENS * WIDTH**2  # FLOPs of attention's and the MLP's matrix products, forward
_MAP = 2 * TOKENS * WIDTH**2
_NARROW = _BLOCK / 16 + _MAP / 2  # a quarter of the channels, between two maps to and from them
_STATE = 2 * TOKENS * WIDTH  # bytes


@dataclass(frozen=True)
class Form:
    """A sweep and the FLOPs of a correction.

    Attributes:
        name: What it is.
        sweep: "chain", or "collapsed".
        correction: FLOPs of one coarse propagator, forward.
        weights: Parameters of one.
    """

    name: str
    sweep: str
    correction: float
    weights: float


FORMS = (
    Form("chain, copied blocks", "chain", _BLOCK, 12 * WIDTH**2),
    Form("chain, channel maps", "chain", _MAP, WIDTH**2),
    Form("star, copied blocks", "collapsed", _BLOCK, 12 * WIDTH**2),
    Form("star, a quarter of the channels", "collapsed", _NARROW, 1.25 * WIDTH**2),
    Form("collapsed, channel maps", "collapsed", _MAP, WIDTH**2),
)


def speedup(form: Form, count: int, device: DeviceProfile) -> float:
    """Return the simulated speed-up of a training step on a number of devices."""
    rate = device.rate("bfloat16")
    lists = schedule(range(count), Sweep(form.sweep))
    return 3 * BLOCKS * _BLOCK / rate / simulate(lists, _times(form, count, device)).time


def _times(form: Form, count: int, device: DeviceProfile) -> Times:
    rate = device.rate("bfloat16")
    compute: dict[tuple[Kind, int], float] = {}
    for stage in range(count):
        work = {Kind.FINE: BLOCKS / count * _BLOCK}
        if stage:
            work |= {Kind.GUESS: _MAP, Kind.CORRECT: form.correction}
        for kind, flops in work.items():
            compute[kind, stage] = flops / rate
            compute[_BACKWARD[kind], stage] = 2 * flops / rate
    sends = (Kind.SEND, Kind.SEND_OUTPUT, Kind.SEND_SUM, Kind.SEND_GUESS)
    adjoints = [Kind[f"{kind.name}_ADJOINT"] for kind in sends]
    sizes = {(kind, s): float(_STATE) for kind in (*sends, *adjoints) for s in range(count)}
    return Times(
        compute, sizes, device.link_latency, device.link_bandwidth, device.node,
        device.network_latency, device.network_bandwidth,
    )  # fmt: skip


_BACKWARD = {
    Kind.FINE: Kind.FINE_BACKWARD,
    Kind.GUESS: Kind.GUESS_BACKWARD,
    Kind.CORRECT: Kind.COARSE_BACKWARD,
}


def two_levels(count: int, device: DeviceProfile) -> float:
    """Return the speed-up of maps that collapse inside groups of √N stages, chained between them.

    In closed form: inside a group a map and a tree of messages, then a map and a message a group.
    """
    rate, phases = device.rate("bfloat16"), 2
    group = 2 ** round(math.log2(count) / 2)
    fine = 3 * (BLOCKS / count * _BLOCK + _MAP) / rate
    inside = sum(
        device.transfer(_STATE, rank=device.node if 2**level >= device.node else 1)
        for level in range(round(math.log2(group)))
    )
    chain = (count // group - 1) * (
        3 * _MAP / rate + phases * device.transfer(_STATE, rank=device.node)
    )
    return 3 * BLOCKS * _BLOCK / rate / (fine + 3 * _MAP / rate + phases * inside + chain)


def rows(device: DeviceProfile) -> Iterator[tuple[str, list[float]]]:
    """Yield the speed-ups of every form by number of devices."""
    for form in FORMS:
        yield form.name, [speedup(form, count, device) for count in COUNTS]
    yield "two levels, channel maps", [two_levels(count, device) for count in COUNTS]


def table(device: DeviceProfile) -> str:
    """Return the speed-ups as a table in Markdown."""
    lines = [
        "| | " + " | ".join(f"N = {count:,}" for count in COUNTS) + " |",
        "|---|" + "---:|" * len(COUNTS),
    ]
    lines += [f"| {name} | " + " | ".join(f"{v:.1f}" for v in row) + " |"
              for name, row in rows(device)]  # fmt: skip
    memory = {form.name: 2 * form.weights / 2**20 for form in FORMS}
    lines += ["", "MiB of bfloat16 weights of a correction, on every device: "]
    lines[-1] += ", ".join(f"{name} {size:.0f}" for name, size in memory.items())
    return "\n".join(lines)


def picture(device: DeviceProfile) -> str:
    """Draw the speed-ups over the number of devices, both by their logarithms, as SVG."""
    width, height, left, bottom, top = 780, 440, 56, 44, 16
    right = 256
    colors = ("#7f7f7f", "#b58900", "#268bd2", "#2aa198", "#d33682", "#6c71c4")
    most = math.log2(COUNTS[-1])

    def x(count: float) -> float:
        return left + (width - left - right) * (math.log2(count) - 3) / (most - 3)

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * math.log2(max(value, 1)) / most

    def text(at: tuple[float, float], words: str, more: str = "") -> str:
        return f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" {more}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for power in range(int(most) + 1):
        value = 2**power
        parts.append(f'<path d="M{left} {y(value):.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(text((left - 6, y(value) + 4), str(value), 'text-anchor="end"'))
    parts += [text((x(c), height - bottom + 18), str(c), 'text-anchor="middle"') for c in COUNTS]
    parts.append(text((x(90), height - 8), "devices N", 'text-anchor="middle"'))
    parts.append(text((left + 6, top + 12), "speed-up of a training step, simulated"))
    curves = [("equal parts, nothing else", [float(c) for c in COUNTS], "#000")]
    curves += [(name, row, color) for (name, row), color in zip(rows(device), colors, strict=True)]
    labels: list[float] = []
    for name, row, color in sorted(curves, key=lambda curve: -curve[1][-1]):
        points = " ".join(f"{x(c):.1f},{y(v):.1f}" for c, v in zip(COUNTS, row, strict=True))
        dash = ' stroke-dasharray="4 3"' if color == "#000" else ""
        line = f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        place = max(y(row[-1]) + 4, labels[-1] + 15 if labels else 0)
        labels.append(place)
        words = f"{name}: {row[-1]:.0f}"
        parts += [line, text((width - right + 8, place), words, f'fill="{color}"')]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Print the table, or draw the picture."""
    parser = argparse.ArgumentParser(description="How far each sweep grows.")
    parser.add_argument("what", nargs="?", choices=("table", "picture"), default="table")
    parser.add_argument("--device", default="h100", help="name or file of a device profile")
    options = parser.parse_args()
    device = pnn.load_profile(options.device)
    actions: dict[str, Callable[[], object]] = {
        "table": lambda: print(table(device)),
        "picture": lambda: PICTURE.write_text(picture(device)),
    }
    actions[options.what]()


if __name__ == "__main__":
    main()
