from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.capture.ladder import capture
from passes.cost.node_facts import observe
from passes.ir.observer import Fact
from tests.models.zoo import CAPTURABLE
from tests.support.programs import facts_by_name, program


def facts(model: nn.Module, *args: Tensor, dynamic: bool = True) -> dict[str, Fact]:
    return facts_by_name(capture(model, args, dynamic=("batch",) * dynamic))


class Layouts(nn.Module):
    """Moves, folds and drops the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        moved = x.transpose(0, 1)
        folded = x.flatten(0, 1)
        pooled = x.mean(dim=0)
        scalar = x.sum()
        constant = self.weight @ self.weight
        return moved, folded, pooled, scalar, constant


def test_the_batch_axis_is_followed_wherever_it_goes() -> None:
    # As many samples as tokens and features: only running twice tells the axes apart.
    by_name = facts(Layouts(), torch.randn(5, 5, 5))
    axes = {name: fact.spec.batch_axis for name, fact in by_name.items() if fact.spec}

    assert axes == {
        "x": 0,
        "weight": None,
        "transpose": 1,
        "flatten": 0,
        "mean": None,
        "sum_1": None,
        "matmul": None,
    }


def test_without_a_free_batch_the_leading_axis_of_its_size_is_taken() -> None:
    by_name = facts(Layouts(), torch.randn(2, 5, 5), dynamic=False)
    axes = {name: fact.spec.batch_axis for name, fact in by_name.items() if fact.spec}

    assert axes["x"] == 0
    assert axes["transpose"] is axes["flatten"] is axes["mean"] is None


class TimeFirst(nn.Module):
    """Takes `[T, B, C]`, and works on rows of samples, on rows of times, and on samples."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        turned = x.transpose(0, 1)
        return turned, turned.flatten(0, 1), x.flatten(0, 1), x.cumsum(0).mean(0), x.cumsum(0)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_square_example_does_not_hide_which_axis_counts_the_samples(dynamic: bool) -> None:
    by_name = facts(TimeFirst(), torch.randn(4, 4, 3), dynamic=dynamic)
    axes = {name: fact.spec.batch_axis for name, fact in by_name.items() if fact.spec}

    assert axes["transpose"] == 1
    assert axes["flatten"] is None  # rows of one time lie apart
    assert axes["flatten_1"] == (0 if dynamic else None)
    assert axes["mean"] is None
    assert axes["cumsum"] == axes["cumsum_1"] == 0


@pytest.mark.parametrize(
    ("name", "at", "text", "channel"),
    [
        ("unet", "down_1_0", "[B, 8, 8, 8] float32", 1),
        ("unet", "interpolate", "[B, 16, 4, 4] float32", 1),
        ("conv1d", "_0", "[B, 8, 24] float32", 1),
        ("conv1d", "_3", "[B, 8, 24] float32", 1),
        ("mixer", "_0", "[B, 6, 16] float32", 2),
        ("float_mask_encoder", "embedding", "[B, 10, 16] float32", 2),
        ("vision_transformer", "patches", "[B, 16, 2, 2] float32", 1),
        ("vision_transformer", "cat", "[B, 5, 16] float32", 2),
        ("lstm", "getitem_6", "[1, B, 8] float32", 2),
        ("mlp", "_3", "[B, 16] float32", 1),
        ("dict_output", "norm", "[B] float32", 0),
    ],
)
def test_a_tensor_has_the_shape_and_the_axes_that_layers_give_it(
    name: str, at: str, text: str, channel: int
) -> None:
    spec = facts_by_name(program(name))[at].spec

    assert spec is not None
    assert (str(spec), spec.channel_axis) == (text, channel)


def test_no_type_is_given_to_what_is_no_tensor() -> None:
    by_name = facts_by_name(program("lstm"))

    assert by_name["lstm1"].spec is None
    assert by_name["lstm1"].bytes == 4 * (2 * 6 * 8 + 2 * (2 * 8))


def test_every_write_is_seen() -> None:
    expected = {
        "deep_batchnorm": {f"_{3 * i + 1}" for i in range(8)},
        "conv_inplace": {"_1", "_3", "_6", "_8", "_11"},
        "view_write": {"add_", *(f"add__{i}" for i in range(1, 7))},
        "running_mean": {"lerp_", *(f"lerp__{i}" for i in range(1, 7))},
        "step_counter": {"add_", *(f"add__{i}" for i in range(1, 7))},
        "mlp": set(),
        "dropout": set(),
    }
    for name, writers in expected.items():
        by_name = facts_by_name(program(name))
        assert {at for at, fact in by_name.items() if fact.writes} == writers, name


def test_a_write_names_the_memory_that_it_changes() -> None:
    by_name = facts_by_name(program("view_write"))
    first = by_name["layers_0"].storages

    assert (
        by_name["getitem"].storages == by_name["add_"].storages == by_name["add_"].writes == first
    )
    assert not by_name["layers_1"].storages & first
    running = facts_by_name(program("running_mean"))
    assert running["lerp_"].writes == running["_0_mean"].storages


def test_randomness_is_seen() -> None:
    for name in CAPTURABLE:
        by_name = facts_by_name(program(name))
        expected = {"_2", "_5", "_8", "_11", "_14", "_17"} if name == "dropout" else set()
        assert {at for at, fact in by_name.items() if fact.random} == expected, name


def test_layers_that_write_and_layers_that_draw_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(), nn.Tanh())
    nodes = [facts(model, torch.randn(2, 4))[f"_{i}"] for i in range(4)]

    assert [bool(node.writes) for node in nodes] == [False, True, False, False]
    assert [node.random for node in nodes] == [False, False, True, False]


def test_looking_changes_nothing() -> None:
    captured = program("resnet")
    before = {key: value.clone() for key, value in captured.module.state_dict().items()}
    inputs = {key: value.clone() for key, value in captured.args.items()}
    random = torch.get_rng_state()
    observe(captured)

    for key, value in captured.module.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(torch.equal(captured.args[key], value) for key, value in inputs.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert captured.module.training


def test_a_model_that_cannot_train_on_one_sample_is_observed_on_two() -> None:
    by_name = facts(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(1, 4))

    assert by_name["_1"].spec is not None
    assert str(by_name["_1"].spec) == "[B, 4] float32"
    assert by_name["_1"].writes
