"""The studies run from end to end on a handful of random samples."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pnn_compile as pnn
from examples import resnet110, resnet1001
from examples.studies import accuracy, growth, overhead, queue, step_trace, steps, training
from examples.studies.conversions import ATTEMPTS
from examples.studies.data import Split, gated_pairs, load_cifar10, standard_library
from examples.studies.networks import (
    SideBySide,
    build_resnet,
    build_vgg,
    in_groups,
    shortened,
)
from examples.studies.presets import PRESETS
from examples.studies.regimes import REGIMES, Interfaces, Serial
from examples.studies.table import summary, table
from examples.studies.tasks import Task, make_task
from examples.studies.training import Originals, augmented
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Times, simulate

PRESET = PRESETS["smoke"]


def _task() -> Task:
    generator = torch.Generator().manual_seed(0)
    images = Split(
        torch.randn(256, 2, 8, 8, generator=generator),
        torch.randint(10, (256,), generator=generator),
    )
    return Task(images, images, lambda n: build_resnet(n, 4, 2), 12)


def _vgg() -> Task:
    generator = torch.Generator().manual_seed(0)
    images = Split(
        torch.randn(256, 3, 32, 32, generator=generator),
        torch.randint(10, (256,), generator=generator),
    )
    return Task(images, images, lambda n: build_vgg(n, 2), 13)


def _text() -> Task:
    return make_task("text", None, PRESET)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_task, _vgg, _text])
@pytest.mark.parametrize("study", ["scratch", "conversion", "iterations"])
def test_every_network_and_control_is_trained_and_measured(
    study: str, make: Callable[[], Task], tmp_path: Path
) -> None:
    rows = list(accuracy.STUDIES[study](accuracy.Study(make(), PRESET, seed=0)))
    names = {(row["network"], row["stages"]) for row in rows}
    # Two shorter networks, the forms and the regimes, or K = 1 to N = 3, or five ways to convert,
    # two of them with controls; a sixth with its own where there are enough equal blocks to thin.
    thinned = make is _task  # elsewhere too few equal blocks
    per_stage = {
        "scratch": 2 + len(accuracy.FORMS) - (not thinned) + len(REGIMES),
        "iterations": 3,
        "conversion": 9 if make is _vgg else 15,
    }[study]
    assert len(rows) == len(names) == 1 + len(PRESET.stages) * per_stage
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"task": "random", **row}) + "\n" for row in rows))
    assert table(file).count("\n") == len(rows) + 1


def test_regimes_call_the_network_in_their_way() -> None:
    task = _task()
    compiled = pnn.compile(task.build(12), task.train.x[:2], stages=2, coarse="linear")
    x = task.train.x[:4]
    torch.testing.assert_close(Serial(compiled, last=0.25)(x, 0.8), compiled.sequential(x))
    parallel = compiled.module(x)
    torch.testing.assert_close(Serial(compiled, last=0.25)(x, 0.7), parallel)
    regime = Interfaces(compiled, 0.5)
    torch.testing.assert_close(regime(x, 0.5), parallel)
    state = compiled.module.get_submodule("fine_0")(x)
    guess = compiled.module.get_submodule("preprocess_1")(x)
    expected = 0.5 * (guess - state).square().mean() / state.square().mean()
    torch.testing.assert_close(regime.penalty(), expected)


def test_some_networks_are_trained_and_measured(tmp_path: Path) -> None:
    only = ("original", "same latency", "star, two blocks")
    rows = [*accuracy.from_scratch(accuracy.Study(_task(), PRESET, seed=0, only=only))]
    assert [row["network"] for row in rows] == [*only]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"task": "random", **row}) + "\n" for row in rows))
    assert table(file).count("\n") == len(rows) + 1


@pytest.mark.parametrize(
    "name",
    [
        "all together",
        pytest.param("interfaces first", marks=pytest.mark.slow),
        pytest.param("unit in difference form", marks=pytest.mark.slow),
    ],
)
def test_attempts_are_fitted_and_measured(name: str) -> None:
    study = accuracy.Study(_vgg(), PRESET, seed=0, only=(name,))
    names = [row["network"] for row in accuracy.attempts(study)]
    assert len(set(names)) == len(names) == 2 + 2 * ATTEMPTS[name].controls


def test_a_conversion_is_fitted_for_several_lengths() -> None:
    only = ("parareal, auto", "layers dropped")
    study = accuracy.Study(_vgg(), PRESET, seed=0, only=only, lengths=(0.5, 0.1))
    names = [row["network"] for row in accuracy.lengths(study)]
    assert names == [
        "original",
        *(
            f"{name}, after {share} of the training"
            for share in ("50.0%", "10.0%")
            for name in ("parareal, auto", "layers dropped, as fast as parareal, auto")
        ),
    ]


def test_windows_are_fitted_beside_layers_in_parallel() -> None:
    only = ("in 2 windows", "layers in parallel")
    study = accuracy.Study(_task(), PRESET, seed=0, only=only, lengths=(0.5,))
    _, windowed, control = accuracy.lengths(study)
    assert windowed["network"] == "in 2 windows, after 50.0% of the training"
    assert control["units"] == math.ceil(12 / float(str(windowed["speedup"])))


def test_a_window_of_identities_is_a_group_of_layers_in_parallel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.trunk = nn.Sequential(*(resnet110.Unit(4, 4, 1) for _ in range(6)))
    model.eval()
    x = torch.randn(2, 4, 8, 8)
    grouped = in_groups(model, 2)
    assert grouped is not None
    windowed = pnn.compile(model, x, stages=3, windows=2, preprocess="identity", coarse="identity")
    torch.testing.assert_close(windowed.module(x), grouped(x))
    assert windowed.plan.forecast.speedup == pytest.approx(3, rel=0.03)


def test_windows_of_identities_copy_what_changes_the_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = build_resnet(units=9, width=4, channels=3).eval(), torch.randn(2, 3, 16, 16)
    windowed = pnn.compile(model, x, stages=3, windows=3, preprocess="identity", coarse="identity")
    grouped = in_groups(model, 5)  # units that change the shape, and two groups of two after them
    assert grouped is not None
    torch.testing.assert_close(windowed.module(x), grouped(x))
    assert windowed.verify().ok
    assert windowed.plan.forecast.speedup > 1.5

    options = windowed.plan.stages[4].preprocess.options  # type: ignore[union-attr]
    assert options.entering == ("add_2",)
    assert options.copied is not None
    windowed.save(tmp_path / "saved")
    torch.testing.assert_close(pnn.load(tmp_path / "saved").module.eval()(x), grouped(x))


def test_an_early_exit_starts_from_the_original(tmp_path: Path) -> None:
    alone, beside = (
        next(row for row in accuracy.conversion(study) if row["network"] == "early exit")
        for only in (("early exit",), ("parareal, auto", "early exit"))
        for study in [accuracy.Study(_task(), PRESET, 0, only, Originals(tmp_path))]
    )
    assert alone == beside  # whether or not the parareal network was fitted meanwhile


def test_an_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, preset, file = _vgg(), replace(PRESET, epochs=3), tmp_path / "training.state"

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return task.build(task.units)

    whole = network()
    training.train(whole, task, preset, seed=0)
    save = training._save

    def interrupted(file: Path, epochs: int, *parts: object) -> None:
        save(file, epochs, *parts)
        if epochs == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(network(), task, preset, seed=0, state=file)
    monkeypatch.undo()
    cut = network()
    training.train(cut, task, preset, seed=0, state=file)
    for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not file.exists()


def test_an_original_is_trained_once(tmp_path: Path) -> None:
    originals = Originals(tmp_path)
    first, seconds = originals.trained(_vgg(), PRESET, 0)
    second, again = originals.trained(_vgg(), PRESET, 0)
    assert seconds > 0 == again
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_queue_of_jobs_writes_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "make_task", lambda *_: _vgg())
    results = tmp_path / "rows.jsonl"
    settings = queue.Settings(
        "smoke", tmp_path, "cpu", results, tmp_path / "originals", 1, time.time() + 60
    )
    waiting = Queue[queue.Job]()
    for job in queue.jobs([0], PRESET.stages)[:2]:
        waiting.put(job)
    waiting.put(queue.Job("vgg", "unknown", 0))  # fails, and the others do not
    waiting.put(queue.Job("vgg", "conversion", 0, ("early exit",)))
    queue.work(waiting, settings)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["network"] for row in rows] == ["original", "original", "original", "early exit"]


def test_a_queue_holds_every_comparison_once() -> None:
    found = queue.jobs([0, 1, 2], (3, 6, 12, 18))
    assert len(set(found)) == len(found)
    per_seed = (2 + len(accuracy.FORMS)) * 4 + 4  # the residual network from scratch, and converted
    assert sum(job.task == "cifar10" and job.only != ("original",) for job in found) == 3 * per_seed


def test_no_form_is_named_inside_another() -> None:
    names = [*accuracy.FORMS, "original", "same latency", "latency of units"]
    assert not [(a, b) for a in names for b in names if a != b and a in b]


@pytest.mark.parametrize("keep", [9, 5, 3])
def test_layers_in_parallel_read_one_state(keep: int) -> None:
    torch.manual_seed(0)
    original = build_resnet(9, 4, 1).eval()
    network = in_groups(original, keep)
    assert network is not None
    stem, trunk = (original.get_submodule(name) for name in ("stem", "trunk"))
    groups = [g for g in network.get_submodule("trunk").children() if isinstance(g, SideBySide)]
    assert len(groups) == {9: 9, 5: 5, 3: 5}[keep]  # two change the shape, between three runs
    x = torch.randn(2, 1, 8, 8)
    state = stem(x)
    units = trunk.children()
    for group in groups:
        outputs = [next(units)(state) for _ in group.units]
        state = sum(outputs) - (len(outputs) - 1) * state if len(outputs) > 1 else outputs[0]
    torch.testing.assert_close(network.get_submodule("trunk")(stem(x)), state)
    if keep == 9:
        torch.testing.assert_close(network(x), original(x))
    assert in_groups(build_vgg(13, 4), 5) is None


def test_images_are_shifted_and_mirrored() -> None:
    images = torch.arange(1.0, 65).reshape(1, 1, 8, 8).expand(64, 1, 8, 8)
    moved = augmented(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    centres = {tuple(image[0, 4:6, 4].tolist()) for image in moved}
    steps = {b - a for a, b in centres if a and b}
    assert len(centres) > 20
    assert steps == {8.0}  # rows stay rows
    rising = [(image[0, 4, 4] < image[0, 4, 5]).item() for image in moved if image[0, 4, 4:6].all()]
    assert 0.2 < sum(rising) / len(rising) < 0.8


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


def test_cifar10_is_read_from_one_file(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([1, 2, 3])
    tensors = {"train_x": images, "train_y": labels, "test_x": images[:1], "test_y": labels[:1]}
    save_file(
        {name: value.clone() for name, value in tensors.items()}, tmp_path / "cifar10.safetensors"
    )
    train, test = load_cifar10(tmp_path)
    assert torch.equal(train.y, labels)
    assert torch.equal(train.x[:1], test.x)
    assert train.x.abs().max() < 3


def test_steps_of_the_parts_are_measured() -> None:
    compiled = pnn.compile(resnet1001.build_model(2), resnet1001.example_inputs(), stages=2)
    row = steps.measured(compiled, torch.randn(2, 3, 32, 32), bfloat16=False)
    parts = [row[name] for name in ("slowest stage", "sweep", "head")]
    assert min(parts) > 0
    assert row["speedup"] == pytest.approx(row["original"] / sum(parts))


def test_the_summary_compares_with_the_original_of_the_same_seed(tmp_path: Path) -> None:
    common = {"task": "vgg", "preset": "cpu", "study": "conversion"}
    rows = [
        common | {"network": name, "stages": stages, "seed": seed, "fitted": fitted}
        for name, stages, seed, fitted in (
            ("original", 1, 0, 90.0), ("original", 1, 1, 80.0),
            ("early exit", 3, 0, 88.0), ("early exit", 3, 1, 79.0), ("early exit", 6, 0, 91.0),
            ("original", 1, 0, 92.0), ("narrow", 3, 0, 90.0), ("narrow", 3, 0, 91.0),
        )
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| early exit | -1.50 ± 0.71 | +1.00 |" in summary(file)
    assert "| narrow | -1.00 |  |" in summary(file)


def test_a_network_of_an_original_that_was_trained_anew_counts_again(tmp_path: Path) -> None:
    common = {"task": "vgg", "preset": "cpu", "study": "lengths", "seed": 0}
    rows = [
        common | {"network": name, "stages": 3, "fitted": fitted}
        for name, fitted in (
            ("original", 90.0), ("narrow", 89.0), ("original", 92.0), ("narrow", 90.0),
        )
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| narrow | -1.50 ± 0.71 |" in summary(file)
    assert "| cpu | vgg | lengths | narrow | 3 | 2 |" in table(file)


def test_calling_layers_is_timed_for_every_batch(tmp_path: Path) -> None:
    model = tmp_path / "small.py"
    model.write_text(
        "import torch\n"
        "def build_model(): return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())\n"
        "def example_inputs(): return (torch.randn(2, 4),)\n"
    )
    found = overhead.study(torch.device("cpu"), str(model), [1, 3], 2)
    assert len(found) == 2
    for seconds in found:
        assert [*seconds] == [overhead.MODEL, overhead.CAPTURED, overhead.DIRECT]
        assert all(len(own) == 2 and min(own) > 0 for own in seconds.values())


def test_a_queue_that_is_started_again_skips_what_is_there(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    job = queue.Job("vgg", "scratch", 1, ("same latency",), (3,))
    assert not queue.finished(job, "cpu", results)
    row = {"task": "vgg", "preset": "cpu", "study": "scratch", "seed": 1, "stages": 3}
    results.write_text(json.dumps(row | {"network": "same latency"}) + "\n")
    assert queue.finished(job, "cpu", results)
    for other in ({"seed": 2}, {"stages": (6,)}, {"only": ("latency of units",)}, {"only": ()}):
        assert not queue.finished(replace(job, **other), "cpu", results)
    assert not queue.finished(job, "gpu", results)


def test_a_star_grows_where_a_chain_stops() -> None:
    device = pnn.load_profile("h100")
    by_name = {form.name: form for form in growth.FORMS}
    chain, star = by_name["chain, copied blocks"], by_name["star, copied blocks"]
    assert growth.speedup(chain, 8, device) == pytest.approx(8, rel=0.05)
    assert growth.speedup(chain, 128, device) < growth.speedup(chain, 64, device)
    assert 110 < growth.speedup(star, 128, device) < 128


def test_a_step_is_drawn_beside_its_simulation() -> None:
    plan = pnn.compile(resnet1001.build_model(2), torch.randn(2, 3, 8, 8), stages=2).plan
    simulated = simulate(schedule(range(2), Sweep.of(plan)), Times.of(plan))
    late = [[replace(s, start=s.start + 5, end=s.end + 5) for s in x] for x in simulated.spans]
    longer = [[replace(s, end=2 * s.end) for s in spans] for spans in simulated.spans]

    step = step_trace.traced([longer, late])
    times = step_trace.times_of(step)
    again = simulate(schedule(range(2), Sweep.of(plan)), times)
    drawing = step_trace.picture([("ranks", step), ("simulated", again)])

    assert step.time == pytest.approx(simulated.time)
    assert again.time == pytest.approx(simulated.time)
    assert drawing.count("<title>fine backward 1: ") == 2
    assert drawing.count(">rank 1<") == 2
