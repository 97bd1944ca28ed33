"""Parameters that several ranks hold have the gradient of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from pnn_compile.artifact.directory import load
from pnn_compile.runtime.tied_weights import check_memory, check_shardable
from tests.distributed.ranks import start
from tests.models.builders import linear_chain
from tests.models.distributed_models import batches, loss, network


def _tied(module: nn.Module) -> nn.Parameter:
    """The weight of the first layer, which is that of the last one."""
    return next(
        p for n, p in module.named_parameters() if n.endswith(("stem.weight", "top.weight"))
    )


def _accumulate(rank: int) -> Tensor | None:
    module = pnn.runtime.distribute(network(2, "tied", dropout=0.0)).train()
    for batch in batches(3):
        module.forward_backward(batch, loss)
    return _tied(module).grad


def test_gradients_add_up_over_several_passes(tmp_path: Path) -> None:
    module = network(2, "tied", dropout=0.0).module.train()
    for batch in batches(3):
        loss(module(batch), batch).backward()
    for gradient in start(_accumulate, 2, tmp_path):
        torch.testing.assert_close(gradient, _tied(module).grad)


def _frozen(rank: int) -> bool:
    module = pnn.runtime.distribute(network(2, "tied")).train()
    tied = _tied(module).requires_grad_(False)
    before = tied.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, weight_decay=0.5)
    for batch in batches(2):
        module.train_step(batch, loss, optimizer)
    return tied.grad is None and torch.equal(tied, before)


def test_what_is_frozen_stays(tmp_path: Path) -> None:
    assert start(_frozen, 2, tmp_path) == [True, True]


def _half_frozen(rank: int) -> str:
    module = pnn.runtime.distribute(network(2, "tied")).train()
    _tied(module).requires_grad_(rank == 0)
    with pytest.raises(pnn.RuntimeFault) as caught:
        module.forward_backward(batches(1)[0], loss)
    return str(caught.value)


def test_what_is_frozen_on_some_ranks_only_is_refused(tmp_path: Path) -> None:
    for message in start(_half_frozen, 2, tmp_path):
        assert "is frozen on 1 of the ranks [0, 1]" in message


def _over_one_memory() -> pnn.Compiled:
    """First and last layer have different parameters over one memory."""
    model: Any = linear_chain(4, 8)
    model[3].weight.data = model[0].weight.data
    return pnn.compile(model, torch.randn(3, 8), stages=2)


@pytest.mark.parametrize("stored", [False, True])
def test_parameters_over_one_memory_stay_on_one_rank(stored: bool, tmp_path: Path) -> None:
    compiled = _over_one_memory()
    if stored:
        compiled = load(compiled.save(tmp_path / "artifact"), without_data=True)
    check_memory(compiled, (0, 0))
    with pytest.raises(
        pnn.RuntimeFault, match=r"0\.weight of rank 0 and .*3\.weight of rank 1 are"
    ):
        check_memory(compiled, (0, 1))


def test_what_sharding_would_lose_is_refused() -> None:
    check_shardable(network(2))
    with pytest.raises(pnn.RuntimeFault, match="are two parameters over one memory"):
        check_shardable(_over_one_memory())
    hooked = network(2)
    name, parameter = next(iter(hooked.module.named_parameters()))
    parameter.register_hook(lambda gradient: gradient)
    with pytest.raises(pnn.RuntimeFault, match=f"{name} has a hook on its gradient"):
        check_shardable(hooked)
