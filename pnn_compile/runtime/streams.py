"""`StreamNetwork`: the stages side by side on one GPU, each on a CUDA stream of its own.

A deep, narrow network at a small batch leaves most of a GPU idle: its kernels are short, and each
waits for the one before. The stages of a parareal network do not wait for each other, so that one
device can run them at once. Launching kernels one by one from Python would hide the gain; capture
the whole in a CUDA graph (`pnn_compile.runtime.captured`).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from passes.errors import RuntimeFault
from passes.ir.interpreter import Interpreter
from pnn_compile.inputs import argument_names, device_of
from pnn_compile.runtime.lanes import Lanes, lanes

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["StreamNetwork"]


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
        self._lanes = lanes(compiled.module.graph, compiled.plan)
        self._streams = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(1, self._lanes.count)
        ]
        self._shared = _shared_buffers(compiled.module, self._lanes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; it takes and gives what the model does.

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
        result = _Runner(self.network, self._lanes, streams).run(
            *(inputs[name] for name in self._names)
        )
        for stream in self._streams:
            current.wait_stream(stream)
        return result


class _Runner(Interpreter):
    """Calls the pieces in the order of the graph, each on the stream of its lane.

    All values live until every stream has come together again: memory that is freed on one stream
    while another still reads it could be given out too early.
    """

    def __init__(
        self, module: fx.GraphModule, lanes: Lanes, streams: list[torch.cuda.Stream]
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._lanes = lanes
        self._streams = streams
        self._awaited = lanes.awaited
        self._done: dict[fx.Node, torch.cuda.Event] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        stream = self._streams[self._lanes.lane[n]]
        for source in self._lanes.waits[n]:
            stream.wait_event(self._done[source])
        with torch.cuda.stream(stream):
            value = super().run_node(n)
        if n in self._awaited:
            self._done[n] = stream.record_event()
        return value


def _shared_buffers(module: fx.GraphModule, lanes: Lanes) -> list[str]:
    """Names of buffers that pieces on different lanes hold."""
    found: dict[int, set[int]] = defaultdict(set)
    names: dict[int, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            piece = module.get_submodule(str(node.target))
            for name, buffer in piece.named_buffers():
                found[id(buffer)].add(lanes.lane[node])
                names[id(buffer)] = name
    return [names[key] for key, held in found.items() if len(held) > 1]
