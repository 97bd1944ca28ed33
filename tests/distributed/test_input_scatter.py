"""What ranks are fed: micro-batches, batches handed out by rank 0, and inputs that do not fit."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from pnn_compile.inputs import check_shapes
from pnn_compile.runtime.input_scatter import arguments_read
from pnn_compile.runtime.micro_batches import divide
from pnn_compile.runtime.rank_pieces import RankPieces
from tests.distributed.ranks import start


class _Late(nn.Module):
    """Reads one argument at its beginning and another at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.table = nn.Embedding(5, 8)

    def forward(self, x: Tensor, *, late: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x * self.table(late)


def _compiled() -> pnn.Compiled:
    torch.manual_seed(0)
    kwargs = {"late": torch.randint(5, (4,))}
    return pnn.compile(
        _Late(), args=(torch.randn(4, 8),), kwargs=kwargs, stages=3, coarse_budget=1.0
    )


def _loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch["labels"])


def _train(rank: int, inputs: Any, micro: int) -> dict[str, Any]:
    module = pnn.runtime.distribute(_compiled(), inputs=inputs, batches=micro).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(2):
        batch = {name: torch.randn(4, 8, generator=generator) for name in ("x", "labels")}
        batch["late"] = torch.randint(5, (4,), generator=generator)
        passed = batch if rank == 0 or inputs == "every rank" else None
        losses.append(module.train_step(passed, _loss, optimizer).item())
    arguments = (batch["x"],) if passed is not None else ()
    kwargs = {"late": batch["late"]} if passed is not None else {}
    outputs = module.eval()(*arguments, **kwargs)
    fed = None if module._scatter is None else module._scatter(passed)
    return {"losses": losses, "outputs": outputs, "fed": fed}


@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_that_are_fed_train_alike(micro: int, tmp_path: Path) -> None:
    reference = start(_train, 3, tmp_path, "every rank", micro)
    result = start(_train, 3, tmp_path, "rank 0", micro)
    for actual, expected in zip(result, reference, strict=True):
        assert actual["losses"] == expected["losses"]
    assert torch.equal(result[2]["outputs"], reference[2]["outputs"])
    first, middle, last = (rank["fed"] for rank in result)
    # No state of the middle depends on the late argument, so that its guess does not read it.
    assert {name for name, value in middle.items() if not value.is_meta} == {"x"}
    assert middle["labels"].shape == (4, 8)
    for name, value in first.items():
        assert torch.equal(value, last[name])


def test_what_a_rank_reads_is_in_its_plan() -> None:
    compiled = _compiled()
    ranks = [RankPieces(compiled, (0, 1, 2), rank) for rank in range(3)]
    assert [arguments_read(pieces, ["x", "late"]) for pieces in ranks] == [
        {"x"},
        {"x"},
        {"x", "late"},
    ]


def _strange(rank: int) -> str:
    strange: Any = "rank 3"
    with pytest.raises(pnn.RuntimeFault) as caught:
        pnn.runtime.distribute(_compiled(), inputs=strange, placement=[0, 0, 0])
    return str(caught.value)


def test_other_words_are_refused(tmp_path: Path) -> None:
    assert "got 'rank 3'" in start(_strange, 1, tmp_path)[0]


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
    with pytest.raises(
        pnn.RuntimeFault, match=r"a batch of 3 does not divide into 4 micro-batches"
    ):
        divide({"x": torch.ones(3, 2)}, 4)


def test_the_example_tells_what_has_samples() -> None:
    example = {"table": torch.ones(3, 2), "x": torch.ones(2, 2)}
    batch = {"x": torch.randn(6, 2), "table": torch.ones(6, 2)}
    with pytest.raises(pnn.RuntimeFault, match="a batch of 6 does not divide into 7"):
        divide(batch, 7, example)
    example = {"x": torch.ones(2, 2), "table": torch.ones(3, 2)}
    pieces = divide(batch, 4, example)  # the table has as many rows as the batch by chance
    assert [(len(piece["x"]), len(piece["table"])) for piece in pieces] == [
        (2, 6), (2, 6), (1, 6), (1, 6)
    ]  # fmt: skip


def _convolutions() -> pnn.Compiled:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(6)]
    return pnn.compile(nn.Sequential(*blocks), torch.randn(2, 4, 8, 8), stages=2, coarse_budget=1.0)


@pytest.mark.parametrize(
    "shaped", [torch.ones(2, 4, 6, 6), torch.ones(2, 4, 8), torch.ones(2, 4, 8, 8).long()]
)
def test_another_shape_than_that_of_the_example_is_refused(shaped: Tensor) -> None:
    compiled = _convolutions()
    (name,) = compiled.program.args
    check_shapes(compiled, {name: torch.ones(5, 4, 8, 8, dtype=torch.float64)})
    with pytest.raises(pnn.OptionError, match=r"compiled for \[any number, 4, 8, 8\]"):
        check_shapes(compiled, {name: shaped})


def _distance(outputs: Tensor, _: Any) -> Tensor:
    return F.mse_loss(outputs, torch.ones_like(outputs))


def _nothing_but_numbers(outputs: Tensor, batch: Any) -> Tensor:
    return _distance(outputs, batch) / 0.0


def _wrong(rank: int) -> Any:
    compiled = _convolutions()
    module = pnn.runtime.distribute(compiled).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    message = []
    for batch, loss in (
        (torch.randn(2, 4, 6, 6), _distance),
        (torch.randn(2, 4, 8, 8), _nothing_but_numbers),
    ):
        before = {name: value.clone() for name, value in module.named_parameters()}
        try:
            module.train_step(batch, loss, optimizer)
        except pnn.RuntimeFault as error:
            message.append(str(error))
        assert all(torch.equal(before[name], value) for name, value in module.named_parameters())
    return message, module.train_step(torch.randn(3, 4, 8, 8), _distance, optimizer).item()


def test_wrong_shapes_and_losses_get_a_clear_error_on_every_rank(tmp_path: Path) -> None:
    (first, loss), (second, other) = start(_wrong, 2, tmp_path)
    assert "rank 0: " in first[0]
    assert "rank 1: " in second[0]
    assert "is [2, 4, 6, 6]" in first[0]
    assert first[1] == second[1]
    assert "is inf on all ranks: lower the learning rate" in first[1]
    assert loss == other > 0


def _mapping(rank: int) -> Any:
    compiled = _convolutions()
    module = pnn.runtime.distribute(compiled, inputs="rank 0").train()
    (name,) = compiled.program.args
    batch = UserDict({name: torch.ones(2, 4, 8, 8)})
    return module.forward_backward(batch if rank == 0 else None, _distance).item()


def test_a_mapping_that_torch_does_not_know_is_handed_out(tmp_path: Path) -> None:
    first, second = start(_mapping, 2, tmp_path)
    assert first == second > 0
