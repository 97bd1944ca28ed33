"""The partition graph in the formats of other programs reads back as it was written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.resources import files

import networkx as nx
import pytest
import torch

import pnn_compile as pnn
from passes.schedule.simulate import step_trace
from pnn_compile.export.graph_formats import (
    format_count,
    to_dot,
    to_graphml,
    to_mermaid,
    to_node_link,
)
from pnn_compile.export.module_trees import COLORS, collapsed
from pnn_compile.report.graph_data import graph_data
from tests.models.builders import linear_chain

DOT = shutil.which("dot")

if DOT is None and os.environ.get("CI") == "true":
    raise RuntimeError("tests of the drawings need graphviz: apt-get install graphviz")


NASTY = 'say "hi" <b>\\N & ]; end\n%% {x} | \x07'


@pytest.fixture(scope="module")
def nasty() -> nx.DiGraph[str]:
    """A graph with names that no format likes, as a program read from a file may have."""
    model = linear_chain(4, 4)
    graph = pnn.compile(model, torch.randn(2, 4), stages=2).graph.copy()
    graph.name = NASTY
    for _, data in graph.nodes(data=True):
        data["path"] = NASTY + data["path"]
    renamed: nx.DiGraph[str] = nx.relabel_nodes(graph, {"_0": NASTY})
    return renamed


@pytest.fixture(scope="module")
def graph(unet_compiled: pnn.Compiled) -> nx.DiGraph[str]:
    return unet_compiled.graph


def equal(one: nx.Graph[str], other: nx.Graph[str]) -> bool:
    """Return whether two graphs have the same name, nodes and edges, attributes included."""
    return (one.name, dict(one.nodes), one.adj) == (other.name, dict(other.nodes), other.adj)


def test_graphml_reads_back_equal(unet_compiled: pnn.Compiled) -> None:
    again = nx.parse_graphml(to_graphml(unet_compiled.graph))
    assert equal(again, unet_compiled.graph)


def test_graphml_holds_measured_seconds_of_the_nodes_that_have_them() -> None:
    model = linear_chain(4, 16)
    graph = pnn.compile(model, torch.randn(4, 16), stages=2, cost="measured").graph
    again = nx.parse_graphml(to_graphml(graph))
    assert equal(again, graph)
    measured = {name for name, data in graph.nodes(data=True) if "seconds" in data}
    assert measured == {n for n, d in graph.nodes(data=True) if d["role"] in ("fine", "head")}


def test_graphml_takes_names_that_xml_cannot_hold(nasty: nx.DiGraph[str]) -> None:
    again = nx.parse_graphml(to_graphml(nasty))
    assert nx.is_isomorphic(again, nasty)
    paths = {data["path"] for _, data in again.nodes(data=True)}
    assert NASTY.replace("\x07", "\ufffd") + "0" in paths


def test_node_link_json_reads_back_equal(unet_compiled: pnn.Compiled) -> None:
    data = json.loads(to_node_link(unet_compiled.graph))
    assert equal(nx.node_link_graph(data, edges="edges"), unet_compiled.graph)


@pytest.mark.skipif(DOT is None, reason="no graphviz on the PATH: apt-get install graphviz")
@pytest.mark.parametrize("which", ["graph", "nasty"])
def test_graphviz_draws_every_node(which: str, request: pytest.FixtureRequest) -> None:
    graph = request.getfixturevalue(which)
    drawn = subprocess.run(
        [str(DOT), "-Tsvg"], input=to_dot(graph, 99), capture_output=True, text=True, check=True
    )
    assert len(re.findall('class="node"', drawn.stdout)) == len(graph)
    assert len(re.findall('class="edge"', drawn.stdout)) == graph.number_of_edges()


_BOX = r'n\d+\["[^"\[\]{}|<>\n]*(<br/>[^"\[\]{}|<>\n]+)?"\]:::[a-z]+'
_LINE = re.compile(
    rf'flowchart TB|  subgraph stage\d+ \["stage \d+"\]|    {_BOX}|  {_BOX}|  end'
    r'|  n\d+ (-->|== "[\d.]+[kMGTP]?B" ==>) n\d+|  classDef [a-z]+ [a-z#:,\d]+'
)


@pytest.mark.parametrize("which", ["graph", "nasty"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mermaid_keeps_to_its_grammar(
    which: str, depth: int, request: pytest.FixtureRequest
) -> None:
    text = to_mermaid(request.getfixturevalue(which), depth)
    for line in text.splitlines():
        assert _LINE.fullmatch(line), line
    assert text.count("subgraph ") == text.count("  end\n")


def test_drawings_collapse_as_the_page_does(unet_compiled: pnn.Compiled) -> None:
    graph = unet_compiled.graph
    lane = [name for name, data in graph.nodes(data=True) if data["stage"] == 0]
    inside = [n for n in lane if graph.nodes[n]["path"].startswith("stem.")]
    flops = format_count(sum(graph.nodes[name]["flops"] for name in inside))
    label = f"{len(inside)} nodes · {flops} FLOPs"

    mermaid, dot = to_mermaid(graph), to_dot(graph)
    assert f'["stem<br/>{label}"]:::fine' in mermaid
    assert f'label="stem\\n{label}"' in dot
    assert f"classDef fine fill:{COLORS['fine']}26,stroke:{COLORS['fine']}" in mermaid
    assert f'color="{COLORS["fine"]}"' in dot
    (tree, *_) = graph_data(graph, len(unet_compiled.plan.stages))["lanes"][0]
    assert isinstance(tree, int) or tree[2]  # what the page opens first is a group, too
    sizes = [len(collapsed(graph, depth)) for depth in (0, 1, 3, 99)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(graph)


def test_roles_have_the_colors_of_the_page() -> None:
    style = files("pnn_compile").joinpath("report/assets/style.css").read_text()
    light = dict(re.findall(r"--(\w+): (#\w{6})", style.partition("}")[0]))
    assert {role: light[role] for role in COLORS} == COLORS


def test_a_step_is_traced_in_the_plans_own_time(unet_compiled: pnn.Compiled) -> None:
    events = step_trace(unet_compiled.plan)["traceEvents"]
    fine = next(event for event in events if event["name"] == "fine 0")
    assert fine["dur"] == pytest.approx(
        unet_compiled.plan.stages[0].flops * 1e-6
    )  # at 10^12 a second
    assert {event["tid"] for event in events} == {0, 1, 2}
