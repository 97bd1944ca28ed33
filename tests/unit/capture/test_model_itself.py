"""The user's own object is the reference: only read, put back, and followed in every parameter."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.errors import CaptureError
from passes.ir.isolation import preserved
from tests.models.builders import block_chain
from tests.models.zoo import by_name
from tests.support.parameters import quick
from tests.support.programs import compile_program, parts, program

WIDTH = 8


# --- what capture leaves behind -------------------------------------------------------------------


class Remembers(nn.Module):
    """Changes attributes, buffers, generators and containers in forward."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = block_chain(4, WIDTH)
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.history, self.last = 0, [torch.zeros(())], torch.zeros(())
        self.generator = torch.Generator().manual_seed(1)
        self.dice, self.numbers = random.Random(1), np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count = self.count + 1
        self.history.append(torch.ones(()))
        self.last.add_(1)
        self.extra = self.calls
        self.dice.random(), self.numbers.random(), random.random(), np.random.rand()
        return self.body(x) + 0 * torch.rand(WIDTH, generator=self.generator)


def test_a_run_is_put_back_with_attributes_and_every_generator() -> None:
    model = Remembers()
    history = model.history
    states = random.getstate(), str(np.random.get_state()), model.dice.getstate()
    held = model.generator.get_state(), model.numbers.bit_generator.state
    with preserved(model):
        model(torch.ones(2, WIDTH))
        assert model.calls == len(history) - 1 == model.last.item() == 1

    assert (model.calls, len(history), model.last.item(), model.count.item()) == (0, 1, 0, 0)
    assert model.history is history
    assert not hasattr(model, "extra")
    assert states == (
        random.getstate(), str(np.random.get_state()), model.dice.getstate()
    )  # fmt: skip
    assert torch.equal(held[0], model.generator.get_state())
    assert held[1] == model.numbers.bit_generator.state


def test_a_forward_that_changes_a_parameter_is_refused_and_the_parameter_put_back() -> None:
    class Clips(nn.Module):
        def __init__(self, by_data: bool) -> None:
            super().__init__()
            self.body, self.by_data = block_chain(4, WIDTH), by_data

        def forward(self, x: Tensor) -> Tensor:
            weight = self.body.get_parameter("0.0.weight")
            with torch.no_grad():
                if self.by_data:
                    weight.data = weight.data * 0.5
                else:
                    weight.clamp_(-0.1, 0.1)
            return self.body(x)

    for by_data in (False, True):
        model = Clips(by_data)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(CaptureError, match=r"forward changes the parameter body\.0\.0\.weight"):
            capture(model, (torch.randn(3, WIDTH),))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", quick())
def test_what_a_parameter_changes_in_the_model_it_changes_in_the_network(name: str) -> None:
    case = by_name(name)
    model, compilation = case.build().eval(), compile_program(program(name), stages=2)
    sequential = copy.deepcopy(parts(compilation)[1])  # it shares its modules with the program
    args, kwargs = case.args(2), case.kwargs(2)
    unused = {f"unused.{key}" for key in program(name).unused}
    names = dict(sequential.eval().named_parameters(remove_duplicate=False))
    for key, parameter in model.named_parameters():
        expected = _outputs_without(parameter, lambda: model(*args, **kwargs))
        if key in program(name).unused or f"unused.{key}" in unused:
            assert expected is None, key
            continue
        path = next(p for p in names if p == key or p.endswith(f".{key}"))
        result = _outputs_without(names[path], lambda: sequential(*args, **kwargs))
        assert (result is None) == (expected is None), key
        if result is not None and expected is not None:
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _outputs_without(parameter: nn.Parameter, run: Callable[[], Any]) -> list[Any] | None:
    """Return the outputs after a parameter has changed; None if they do not change."""
    with torch.no_grad():
        before = pytree.tree_map_only(Tensor, torch.clone, pytree.tree_leaves(run()))
        original = parameter.clone()
        parameter.add_(torch.linspace(0.05, 0.2, parameter.numel()).view_as(parameter))
        after = pytree.tree_map_only(Tensor, torch.clone, pytree.tree_leaves(run()))
        parameter.copy_(original)
    same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True))
    return None if same else after


# --- what no graph can hold, by name --------------------------------------------------------------


class Skips(nn.Module):
    """Leaves out layers at random (Huang et al., ECCV 2016)."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.draw() < 0.3:
                continue
            x = torch.tanh(layer(x))
        return x


_dice = random.Random(3)


def _drawn_by_torch() -> Tensor:
    return torch.rand(1)


@pytest.mark.parametrize(
    ("draw", "source"),
    [
        (_drawn_by_torch, r"torch\.rand at .*test_model_itself\.py:\d+"),
        pytest.param(
            lambda: torch.rand(()).item(),
            r"torch\.rand at .*test_model_itself\.py:\d+",
            marks=pytest.mark.slow,
        ),
        (lambda: torch.empty(1).uniform_(), r"torch\.uniform_ at .*test_model_itself\.py:\d+"),
        (random.random, "Python's random module"),
        pytest.param(lambda: np.random.rand(), "numpy's random module", marks=pytest.mark.slow),
        (_dice.random, "another result"),
    ],
)
def test_layers_that_are_left_out_at_random_are_named_in_one_line(draw: Any, source: str) -> None:
    model, x = Skips(draw), torch.randn(3, WIDTH)
    with pytest.raises(CaptureError, match=rf"in training mode, .*{source}.*model\.eval") as caught:
        capture(model, (x,))
    assert "\n" not in str(caught.value)

    assert capture(model.eval(), (x,)).capture.notes


@pytest.mark.parametrize(
    "generator", [torch.Generator(), random.Random(0), np.random.default_rng(0)]
)
def test_a_generator_that_a_module_holds_is_named(generator: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.noise = block_chain(4, WIDTH), generator

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.noise, torch.Generator):
                return self.body(x + torch.randn(x.shape, generator=self.noise))
            return self.body(x * (1 + self.noise.random()))

    name = type(generator).__name__
    with pytest.raises(CaptureError, match=rf"{name}.*no graph can hold|the {name} 'noise'"):
        capture(Noisy(), (torch.randn(3, WIDTH),))


def test_a_derivative_inside_forward_is_named() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block_chain(4, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.body(x).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0]

    with pytest.raises(CaptureError, match=r"forward calls torch\.autograd\.grad at .*:\d+, and"):
        capture(Force(), (torch.randn(3, WIDTH),))


# --- what graphs hold as it is --------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    """Passes values on, and gradients with a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None


@pytest.mark.parametrize(
    "rung", ["torch.fx trace", "torch.export, functions kept whole"], ids=["traced", "exported"]
)
def test_a_custom_autograd_function_of_the_model_itself_keeps_its_backward(rung: str) -> None:
    class Domain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.domain = block_chain(6, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if rung != "torch.fx trace" and x.shape[1] > WIDTH:  # a trace stops here
                return x, x
            x = self.body(x)
            return x, self.domain(Reversal.apply(x, 0.3))

    model, x = Domain(), torch.randn(3, WIDTH)
    compiled = pnn.compile(model, x, stages=3)
    assert compiled.program.capture.rung == rung
    assert any("Reversal" in note for note in compiled.program.capture.notes)
    for network in (model, compiled.sequential):
        network(x)[1].sum().backward()
    gradients = [p.grad for p in compiled.sequential.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert "for_this_thread" not in str(torch.autograd.Function.apply)


class Recompute(torch.autograd.Function):
    """Calls a module, and calls it again for the backward, as layers that save memory do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.module(x)
        output.backward(*gradients)  # adds to the parameters of the module
        return x.grad, None


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + Recompute.apply(x, self.module)


class Checkpointed(Recomputed):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.module, x, use_reentrant=True)
        return x + result


@pytest.mark.parametrize("block", [Recomputed, Checkpointed])
def test_blocks_that_are_computed_again_in_the_backward_train_alike(block: Any) -> None:
    model, x = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), *(block() for _ in range(4))),
        torch.ones(3, 8),
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    compiled = pnn.compile(model, x, stages=2)
    compiled.verify(strict=True)
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter))
    model.zero_grad()
    for network in (model, compiled.sequential):
        network(x).square().sum().backward()
    for parameter, other in zip(model.parameters(), compiled.sequential.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(other.grad, parameter.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_embeddings_with_sparse_gradients_train_alike(optimizer: Any) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, WIDTH, sparse=True)
            self.body = block_chain(6, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.embedding(ids).mean(1))

    model, ids = Bags(), torch.randint(0, 30, (4, 6))
    compiled = pnn.compile(model, ids, stages=3)
    compiled.verify(strict=True)
    for network in (model, compiled.sequential):
        tables = [p for name, p in network.named_parameters() if "embedding" in name]
        steps = optimizer(tables, lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            network(ids).square().sum().backward()
            steps.step()
    torch.testing.assert_close(compiled.original_state_dict()["embedding.weight"],
                               model.embedding.weight)  # fmt: skip


def test_sparse_buffers_and_inputs_are_refused_by_name() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block_chain(4, WIDTH)
            self.register_buffer("adjacency", torch.eye(4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(torch.sparse.mm(self.adjacency, x))

    x = torch.randn(4, WIDTH)
    with pytest.raises(CaptureError, match=r"buffer 'adjacency' of Graph is sparse"):
        capture(Graph(), (x,))
    with pytest.raises(CaptureError, match=r"example input \[0\] of Sequential is sparse"):
        capture(block_chain(4, WIDTH), (x.to_sparse(),))


class Ranking(nn.Module):
    """Looks up bags in a flat list of ids: the second input counts the samples."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, WIDTH, mode="sum")
        self.dense = nn.Linear(5, WIDTH) if dense else None
        self.body = block_chain(6, WIDTH)

    def forward(self, ids: Tensor, offsets: Tensor, dense: Tensor | None = None) -> Tensor:
        x = self.bag(ids, offsets)
        if self.dense is not None:
            x = x + self.dense(dense)
        return self.body(x)


@pytest.mark.parametrize("dense", [False, True])
def test_samples_may_be_counted_by_another_input_than_the_first(dense: bool) -> None:
    inputs = [torch.randint(0, 50, (17,)), torch.tensor([0, 3, 7, 12])]
    inputs += [torch.randn(4, 5)] if dense else []
    model = Ranking(dense)
    compiled = pnn.compile(model, tuple(inputs), stages=3)

    assert "the outputs count samples as" in compiled.program.capture.notes[0]
    assert compiled.plan.interfaces[0].state[0].spec.batch_axis == 0
    compiled.verify(strict=True)
    torch.testing.assert_close(compiled.sequential(*inputs), model(*inputs))


class Positions(nn.Module):
    """Fills its table of positions at the first call, by the length of the input."""

    table: Tensor

    def __init__(self, grow: bool = False) -> None:
        super().__init__()
        self.body = block_chain(4, WIDTH)
        self.grow = grow
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.grow or self.table.shape[0] != x.shape[1]:
            steps = torch.arange(x.shape[1], dtype=x.dtype)
            self.table = torch.cat([self.table, steps]) if self.grow else steps
        return self.body(x + torch.sin(self.table[-x.shape[1] :])[:, None])


def test_buffers_that_forward_fills_once_are_computed_in_every_call(tmp_path: Path) -> None:
    model, x = Positions(), torch.randn(3, 5, WIDTH)
    compiled = pnn.compile(model, x, stages=2)
    note, sizes = compiled.program.capture.notes
    assert note.startswith("forward fills the buffers table at its first call")
    assert sizes.startswith("sizes of the inputs but the batch are fixed (x [3, 5, 8])")
    assert model.table.shape == (1,)
    loaded = pnn.load(compiled.save(tmp_path / "a"))
    assert loaded.verify().ok
    torch.testing.assert_close(loaded.sequential(x), model(x))


def test_buffers_that_grow_at_every_call_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"does not change buffer table"):
        capture(Positions(grow=True), (torch.randn(3, 5, WIDTH),))


# --- names, and what is refused by name -----------------------------------------------------------


class Named(nn.Module):
    """Has a layer of a name at its root, and reads the tensors that an object holds."""

    def __init__(self, name: str = "last") -> None:
        super().__init__()
        self.body, self.name = block_chain(4, WIDTH), name
        self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        x = self.body(x if extra is None else x + extra.bias["first"])
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile"])
def test_names_that_a_graph_module_has_are_those_of_the_state_dict(
    name: str, tmp_path: Path
) -> None:
    model, x = Named(name), torch.randn(3, WIDTH)
    compiled = pnn.compile(model, x, stages=2)
    torch.testing.assert_close(compiled.sequential(x), model(x))
    assert any(f"'_enclosed.{name}'" in note for note in compiled.program.capture.notes)

    other = Named(name)
    for network in (compiled, pnn.load(compiled.save(tmp_path / "a"))):
        assert network.original_state_dict().keys() == model.state_dict().keys()
        network.load_original_state_dict(other.state_dict())
        torch.testing.assert_close(network.sequential(x), other(x))


def test_a_layer_may_be_called_self(capfd: pytest.CaptureFixture[str]) -> None:
    class Calls(Named):
        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            return self.body(super().forward(x))

    model, x = Calls("self"), torch.randn(3, WIDTH)
    assert torch.equal(capture(model, (x,)).module(x), model(x))
    assert capfd.readouterr().err == ""


def test_keywords_of_python_are_refused_as_names() -> None:
    model = nn.Sequential(nn.ModuleDict({"class": nn.Linear(WIDTH, WIDTH)}))
    with pytest.raises(CaptureError, match=r"'class' in 0 is a keyword of Python"):
        capture(model, (torch.randn(3, WIDTH),))


def test_a_forward_that_freezes_its_parameters_is_refused() -> None:
    class Freezes(Named):
        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            next(self.body.parameters()).requires_grad_(False)
            return super().forward(x)

    model = Freezes()
    with pytest.raises(CaptureError, match=r"sets requires_grad of the parameter body.0.0.weight"):
        capture(model, (torch.randn(3, WIDTH),))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_objects_with_tensors_are_no_constants() -> None:
    extra = SimpleNamespace(bias={"first": torch.randn(WIDTH)})
    message = r"argument 'extra' is or holds a SimpleNamespace with the tensor \"bias\['first'\]\""
    with pytest.raises(CaptureError, match=message):
        capture(Named(), (torch.randn(3, WIDTH), extra))


def test_a_hook_on_a_gradient_is_named() -> None:
    class Damped(Named):
        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            y = self.body(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: gradient * 0.5)
            return super().forward(y)

    with pytest.raises(CaptureError, match=r"registers a hook on a gradient at .*:\d+, and no"):
        capture(Damped(), (torch.randn(3, WIDTH),))
