"""Write the report as one HTML file that needs no network, and draw a plan for notebooks."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from passes.errors import OptionError, why
from passes.plan.schema import windows_of
from pnn_compile.atomic import write_text
from pnn_compile.export.graph_formats import format_count, format_size
from pnn_compile.report.page_data import page_data

if TYPE_CHECKING:
    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.iterate import DialRow
    from pnn_compile.forecast.table import ForecastTable
    from pnn_compile.report.pictures import PictureRow

_log = logging.getLogger(__name__)

_DEVICE_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

_LIBRARIES = ("d3.min.js", "dagre.min.js")
_SCRIPTS = (
    "basics.js", "tree.js", "layout.js", "route.js", "graph.js", "search.js", "chart.js",
    "balance.js", "forecast.js", "timeline.js", "accuracy.js", "plan.js", "main.js",
)  # fmt: skip


def html_report(
    compiled: Compiled,
    dial: Sequence[DialRow] = (),
    forecast: ForecastTable | None = None,
    pictures: Sequence[PictureRow] = (),
) -> str:
    """Return the report of a compiled network as the text of an HTML file.

    Args:
        compiled: The network.
        dial: Errors by number of iterations, from `pnn.dial`; empty leaves them out.
        forecast: Forecast of other numbers of devices, from `quick_forecast` or `pnn.forecast`.
        pictures: Samples of the original and its iterates, from `sample_pictures`.
    """
    return page(page_data(compiled, dial, forecast, pictures))


def write_report(
    compiled: Compiled,
    path: str | Path,
    dial: Sequence[DialRow] = (),
    pictures: Sequence[PictureRow] = (),
) -> Path:
    """Write the report, with a forecast, as one HTML file.

    Raises:
        OptionError: The file cannot be written.
    """
    target = Path(path)
    text = html_report(compiled, dial, quick_forecast(compiled), pictures)
    try:
        write_text(target, text)
    except OSError as error:
        raise OptionError(
            f"{target} cannot be written ({why(error)}): give another path"
        ) from error
    return target


def quick_forecast(compiled: Compiled) -> ForecastTable | None:
    """Forecast the step time by FLOPs, on 2 to 64 devices and on those of the plan.

    Returns:
        The forecast; None if the network cannot be cut into any of these numbers of stages.
    """
    from pnn_compile.forecast.forecast import forecast

    counts = {*_DEVICE_COUNTS, compiled.plan.devices}
    try:
        return forecast(
            compiled, stages=counts, cost="flops", micro_batches=(), windows=compiled.plan.windows
        )
    except OptionError as error:
        _log.warning("the report of %s has no forecast: %s", compiled.plan.model, error)
        return None


def page(data: Mapping[str, Any]) -> str:
    """Fill the page with the data of `page_data`.

    Names of the model never become markup: they stand in a block of JSON that they cannot close,
    and scripts show them as text. The content security policy lets only the scripts of the page
    run, by their hashes, shows the pictures in it, and forbids every request.
    """
    assets = _assets()
    return assets.template.substitute(
        title=escape(str(data["plan"]["model"])),
        policy=assets.policy,
        style=assets.style,
        libraries=assets.libraries,
        script=assets.script,
        data=to_script_json(data),
    )


def to_script_json(data: Mapping[str, Any]) -> str:
    """Return JSON that can stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"} | {
    code: f"\\u{code:04x}"
    for code in range(0xD800, 0xE000)  # lone surrogates cannot be encoded in UTF-8
}


class _Assets:
    """Parts of the page that are the same for all networks."""

    def __init__(self) -> None:
        folder = files("pnn_compile.report") / "assets"

        def read(name: str) -> str:
            return (folder / name).read_text(encoding="utf-8")

        self.template = Template(read("page.html"))
        self.style = read("style.css")
        self.libraries = "\n".join(_without_source_map(read(name)) for name in _LIBRARIES)
        code = "\n".join(read(name) for name in _SCRIPTS)
        self.script = f'"use strict";\n(() => {{\n{code}\n}})();\n'
        scripts = " ".join(map(_hash, (self.libraries, self.script)))
        self.policy = (
            f"default-src 'none'; script-src {scripts}; style-src {_hash(self.style)}; "
            "img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )


@cache
def _assets() -> _Assets:
    return _Assets()


def _without_source_map(script: str) -> str:
    # Browsers would request the source map, which the policy forbids.
    lines = script.splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


_COLORS = {"preprocess": "#c98500", "fine": "#0072b2", "coarse": "#00855f", "head": "#a3527f"}
_LEFT, _BAR, _ROW, _TOP = 64, 520, 26, 8
_MAX_ROWS = 16
"""Largest number of stages to draw: the first ones."""


def picture(plan: Plan) -> str:
    """Draw one iteration of a plan for a notebook, as HTML without scripts.

    Each stage is a row of bars whose lengths are FLOPs: preprocessing, fine stage, coarse
    propagator. All stages start at the left; the coarse propagators start when the slowest stage
    ends, one after another in a chain, at once in a collapsed sweep. The head comes last. Three
    stages (p, f, c, h) in a chain:

        stage 0  ffffffff
        stage 1  ppffffff  cc
        stage 2  ppfffff     cc
        head                   hh
    """
    preprocess = [stage.preprocess.flops if stage.preprocess else 0 for stage in plan.stages]
    coarse = [stage.coarse.flops if stage.coarse else 0 for stage in plan.stages]
    fine = [p + stage.flops for p, stage in zip(preprocess, plan.stages, strict=True)]
    begins, swept, end = [], [], 0.0  # by stage: the start of its window, and of its correction
    for window in windows_of(len(plan.stages), plan.windows):
        ready = end + max(fine[j] for j in window)
        begins += [end] * len(window)
        chain = [*itertools.accumulate((coarse[j] for j in window), initial=ready)]
        together = plan.sweep == "collapsed"
        swept += [ready] * len(window) if together else chain[:-1]
        end = ready + max(coarse[j] for j in window) if together else chain[-1]
    scale = _BAR / ((end + plan.head.flops) or 1)
    parts: list[str] = []
    rows = min(len(plan.stages), _MAX_ROWS)
    for number, stage in enumerate(plan.stages[:rows]):
        y = _TOP + number * _ROW
        span = f"{stage.first_module or stage.first} .. {stage.last_module or stage.last}"
        title = f"stage {number}: {span}, {format_count(stage.flops)} FLOPs"
        parts += [
            _svg_text(f"stage {number}", y),
            _svg_bar(
                "preprocess", begins[number], preprocess[number], y, scale,
                f"preprocessing {number}",
            ),
            _svg_bar("fine", begins[number] + preprocess[number], stage.flops, y, scale, title),
            _svg_bar("coarse", swept[number], coarse[number], y, scale, f"correction {number}"),
        ]  # fmt: skip
    y = _TOP + rows * _ROW
    title = f"head: {format_count(plan.head.flops)} FLOPs"
    parts += [
        _svg_text("head", y),
        _svg_bar("head", end, plan.head.flops, y, scale, title),
    ]
    height, width = y + _ROW + 4, _LEFT + _BAR + 10
    caption = escape(_caption(plan, rows))
    return (
        f'<div style="font-family: sans-serif; font-size: 13px"><b>{escape(plan.model)}</b><br>'
        f"{caption}"
        f'<svg role="img" aria-label="{caption}" viewBox="0 0 {width} {height}" '
        f'style="display: block; width: 100%; max-width: {width}px" fill="currentColor">'
        f"{''.join(parts)}</svg></div>"
    )


def _caption(plan: Plan, rows: int) -> str:
    more = f", {len(plan.stages) - rows} more not drawn" if len(plan.stages) > rows else ""
    forecast = plan.forecast
    crossing = max(interface.bytes for interface in plan.interfaces)
    return (
        f"{plan.form}{more}; speed-up {forecast.speedup:.2f} predicted by {forecast.unit}, "
        f"bound {forecast.bound:.2f}; at most {format_size(crossing)} cross a cut"
    )


def _svg_text(text: str, y: float) -> str:
    return (
        f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end" font-size="12">{escape(text)}</text>'
    )


def _svg_bar(role: str, start: float, cost: float, y: float, scale: float, title: str) -> str:
    if not cost:
        return ""
    width = max(1.0, cost * scale)
    return (
        f'<rect x="{_LEFT + start * scale:.1f}" y="{y + 3}" width="{width:.1f}" height="17" '
        f'fill="{_COLORS[role]}"><title>{escape(title)}</title></rect>'
    )
