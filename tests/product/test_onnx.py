"""The ONNX files, read back with plain onnx, onnx-ir and ONNX Runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder, resnet110
from passes.transform.sweep import Role
from pnn_compile.cli import main
from pnn_compile.export.onnx import StageExecutor, export_onnx, lower_network, open_streams
from pnn_compile.export.onnx.export import in_half_precision
from pnn_compile.export.onnx.lower import Lowered
from tests.models.builders import linear_chain, residual_chain


class Exports:
    """A network and what it was exported to, once for all tests."""

    def __init__(self, compiled: pnn.Compiled, folder: Path) -> None:
        self.compiled = compiled
        self.folder = folder
        lowered = lower_network(compiled)
        self.whole = export_onnx(compiled, folder / "model.onnx", lowered=lowered)
        self.stages = export_onnx(compiled, folder, per_stage=True, lowered=lowered)
        self.model = onnx.load(self.whole.path)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    model = decoder.build_model(layers=3, width=32)
    compiled = pnn.compile(model, decoder.example_inputs(), stages=3)
    return Exports(compiled, tmp_path_factory.mktemp("onnx"))


def metadata(proto: onnx.NodeProto | onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def tokens(samples: int) -> torch.Tensor:
    """Random inputs of the decoder, of any batch size up to 8."""
    return decoder.example_inputs()[0].repeat(4, 1)[:samples]


def assert_equals_torch(output: np.ndarray, exports: Exports, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = exports.compiled.module.eval()(inputs).numpy()
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_every_node_has_configuration_stage_and_role(exports: Exports) -> None:
    model = exports.model
    assert model.ir_version == 11
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    (configuration,) = model.configuration
    assert (configuration.name, configuration.num_devices) == ("pnn", 3)
    places = set()
    for node in model.graph.node:
        (placement,) = node.device_configurations
        assert placement.configuration_id == configuration.name
        facts = metadata(node)
        assert placement.pipeline_stage == int(facts["pnn.stage"])
        assert facts["pnn.role"] in set(Role)
        places.add((placement.pipeline_stage, facts["pnn.role"]))
    later = {"preprocess", "fine", "residual", "coarse", "correct"}
    assert places == {(0, "fine"), (2, "head")} | {(s, r) for s in (1, 2) for r in later}


def test_onnx_ir_keeps_the_annotations_of_the_nodes(exports: Exports, tmp_path: Path) -> None:
    ir.save(ir.load(exports.whole.path), tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert again.ir_version == 11
    assert [c.SerializeToString() for c in again.configuration] == [
        c.SerializeToString() for c in exports.model.configuration
    ]
    for node, copy in zip(exports.model.graph.node, again.graph.node, strict=True):
        assert node.name == copy.name
        assert metadata(node) == metadata(copy)
        assert node.device_configurations == copy.device_configurations


def test_names_say_stage_role_and_module(exports: Exports) -> None:
    nodes = exports.model.graph.node
    assert len({node.name for node in nodes}) == len(nodes)
    pattern = re.compile(rf"stage_[0-2]/({'|'.join(Role)})/([\w.]+/)?[A-Z]\w+")
    assert [node.name for node in nodes if not pattern.fullmatch(node.name)] == []
    assert "stage_0/fine/blocks.0.mlp.1/Gelu" in {node.name for node in nodes}
    weights = {tensor.name for tensor in exports.model.graph.initializer}
    keys = set(exports.compiled.original_state_dict())
    named = {name for name in weights if not name.startswith(("constant_", "preprocess", "coarse"))}
    assert named <= keys
    assert len(keys - named) <= 1  # the head is tied to the embedding


def test_the_plan_stands_in_the_metadata(exports: Exports) -> None:
    facts = metadata(exports.model)
    plan = pnn.Plan.from_json(facts["pnn.plan"])
    assert plan == pnn.Plan.from_json(exports.compiled.plan.to_json())
    assert (facts["pnn.stages"], facts["pnn.sweep"]) == ("3", "chain")


def test_one_file_agrees_with_torch_at_other_batch_sizes(exports: Exports) -> None:
    assert exports.whole.checked is not None
    assert exports.whole.checked.batches == (1, 2, 5)
    assert exports.whole.checked.error < 1e-5
    assert exports.whole.checked.agreement == 1.0
    session = onnxruntime.InferenceSession(exports.whole.path)
    inputs = tokens(7)
    (output,) = session.run(None, {"tokens": inputs.numpy()})
    assert_equals_torch(output, exports, inputs)


def test_stage_models_agree_with_torch(exports: Exports) -> None:
    assert exports.stages.checked is not None
    assert exports.stages.checked.error < 1e-5
    inputs = tokens(7)
    array = inputs.numpy()
    with StageExecutor(exports.folder) as executor:
        for _ in range(2):
            outputs = executor.run({"tokens": array})
        assert_equals_torch(outputs["output"], exports, inputs)
        with pytest.raises(pnn.OptionError, match=r"takes tokens \(got images\)"):
            executor.run({"images": array})
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            executor.run({"tokens": array.astype(np.float32)})
        assert_equals_torch(executor.run({"tokens": array})["output"], exports, inputs)


def test_the_manifest_is_enough_to_run_the_models(exports: Exports) -> None:
    """What a reader in another language does: the runs in order, by position."""
    manifest = json.loads((exports.folder / "manifest.json").read_text())
    inputs = tokens(2)
    values = {manifest["inputs"][0]["name"]: inputs.numpy()}
    models = {model["name"]: model for model in manifest["models"]}
    for run in manifest["runs"]:
        model = models[run["model"]]
        session = onnxruntime.InferenceSession(exports.folder / model["files"][0]["path"])
        feeds = {
            slot["name"]: values[name]
            for slot, name in zip(model["inputs"], run["inputs"], strict=True)
        }
        results = session.run([slot["name"] for slot in model["outputs"]], feeds)
        values.update(zip(run["outputs"], results, strict=True))
    assert_equals_torch(values[manifest["outputs"][0]["name"]], exports, inputs)


def test_a_stream_a_stage_runs_the_single_file_on_several_threads(
    exports: Exports, tmp_path: Path
) -> None:
    def profile(options: onnxruntime.SessionOptions) -> None:
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")

    inputs = tokens(8)
    session = open_streams(exports.whole.path, options=profile)
    for _ in range(50):  # on busy cores one thread may do all the work of a run
        (output,) = session.run(None, {"tokens": inputs.numpy()})
    assert_equals_torch(output, exports, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    assert len({event["tid"] for event in kernels}) > 1
    with pytest.raises(pnn.ArtifactError, match="cannot be read"):
        open_streams(tmp_path / "missing.onnx")


def test_a_damaged_stage_model_is_refused(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    for file in exports.stages.files:
        copy = tmp_path / file.relative_to(exports.folder)
        copy.write_bytes(file.read_bytes())
    file = tmp_path / "stages" / "head.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(pnn.ArtifactError, match=r"head\.onnx is not the file that was exported"):
        StageExecutor(tmp_path)
    file.unlink()
    with pytest.raises(pnn.ArtifactError, match=r"head\.onnx is missing"):
        StageExecutor(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(pnn.ArtifactError, match="not a manifest of stage models"):
        StageExecutor(tmp_path)


def test_inspect_shows_stages_and_roles(
    exports: Exports, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(exports.whole.path)]) == 0
    shown = capsys.readouterr().out
    assert "preprocess" in shown
    assert f"{exports.whole.nodes} of {exports.whole.nodes} nodes have a device" in shown
    assert main(["inspect", str(exports.stages.path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["placed"] == data["nodes"] == exports.stages.nodes
    assert {part["role"] for part in data["parts"]} == set(Role)
    foreign = exports.folder / "foreign.onnx"
    foreign.write_bytes(onnx.ModelProto(ir_version=11).SerializeToString())
    assert main(["inspect", str(foreign)]) == 2
    assert "says nothing of stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"stages": 3, "iterations": 2, "correction": "difference", "coarse": "units"},
        {"stages": 3, "sweep": "collapsed", "coarse": "linear"},
        {"stages": 3, "sweep": "collapsed", "coarse": "units"},
        pytest.param(
            {"stages": 3, "sweep": "collapsed", "coarse": "units", "coarse_width": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_iterations_and_the_collapsed_sweep_run_stage_by_stage(
    options: dict[str, object], tmp_path: Path
) -> None:
    model, example = resnet110.build_model(1, 4), resnet110.example_inputs(size=16)
    compiled = pnn.compile(model, example, **options)  # type: ignore[arg-type]
    exported = compiled.export_onnx(tmp_path, per_stage=True)
    assert exported.checked is not None
    assert exported.checked.error < 1e-4
    assert exported.checked.batches == (1, 2, 5)
    names = [file.stem for file in exported.files if file.suffix == ".onnx"]
    expected = {"head", "stage_0", "stage_1", "stage_2", "stage_1_correct", "stage_2_correct"}
    if "iterations" in options:
        # The last stage's first iteration would not reach the output.
        expected = (expected | {"stage_1_fine", "stage_2_fine"}) - {"stage_2"}
    assert set(names) == expected


Chain = tuple[pnn.Compiled, Lowered, Lowered]


@pytest.fixture(scope="module")
def chain() -> Chain:
    """A network whose weights all count as large where 1,000 bytes do, lowered in two types."""
    compiled = pnn.compile(residual_chain(4, 32), torch.randn(2, 32), stages=2)
    rounded = lower_network(in_half_precision(compiled, bf16=True), bf16=True)
    return compiled, lower_network(compiled), rounded


def test_large_weights_stand_beside_the_model_stage_by_stage(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnn_compile.export.onnx.write.LARGE", 1000)
    compiled, lowered, _ = chain
    exported = export_onnx(compiled, tmp_path / "model.onnx", lowered=lowered)
    names = [file.name for file in exported.files]
    assert names == ["model.onnx", "model.onnx.stage_0.data", "model.onnx.stage_1.data"]
    assert all(file.exists() for file in exported.files)
    assert exported.checked is not None


class Unexportable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x @ x.mT).real + x.sum(-1)


class _NamesClash(nn.Module):
    """Outputs that have the names of an input and of a weight, and are an input and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = linear_chain(4, 4)
        self.last = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.last(self.body(x))
        return {
            "x": y,
            "last.weight": y + 1,
            "copy": x,
            "bias": self.last.bias,
            "all": [self.scale],
        }


def test_outputs_may_be_weights_and_have_any_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    compiled = pnn.compile(_NamesClash().eval(), x, stages=2)
    lowered = lower_network(compiled)
    names = ["output.x", "last.weight", "copy", "bias", "all.0"]
    stages = export_onnx(compiled, tmp_path / "stages", per_stage=True, lowered=lowered)
    read = json.loads(stages.path.read_text())
    assert [tensor["name"] for tensor in read["outputs"]] == names
    exported = export_onnx(compiled, tmp_path / "net.onnx", lowered=lowered)
    session = onnxruntime.InferenceSession(exported.path)
    assert [output.name for output in session.get_outputs()] == names
    values = session.run(None, {"x": x.numpy()})
    result = compiled.module.eval()(x)
    wanted = [result["x"], result["last.weight"], x, result["bias"], result["all"][0]]
    for value, tensor in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_operator_without_onnx_form_is_named_and_the_old_file_kept(tmp_path: Path) -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Unexportable()]
    compiled = pnn.compile(nn.Sequential(*blocks), torch.randn(2, 4, 4), stages=2)
    old = tmp_path / "model.onnx"
    old.write_bytes(b"old")
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "linalg.eigvals(x" in text
    )
    with pytest.raises(pnn.ExportError, match="no ONNX form") as caught:
        compiled.export_onnx(old)
    message = str(caught.value)
    assert "linalg_eigvals in module 3" in message
    assert f"test_onnx.py:{line}" in message
    assert old.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class Autocasting(nn.Module):
    """Runs its blocks in a lower precision, as its forward says."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.last, self.dtype = residual_chain(3, 8), nn.Linear(8, 8), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype):
            x = self.body(x)
        return self.last(x.float())


def test_conversions_of_autocast_are_exported(tmp_path: Path) -> None:
    compiled = pnn.compile(Autocasting(torch.float16), torch.randn(4, 8), stages=2)
    exported = compiled.export_onnx(tmp_path / "model.onnx")
    assert exported.checked is not None  # ran beside torch
    types = {t.type.tensor_type.elem_type for t in onnx.load(exported.path).graph.value_info}
    assert onnx.TensorProto.FLOAT16 in types

    compiled = pnn.compile(Autocasting(torch.bfloat16), torch.randn(4, 8), stages=2)
    lowered, other = lower_network(compiled), tmp_path / "other.onnx"
    with pytest.raises(
        pnn.PnnError, match=r"ONNX Runtime does not open .*Gemm\(13\).*fine/body\.0"
    ):
        export_onnx(compiled, other, lowered=lowered)  # it has no such kernels for a CPU
    assert not other.exists()
    assert export_onnx(compiled, other, verify=False, lowered=lowered).checked is None


class Averaging(nn.Module):
    """Counts its calls, and subtracts a mean over all of them on demand, in both modes."""

    calls: torch.Tensor
    mean: torch.Tensor

    def __init__(self, subtract: bool) -> None:
        super().__init__()
        self.body, self.subtract = residual_chain(3, 8), subtract
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.mean.lerp_(x.detach().mean(0), 1e-4)
        return self.body(x - self.mean if self.subtract else x)


def test_state_that_outputs_depend_on_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    compiled = pnn.compile(Averaging(True), x, stages=2)
    with pytest.raises(pnn.ExportError, match=r"forward changes .*mean in evaluation mode"):
        compiled.export_onnx(tmp_path / "model.onnx", verify=False)
    compiled = pnn.compile(Averaging(False), x, stages=2)
    assert compiled.export_onnx(tmp_path / "model.onnx").checked is not None
    assert all(not buffer.any() for buffer in compiled.module.buffers())


def test_a_wrong_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pnn_compile.export.onnx.export.LIMIT", 0.0)
    compiled = pnn.compile(linear_chain(4, 8), torch.randn(2, 8), stages=2)
    lowered = lower_network(compiled)
    with pytest.raises(pnn.ExportError, match="disagrees with torch"):
        export_onnx(compiled, tmp_path / "model.onnx", lowered=lowered)
    assert list(tmp_path.iterdir()) == []
    exported = export_onnx(compiled, tmp_path / "model.onnx", verify=False, lowered=lowered)
    assert exported.checked is None
    assert "not verified" in str(exported)


@pytest.mark.parametrize("opset", [18, pytest.param(24, marks=pytest.mark.slow)])
def test_other_operator_sets_are_written(opset: int, exports: Exports, tmp_path: Path) -> None:
    exported = exports.compiled.export_onnx(tmp_path / "model.onnx", opset=opset)
    model = onnx.load(exported.path)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
    assert (model.producer_name, model.producer_version) == ("pnn-compile", pnn.__version__)
    assert exported.opset == opset


def test_an_operator_set_that_is_not_supported_is_refused(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(pnn.OptionError, match=r"opset must be from 18 to 24 \(got 7\)"):
        exports.compiled.export_onnx(tmp_path / "model.onnx", opset=7)


@pytest.mark.parametrize("per_stage", [False, True])
def test_half_precision_is_that_of_weights_inputs_and_outputs(
    per_stage: bool, tmp_path: Path
) -> None:
    compiled = pnn.compile(residual_chain(4, 8), torch.randn(2, 8), stages=2)
    exported = compiled.export_onnx(tmp_path / "half", per_stage=per_stage, fp16=True)
    assert exported.checked is not None
    assert 0 < exported.checked.error < 2e-2
    for path in exported.files[per_stage:]:
        graph = onnx.load(path).graph
        values = [*graph.input, *graph.output]
        types = {value.type.tensor_type.elem_type for value in values}
        types |= {weight.data_type for weight in graph.initializer if weight.dims}
        assert types - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT16}
    assert next(compiled.parameters()).dtype == torch.float32


@pytest.mark.parametrize("per_stage", [False, True])
def test_bfloat16_halves_the_weights_of_a_network_of_float32(
    per_stage: bool, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnn_compile.export.onnx.write.LARGE", 1000)
    compiled, lowered, rounded = chain
    sizes = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        target = folder if per_stage else folder / "model.onnx"
        exported = export_onnx(
            compiled, target, per_stage=per_stage, bf16=bf16, lowered=rounded if bf16 else lowered
        )
        assert exported.checked is not None
        sizes.append(sum(f.stat().st_size for f in exported.files if f.suffix == ".data"))
        models = [onnx.load(f) for f in exported.files if f.suffix == ".onnx"]
        nodes = [node for model in models for node in model.graph.node]
        assert bf16 == any(node.op_type == "Cast" for node in nodes)
        assert all("pnn.stage" in metadata(node) for node in nodes)
    assert sizes[1] == sizes[0] / 2
    with pytest.raises(pnn.OptionError, match="exclude each other"):
        compiled.export_onnx(tmp_path / "both", per_stage=per_stage, fp16=True, bf16=True)


def test_large_weights_stand_beside_every_stage_model(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnn_compile.export.onnx.write.LARGE", 1000)
    compiled, lowered, _ = chain
    exported = export_onnx(compiled, tmp_path, per_stage=True, lowered=lowered)
    assert {"stage_0.onnx.stage_0.data", "stage_1.onnx.stage_1.data"} <= {
        file.name for file in exported.files
    }
    x = torch.randn(3, 32)
    with StageExecutor(tmp_path) as executor:
        (outputs,) = executor.run({executor.inputs[0]: x.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(outputs), compiled.eval()(x).detach())


def test_a_network_that_does_not_run_in_half_precision_is_refused(tmp_path: Path) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x.float())

    compiled = pnn.compile(Single(), torch.randn(2, 8), stages=2)
    with pytest.raises(pnn.ExportError, match="does not run in half precision"):
        compiled.export_onnx(tmp_path / "model.onnx", fp16=True)


def test_export_takes_operator_set_and_precision(tmp_path: Path) -> None:
    folder = str(
        pnn.compile(residual_chain(4, 8), torch.randn(2, 8), stages=2).save(tmp_path / "net")
    )
    file = tmp_path / "model.onnx"
    assert main(["export", folder, "--onnx", str(file), "--opset", "21", "--fp16"]) == 0
    model = onnx.load(file)
    assert model.opset_import[0].version == 21
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_the_batch_of_a_map_of_small_rank_stays_free(tmp_path: Path) -> None:
    families: dict[str, Any] = {"coarse": "lowrank", "preprocess": "lowrank", "rank": 2}
    compiled = pnn.compile(residual_chain(4, 8), torch.randn(2, 8), stages=2, **families)
    graph = onnx.load(compiled.export_onnx(tmp_path / "model.onnx").path).graph
    computed = {name for node in graph.node for name in node.output}
    shapes = [v.type.tensor_type.shape for v in graph.value_info if v.name in computed]
    assert shapes
    assert all(shape.dim[0].dim_param == "batch" for shape in shapes)
