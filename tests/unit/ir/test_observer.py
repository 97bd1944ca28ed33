from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.capture.ladder import capture_and_observe
from passes.cost.node_facts import observe
from passes.ir.module_walk import named_buffers, named_parameters
from passes.ir.observer import Fact, Observer, memory_of
from passes.ir.program import Program, is_compute
from tests.models.zoo import by_name
from tests.support.programs import program


def described(facts: dict[str, Fact]) -> dict[str, object]:
    """Facts by node, with the names of the nodes that share or write its memory for the memory."""

    def nodes(memory: frozenset[int]) -> list[str]:
        return [name for name, fact in facts.items() if fact.storages & memory]

    return {
        name: (f.spec, nodes(f.storages), nodes(f.writes), f.random, f.bytes, f.work)
        for name, f in facts.items()
    }


def by_node(captured: Program, *observations: object) -> dict[str, object]:
    facts = observe(captured, *observations)  # type: ignore[arg-type]
    return described({node.name: fact for node, fact in facts.items()})


@pytest.mark.parametrize("name", ["resnet", "dropout", "conv_inplace", "slice_assignment", "lstm"])
def test_what_validation_saw_is_what_runs_of_its_own_show(name: str) -> None:
    case = by_name(name)
    captured, seen = capture_and_observe(case.build(), case.args(2), case.kwargs(2))
    assert seen is not None
    assert seen.are_of(captured)
    assert seen.larger is not None
    assert seen.trained is not None

    assert by_node(captured, seen) == by_node(captured)


def test_what_validation_saw_is_not_looked_for_again() -> None:
    captured, seen = capture_and_observe(nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4),))
    calls = []
    captured.module.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
    observe(captured)
    without = len(calls)
    observe(captured, seen)

    assert len(calls) - without == without - 2  # neither a larger batch nor training mode


def test_observations_of_another_graph_or_of_other_inputs_are_not_used() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    captured, seen = capture_and_observe(model, (x,))
    other, _ = capture_and_observe(model, (x,))
    assert seen is not None

    assert seen.are_of(captured)
    assert not seen.are_of(other)
    assert by_node(other, seen) == by_node(other)


def test_memory_of_one_run_is_not_taken_for_that_of_the_next() -> None:
    captured = program("mlp")
    state = (*named_parameters(captured.module), *named_buffers(captured.module))
    lasting = {memory_of(tensor) for _, tensor in state}
    seen: set[int] = set()
    for _ in range(5):
        observer = Observer(captured.module)
        observer.run(*captured.fresh_inputs())
        memory = {
            storage
            for node, fact in observer.facts().items()
            if is_compute(node)
            for storage in fact.storages - lasting
        }
        assert memory
        assert not memory & seen
        seen |= memory
