"""No cut crosses rows whose number follows from values: a guess would have another number."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn

WIDTH = 6


class Rows(nn.Module):
    """Three layers, a change of the rows, and three layers."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.before = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.after = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("first", torch.arange(WIDTH) < 3)

    def forward(self, x: Tensor, some: Tensor) -> Tensor:
        for layer in self.before:
            x = torch.tanh(layer(x))
        x = CHANGES[self.change](self, x, some)
        for layer in self.after:
            x = torch.tanh(layer(x))
        return x


def written(model: Rows, x: Tensor, some: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[some] = x[some] * 2
    return x + y


CHANGES: dict[str, Any] = {
    "mask": lambda model, x, some: x[some],
    "mask of values": lambda model, x, some: x[x[:, 0] > 0],
    "nonzero": lambda model, x, some: x[torch.nonzero(some).squeeze(-1)],
    "masked_select": lambda model, x, some: x.masked_select(some[:, None]).view(-1, WIDTH),
    "by keywords": lambda model, x, some: torch.masked_select(mask=some[:, None], input=x).view(
        -1, WIDTH
    ),
    "unique": lambda model, x, some: x[torch.unique(x.argmax(-1)) % x.shape[0]],
    "repeats": lambda model, x, some: torch.repeat_interleave(x, some.long() + 1, 0),
    # As many rows as before:
    "written back": written,
    "mask of a buffer": lambda model, x, some: torch.cat([x[:, model.first]] * 2, 1),
    "mean of rows": lambda model, x, some: x - x[some].mean(0),
    "mean by keywords": lambda model, x, some: torch.sub(other=x[some].mean(0), input=x),
}
KEEPING = ("written back", "mask of a buffer", "mean of rows", "mean by keywords")


# All rows of the example are as many as it has samples.
@pytest.mark.parametrize(("change", "all_rows"), [("mask", False), *((c, True) for c in CHANGES)])
def test_no_cut_crosses_rows_that_values_count(change: str, all_rows: bool) -> None:
    torch.manual_seed(0)
    model, x = Rows(change).eval(), torch.randn(4, WIDTH).abs()
    inputs = (x, torch.tensor([True, all_rows, True, all_rows]))
    if change not in KEEPING:
        with pytest.raises(pnn.PnnError, match=r"follows from values|without a batch axis"):
            pnn.compile(model, inputs, stages=8, validate="off")
    stages = 8 if change in KEEPING else 3
    compiled = pnn.compile(model, inputs, stages=stages, validate="off")
    others = (torch.randn(4, WIDTH), torch.tensor([False, True, False, False]))
    torch.testing.assert_close(compiled.sequential.eval()(*others), model(*others))
    compiled.module.eval()(*others)
