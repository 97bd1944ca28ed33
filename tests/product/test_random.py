"""Random networks: whatever the graph is, the stages are the model and parareal becomes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from passes.capture.ladder import capture
from passes.errors import PartitionError
from tests.support.parity import assert_same_step, step
from tests.support.programs import compile_program, parts

WIDTH = 8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
    "layernorm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
}
OPERATORS: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    "tanh": lambda net, x, a, b: torch.tanh(a),
    "add": lambda net, x, a, b: a + b,
    "multiply": lambda net, x, a, b: a * torch.sigmoid(b),
    "late input": lambda net, x, a, b: a + x,
    "mask": lambda net, x, a, b: a * (x > 0).float(),
    "pick": lambda net, x, a, b: a + F.one_hot(a.argmax(1), WIDTH),
    "swap": lambda net, x, a, b: torch.cat(a.chunk(2, 1)[::-1], 1),
    "turn": lambda net, x, a, b: a.view(-1, 4, WIDTH // 4).transpose(1, 2).flatten(1),
    "mean": lambda net, x, a, b: a - a.mean(1, keepdim=True),
    "drop": lambda net, x, a, b: F.dropout(a, 0.2, net.training),
    "relu in place": lambda net, x, a, b: F.relu(a * 2.0, inplace=True),
    "write": lambda net, x, a, b: (a * 1.0).add_(b),
}
KINDS = ["linear"] * 6 + [*LAYERS, *OPERATORS, "again"]

# What is done, and how far back its two operands are.
choices = st.tuples(st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 6))


class RandomNet(nn.Module):
    def __init__(self, steps: list[tuple[str, int, int]], *, exported: bool, several: bool) -> None:
        super().__init__()
        self.steps, self.exported, self.several = steps, exported, several
        self.layers = nn.ModuleList(LAYERS[kind]() for kind, *_ in steps if kind in LAYERS)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        if self.exported and x.shape[1] > 100:
            return x  # a question that only torch.export can answer
        layers, values = iter(self.layers), [x]
        for kind, near, far in self.steps:
            a, b = (values[max(-back, -len(values))] for back in (near, far))
            if kind in LAYERS:
                values.append(next(layers)(a))
            elif kind == "again":
                values.append(self.layers[0](a) if len(self.layers) else a + 1.0)
            else:
                values.append(OPERATORS[kind](self, x, a, b))
        result = self.head(values[-1])
        return {"result": result, "inner": [values[len(values) // 2]]} if self.several else result


@settings(max_examples=10)
@given(st.lists(choices, min_size=5, max_size=14), st.booleans(), st.booleans(), st.integers(2, 3))
def test_any_network_is_cut_and_composed_soundly(
    steps: list[tuple[str, int, int]], exported: bool, several: bool, stages: int
) -> None:
    model = RandomNet(steps, exported=exported, several=several)
    captured = capture(model, (torch.randn(4, WIDTH),))
    x = torch.randn(5, WIDTH)
    expected = {train: step(model, (x,), train=train) for train in (True, False)}
    try:
        sequential = parts(compile_program(captured, stages=stages))[1]
    except PartitionError:
        return
    for train in (True, False):
        sequential.train(train)
        assert_same_step(
            step(captured.module, (x,), train=train, forward=sequential), expected[train]
        )
    for options in (
        {"coarse": "exact", "correction": "difference"},
        {"iterations": stages},
    ):
        module = parts(compile_program(captured, stages=stages, **options))[2].eval()
        result = step(captured.module, (x,), train=False, forward=module).output
        torch.testing.assert_close(result, expected[False].output, rtol=1e-3, atol=1e-3)
