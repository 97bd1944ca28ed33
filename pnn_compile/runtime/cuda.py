"""One GPU: run the stages in parallel on CUDA streams, and steps as CUDA graphs.

A deep, narrow network at a small batch leaves most of a GPU idle: its kernels are short, and each
waits for the one before. The stages of a parareal network do not wait for each other, so that one
device can run them at once, each on a stream of its own. Launching kernels one by one from Python
would hide the gain; a CUDA graph launches a network, or a whole training step, at once.

A graph contains addresses: inputs are copied to where they were at capture, shapes stay, and
outputs are overwritten by the next call. Of torch's two interfaces, `torch.cuda.graph` is taken
(the other, `make_graphed_callables`, cuts a step into a forward and a backward graph).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault, first_line
from passes.ir.output_types import typed
from passes.ir.program import Interpreter, tensor_leaves
from passes.plan.schema import Plan
from passes.transform.assemble import step_of
from passes.transform.network import check_mode
from passes.transform.sweep import Role
from pnn_compile.inputs import argument_names, by_argument, call_arguments, device_of

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_WARM_UP = 3
"""Runs before capture, in which libraries choose their kernels and take their workspaces."""


@dataclass(frozen=True)
class StreamAssignment:
    """The stream of every node of a parareal network, and the nodes that it waits for.

    Every stage has a stream for its guess and its fine stage; stream 0 also runs the sweep and the
    head. In a collapsed sweep, whose maps wait for fine stages only, every map runs on the stream
    of its stage. A stream runs its calls in order, and waits for values of other streams.

    Attributes:
        count: Number of streams, one a stage.
        stream: By node of the graph; nodes of no stage are on stream 0.
        waits: By node, the nodes of other streams that it reads, inputs of the network aside.
    """

    count: int
    stream: Mapping[fx.Node, int]
    waits: Mapping[fx.Node, tuple[fx.Node, ...]]

    @property
    def awaited(self) -> frozenset[fx.Node]:
        """The nodes that another stream reads."""
        return frozenset(node for nodes in self.waits.values() for node in nodes)


def assign_streams(graph: fx.Graph, plan: Plan) -> StreamAssignment:
    """Assign a stream to every node of the graph that `passes.transform.assemble` built."""
    parallel = {Role.PREPROCESS, Role.FINE}
    if plan.sweep == "collapsed":  # a residual runs on the stream of its correction
        parallel |= {Role.RESIDUAL, Role.COARSE}
    stream: dict[fx.Node, int] = {}
    for node in graph.nodes:
        step = step_of(node)
        stream[node] = plan.placement[step.stage] if step and step.role in parallel else 0
    waits = {
        node: tuple(
            source
            for source in node.all_input_nodes
            if source.op != "placeholder" and stream[source] != stream[node]
        )
        for node in graph.nodes
        if node.op != "output"
    }
    return StreamAssignment(plan.devices, stream, waits)


class StreamNetwork(nn.Module):
    """A parareal network that runs every stage on a separate CUDA stream.

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
        self._program = compiled.program
        self._assignment = assign_streams(compiled.module.graph, compiled.plan)
        self._streams = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(1, self._assignment.count)
        ]
        self._shared = _shared_buffers(compiled.module, self._assignment)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, with the arguments and outputs of the model.

        Raises:
            RuntimeFault: Training would update a buffer of two stages at once.
        """
        if self.training and self._shared:
            raise RuntimeFault(
                f"several stages update the same buffer ({self._shared[0]}), which streams would "
                "do concurrently: call eval(), or train on ranks (pnn.runtime.distribute)"
            )
        program = self._program
        check_mode(program.name, program.capture.only_mode, training=self.training)
        current = torch.cuda.current_stream()
        streams = [current, *self._streams]
        for stream in self._streams:
            stream.wait_stream(current)
        inputs = by_argument(self._program, call_arguments(self._program, args, kwargs))
        result = _Runner(self.network, self._assignment, streams).run(
            *(inputs[name] for name in argument_names(self._program))
        )
        for stream in self._streams:
            current.wait_stream(stream)
        return typed(result, program.output_types)


class _Runner(Interpreter):
    """Call the pieces in the order of the graph, each on its stream.

    All values live until the streams join: memory that is freed on one stream while another still
    reads it could be reused too early.
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
    """Return the names of buffers that pieces on different streams share."""
    streams: dict[int, set[int]] = defaultdict(set)
    names: dict[int, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            piece = module.get_submodule(str(node.target))
            for name, buffer in piece.named_buffers():
                streams[id(buffer)].add(assignment.stream[node])
                names[id(buffer)] = name
    return [names[key] for key, users in streams.items() if len(users) > 1]


class CapturedForward:
    """The forward pass of a module without gradients, as a CUDA graph.

    Args:
        module: Any module on a CUDA device, a `StreamNetwork` for instance. Put it into evaluation
            mode first, unless its buffers are to be updated.
        *args: Example inputs on that device; all later ones must have their shapes.
        **kwargs: The same, by name.

    Raises:
        RuntimeFault: There is no CUDA device, or the module cannot be captured: it waits for the
            device, as `.item()` does.
    """

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._inputs = _Inputs((args, kwargs))
        self._module = module  # the graph contains the addresses of its weights

        @torch.no_grad()
        def run() -> Any:
            args, kwargs = self._inputs.value
            return module(*args, **kwargs)

        self._graph, self._outputs = _captured(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on other inputs; the outputs are valid until the next call.

        Raises:
            RuntimeFault: The inputs have other shapes or types than the example.
        """
        self._inputs.fill((args, kwargs))
        self._graph.replay()
        return self._outputs


class CapturedStep:
    """Forward, backward and optimizer step of a module, as one CUDA graph.

    Construction does not change weights, buffers and the state of the optimizer.

    Args:
        module: Any module on a CUDA device, in training mode.
        inputs: An example: a tensor, or a tuple of positional arguments.
        target: Second argument of the loss function, after the outputs, on that device.
        loss_function: From outputs and target to a scalar.
        optimizer: Of the module's parameters; Adam and its variants need `capturable=True`. Its
            learning rate may change between steps if it is a tensor.

    Raises:
        RuntimeFault: As `CapturedForward`.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        target: Any,
        loss_function: Callable[[Any, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._inputs = _Inputs((_positional(inputs), target))
        # The graph contains the addresses of weights, gradients and moments.
        self._referenced = module, optimizer

        def run() -> torch.Tensor:
            args, target = self._inputs.value
            optimizer.zero_grad(set_to_none=True)
            loss = loss_function(module(*args), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()

        before = _Snapshot(module, optimizer)
        self._graph, self._loss = _captured(run)
        before.restore()

    def __call__(self, inputs: Any, target: Any) -> torch.Tensor:
        """Take a step; return its loss, which is valid until the next one.

        Raises:
            RuntimeFault: As `CapturedForward.__call__`.
        """
        self._inputs.fill((_positional(inputs), target))
        self._graph.replay()
        loss: torch.Tensor = self._loss
        return loss


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


class _Inputs:
    """Copies of example inputs, whose addresses are in a graph."""

    def __init__(self, example: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(example)
        self._leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self.value = pytree.tree_unflatten(self._leaves, self._spec)

    def fill(self, inputs: Any) -> None:
        """Copy other inputs to these addresses."""
        leaves, spec = pytree.tree_flatten(inputs)
        if spec != self._spec:
            raise RuntimeFault("the inputs have another structure than those that were captured")
        for captured, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(captured, torch.Tensor):
                if not isinstance(leaf, torch.Tensor) or captured.shape != leaf.shape:
                    other = list(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf
                    raise RuntimeFault(
                        f"an input is {other}, but {list(captured.shape)} was captured: a CUDA "
                        "graph has fixed shapes; capture one per shape"
                    )
                captured.copy_(leaf, non_blocking=True)
            elif captured != leaf:
                raise RuntimeFault(
                    f"an argument is {leaf!r}, but {captured!r} was captured: capture a graph per "
                    "value"
                )


class _Snapshot:
    """Weights, buffers and state of an optimizer, to be restored after trial steps."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        tensors = [*module.parameters(), *module.buffers(), *_state(optimizer)]
        self._before = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._copied = {id(tensor) for tensor in tensors}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all tensors; those that the optimizer created since become zero."""
        for tensor, value in self._before:
            tensor.copy_(value)
        for tensor in _state(self._optimizer):
            if id(tensor) not in self._copied:
                tensor.zero_()


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return tensor_leaves([*optimizer.state.values()])


def _captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm up a function, and capture it; return the graph and the output tensors."""
    if not torch.cuda.is_available():
        raise RuntimeFault("CUDA graphs need a CUDA device, and torch finds none here")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except RuntimeError as error:
        raise RuntimeFault(
            f"a CUDA graph could not be captured: {first_line(error)}; the module waits "
            "for the device (.item(), a copy to the CPU, a shape that depends on values)"
        ) from error
    return graph, outputs
