"""Saving and loading: round trips over the zoo, atomicity, and one error for each damage."""

import copy
import dataclasses
import json
import logging
import os
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
from passes.program import provenance
from pnn_compile import artifact
from tests.zoo import CASES, Case

FILES = ("plan.json", "program.json", "program.safetensors", "weights.safetensors")


def outputs(network: nn.Module, compiled: pnn.Compiled, *, train: bool) -> list[Any]:
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
    for name in ("module", "sequential"):
        for train in (False, True):
            a, b = copy.deepcopy((getattr(compiled, name), getattr(again, name)))
            old_values, new_values = (outputs(n, compiled, train=train) for n in (a, b))
            for old_value, new_value in zip(old_values, new_values, strict=True):
                assert torch.equal(new_value, old_value)


CAPTURABLE = [case for case in CASES if "uncapturable" not in case.tags]


@pytest.mark.parametrize("case", CAPTURABLE, ids=lambda case: case.name)
def test_networks_come_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    compiled = pnn.compile(case.build(), args=case.args(2), kwargs=case.kwargs(2), stages=2)
    assert_equal(pnn.load(compiled.save(tmp_path / "out")), compiled)


@pytest.mark.parametrize("case", CAPTURABLE, ids=lambda case: case.name)
def test_plans_are_replayed_over_the_model(case: Case, tmp_path: Path) -> None:
    compiled = pnn.compile(case.build(), args=case.args(2), kwargs=case.kwargs(2), stages=2)
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            parameter.add_(0.01)
    again = pnn.load(compiled.save(tmp_path / "out"), model=case.build())
    assert_equal(again, compiled)


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
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)))
    compiled = pnn.compile(model, torch.randn(2, 4), **({"stages": 3} | options))
    assert_equal(pnn.load(compiled.save(tmp_path / "out")), compiled)


@pytest.fixture(scope="module")
def compiled() -> pnn.Compiled:
    torch.manual_seed(0)
    return pnn.compile(vgg16.build_model(width=4), vgg16.example_inputs(), stages=3)


@pytest.fixture
def folder(compiled: pnn.Compiled, tmp_path: Path) -> Path:
    return compiled.save(tmp_path / "out")


def test_an_artifact_is_four_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert pnn.Plan.from_json((folder / "plan.json").read_text()).model == "VGG16"
    assert load_file(folder / "program.safetensors")["features.0.weight"].shape == (4, 3, 3, 3)


def test_the_fine_weights_are_stored_once(folder: Path) -> None:
    stored = load_file(folder / "weights.safetensors")
    assert stored
    assert all(name.startswith(("preprocess_", "coarse_")) for name in stored)


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


def test_a_loaded_network_is_saved_again_alike(folder: Path, tmp_path: Path) -> None:
    again = pnn.load(folder).save(tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_network_converted_after_compilation_comes_back(tmp_path: Path) -> None:
    model = decoder.build_model(layers=4, width=16, vocabulary=32, context=8)
    compiled = pnn.compile(model, decoder.example_inputs(2, 8, 32), stages=2)
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
    """A class of one's own that is one call in the graph, for it looks like torch's."""

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


def test_a_fixed_argument_that_is_missing_is_named(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    compiled = pnn.compile(
        Fixed(), args=(x, x), kwargs={"scale": 0.5, "bias": torch.randn(2, 4)}, stages=2
    )
    folder = compiled.save(tmp_path / "out")
    assert_equal(pnn.load(folder), compiled)
    with pytest.raises(pnn.ArtifactError, match=r"'scale' is fixed at 0\.5"):
        pnn.load(folder, model=Fixed())


# --- writing --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_older_artifact_is_replaced_whole(compiled: pnn.Compiled, folder: Path) -> None:
    (folder / "model.onnx").write_text("of the older one")
    compiled.save(folder)
    assert sorted(contents(folder)) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save_file", "os.rename"])
def test_a_failure_leaves_the_older_artifact_whole(
    compiled: pnn.Compiled,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    where: str,
) -> None:
    before, calls = contents(folder), []
    original = getattr(artifact.os, "rename") if where == "os.rename" else save_file

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:  # the second file, or the second of the two renames
            raise error
        return original(*arguments)

    monkeypatch.setattr(f"pnn_compile.artifact.{where}", fail)
    clean = isinstance(error, OSError)
    with pytest.raises(
        pnn.ArtifactError if clean else KeyboardInterrupt,
        match="no space left.*free space" if clean else None,
    ):
        compiled.save(folder)
    assert len(calls) >= 2
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


# --- damage ---------------------------------------------------------------------------------------


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def edit_tensors(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_item(*path: Any) -> Callable[[Any], None]:
    *keys, last, value = path

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


def call_eval(data: dict[str, Any]) -> None:
    node = next(node for node in data["nodes"] if node["op"] == "call_function")
    node["target"] = "builtins.eval"


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no plan": (remove("plan.json"), r"out is no artifact \(plan\.json is missing\): give"),
    "no program": (remove("program.json"), r"program\.json is missing: restore"),
    "no values": (remove("program.safetensors"), r"program\.safetensors is missing: restore"),
    "no weights": (remove("weights.safetensors"), r"weights\.safetensors is missing: restore"),
    "cut plan": (truncate("plan.json"), r"plan\.json: the plan is not JSON.*restore"),
    "cut program": (truncate("program.json"), r"program\.json is damaged.*restore"),
    "cut values": (truncate("program.safetensors"), r"program\.safetensors is damaged.*restore"),
    "cut weights": (truncate("weights.safetensors"), r"weights\.safetensors is damaged.*restore"),
    "empty program": (
        write("program.json", b"[]"),
        r"program\.json: should hold a JSON object, holds a list.*restore",
    ),
    "binary plan": (
        write("plan.json", b"\xff\xfe"),
        r"plan\.json is damaged.*UnicodeDecodeError.*restore",
    ),
    "nested plan": (
        write("plan.json", b"[" * 100_000),
        r"plan\.json is damaged.*RecursionError",
    ),
    "schema of plan": (
        edit_json("plan.json", set_item("schema", 99)),
        r"plan\.json: the plan has schema 99, this version reads 1; restore",
    ),
    "schema of program": (
        edit_json("program.json", set_item("schema", 99)),
        r"program\.json: the program has schema 99, this version reads 1; restore",
    ),
    "field of program": (
        edit_json("program.json", lambda data: data.pop("nodes")),
        r"program\.json: malformed program \(KeyError: 'nodes'\); restore",
    ),
    "network of program": (
        edit_json("program.json", lambda data: data.pop("network")),
        r"weights\.safetensors is damaged.*'network'",
    ),
    "missing value": (
        edit_tensors("program.safetensors", lambda tensors: tensors.pop("features.0.weight")),
        r"program\.json: 1 tensors are missing \(features\.0\.weight\): restore",
    ),
    "shape of value": (
        edit_tensors("program.safetensors", set_item("features.0.bias", torch.ones(5))),
        r"features\.0\.bias should be \[4\].*found \[5\].*restore",
    ),
    "dtype of value": (
        edit_tensors("program.safetensors", set_item("features.0.bias", torch.ones(4).half())),
        r"features\.0\.bias should be .* torch\.float32, found .* torch\.float16; restore",
    ),
    "missing weight": (
        edit_tensors("weights.safetensors", lambda tensors: tensors.popitem()),
        r"weights\.safetensors: 1 tensors are missing",
    ),
    "missing record": (
        edit_json("program.json", lambda data: data["network"]["tensors"].pop()),
        r"weights\.safetensors: 1 weights are missing",
    ),
    "extra record": (
        edit_json("program.json", lambda data: data["network"]["tensors"][0].update(name="x")),
        r"weights\.safetensors: 1 weights are missing",
    ),
    "shape of weight": (
        edit_json("program.json", set_item("network", "tensors", 0, "shape", [1])),
        r"weights\.safetensors: .* should be \[1\]",
    ),
    "operator": (
        edit_json("program.json", call_eval),
        r"program\.json: function 'builtins\.eval' is not among those that a graph may call",
    ),
    "class": (
        edit_json("program.json", set_item("modules", 0, "class", "os.system")),
        r"program\.json: module class 'os\.system' is not among",
    ),
    "layer": (
        edit_json(
            "program.json", set_item("modules", 0, "arguments", "padding", {"tuple": [0, 0]})
        ),
        r"plan\.json: the plan was made for another VGG16",
    ),
    "stage of plan": (
        edit_json("plan.json", set_item("stages", 0, "last", "nowhere")),
        r"plan\.json is damaged or does not fit.*to 'nowhere'.*restore",
    ),
    "interface of plan": (
        edit_json("plan.json", set_item("interfaces", -1, "after", "nowhere")),
        r"plan\.json is damaged or does not fit.*'nowhere'.*restore",
    ),
    "state of plan": (
        edit_json("plan.json", set_item("stages", 1, "consumes", ["nowhere"])),
        r"plan\.json is damaged or does not fit.*'nowhere'.*restore",
    ),
    "dtype of plan": (
        edit_json("plan.json", set_item("interfaces", 0, "state", 0, "spec", "dtype", "load")),
        r"plan\.json: 'load' is no dtype of torch; restore",
    ),
    "family of plan": (
        edit_json("plan.json", set_item("stages", 1, "coarse", "family", "magic")),
        r"plan\.json is damaged or does not fit.*unknown coarse family 'magic'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(name: str, folder: Path) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(pnn.ArtifactError, match=message):
        pnn.load(folder)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pnn.ArtifactError, match=r"nothing does not exist.*compiled\.save"):
        pnn.load(tmp_path / "nothing")
    with pytest.raises(pnn.ArtifactError, match=r"no artifact \(plan\.json is missing\)"):
        pnn.load(tmp_path)


def test_an_edited_plan_is_obeyed(compiled: pnn.Compiled, folder: Path) -> None:
    edit_json("plan.json", set_item("iterations", 3))(folder)
    again = pnn.load(folder)
    assert again.plan == dataclasses.replace(compiled.plan, iterations=3)
    images, *_ = compiled.program.args.values()
    exact = compiled.sequential.eval()(images)
    torch.testing.assert_close(again.module.eval()(images), exact)
