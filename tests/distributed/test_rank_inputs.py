"""What ranks are given: other shapes, short batches, mappings, losses that are no numbers."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from passes.errors import RuntimeFault
from pnn_compile.inputs import check_shapes
from pnn_compile.runtime.input_scatter import divide
from tests.distributed.ranks import start


def test_only_what_has_the_samples_is_cut() -> None:
    x, weight = torch.arange(36.0).reshape(9, 4), torch.ones(2, 4)
    hidden = (torch.arange(9), torch.tensor(3.0))
    pieces = divide({"x": x, "w": weight, "h": hidden, "scale": 2}, 4)
    assert [len(piece["x"]) for piece in pieces] == [3, 2, 2, 2]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), x)
    assert torch.equal(torch.cat([piece["h"][0] for piece in pieces]), hidden[0])
    for piece in pieces:
        assert torch.equal(piece["w"], weight)
        assert piece["h"][1] == 3
        assert piece["scale"] == 2
    with pytest.raises(RuntimeFault, match=r"a batch of 3 does not divide into 4 micro-batches"):
        divide(torch.ones(3, 2), 4)


def _compiled() -> pnn.Compiled:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(6)]
    return pnn.compile(nn.Sequential(*blocks), torch.randn(2, 4, 8, 8), stages=2, coarse_budget=1.0)


@pytest.mark.parametrize(
    "found", [torch.ones(2, 4, 6, 6), torch.ones(2, 4, 8), torch.ones(2, 4, 8, 8).long()]
)
def test_another_shape_than_that_of_the_example_is_refused(found: Tensor) -> None:
    compiled = _compiled()
    (name,) = compiled.program.args
    check_shapes(compiled, {name: torch.ones(5, 4, 8, 8, dtype=torch.float64)})
    with pytest.raises(pnn.OptionError, match=r"compiled for \[any number, 4, 8, 8\]"):
        check_shapes(compiled, {name: found})


def _loss(outputs: Tensor, _: Any) -> Tensor:
    return F.mse_loss(outputs, torch.ones_like(outputs))


def _nothing_but_numbers(outputs: Tensor, batch: Any) -> Tensor:
    return _loss(outputs, batch) / 0.0


def _refused(rank: int) -> Any:
    compiled = _compiled()
    module = pnn.runtime.distribute(compiled).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    said = []
    for batch, loss in (
        (torch.randn(2, 4, 6, 6), _loss),
        (torch.randn(2, 4, 8, 8), _nothing_but_numbers),
    ):
        before = {name: value.clone() for name, value in module.named_parameters()}
        try:
            module.train_step(batch, loss, optimizer)
        except RuntimeFault as error:
            said.append(str(error))
        assert all(torch.equal(before[name], value) for name, value in module.named_parameters())
    return said, module.train_step(torch.randn(3, 4, 8, 8), _loss, optimizer).item()


def test_wrong_shapes_and_losses_get_a_clear_error_on_every_rank(tmp_path: Path) -> None:
    (first, loss), (second, other) = start(_refused, 2, tmp_path)
    assert "rank 0: " in first[0]
    assert "rank 1: " in second[0]
    assert "is [2, 4, 6, 6]" in first[0]
    assert first[1] == second[1]
    assert "is inf on all ranks: lower the learning rate" in first[1]
    assert loss == other > 0


def _fed(rank: int) -> Any:
    compiled = _compiled()
    module = pnn.runtime.distribute(compiled, inputs="rank 0").train()
    (name,) = compiled.program.args
    batch = UserDict({name: torch.ones(2, 4, 8, 8)})
    return module.forward_backward(batch if rank == 0 else None, _loss).item()


def test_a_mapping_that_torch_does_not_know_is_handed_out(tmp_path: Path) -> None:
    first, second = start(_fed, 2, tmp_path)
    assert first == second > 0
