"""What guesses read: integers through their first values, and nothing later in a sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from tests.models.builders import block_chain


class OneHot(nn.Module):
    """Takes integers that no table is looked up by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(nn.functional.one_hot(ids, 4).float())


class LargeVocabulary(nn.Module):
    """Looks up more than the trunk computes."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 32)
        self.narrow = nn.Linear(32, 4)
        self.layers = block_chain(9, 4)
        self.pooled = pooled

    def forward(self, ids: Tensor) -> Tensor:
        x = self.narrow(self.embedding(ids))
        return self.layers(x.mean(1) if self.pooled else x)


class IntegerImage(nn.Module):
    """Takes the bytes of an image."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.float() / 255)


INTEGERS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (OneHot, torch.tensor([0, 1, 2])),
    (LargeVocabulary, torch.randint(0, 5000, (2, 6))),
    (lambda: LargeVocabulary(pooled=True), torch.randint(0, 5000, (2, 6))),
    (IntegerImage, torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)),
]


@pytest.mark.parametrize("stages", [2, 3, 8])
@pytest.mark.parametrize(("build", "example"), INTEGERS)
def test_integers_alone_can_be_guessed_from(
    build: Callable[[], nn.Module], example: Tensor, stages: int
) -> None:
    model = build().eval()
    compiled = pnn.compile(model, example, stages=stages)

    compiled.verify(strict=True)
    torch.testing.assert_close(compiled.sequential(example), model(example))
    compiled.module(example).sum().backward()
