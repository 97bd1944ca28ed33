"""CUDA streams: runs the stages side by side on one GPU, each on a stream of its own.

A deep, narrow network at a small batch leaves most of a GPU idle: its kernels are short, and each
waits for the one before. The stages of a parareal network do not wait for each other, so that one
device can run them at once. Launching kernels one by one from Python would hide the gain; capture
the whole in a CUDA graph (`pnn_compile.runtime.cuda_graphs`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from passes.errors import RuntimeFault
from passes.ir.program import Interpreter
from passes.plan.schema import Plan
from passes.transform.assemble import step_of
from passes.transform.sweep import Role
from pnn_compile.inputs import argument_names, device_of

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


@dataclass(frozen=True)
class StreamAssignment:
    """Which stream every node of a parareal network runs on, and what it waits for there.

    Every stage has a stream for its guess and its fine network; stream 0 also carries the sweep and
    the head. In a collapsed sweep, whose maps wait for nothing but fine networks, each map runs on
    the stream of its stage. A stream runs its calls in order; where one reads what another stream
    made, it waits.

    Attributes:
        count: Number of streams, one a stage.
        stream: By node of the graph; what belongs to no stage is on stream 0.
        waits: By node, the nodes of other streams that it reads; inputs of the network are there
            from the start.
    """

    count: int
    stream: Mapping[fx.Node, int]
    waits: Mapping[fx.Node, tuple[fx.Node, ...]]

    @property
    def awaited(self) -> frozenset[fx.Node]:
        """The nodes that another stream reads."""
        return frozenset(node for nodes in self.waits.values() for node in nodes)


def assign_streams(graph: fx.Graph, plan: Plan) -> StreamAssignment:
    """Give every node of the graph that `passes.transform.assemble` made of a plan its stream."""
    side_by_side = {Role.PREPROCESS, Role.FINE}
    if plan.sweep == "collapsed":  # a residual goes where its correction runs
        side_by_side |= {Role.RESIDUAL, Role.COARSE}
    stream: dict[fx.Node, int] = {}
    for node in graph.nodes:
        step = step_of(node)
        stream[node] = step.stage if step and step.role in side_by_side else 0
    waits = {
        node: tuple(
            source
            for source in node.all_input_nodes
            if source.op != "placeholder" and stream[source] != stream[node]
        )
        for node in graph.nodes
        if node.op != "output"
    }
    return StreamAssignment(len(plan.stages), stream, waits)


class StreamNetwork(nn.Module):
    """A parareal network that runs each stage on its own CUDA stream.

    It computes what `compiled.module` computes and shares its weights; autograd runs every stage
    backward on the stream that it ran forward on. Compile with `stages` between 2 and the number of
    short kernels that the GPU can run at once.

    Args:
        compiled: The network, with its weights on one CUDA device.

    Raises:
        RuntimeFault: The weights are not on a CUDA device.
    """

    def __init__(self, compiled: Compiled) -> None:
        super().__init__()
        device = device_of(compiled.module)
        if device.type != "cuda":
            raise RuntimeFault(
                f"streams need a CUDA device, and {compiled.plan.model} is on {device}: "
                'call compiled.module.to("cuda") first'
            )
        self.network = compiled.module
        self.training = compiled.module.training
        self._names = argument_names(compiled.program)
        self._assignment = assign_streams(compiled.module.graph, compiled.plan)
        self._streams = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(1, self._assignment.count)
        ]
        self._shared = _shared_buffers(compiled.module, self._assignment)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; it takes and returns what the model does.

        Raises:
            RuntimeFault: Training would update a buffer of two stages at once.
        """
        if self.training and self._shared:
            raise RuntimeFault(
                f"several stages update the same buffer ({self._shared[0]}), which streams would "
                "do at once: call eval(), or train on ranks (pnn.runtime.distribute)"
            )
        current = torch.cuda.current_stream()
        streams = [current, *self._streams]
        for stream in self._streams:
            stream.wait_stream(current)
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        result = _Runner(self.network, self._assignment, streams).run(
            *(inputs[name] for name in self._names)
        )
        for stream in self._streams:
            current.wait_stream(stream)
        return result


class _Runner(Interpreter):
    """Call the pieces in the order of the graph, each on its stream.

    All values live until every stream has come together again: memory that is freed on one stream
    while another still reads it could be given out too early.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        assignment: StreamAssignment,
        streams: list[torch.cuda.Stream],
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._assignment = assignment
        self._streams = streams
        self._awaited = assignment.awaited
        self._done: dict[fx.Node, torch.cuda.Event] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        stream = self._streams[self._assignment.stream[n]]
        for source in self._assignment.waits[n]:
            stream.wait_event(self._done[source])
        with torch.cuda.stream(stream):
            value = super().run_node(n)
        if n in self._awaited:
            self._done[n] = stream.record_event()
        return value


def _shared_buffers(module: fx.GraphModule, assignment: StreamAssignment) -> list[str]:
    """Names of buffers that pieces on different streams hold."""
    streams: dict[int, set[int]] = defaultdict(set)
    names: dict[int, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            piece = module.get_submodule(str(node.target))
            for name, buffer in piece.named_buffers():
                streams[id(buffer)].add(assignment.stream[node])
                names[id(buffer)] = name
    return [names[key] for key, holders in streams.items() if len(holders) > 1]
