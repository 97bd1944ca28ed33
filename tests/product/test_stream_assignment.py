"""Stream assignment: waits between streams, checked against the data flow of the graph."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import pnn_compile as pnn
from examples import resnet110, unet
from pnn_compile.runtime import Sweep
from pnn_compile.runtime.cuda import StreamAssignment, assign_streams
from tests.support.parameters import grid

FORMS: dict[str, dict[str, Any]] = {
    "chain": {},
    "collapsed": {"coarse": "linear", "sweep": "collapsed"},
    "two iterations": {"iterations": 2},
    "difference": {"correction": "difference", "coarse": "conv"},
}


@functools.cache
def _compiled(name: str, form: str) -> pnn.Compiled:
    model: nn.Module = resnet110.build_model(2, 4)
    example: tuple[torch.Tensor, ...] = resnet110.example_inputs(size=16)
    if name == "unet":
        model, example = unet.build_model(depth=2, width=4), unet.example_inputs()
    return pnn.compile(model, example, stages=3, **FORMS[form])


NETWORKS = pytest.mark.parametrize(("name", "form"), grid(("resnet", "unet"), tuple(FORMS)))


def _started_before(graph: fx.Graph, found: StreamAssignment) -> dict[fx.Node, set[fx.Node]]:
    """By node, everything that is done when it starts: before it on its lane, or awaited."""
    done: dict[fx.Node, set[fx.Node]] = {}
    on_lane: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        before = set(on_lane.get(found.stream[node], set()))
        for source in found.waits[node]:
            before |= done[source] | {source}
        done[node] = before
        on_lane[found.stream[node]] = before | {node}
    return done


@NETWORKS
def test_everything_read_is_done(name: str, form: str) -> None:
    compiled = _compiled(name, form)
    graph = compiled.module.graph
    result = assign_streams(graph, compiled.plan)
    done = _started_before(graph, result)
    for node, before in done.items():
        read = {n for n in node.all_input_nodes if n.op != "placeholder"}
        assert read <= before, node


@NETWORKS
def test_fine_stages_of_the_first_iteration_wait_for_their_guess_alone(
    name: str, form: str
) -> None:
    compiled = _compiled(name, form)
    result = assign_streams(compiled.module.graph, compiled.plan)
    done = _started_before(compiled.module.graph, result)
    computed = [f"fine_{j}" for j in Sweep.of(compiled.plan).computed(result.count, 0)]
    first = {str(node.target): before for node, before in reversed(done.items())}
    for target in computed:
        calls = {str(n.target) for n in first[target] if n.op == "call_module"}
        assert calls <= {target.replace("fine", "preprocess")}
    assert result.count == 3
    assert len(computed) >= 2


@pytest.mark.parametrize("coarse", ["linear", "units"])
def test_maps_of_a_collapsed_sweep_do_not_wait_for_each_other(coarse: str) -> None:
    model, example = resnet110.build_model(3, 4), resnet110.example_inputs(size=16)
    compiled = pnn.compile(model, example, stages=3, sweep="collapsed", coarse=coarse)
    done = _started_before(
        compiled.module.graph, assign_streams(compiled.module.graph, compiled.plan)
    )
    for node, before in done.items():
        if str(node.target).startswith("coarse_"):
            assert not [n for n in before if str(n.target).startswith("coarse_")]


def _stream_network(compiled: pnn.Compiled) -> nn.Module:
    return pnn.runtime.StreamNetwork(compiled)


def _forward(compiled: pnn.Compiled) -> object:
    return pnn.runtime.CapturedForward(compiled.module, torch.zeros(2, 3, 16, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says")
@pytest.mark.parametrize("make", [_stream_network, _forward])
def test_without_a_gpu_it_says_so(make: Callable[[pnn.Compiled], object]) -> None:
    with pytest.raises(pnn.RuntimeFault, match="CUDA device"):
        make(_compiled("resnet", "chain"))
