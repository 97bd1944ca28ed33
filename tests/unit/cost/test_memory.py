from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from passes.analysis.analysis import Analysis
from passes.cost.flops import parameters
from passes.cost.memory import Memory, last_fitting_ends
from tests.support.programs import analysis


def by_hand(result: Analysis, start: int, stop: int, *, training: bool) -> float:
    """Add up the bytes of consecutive nodes one by one."""
    nodes = result.frontiers.order[start:stop]
    owned = {id(p): p for node in nodes for p in parameters(result.program, node)}
    read = sum(p.numel() * p.element_size() for p in owned.values())
    written = [result.costs[node].activation_bytes for node in nodes]
    if training:
        return 4 * read + sum(written)
    return read + 2 * max(written, default=0)


def _memory(name: str, *, training: bool) -> Memory:
    return Memory(analysis(name).program, analysis(name).costs, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet", "tied_linear", "reused_module"])
def test_bytes_of_runs_count_shared_parameters_once(name: str, training: bool) -> None:
    result = analysis(name)
    memory = Memory(result.program, result.costs, training=training)
    pairs = list(itertools.combinations(range(len(result.frontiers.order) + 1), 2))
    begin, end = (torch.tensor(indices) for indices in zip(*pairs, strict=True))
    expected = [by_hand(result, *pair, training=training) for pair in pairs]

    assert memory.nodes(begin, end).tolist() == expected
    assert memory.span(*pairs[3]) == expected[3]


@pytest.mark.parametrize("training", [True, False])
def test_the_last_end_that_fits_is_found(training: bool) -> None:
    memory = _memory("resnet", training=training)
    size = len(analysis("resnet").frontiers.order)
    ends = list(range(0, size + 1, 2))
    entry = [100.0 * (place % 3) for place in ends]
    for limit in (0.0, 2e3, 1e5, 1e6, 1e9):
        indices = last_fitting_ends(memory, ends, entry, ends, limit)
        for begin, extra, last in zip(ends, entry, indices, strict=True):
            fits = [
                i
                for i, end in enumerate(ends)
                if end >= begin and memory.span(begin, end) + extra <= limit
            ]
            if fits:
                assert last == max(fits)
            else:
                assert last < 0 or ends[last] < begin or last == -1


def test_operators_and_state_count() -> None:
    memory = _memory("mlp", training=True)

    assert isinstance(analysis("mlp").program.module, nn.Module)
    assert memory.entry(10, 100) == 4 * 4 * 10 + 2 * 4 * 100
    assert _memory("mlp", training=False).entry(10, 100) == 4 * 10 + 4 * 100
