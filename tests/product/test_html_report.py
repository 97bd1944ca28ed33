"""The report in a browser: it opens without a network and reacts to mouse and keyboard."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, expect
from safetensors.torch import save_file
from torch import nn

import pnn_compile as pnn
from examples import resnet110
from examples.digits_sampler import Euler, UNet
from pnn_compile.cli import main
from pnn_compile.report.graph_data import graph_data
from pnn_compile.report.html import html_report, page, quick_forecast, to_script_json
from pnn_compile.report.page_data import forecast_data, page_data
from pnn_compile.report.pictures import png, sample_pictures
from tests.models.builders import linear_chain
from tests.support.browser import Sheet, chromium, needs_chromium

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(unet_compiled: pnn.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unet_compiled.export_html(tmp_path_factory.mktemp("report") / "report.html")


def test_the_forecast_marks_the_knee_and_this_plan(
    browser: Browser, unet_compiled: pnn.Compiled, report: Path
) -> None:
    sheet = Sheet(browser, report)
    table = quick_forecast(unet_compiled)
    assert table is not None
    expect(sheet.page.locator("#forecast-lead")).to_contain_text(table.verdict[1:])
    knees = sheet.page.locator("#forecast-chart .knee")
    most = max(row.stages for method in table.methods for row in table.of(method))
    # Of the speed-up and of the time; where the largest number is the best one, there is none.
    assert knees.count() == (2 if table.best.stages < most else 0)
    for label in knees.evaluate_all("dots => dots.map(dot => dot.getAttribute('aria-label'))"):
        assert label.startswith(f"{table.best.stages} devices, {table.best.method}, ")
    assert sheet.page.locator("#forecast-chart", has_text="this plan").count() == 1
    sheet.check()


def test_without_forecast_or_calibration_it_says_how_to_get_them(
    browser: Browser, unet_compiled: pnn.Compiled, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(html_report(unet_compiled), encoding="utf-8")
    sheet = Sheet(browser, path)
    expect(sheet.page.locator("#forecast-chart code")).to_contain_text("pnn-compile inspect")
    expect(sheet.page.locator("#accuracy-charts code")).to_contain_text("--calibrate")
    sheet.check()


def test_calibration_trials_and_accuracy_against_iterations(
    browser: Browser, tmp_path: Path
) -> None:
    model = resnet110.build_model(units_per_group=2, width=4).eval()
    batches = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    compiled = pnn.compile(
        model, batches[0][:2], stages=3, coarse_budget=0.4, prologue=0.2, calibration=batches
    )
    path = tmp_path / "report.html"
    path.write_text(html_report(compiled, compiled.dial(batches[:1])), encoding="utf-8")
    sheet = Sheet(browser, path)
    assert compiled.calibration is not None
    faces = compiled.calibration.interfaces
    dots = sheet.page.locator("#accuracy-charts circle.dot")
    labels = dots.evaluate_all("dots => dots.map(dot => dot.getAttribute('aria-label'))")
    for face in faces:
        assert f"stage {face.stage}, corrected: {face.corrected_after:.3f}" in labels
    assert sum(label.startswith("K = ") for label in labels) == 3
    sheet.page.locator("#plan summary", has_text="Stage 1").click()
    stage = compiled.plan.stages[1]
    assert stage.preprocess is not None
    assert stage.coarse is not None
    tried = (*stage.preprocess.tried, *stage.coarse.tried)
    assert tried
    rows = sheet.page.locator("#plan details[open] tbody tr")
    assert rows.count() == len(tried) + len(compiled.plan.interfaces[1].state)
    for trial in tried:
        expect(sheet.page.locator("#plan details[open]")).to_contain_text(trial.name)
    sheet.check()


def test_samples_are_shown_where_they_are_images(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = pnn.compile(Euler(UNet(4), 6).eval(), noise := torch.randn(3, 1, 8, 8), stages=3)
    compiled.save(tmp_path / "sampler")
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    page_file = tmp_path / "report.html"
    arguments = ["inspect", str(tmp_path / "sampler"), "--html", str(page_file)]
    assert main([*arguments, "--samples", str(tmp_path / "noise.safetensors"), "--json"]) == 0
    for width in (1400, 420):
        sheet = Sheet(browser, page_file, width=width)
        grid = sheet.page.locator(".pictures img")
        names = grid.evaluate_all("all => all.map(one => one.alt)")
        assert len(names) == 3 * (1 + 3)  # three samples: the original, and K = 1, 2, 3
        assert names[0] == "sample 1, original"
        assert names[-1] == "sample 3, K = 3, error 0.00 %"
        sizes = grid.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
        assert sizes == [[8, 8]] * 12
        sheet.check()


def test_a_picture_is_what_was_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for channels in (1, 3):
        pixels = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
        (tmp_path / "drawn.png").write_bytes(png(pixels))
        image = np.asarray(Image.open(tmp_path / "drawn.png"))
        assert np.array_equal(image.reshape(5, 7, channels), pixels.permute(1, 2, 0).numpy())
    chain = pnn.compile(linear_chain(4, 8), x := torch.randn(2, 8), stages=2)
    assert sample_pictures(chain, x) == ()


def test_long_pictures_keep_a_row() -> None:
    """A spectrogram of [B, 1, 4, 2000] is reduced to 128 columns, and to one row."""
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(4)))
    compiled = pnn.compile(model, x := torch.randn(1, 1, 4, 2000), stages=2)
    header = base64.b64decode(sample_pictures(compiled, x)[0].images[0].partition(",")[2])[16:24]
    assert struct.unpack(">II", header) == (128, 1)


def test_a_plan_of_the_users_own_weights_has_no_timeline(browser: Browser, tmp_path: Path) -> None:
    model = linear_chain(4, 8)
    compiled = pnn.compile(model, torch.randn(2, 8), stages=2, cost=lambda node, flops: flops + 1.0)
    path = tmp_path / "report.html"
    path.write_text(html_report(compiled), encoding="utf-8")
    sheet = Sheet(browser, path)
    expect(sheet.page.locator("#timeline-chart")).to_contain_text("which it does not store")
    sheet.check()


def test_windows_share_their_devices(browser: Browser, tmp_path: Path) -> None:
    compiled = pnn.compile(linear_chain(8, 8), torch.randn(2, 8), stages=2, windows=2)
    path = tmp_path / "report.html"
    path.write_text(html_report(compiled, forecast=quick_forecast(compiled)), encoding="utf-8")
    sheet = Sheet(browser, path)
    ranks = sheet.page.locator("#timeline-chart .row-name").all_text_contents()
    assert ranks == ["original", "rank 0", "rank 1"]
    expect(sheet.page.locator("#graph .lead")).to_contain_text("lanes of a window start at once")
    expect(sheet.page.locator("#decisions")).to_contain_text("2 of 2 stages each")
    sheet.check()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_it_opens_without_errors_requests_or_sideways_scrolling(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    sheet = Sheet(browser, report, width, scheme)
    assert sheet.page.evaluate("document.documentElement.scrollWidth") <= width
    dark = sheet.page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 80"
    )
    assert dark == (scheme == "dark")
    expect(sheet.page.locator("h1")).to_have_text("UNet")
    assert sheet.page.locator("#balance-chart rect.bar").count() >= 3
    assert sheet.page.locator("#timeline-chart rect.span").count() > 10
    sheet.check()


_LABELS_ON_LINES = """() => {
  const lines = [...document.querySelectorAll("#canvas path.edge.cut")].flatMap((path) => {
    const length = path.getTotalLength();
    return [...Array(200).keys()].map((step) => path.getPointAtLength((length * step) / 199));
  });
  return [...document.querySelectorAll("#canvas .edge-label")].filter((label) => {
    const box = label.getBBox();
    const inside = (at, start, size) => at > start && at < start + size;
    return lines.some(({ x, y }) => inside(x, box.x, box.width) && inside(y, box.y, box.height));
  }).map((label) => label.textContent);
}"""
"""Labels of states through which a line goes that carries a state."""


def test_there_is_a_lane_a_stage_and_cuts_say_what_crosses(
    browser: Browser, unet_compiled: pnn.Compiled, report: Path
) -> None:
    sheet = Sheet(browser, report)
    names = sheet.page.locator("#canvas .lane > text.name").all_text_contents()
    assert names == ["Stage 0", "Stage 1", "Stage 2", "Head"]
    labels = sheet.page.locator("#canvas .edge-label").all_text_contents()
    for value in unet_compiled.plan.interfaces[-1].state:
        sizes = value.spec.shape[1:]
        assert any(label.startswith("×".join(map(str, sizes))) for label in labels)
    assert all(label.endswith("B") for label in labels)
    crossed = sheet.page.evaluate(_LABELS_ON_LINES)
    assert crossed == []


def test_a_module_opens_and_closes_by_mouse(browser: Browser, report: Path) -> None:
    sheet = Sheet(browser, report)
    before = sheet.boxes()
    sheet.page.locator("#canvas [aria-label^='stem,']").click()
    stem = sheet.page.locator("#canvas [aria-label^='stem,']")
    expect(stem).to_have_attribute("aria-expanded", "true")
    assert len(sheet.boxes()) == len(before) + 6
    expect(sheet.page.locator("#details h3")).to_have_text("stem")
    stem.locator("text.label").click()
    assert sheet.boxes() == before
    sheet.check()


def test_it_is_reached_and_walked_by_the_keyboard(browser: Browser, report: Path) -> None:
    sheet = Sheet(browser, report)
    page_ = sheet.page
    stops = set()
    for _ in range(60):
        page_.keyboard.press("Tab")
        stops.add(page_.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {
        "theme", "search", "lane", "fit", "canvas", "measure", "balance-chart", "batches",
        "timeline-chart", "stages",
    } <= stops  # fmt: skip
    page_.locator("#canvas .node[tabindex='0']").focus()
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page_.evaluate(focused).startswith("images")
    page_.keyboard.press("ArrowDown")
    assert page_.evaluate(focused).startswith("stem")
    count = len(sheet.boxes())
    page_.keyboard.press("Enter")
    assert len(sheet.boxes()) > count
    page_.keyboard.press("ArrowDown")
    assert page_.evaluate(focused).startswith("stem.0")
    page_.keyboard.press("Escape")
    assert len(sheet.boxes()) == count
    assert page_.evaluate(focused).startswith("stem,")
    page_.keyboard.press("ArrowRight")
    assert "Stage 1" in page_.evaluate(focused)
    sheet.check()


def test_search_opens_what_is_around_a_hit(browser: Browser, report: Path) -> None:
    sheet = Sheet(browser, report)
    field = sheet.page.locator("#search")
    field.fill("down.2.3")
    expect(sheet.page.locator("#hits li").first).to_contain_text("down.2.3")
    field.press("Enter")
    expect(sheet.page.locator("#hits")).to_be_hidden()
    hit = sheet.page.locator("#canvas .node.chosen")
    expect(hit).to_have_attribute("aria-label", re.compile("Stage 0"))
    expect(hit).to_be_in_viewport()
    details = sheet.page.locator("#details")
    expect(details).to_contain_text("down.2.3")
    expect(details).to_contain_text("unet.py:")
    expect(details).to_contain_text("[B, ")
    field.fill("nothing is called this")
    expect(sheet.page.locator("#hits")).to_have_text("nothing found")
    sheet.check()


def test_hovering_tells_costs(browser: Browser, report: Path) -> None:
    sheet = Sheet(browser, report)
    tip = sheet.page.locator("#tip")
    sheet.page.locator("#canvas [aria-label^='guess,']").first.hover()
    expect(tip).to_contain_text("FLOPs")
    cut = sheet.page.locator("#canvas path.edge.cut").last
    cut.dispatch_event("pointermove", {"clientX": 300, "clientY": 300})
    expect(tip).to_contain_text("float32")
    expect(tip).to_contain_text("kB")
    sheet.page.locator("#balance-chart rect.bar").first.hover()
    expect(tip).to_contain_text("of the row")
    sheet.page.locator("#timeline-chart rect.step, #timeline-chart rect.critical").first.hover()
    expect(tip).to_contain_text("micro-batch 0")
    sheet.page.locator("h1").hover()
    expect(tip).to_be_hidden()
    sheet.check()


def test_measures_micro_batches_zoom_and_theme(browser: Browser, report: Path) -> None:
    sheet = Sheet(browser, report)
    sheet.page.locator("#measure").select_option("parameters")
    expect(sheet.page.locator("#balance-chart svg")).to_have_attribute(
        "aria-label", "Bars of parameters by stage"
    )
    spans = sheet.page.locator("#timeline-chart rect.span")
    once = spans.count()
    sheet.page.locator("#batches").select_option(label="4")
    assert spans.count() > 2 * once
    width = "document.querySelector('#canvas svg').getBoundingClientRect().width"
    before = sheet.page.evaluate(width)
    sheet.page.locator("#zoom-in").click()
    assert sheet.page.evaluate(width) > 1.2 * before
    sheet.page.locator("#lane").select_option(label="Stage 2")
    expect(sheet.page.locator("#canvas .lane > text.name", has_text="Stage 2")).to_be_in_viewport()
    theme = sheet.page.locator("#theme")
    for name in ("light", "dark"):
        theme.click()
        expect(theme).to_have_text(f"Theme: {name}")
        expect(sheet.page.locator("html")).to_have_attribute("data-theme", name)
    sheet.check()


def test_it_prints(browser: Browser, report: Path) -> None:
    sheet = Sheet(browser, report, scheme="dark")
    assert len(sheet.page.pdf()) > 10_000
    sheet.page.emulate_media(media="print")
    background = sheet.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    expect(sheet.page.locator("nav")).to_be_hidden()
    sheet.check()


NASTY = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "QUOTED",
    "long_" + "o" * 300,
)


QUOTED = 'it\'s "quoted" & `ticked` ${alert(3)} \u2028 \x07'
"""What torch.fx cannot write into code; a graph from a file may have it."""


class Nasty(nn.Module):
    """Children whose names hold markup, quotes and far too much."""

    def __init__(self) -> None:
        super().__init__()
        for name in NASTY:
            self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


Nasty.__name__ = Nasty.__qualname__ = "<b onclick=alert(4)>$title</title><script>alert(5)</script>"


def test_names_are_text_and_never_markup(browser: Browser, tmp_path: Path) -> None:
    compiled = pnn.compile(Nasty(), torch.randn(2, 8), stages=2)
    data = json.loads(json.dumps(page_data(compiled)).replace("QUOTED", json.dumps(QUOTED)[1:-1]))
    text = page(data)
    assert "<script>alert" not in text
    assert "onerror=alert(2)>" not in text
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    sheet = Sheet(browser, path)
    expect(sheet.page.locator("h1")).to_have_text(type(Nasty()).__name__)
    assert sheet.page.locator("img").count() == 0
    assert sheet.page.locator("script").count() == 3
    labels = " ".join(sheet.boxes())
    assert "<img src=x onerror=alert(2)>" in labels
    assert "oooo" in labels
    assert QUOTED in labels
    for box in sheet.page.locator("#canvas .node.group").all():
        box.click()
    sheet.page.locator("#search").fill("onerror")
    sheet.page.locator("#search").press("Enter")
    expect(sheet.page.locator("#details")).to_contain_text("<img src=x onerror=alert(2)>")
    assert sheet.page.evaluate("document.documentElement.scrollWidth") <= 1280
    sheet.check()


def test_the_page_forbids_everything_but_its_own_scripts(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    match = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert match is not None
    policy = dict(part.strip().split(" ", 1) for part in match[1].split(";"))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in match[1]
    assert all(source.startswith("'sha256-") for source in policy["script-src"].split())
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text.partition("<main>")[0])


def test_json_in_a_script_cannot_end_it() -> None:
    data = {"a": "</script>\u2028<!--&\ud800", "b": [1.5, None]}
    text = to_script_json(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data
    text.encode()


def synthetic(nodes: int, stages: int) -> nx.DiGraph[str]:
    """A partition graph of as many nodes, residual blocks in two levels of modules."""
    graph: nx.DiGraph[str] = nx.DiGraph(name="Synthetic")
    blank = {"source": "model.py:1", "shape": "[B, 64, 8, 8] float32", "flops": 1000}
    blank |= {"backward_flops": 2000, "parameter_bytes": 64, "bytes": 256}
    for at in range(nodes):
        path = f"layers.{at // 500}.blocks.{at // 5 % 100}.op{at % 5}"
        stage = min(at * stages // nodes, stages - 1)
        graph.add_node(f"n{at}", role="fine", stage=stage, op="Conv2d", path=path, **blank)
        for source in (at - 1, at - 5):
            if source >= 0 and graph.nodes[f"n{source}"]["stage"] == stage:
                graph.add_edge(f"n{source}", f"n{at}", bytes=256, shape="", crosses=False)
    graph.add_node("x", role="input", stage=-1, op="input", path="", **blank)
    graph.add_node(":output", role="output", stage=-1, op="output", path="", **blank)
    graph.add_edge("x", "n0", bytes=256, shape="", crosses=False)
    graph.add_edge(f"n{nodes - 1}", ":output", bytes=256, shape="", crosses=False)
    return graph


@pytest.mark.parametrize("nodes", [2500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_nodes_are_interactive_within_two_seconds(
    browser: Browser, unet_compiled: pnn.Compiled, tmp_path: Path, nodes: int
) -> None:
    data = page_data(unet_compiled) | {"graph": graph_data(synthetic(nodes, 3), 3)}
    path = tmp_path / "report.html"
    path.write_text(page(data), encoding="utf-8")
    assert path.stat().st_size < 300 * nodes
    sheet = Sheet(browser, path)
    ready = "performance.getEntriesByName('ready')[0].startTime"
    assert sheet.page.evaluate(ready) < 2000 * PATIENCE
    sheet.page.locator("#search").fill(f"layers.{nodes // 500 - 1}.blocks.42.op3")
    sheet.page.locator("#search").press("Enter")
    expect(sheet.page.locator("#canvas .node.chosen")).to_have_attribute(
        "aria-label", re.compile(r"^op3, .*Stage 2$")
    )
    assert len(sheet.boxes()) < 300
    sheet.check()


PATIENCE = 5
"""The machine that runs the tests may be busy with others; at rest it takes a fifth."""


def test_the_largest_number_that_was_looked_at_is_no_knee(unet_compiled: pnn.Compiled) -> None:
    table = quick_forecast(unet_compiled)
    assert table is not None
    rows = [row for row in table.rows if row.method == table.best.method]
    times = [float(len(rows) - place) for place in range(len(rows))]  # faster and faster
    faster = [
        dataclasses.replace(row, time=time, speedup=10 / time)
        for row, time in zip(rows, times, strict=True)
    ]
    for some, knees in ((faster, 0), ([*faster, dataclasses.replace(faster[0], stages=999)], 1)):
        data = forecast_data(dataclasses.replace(table, rows=tuple(some)))
        assert sum(row["knee"] for row in data["rows"]) == knees
