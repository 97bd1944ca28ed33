"""The report as one HTML file that opens from disk: no network, no code but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from passes.errors import OptionError
from pnn_compile.report.page_data import page_data

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.iterate import DialRow
    from pnn_compile.forecast.table import ForecastTable

__all__ = ["html_report", "page", "quick_forecast", "to_script_json", "write_report"]

_log = logging.getLogger(__name__)

_LIBRARIES = ("d3.min.js", "dagre.min.js")
_SCRIPTS = (
    "basics.js", "tree.js", "layout.js", "route.js", "graph.js", "search.js", "chart.js",
    "balance.js", "forecast.js", "timeline.js", "accuracy.js", "plan.js", "main.js",
)  # fmt: skip


def html_report(
    compiled: Compiled, dial: Sequence[DialRow] = (), forecast: ForecastTable | None = None
) -> str:
    """Return the report of a compiled network as the text of an HTML file.

    Args:
        compiled: The network.
        dial: What every number of iterations gives, where `pnn.dial` measured it.
        forecast: What other numbers of devices would give, where `quick_forecast` or
            `pnn.forecast` computed it.
    """
    return page(page_data(compiled, dial, forecast))


def write_report(compiled: Compiled, path: str | Path, dial: Sequence[DialRow] = ()) -> Path:
    """Write the report, with a forecast, as one HTML file.

    Raises:
        OptionError: The file cannot be written.
    """
    target = Path(path)
    text = html_report(compiled, dial, quick_forecast(compiled))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"{target} cannot be written ({error.strerror}): give another path"
        ) from error
    return target


def quick_forecast(compiled: Compiled) -> ForecastTable | None:
    """Forecast by FLOPs, at numbers of devices that lie further and further apart.

    Returns:
        The forecast; None where the network can be cut in none of these ways.
    """
    from pnn_compile.forecast.forecast import forecast

    counts = {*_COUNTS, len(compiled.plan.stages)}
    try:
        return forecast(compiled, stages=counts, cost="flops", micro_batches=())
    except OptionError as error:
        _log.warning("the report of %s has no forecast: %s", compiled.plan.model, error)
        return None


_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def page(data: Mapping[str, Any]) -> str:
    """Put data of `page_data` into the page.

    Names of the model are data to the page, never markup: they stand in a block of JSON in which
    nothing can end the block, and scripts show them as text. The policy in the page lets only the
    page's own scripts run, by their hashes, and forbids every request.
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
    """JSON that can stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"} | {
    code: f"\\u{code:04x}"
    for code in range(0xD800, 0xE000)  # halves of pairs have no UTF-8
}


class _Assets:
    """The parts of the page that are the same for every network."""

    def __init__(self) -> None:
        folder = files("pnn_compile.report") / "assets"

        def read(name: str) -> str:
            return (folder / name).read_text(encoding="utf-8")

        self.template = Template(read("page.html"))
        self.style = read("style.css")
        # A map of the source would be fetched.
        self.libraries = "\n".join(_without_map(read(name)) for name in _LIBRARIES)
        own = "\n".join(read(name) for name in _SCRIPTS)
        self.script = f'"use strict";\n(() => {{\n{own}\n}})();\n'
        scripts = " ".join(map(_hash, (self.libraries, self.script)))
        self.policy = (
            f"default-src 'none'; script-src {scripts}; style-src {_hash(self.style)}; "
            "base-uri 'none'; form-action 'none'"
        )


@cache
def _assets() -> _Assets:
    return _Assets()


def _without_map(script: str) -> str:
    lines = script.splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
