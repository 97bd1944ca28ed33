"""Rank 0 hands the batches out, and every rank gets what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from pnn_compile.runtime.input_scatter import arguments_read
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
        given = batch if rank == 0 or inputs == "every rank" else None
        losses.append(module.train_step(given, _loss, optimizer).item())
    arguments = (batch["x"],) if given is not None else ()
    kwargs = {"late": batch["late"]} if given is not None else {}
    outputs = module.eval()(*arguments, **kwargs)
    fed = None if module._scatter is None else module._scatter(given)
    return {"losses": losses, "outputs": outputs, "fed": fed}


@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_that_are_fed_train_alike(micro: int, tmp_path: Path) -> None:
    wanted = start(_train, 3, tmp_path, "every rank", micro)
    found = start(_train, 3, tmp_path, "rank 0", micro)
    for own, expected in zip(found, wanted, strict=True):
        assert own["losses"] == expected["losses"]
    assert torch.equal(found[2]["outputs"], wanted[2]["outputs"])
    first, middle, last = (rank["fed"] for rank in found)
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
