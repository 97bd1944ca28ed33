"""Parameters that several ranks hold have the gradient of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from tests.distributed.ranks import start
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
