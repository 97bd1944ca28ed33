"""The studies run from end to end on a handful of random samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.studies import accuracy
from examples.studies.data import Split, gated_pairs, standard_library
from examples.studies.networks import build_resnet, build_vgg, shortened

PRESET = accuracy.PRESETS["smoke"]


def _task() -> accuracy.Task:
    generator = torch.Generator().manual_seed(0)
    images = Split(
        torch.randn(256, 2, 8, 8, generator=generator),
        torch.randint(10, (256,), generator=generator),
    )
    return accuracy.Task(images, images, lambda n: build_resnet(n, 4, 2), 12)


def _vgg() -> accuracy.Task:
    generator = torch.Generator().manual_seed(0)
    images = Split(
        torch.randn(256, 3, 32, 32, generator=generator),
        torch.randint(10, (256,), generator=generator),
    )
    return accuracy.Task(images, images, lambda n: build_vgg(n, 2), 13)


def _text() -> accuracy.Task:
    return accuracy.make_task("text", None, PRESET)


@pytest.mark.parametrize("make", [_task, _vgg, _text])
@pytest.mark.parametrize("study", list(accuracy.STUDIES))
def test_every_network_and_control_is_trained_and_measured(
    study: str, make: Callable[[], accuracy.Task], tmp_path: Path
) -> None:
    rows = list(accuracy.STUDIES[study](make(), PRESET, seed=0))
    names = {(row["network"], row["stages"]) for row in rows}
    # the same-latency network and three forms, or two forms and two controls, or K = 1 to N = 3
    per_stage = 3 if study == "iterations" else 4
    assert len(rows) == len(names) == 1 + len(PRESET.stages) * per_stage
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"task": "random", **row}) + "\n" for row in rows))
    assert accuracy.table(file).count("\n") == len(rows) + 1


def test_networks_are_shortened_evenly_and_keep_what_changes_the_shape() -> None:
    images = torch.randn(2, 3, 32, 32)
    for network, units, keep in ((build_resnet(9, 4, 3), 9, 5), (build_vgg(13, 2), 13, 7)):
        short = shortened(network.eval(), keep)
        convolutions = [
            sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules())
            for each in (network, short)
        ]
        assert short(images).shape == (2, 10)
        assert convolutions[1] / convolutions[0] == pytest.approx(keep / units, abs=0.1)


def test_the_gate_depends_on_both_images() -> None:
    images = Split(torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor([1, 2, 3, 4]))
    pairs = gated_pairs(images, 64, torch.Generator().manual_seed(0))
    for (a, b), label in zip(pairs.x.flatten(1).long().tolist(), pairs.y.tolist(), strict=True):
        assert label == (images.y[a] + 5 * (images.y[b] % 2)) % 10


def test_text_windows_predict_the_next_byte() -> None:
    train, test = standard_library(context=16, count=64)
    assert train.x.shape == (64, 16)
    assert torch.equal(train.x[:, 1:], train.y[:, :-1])
    assert len(test.y) == 8
