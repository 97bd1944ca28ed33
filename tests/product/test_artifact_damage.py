"""Damaged artifacts: one clear error each, that names the file and says what to do."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import pnn_compile as pnn
from examples import vgg16
from pnn_compile.artifact.functions import check_enums, function_name


@pytest.fixture
def compiled(vgg: pnn.Compiled) -> pnn.Compiled:
    return vgg


@pytest.fixture
def folder(vgg_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vgg_artifact, tmp_path / "out"))


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


def endless_number(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    text = re.sub(r'"speedup": [\d.e+-]+', '"speedup": 1e999', text)
    (folder / "plan.json").write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no plan": (remove("plan.json"), r"out is not an artifact \(plan\.json is missing\): give"),
    "no program": (remove("program.json"), r"program\.json is missing: restore"),
    "no values": (remove("program.safetensors"), r"program\.safetensors is missing: restore"),
    "no weights": (remove("weights.safetensors"), r"weights\.safetensors is missing: restore"),
    "cut plan": (truncate("plan.json"), r"plan\.json: the plan is not JSON.*restore"),
    "cut program": (truncate("program.json"), r"program\.json: the program is not JSON.*restore"),
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
        r"plan\.json: the plan is not JSON \(RecursionError",
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
        r"program\.json: program\.nodes is missing; restore",
    ),
    "network of program": (
        edit_json("program.json", lambda data: data.pop("network")),
        r"program\.json: program\.network is missing; restore",
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
        r"plan\.json: plan\.stages\[0\]\.last is 'nowhere'; possible here: .*restore",
    ),
    "interface of plan": (
        edit_json("plan.json", set_item("interfaces", -1, "after", "nowhere")),
        r"plan\.json: plan\.interfaces\[2\]\.after is 'nowhere'; possible here: .*restore",
    ),
    "state of plan": (
        edit_json("plan.json", set_item("stages", 1, "consumes", ["nowhere"])),
        r"plan\.json: plan\.stages\[1\]\.consumes\[0\] is 'nowhere'; possible here: .*restore",
    ),
    "dtype of plan": (
        edit_json("plan.json", set_item("interfaces", 0, "state", 0, "spec", "dtype", "load")),
        r"plan\.json: .*\.state\[0\]\.spec\.dtype is 'load', no dtype of torch.*restore",
    ),
    "size of plan": (
        edit_json("plan.json", set_item("interfaces", 0, "state", 0, "spec", "shape", [2, 10**9])),
        r"plan\.json: plan\.interfaces\[0\]\.state\[0\]\.spec\.shape is \[2, 1000000000\], and",
    ),
    "operator of plan": (
        edit_json("plan.json", set_item("stages", 1, "preprocess", "family", "linear")),
        r"weights\.safetensors: (\d+ weights are missing|the artifact has)",
    ),
    "truth for a number": (
        edit_json("plan.json", set_item("stages", 0, "flops", True)),
        r"plan\.json: plan\.stages\[0\]\.flops should be int, found bool; restore",
    ),
    "no number": (
        edit_json("plan.json", set_item("forecast", "speedup", float("nan"))),
        r"plan\.json: the plan is not JSON \(ValueError: NaN is not a number",
    ),
    "endless number": (
        endless_number,
        r"plan\.json: plan\.forecast\.speedup is inf, which is not a number or too large",
    ),
    "half a character": (
        edit_json("plan.json", set_item("model", "\ud800")),
        r"plan\.json: the plan is not JSON \(UnicodeEncodeError",
    ),
    "number for a text": (
        edit_json("program.json", set_item("nodes", 1, "source", 7)),
        r"program\.json: program\.nodes\[1\]\.source should be str, found int",
    ),
    "object for a note": (
        edit_json("program.json", set_item("capture", "notes", [{}])),
        r"program\.json: program\.capture\.notes\[0\] should be str, found dict",
    ),
    "inputs of another name": (
        edit_json("program.json", lambda data: data["inputs"].update(more=1)),
        r"program\.json: the example inputs are not those of the graph",
    ),
    "value of another kind": (
        edit_json("program.json", lambda data: data.update(inputs={"images": 3})),
        r"the program does not run on its example inputs",
    ),
    "flipped bit": (
        edit_tensors("weights.safetensors", lambda tensors: next(iter(tensors.values())).add_(1)),
        r"weights\.safetensors: the values of .* are not those that were saved",
    ),
    "family of plan": (
        edit_json("plan.json", set_item("stages", 1, "coarse", "family", "magic")),
        r"plan\.json: plan\.stages\[1\]\.coarse\.family is 'magic'; possible here: linear,",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(name: str, folder: Path) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(pnn.ArtifactError, match=message):
        pnn.load(folder)


def test_layers_without_tensors_are_not_built(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), Recurrent())
    folder = pnn.compile(model, torch.randn(2, 3, 4), stages=2).save(tmp_path / "out")

    def change(data: dict[str, Any]) -> None:
        record = next(r for r in data["modules"] if r["class"] == "torch.nn.LSTM")
        record["arguments"]["num_layers"] = 10**6

    edit_json("program.json", change)(folder)
    with pytest.raises(pnn.ArtifactError, match=r"3\.layer has 1000000 layers and \d+ tensors"):
        pnn.load(folder)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def test_a_plan_is_held_against_the_weights_that_a_model_gets(folder: Path) -> None:
    edit_json("plan.json", set_item("interfaces", 0, "state", 0, "spec", "shape", [2, 10**9]))(
        folder
    )
    with pytest.raises(pnn.ArtifactError, match="does not fit the model"):
        pnn.load(folder, vgg16.build_model(width=4))


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.aten.max_pool2d_with_indices_backward.default,
        torch.ops.aten.adaptive_max_pool2d_backward.default,
        torch.ops.aten.segment_reduce.default,
        torch.ops.aten.lu_unpack.default,
        torch.ops.aten.linalg_ldl_solve.default,
        torch.segment_reduce,
        nn.functional.ctc_loss,
    ],
)
def test_operators_that_crash_on_hostile_operands_are_not_listed(target: Any) -> None:
    with pytest.raises(pnn.ArtifactError, match=r"operator|function"):
        function_name(target)


def test_a_number_is_no_dtype() -> None:
    x = fx.Graph().placeholder("x")
    check_enums(torch.ops.aten.sum.default, (x,), {"dtype": torch.float64})
    for target, args in ((torch.ops.aten.promote_types.default, (3, 64)),
                         (torch.ops.aten.to.dtype, (x, 10**6))):  # fmt: skip
        with pytest.raises(pnn.ArtifactError, match=r"dtype|type1"):
            check_enums(target, args, {})


def test_operators_run_only_where_their_operands_fit(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.ops.aten._fft_r2c.default(x.relu(), [1], 0, True)).sin()

    folder = pnn.compile(Spectrum(), torch.randn(2, 8), stages=2).save(tmp_path / "out")
    pnn.load(folder)

    def change(data: dict[str, Any]) -> None:
        node = next(node for node in data["nodes"] if "_fft_r2c" in str(node["target"]))
        node["args"][1] = [2**40]

    edit_json("program.json", change)(folder)
    with pytest.raises(pnn.ArtifactError):
        pnn.load(folder)


def test_statistics_have_a_value_for_every_channel(tmp_path: Path) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            normal = torch.ops.aten._native_batch_norm_legit_no_training.default
            return normal(x.relu(), None, None, self.mean, self.var, 0.1, 1e-5)[0].sin()

    folder = pnn.compile(Normalized(), torch.randn(2, 8), stages=2).save(tmp_path / "out")
    pnn.load(folder)

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors["mean"] = torch.zeros(1)

    def record(data: dict[str, Any]) -> None:
        mean = next(r for r in data["tensors"] if r["name"] == "mean")
        mean["shape"] = [1]
        del mean["crc32"]

    edit_tensors("program.safetensors", shrink)(folder)
    edit_json("program.json", record)(folder)
    with pytest.raises(pnn.ArtifactError, match=r"made for another|channels"):
        pnn.load(folder)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pnn.ArtifactError, match=r"nothing does not exist.*compiled\.save"):
        pnn.load(tmp_path / "nothing")
    with pytest.raises(pnn.ArtifactError, match=r"not an artifact \(plan\.json is missing\)"):
        pnn.load(tmp_path)


def test_an_edited_plan_is_obeyed(compiled: pnn.Compiled, folder: Path) -> None:
    edit_json("plan.json", set_item("iterations", 3))(folder)
    again = pnn.load(folder)
    assert again.plan == dataclasses.replace(compiled.plan, iterations=3)
    images, *_ = compiled.program.args.values()
    exact = compiled.sequential.eval()(images)
    torch.testing.assert_close(again.module.eval()(images), exact)
