"""Saving and loading: round trips over the zoo, atomicity, and one error for each damage."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pnn_compile as pnn
from examples import decoder, vgg16
from passes.ir.isolation import preserved
from passes.ir.program import provenance
from pnn_compile.artifact import directory as artifact
from tests.models.builders import block_chain, linear_chain
from tests.models.zoo import by_name
from tests.support.parameters import quick

FILES = ("plan.json", "program.json", "program.safetensors", "weights.safetensors")


def outputs(network: nn.Module, compiled: pnn.Compiled, *, train: bool) -> list[Any]:
    with preserved(network):
        network.train(train)
        torch.manual_seed(0)
        return pytree.tree_leaves(network(*copy.deepcopy(list(compiled.program.args.values()))))


def assert_equal(again: pnn.Compiled, compiled: pnn.Compiled) -> None:
    assert again.plan == compiled.plan
    assert again.program.fingerprint == compiled.program.fingerprint
    assert again.program.capture == compiled.program.capture
    assert list(again.module.state_dict()) == list(compiled.module.state_dict())
    for old, new in zip(compiled.program.graph.nodes, again.program.graph.nodes, strict=True):
        assert (new.name, provenance(new)) == (old.name, provenance(old))
    for train in (False, True):
        reference = outputs(compiled.module, compiled, train=train)
        for value, expected in zip(
            outputs(again.module, compiled, train=train), reference, strict=True
        ):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("name", quick())
def test_networks_of_the_zoo_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    compiled = pnn.compile(case.build(), args=case.args(2), kwargs=case.kwargs(2), stages=2)
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            parameter.add_(0.01)  # no longer the model's
    folder = compiled.save(tmp_path / "out")
    assert_equal(pnn.load(folder, model=case.build()), compiled)
    if "custom-gradient" not in case.tags:
        assert_equal(pnn.load(folder), compiled)


@pytest.mark.parametrize(
    "options",
    [
        {"coarse": "exact", "iterations": 2},
        {"coarse": "zero"},
        {"coarse": "units", "correction": "difference"},
        {"stages": 1},
    ],
)
def test_every_kind_of_plan_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = block_chain(8, 4)
    compiled = pnn.compile(model, torch.randn(2, 4), **({"stages": 3} | options))
    assert_equal(pnn.load(compiled.save(tmp_path / "out")), compiled)


@pytest.fixture
def compiled(vgg: pnn.Compiled) -> pnn.Compiled:
    return vgg


@pytest.fixture
def folder(vgg_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vgg_artifact, tmp_path / "out"))


def test_an_artifact_is_four_files_and_a_report(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "report.html"])
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert pnn.Plan.from_json((folder / "plan.json").read_text()).model == "VGG16"
    assert load_file(folder / "program.safetensors")["features.0.weight"].shape == (4, 3, 3, 3)


def test_the_fine_weights_are_stored_once(folder: Path) -> None:
    stored = load_file(folder / "weights.safetensors")
    assert stored
    assert all(name.startswith(("preprocess_", "coarse_")) for name in stored)


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, fail)
    pnn.load(folder)


def test_trained_weights_modes_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    compiled = pnn.compile(vgg16.build_model(width=4), vgg16.example_inputs(), stages=2)
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            parameter.mul_(1.5)
    compiled.module.eval()
    compiled.module.get_submodule("coarse_1").train().requires_grad_(False)
    again = pnn.load(compiled.save(tmp_path / "out"))
    for name, value in compiled.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)
    modes = {name: module.training for name, module in compiled.module.named_modules()}
    assert {name: module.training for name, module in again.module.named_modules()} == modes
    flags = {name: p.requires_grad for name, p in compiled.module.named_parameters()}
    assert {name: p.requires_grad for name, p in again.module.named_parameters()} == flags


def test_tied_weights_stay_tied_through_training(tmp_path: Path) -> None:
    model = decoder.build_model(layers=4, width=16, vocabulary=32, context=8)
    compiled = pnn.compile(model, decoder.example_inputs(2, 8, 32), stages=2)
    again = pnn.load(compiled.save(tmp_path / "out"))
    assert_equal(again, compiled)
    head = again.module.get_parameter("head.head.weight")
    assert head is again.module.get_parameter("fine_0.token_embedding.weight")
    assert head is again.program.module.get_parameter("head.weight")


def over_one_memory(view: Callable[[Tensor], Tensor]) -> pnn.Compiled:
    """A network whose last layer has a parameter over the memory of the first one's."""
    model: Any = linear_chain(4, 8)
    model[3].weight.data = view(model[0].weight.data)
    return pnn.compile(model, torch.randn(3, 8), stages=2)


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_over_one_memory_stay_so_or_are_refused(
    transposed: bool, tmp_path: Path
) -> None:
    compiled = over_one_memory(Tensor.t if transposed else Tensor.detach)
    if transposed:
        with pytest.raises(pnn.ArtifactError, match=r"3\.weight and 0\.weight are different views"):
            compiled.save(tmp_path / "artifact")
        return
    loaded = pnn.load(compiled.save(tmp_path / "artifact"))
    with torch.no_grad():
        loaded.original_state_dict()["0.weight"].fill_(2.0)
    assert (loaded.original_state_dict()["3.weight"] == 2.0).all()


class Overlapping(nn.Module):
    """Two buffers over one memory: a mean, and a table that begins with it."""

    table: Tensor
    mean: Tensor

    def __init__(self, writes: bool) -> None:
        super().__init__()
        table = torch.zeros(16)
        self.layers, self.writes = linear_chain(4, 8), writes
        self.register_buffer("table", table)
        self.register_buffer("mean", table[:8])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        if self.writes and self.training:
            self.mean.lerp_(y.detach().mean(0), 0.1)
        return y - self.table[:8]


def test_buffers_over_one_memory_that_is_written_are_refused(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    compiled = pnn.compile(Overlapping(writes=True), x, stages=2)
    with pytest.raises(pnn.ArtifactError, match="one memory, which forward writes into"):
        compiled.save(tmp_path / "artifact")
    compiled = pnn.compile(Overlapping(writes=False), x, stages=2)
    assert_equal(pnn.load(compiled.save(tmp_path / "artifact")), compiled)


def test_hooks_on_gradients_need_the_model(tmp_path: Path) -> None:
    model: Any = linear_chain(4, 8)
    x = torch.randn(3, 8)
    model[2].weight.register_hook(torch.zeros_like)
    folder = pnn.compile(model, x, stages=2).save(tmp_path / "artifact")
    with pytest.raises(pnn.ArtifactError, match=r"2\.weight: a hook on its gradient"):
        pnn.load(folder)
    loaded = pnn.load(folder, model=model)
    loaded.sequential(x).sum().backward()
    module = loaded.program.module
    assert module.get_parameter("0.weight").grad.any()  # type: ignore[union-attr]
    assert not module.get_parameter("2.weight").grad.any()  # type: ignore[union-attr]
    assert model[0].weight.grad is None


def test_a_causal_network_over_channels_and_time_comes_back(tmp_path: Path) -> None:
    class Causal(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(super().forward(nn.functional.pad(x, (2, 0))))

    model = nn.Sequential(*(Causal(4, 4, 3) for _ in range(6)))
    compiled = pnn.compile(model, torch.randn(2, 4, 12), stages=3, coarse="linear")
    assert {value.spec.channel_axis for i in compiled.plan.interfaces for value in i.state} == {-2}
    folder = compiled.save(tmp_path / "out")
    assert_equal(pnn.load(folder, model=model), compiled)


def test_a_loaded_network_is_saved_again_alike(folder: Path, tmp_path: Path) -> None:
    again = pnn.load(folder).save(tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_report_is_of_the_network_and_loading_ignores_it(
    compiled: pnn.Compiled, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = folder / "report.html"
    assert f"<title>{compiled.plan.model}" in report.read_text()
    report.write_text("of nothing")
    assert pnn.load(folder).plan == compiled.plan
    compiled.save(folder)
    assert report.read_text() != "of nothing"
    assert not caplog.records


def test_what_cannot_be_reported_is_saved_all_the_same(
    compiled: pnn.Compiled, folder: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(_: object, **__: object) -> str:
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr("pnn_compile.report.html.html_report", fail)
    compiled.save(folder)
    assert not (folder / "report.html").exists()
    assert "without report.html (RuntimeError: expected scalar type Half" in caplog.text
    assert pnn.load(folder).plan == compiled.plan


def test_a_network_converted_after_compilation_comes_back(tmp_path: Path) -> None:
    model = decoder.build_model(layers=4, width=16, vocabulary=32, context=8)
    compiled = pnn.compile(model, decoder.example_inputs(2, 8, 32), stages=2, coarse="linear")
    compiled.module.double().eval()
    again = pnn.load(compiled.save(tmp_path / "out"))
    assert again.module.get_parameter("coarse_1.maps.0.0.weight").dtype == torch.float64
    ids = compiled.program.args["tokens"]
    assert torch.equal(again.module(ids), compiled.module(ids))


class Shifted(nn.Module):
    """Reads a buffer itself, so that every stage and the program have it registered."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) + self.shift)
        return x


def test_buffers_replaced_by_a_conversion_are_the_ones_that_are_saved(tmp_path: Path) -> None:
    compiled = pnn.compile(Shifted(), torch.randn(2, 4), stages=2)
    compiled.module.double().half().float().eval()
    for name in ("fine_0.shift", "fine_1.shift"):
        compiled.module.get_buffer(name).fill_(2.0)
    again = pnn.load(compiled.save(tmp_path / "out"))
    assert torch.equal(again.module.get_buffer("fine_1.shift"), torch.full((4,), 2.0))
    x = torch.randn(3, 4)
    assert torch.equal(again.module(x), compiled.module(x))


def test_a_module_replaced_after_compilation_is_refused(tmp_path: Path) -> None:
    compiled = pnn.compile(Shifted(), torch.randn(2, 4), stages=2)
    compiled.module.get_submodule("fine_0.layers").add_module("0", nn.Identity())
    with pytest.raises(pnn.ArtifactError, match=r"layers\.0 was replaced"):
        compiled.save(tmp_path / "out")


# --- programs that cannot be stored ---------------------------------------------------------------


class Scale(nn.ReLU):
    """A user class that is traced as one call, because it looks like one of torch."""

    __module__ = "torch.nn.modules.activation"


def opaque() -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*layers, Scale(), nn.Linear(4, 2))


def test_an_opaque_program_needs_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = pnn.compile(opaque(), torch.randn(2, 4), stages=2)
    with caplog.at_level(logging.WARNING):
        folder = compiled.save(tmp_path / "out")
    assert "12: module torch.nn.modules.activation.Scale" in caplog.text
    data = json.loads((folder / "program.json").read_text())
    assert data["unknown"] == ["12: module torch.nn.modules.activation.Scale"]
    assert data["nodes"] is None
    with pytest.raises(pnn.ArtifactError, match=r"activation\.Scale\): use pnn\.load\(.*model="):
        pnn.load(folder)
    assert_equal(pnn.load(folder, model=opaque()), compiled)


def test_a_file_does_not_say_what_its_validation_took(folder: Path) -> None:
    data = json.loads((folder / "program.json").read_text())
    data["capture"] |= {"runs": 3, "seconds": "x"}
    (folder / "program.json").write_text(json.dumps(data))
    assert "runs in" not in pnn.load(folder).program.capture.compared


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(pnn.ArtifactError, match=r"does not fit the model.*made for another VGG16"):
        pnn.load(folder, model=vgg16.build_model(width=8))
    with pytest.raises(pnn.ArtifactError, match="does not take the example inputs"):
        pnn.load(folder, model=nn.Linear(7, 7))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, first: Tensor, *rest: Tensor, scale: float, bias: Tensor) -> Tensor:
        x = sum(rest, first)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale + bias
        return x


def test_arguments_of_every_kind_find_their_way() -> None:
    x, y, z, b = torch.randn(4, 2, 4)
    inputs = {"first": x, "rest_0": y, "rest_1": z, "bias": b}
    args, kwargs = artifact._call(Fixed(), inputs)
    assert [id(value) for value in args] == [id(x), id(y), id(z)]
    assert kwargs.keys() == {"bias"}


def test_fixed_arguments_are_stored(tmp_path: Path) -> None:
    x, bias = torch.randn(2, 4), torch.randn(2, 4)
    compiled = pnn.compile(Fixed(), args=(x, x), kwargs={"scale": 0.5, "bias": bias}, stages=2)
    folder = compiled.save(tmp_path / "out")
    for loaded in (pnn.load(folder), pnn.load(folder, model=Fixed())):
        assert_equal(loaded, compiled)
        assert loaded.program.fixed == {"scale": 0.5}


class Weird:
    """A value that no artifact can hold."""

    def __mul__(self, other: Tensor) -> Tensor:
        return other * 0.5


class NeedsWeird(Fixed):
    def forward(self, first: Tensor, weird: Weird) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            first = torch.tanh(weird * layer(first))
        return first


def test_a_fixed_argument_that_no_artifact_holds_is_named(tmp_path: Path) -> None:
    compiled = pnn.compile(NeedsWeird(), (torch.randn(2, 4), Weird()), stages=2)
    folder = compiled.save(tmp_path / "out")
    assert_equal(pnn.load(folder), compiled)
    with pytest.raises(pnn.ArtifactError, match=r"argument 'weird' is fixed at <"):
        pnn.load(folder, model=NeedsWeird())


# --- writing --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_of_the_older_artifact_goes_with_it(
    compiled: pnn.Compiled, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "model.onnx").write_text("of the older one")
    compiled.save(folder)
    assert sorted(contents(folder)) == sorted([*FILES, "report.html"])
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert "model.onnx is removed" in caplog.text


@pytest.mark.parametrize("links", [True, False])
def test_files_of_the_user_stay(
    compiled: pnn.Compiled, folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (folder / "my_results.csv").write_text("1,2")
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "fit.pt").write_text("weights")
    (folder / "latest").symlink_to("runs/first")
    compiled.save(folder)
    assert (folder / "my_results.csv").read_text() == "1,2"
    assert (folder / "latest" / "fit.pt").read_text() == "weights"
    assert (folder / "latest").is_symlink()
    assert pnn.load(folder).plan == compiled.plan


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["artifact.directory.save_file", "atomic._exchange"])
def test_a_failure_leaves_the_older_artifact_whole(
    compiled: pnn.Compiled,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    where: str,
) -> None:
    (folder / "my_results.csv").write_text("1,2")
    before, calls = contents(folder), []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == (1 if "exchange" in where else 2):  # the second file
            raise error
        save_file(*arguments)

    monkeypatch.setattr(f"pnn_compile.{where}", fail)
    clean = isinstance(error, OSError)
    with pytest.raises(
        pnn.ArtifactError if clean else KeyboardInterrupt,
        match="no space left.*free space" if clean else None,
    ):
        compiled.save(folder)
    assert calls
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_missing_parents_are_made(compiled: pnn.Compiled, tmp_path: Path) -> None:
    folder = compiled.save(tmp_path / "deep" / "er" / "out")
    assert pnn.load(folder).plan == compiled.plan


def test_an_empty_directory_is_taken(compiled: pnn.Compiled, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert pnn.load(compiled.save(tmp_path / "out")).plan == compiled.plan


def test_something_else_is_not_replaced(compiled: pnn.Compiled, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(pnn.ArtifactError, match=r"notes\.txt is a file"):
        compiled.save(notes)
    with pytest.raises(pnn.ArtifactError, match="something else than an artifact"):
        compiled.save(tmp_path)
    with pytest.raises(pnn.ArtifactError, match=r"cannot write .*save to another directory"):
        compiled.save(notes / "out")
    assert notes.read_text() == "mine"


def test_a_model_without_data_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    model, x = block_chain(3, 16), torch.randn(2, 16)
    with torch.device("meta"):
        empty = block_chain(3, 16)
    folder = pnn.compile(model, x, stages=2).save(tmp_path / "real")
    with pytest.raises(pnn.ArtifactError, match=r"meta device.*built on a device.*or leave it out"):
        pnn.load(folder, model=empty)
    folder = pnn.compile(empty, x.to("meta"), stages=2).save(tmp_path / "meta")
    pnn.load(folder, model=empty)
    with pytest.raises(pnn.ArtifactError, match="compiled on the meta device"):
        pnn.load(folder, model=model)
