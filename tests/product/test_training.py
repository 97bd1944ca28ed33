"""Training: a compiled network, its stages in sequence, follows the original step by step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples import unet
from passes.capture.ladder import capture
from tests.models.builders import Exported
from tests.support.parity import assert_same_step, step

VOCABULARY, WIDTH = 11, 12


class StochasticDepth(nn.Module):
    """Batch norm, functional dropout, and stochastic depth as a Python branch on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.BatchNorm1d(2 * WIDTH)
        self.last = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(torch.tanh(self.norm(self.first(x))), 0.2, self.training)
        y = self.last(y)
        if not self.training:
            return x + y
        keep = x.new_empty((x.shape[0], 1)).bernoulli_(0.8)
        return x + y * keep / 0.8


class Network(nn.Module):
    """Predicts a token from one token; embedding and head share their weight."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        blocks = nn.Sequential(*(StochasticDepth() for _ in range(6)))
        self.blocks = Exported(blocks) if exported else blocks
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def losses(module: nn.Module, tokens: Tensor, targets: Tensor) -> list[float]:
    """Train ten steps with the same seeds; return the loss before each."""
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.05, momentum=0.9)
    result = []
    for number in range(10):
        torch.manual_seed(number)
        loss = F.cross_entropy(module(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_ten_steps_follow_the_original_whatever_mode_it_was_captured_in(
    training: bool, exported: bool
) -> None:
    torch.manual_seed(0)
    model = Network(exported).train(training)
    tokens, targets = torch.randint(VOCABULARY, (2, 32))
    compiled = pnn.compile(model, tokens[:4], stages=3)
    sequential = compiled.sequential
    assert len(list(sequential.parameters())) == len(list(model.parameters()))  # tied once

    expected = losses(model, tokens, targets)
    assert losses(sequential, tokens, targets) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(sequential.eval()(tokens), model.eval()(tokens), rtol=0, atol=1e-5)
    state = compiled.original_state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
    assert {int(v) for k, v in state.items() if k.endswith("num_batches_tracked")} == {10}


def test_a_unet_whose_skips_cross_two_cuts_trains_in_four_stages() -> None:
    torch.manual_seed(0)
    model = unet.UNet(1, 3, width=4, depth=3)
    x = torch.randn(2, 1, 16, 16)
    compiled = pnn.compile(model, x, stages=4)
    crossings = [{value.name for value in face.state} for face in compiled.plan.interfaces[:-1]]
    assert any(a & b for a, b in itertools.pairwise(crossings))

    for train in (True, False):
        expected = step(model, (x,), train=train)
        sequential = copy.copy(compiled.sequential).train(train)
        actual = step(compiled.program.module, (x,), train=train, forward=sequential)
        assert_same_step(actual, expected, scale=10.0)
    compiled.verify(strict=True)

    network = compiled.module.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(2):
        loss = network(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert sum(moved) > len(moved) // 2


class Reads(nn.Module):
    """Counts how often Python code of the layer runs."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        type(self).runs += 1
        y: Tensor = torch.tanh(self.linear(x))
        return y


def test_the_capture_of_a_deep_network_reads_each_block_as_often_as_a_shallow_one() -> None:
    counts, nodes = [], []
    for depth in (30, 90):
        Reads.runs = 0
        model = nn.Sequential(*(Reads() for _ in range(depth)))
        captured = capture(model, (torch.randn(2, 4),))
        counts.append(Reads.runs / depth)
        nodes.append(len(captured.order) / depth)
    assert counts[0] == counts[1]
    assert nodes[0] == nodes[1] == 2.0
