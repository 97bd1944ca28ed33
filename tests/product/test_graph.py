"""The partition graph and its drawings."""

import networkx as nx
import pydot
import torch
from torch import nn

import pnn_compile as pnn
from examples import unet
from pnn_compile.export.graph_formats import to_dot
from tests.models.builders import linear_chain


def test_the_graph_is_acyclic_and_complete(unet_compiled: pnn.Compiled) -> None:
    graph = unet_compiled.graph
    assert nx.is_directed_acyclic_graph(graph)
    assert {node.name for node in unet_compiled.program.order} <= set(graph)
    roles = {data["role"] for _, data in graph.nodes(data=True)}
    assert roles == {
        "input", "preprocess", "fine", "residual", "coarse", "correct", "head", "output",
    }  # fmt: skip
    assert all(nx.has_path(graph, "images", name) for name in graph if name != "images")


def test_stage_flops_in_the_graph_are_those_of_the_plan(unet_compiled: pnn.Compiled) -> None:
    for number, stage in enumerate(unet_compiled.plan.stages):
        fine = [
            data["flops"]
            for _, data in unet_compiled.graph.nodes(data=True)
            if data["stage"] == number and data["role"] == "fine"
        ]
        assert sum(fine) == stage.flops


def test_only_states_cross_between_stages(unet_compiled: pnn.Compiled) -> None:
    graph = unet_compiled.graph
    for source, target, data in graph.edges(data=True):
        stages = graph.nodes[source]["stage"], graph.nodes[target]["stage"]
        if data["crosses"]:
            assert graph.nodes[target]["role"] == "residual"
            assert stages[0] < stages[1]
        else:
            assert stages[0] == stages[1] or -1 in stages


def test_dot_is_read_back_with_every_node_and_cluster(unet_compiled: pnn.Compiled) -> None:
    (drawing,) = pydot.graph_from_dot_data(to_dot(unet_compiled.graph, depth=99)) or []
    clusters = drawing.get_subgraphs()
    assert len(clusters) == 3
    nodes = len(drawing.get_nodes()) + sum(len(cluster.get_nodes()) for cluster in clusters)
    assert nodes == len(unet_compiled.graph)
    assert len(drawing.get_edges()) == unet_compiled.graph.number_of_edges()


class Names(nn.Module):
    """Children called like what the compiler adds, and an output that no node computes."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess_1, self.residual_1 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.coarse_1, self.output = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.residual_1(self.preprocess_1(x))
        return self.output(self.coarse_1(x)), self.output.bias


def test_names_of_the_model_do_not_collide_with_those_of_the_compiler() -> None:
    compiled = pnn.compile(Names(), torch.randn(2, 4), stages=2)
    graph = compiled.graph
    assert nx.is_directed_acyclic_graph(graph)
    assert len(graph) == 1 + len(compiled.program.order) + 4 + 1
    assert graph.nodes["coarse_1"]["op"] == "Linear"
    assert graph.nodes[":coarse_1"]["role"] == "coarse"
    (drawing,) = pydot.graph_from_dot_data(to_dot(graph)) or []
    drawn = [*drawing.get_nodes(), *(n for c in drawing.get_subgraphs() for n in c.get_nodes())]
    assert {node.get_name().strip('"') for node in drawn} == set(graph)
    assert len(drawing.get_edges()) == graph.number_of_edges()


def test_names_with_quotes_do_not_break_the_drawing() -> None:
    model = linear_chain(4, 4)
    compiled = pnn.compile(model, torch.randn(2, 4), stages=2)
    graph = compiled.graph
    next(data for _, data in graph.nodes(data=True))["path"] = 'say "hi" <b>\\n'
    assert pydot.graph_from_dot_data(to_dot(compiled.graph))


def test_a_collapsed_sweep_has_one_place_of_correction() -> None:
    compiled = pnn.compile(
        unet.build_model(), unet.example_inputs(), stages=3, sweep="collapsed", coarse="linear"
    )
    graph = compiled.graph
    assert nx.is_directed_acyclic_graph(graph)
    assert [n for n, d in graph.nodes(data=True) if d["role"] == "correct"] == [":correct_2"]
    assert {":coarse_1", ":coarse_2"} <= set(graph.predecessors(":correct_2"))
