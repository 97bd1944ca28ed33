"""Compilations in threads, and models that run beside them in others."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import pnn_compile as pnn
from passes.ir.isolation import exclusive, preserved
from tests.models.builders import Exported, block_chain, residual_chain


def _traced() -> nn.Module:
    return block_chain(4, 8, activation=nn.ReLU)


def _exported() -> nn.Module:
    return Exported(residual_chain(4, 8))


@pytest.fixture
def _switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@contextmanager
def _beside(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Do something again and again in another thread; gives what went wrong there."""
    over = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        while not over.wait(0.001) and not errors:
            try:
                work()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield errors
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("_switching")
def test_four_threads_compile_while_a_model_runs() -> None:
    torch.manual_seed(0)
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    builds: list[Callable[[], nn.Module]] = [_traced, _exported]
    models = [builds[number % 2]() for number in range(4)]
    running, x = _exported().eval(), torch.randn(3, 8)
    expected = running(x)

    def step() -> None:
        assert torch.equal(running(x), expected)

    def compile_one(model: nn.Module) -> float:
        compiled = pnn.compile(model, x, stages=2)
        assert compiled.verify().ok
        return float((compiled.sequential(x) - model(x)).detach().abs().max())

    with _beside(step) as errors, ThreadPoolExecutor(4) as pool:
        gaps = list(pool.map(compile_one, models))
    assert not errors
    assert max(gaps) < 1e-5
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattribute
    nn.Linear(2, 2)(torch.ones(1, 2))


@pytest.mark.usefixtures("_switching")
def test_random_numbers_of_another_thread_are_no_fault_of_the_model() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x) * torch.rand(1).item())

    x = torch.randn(3, 8)
    with _beside(lambda: nn.functional.dropout(x)):
        assert pnn.compile(_traced(), x, stages=2).program.capture.rung == "torch.fx trace"
        assert pnn.compile(_exported(), x, stages=2).program.capture.rung == "torch.export"
        with pytest.raises(pnn.CaptureError, match="random numbers that it draws"):
            pnn.compile(Draws(), x, stages=2)


def test_a_seed_gives_the_same_weights_in_every_thread() -> None:
    x, model = torch.randn(3, 8), _traced()
    with ThreadPoolExecutor(4) as pool:
        modules = [*pool.map(lambda _: pnn.compile(model, x, stages=2).module, range(4))]
    for module in modules[1:]:
        for a, b in zip(modules[0].parameters(), module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_methods_that_are_patched_change_for_one_thread_and_not_for_good() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    results: list[object] = []

    class Beside(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                results.append(pool.submit(layer, x).result())
            return value * 2

    with exclusive():
        graph = fx.symbolic_trace(Beside())
    assert graph(x).equal(x * 2)
    assert isinstance(results[0], Tensor)


def test_a_trace_that_fails_leaves_nothing_behind() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise KeyError
            return x

    call = nn.Module.__call__
    with pytest.raises(fx.proxy.TraceError), exclusive():
        fx.symbolic_trace(Broken())
    assert nn.Module.__call__ is call


def test_nested_containers_and_plain_objects_are_put_back() -> None:
    class State:
        def __init__(self) -> None:
            self.last: Any = None
            self.sums = torch.zeros(2)

    model: Any = nn.Linear(2, 2)
    model.state, model.lists = State(), {"history": [State()]}
    with preserved(model):
        model.state.last = torch.ones(2)
        model.state.sums.add_(1.0)
        model.lists["history"][0].last = 3
        model.lists["history"].append(4)
    assert model.state.last is None
    assert not model.state.sums.any()
    (entry,) = model.lists["history"]
    assert entry.last is None
