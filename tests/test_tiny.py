"""The product from top to bottom, in the order in which a user meets it."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pnn_compile as pnn


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def build_model() -> nn.Module:
    blocks = [Residual(8) for _ in range(12)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


def test_compile_cuts_a_model_into_balanced_stages(images: torch.Tensor) -> None:
    compiled = pnn.compile(build_model(), images, stages=3)
    assert len(compiled.plan.stages) == 3
    assert compiled.plan.forecast.imbalance < 1.1
    assert compiled.plan.forecast.speedup > 1.5


def test_every_oracle_holds(images: torch.Tensor) -> None:
    report = pnn.compile(build_model(), images, stages=3).verify(strict=True)
    assert len(report.checks) == 7


def test_the_generated_code_reads_like_the_algorithm(images: torch.Tensor) -> None:
    compiled = pnn.compile(build_model(), images, stages=2)
    wanted = ("preprocess_1(", "fine_0(", "fine_1(", "y_0 - x_1", "coarse_1(r_1", "y_1 + c_1")
    for text in (*wanted, "head(u_1"):
        assert text in compiled.module.code


def test_it_trains_in_a_plain_loop(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = pnn.compile(build_model(), images, stages=3).module.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_as_many_iterations_as_stages_give_the_original(images: torch.Tensor) -> None:
    model = build_model().eval()
    network = pnn.compile(model, images, stages=3, iterations=3).module.eval()
    torch.testing.assert_close(network(images), model(images))


def test_checkpoints_of_the_original_load_and_come_back(images: torch.Tensor) -> None:
    model, trained = build_model(), build_model()
    compiled = pnn.compile(model, images, stages=3)
    compiled.load_original_state_dict(trained.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(compiled.original_state_dict()[key], value)


def test_an_artifact_needs_neither_the_code_nor_unpickling(
    images: torch.Tensor, tmp_path: Path
) -> None:
    compiled = pnn.compile(build_model(), images, stages=3)
    compiled.save(tmp_path / "out")
    again = pnn.load(tmp_path / "out")
    assert again.plan == compiled.plan
    assert torch.equal(again.module.eval()(images), compiled.module.eval()(images))
