"""Programs that torch.export saved: what is loaded, and what a crafted file may not do."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.errors import SourceError
from pnn_compile.sources import load_source
from pnn_compile.sources.exported_archive import check_expression
from tests.models.builders import block_list
from tests.support.sourcefiles import refusal

Members = dict[str, bytes]


class Dropping(nn.Sequential):
    """Six layers with dropout; batch norm on demand. Its input is called x."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__(*block_list(6, 6, norm=norm, dropout=0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def save(model: nn.Module, path: Path, *, dynamic: bool = False) -> Path:
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    exported = torch.export.export(model, (torch.ones(4, 6),), dynamic_shapes=shapes)
    torch.export.save(exported, path)
    return path


def test_a_saved_program_trains_and_evaluates(tmp_path: Path) -> None:
    model = Dropping()
    source = load_source(str(save(model, tmp_path / "model.pt2")))
    assert torch.equal(source.args[0], torch.ones(4, 6))
    assert torch.equal(source.model.eval()(*source.args), model.eval()(*source.args))
    assert not torch.equal(source.model.train()(*source.args), source.model(*source.args))
    compiled = pnn.compile(source.model, source.args, stages=3)
    assert compiled.verify().ok
    assert source.model.state_dict().keys() == model.state_dict().keys()


def test_a_saved_program_switches_its_batchnorm_too(tmp_path: Path) -> None:
    model = Dropping(norm=True)
    x = torch.randn(4, 6)
    for mode in (True, False):
        source = load_source(str(save(model.train(mode), tmp_path / f"{mode}.pt2")))
        torch.testing.assert_close(source.model.eval()(x), model.eval()(x))
        compiled = pnn.compile(source.model, (x,), stages=2)
        assert compiled.verify().ok


def test_a_program_takes_no_arguments(tmp_path: Path) -> None:
    path = save(Dropping(), tmp_path / "model.pt2")
    with pytest.raises(SourceError, match=r"takes no --arg \(width\)"):
        load_source(str(path), (), ["width=3"])


class Canary:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


TOUCH = "__import__('pathlib').Path('canary').touch()"


def _json(suffix: str, edit: Callable[[Any], None]) -> Callable[[Members], None]:
    def craft(members: Members) -> None:
        name = next(name for name in members if name.endswith(suffix))
        table = json.loads(members[name])
        edit(table)
        members[name] = json.dumps(table).encode()

    return craft


def _model(edit: Callable[[Any], None]) -> Callable[[Members], None]:
    return _json("models/model.json", edit)


def _add(name: str, data: bytes) -> Callable[[Members], None]:
    return lambda members: members.update({f"model/{name}": data})


def _pickled_weight(members: Members) -> None:
    def mark(table: Any) -> None:
        for entry in table["config"].values():
            entry["use_pickle"] = entry["path_name"] == "weight_0"

    _json("_weights_config.json", mark)(members)
    members["model/data/weights/weight_0"] = _saved(Canary())


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _node(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"][0]


def _call(target: str, text: str) -> Callable[[Members], None]:
    def edit(model: Any) -> None:
        argument = {"name": "", "arg": {"as_string": text}, "kind": 1}
        _node(model).update(target=target, inputs=[argument])

    return _model(edit)


def _rename(old: str, new: str) -> Callable[[Members], None]:
    """Give an input or a parameter another name wherever it stands."""

    def craft(members: Members) -> None:
        for name in [name for name in members if name.endswith(".json")]:
            members[name] = members[name].replace(
                json.dumps(old).encode(), json.dumps(new).encode()
            )

    return craft


def _symbol(model: Any) -> None:
    sizes = model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = TOUCH


def _argument_names(model: Any) -> None:
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    call["forward_arg_names"] = [f"x={TOUCH}"]


def _structure(model: Any) -> None:
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    keys = json.dumps([f"y={TOUCH}"])
    spec = json.loads(call["in_spec"])
    leaf: Any = {"type": None, "context": None, "children_spec": []}
    spec[1]["children_spec"][1].update(context=keys, children_spec=[leaf])
    call["in_spec"] = json.dumps(spec)


def _guards(model: Any) -> None:
    model["guards_code"] = [TOUCH]


CRAFTED: dict[str, tuple[Callable[[Members], None], str]] = {
    "pickled weight": (_pickled_weight, "a pickled object"),
    "sample inputs": (
        _add("data/sample_inputs/model.pt", _saved(((Canary(),), {}))), "sample inputs of"
    ),
    "legacy weights": (_add("data/weights/model.pt", _saved({"a": Canary()})), "weights/model.pt"),
    "custom class": (_add("data/constants/custom_obj_0", b"x"), "custom_obj_0"),
    "opaque object": (_add("data/constants/opaque_obj_0", pickle.dumps(Canary())), "opaque_obj_0"),
    "compiled library": (_add("data/aotinductor/model/a.wrapper.so", b"\x7fELF"), "wrapper.so"),
    "size as code": (_model(_symbol), "the size"),
    "function of the system": (_call("torch.os.system", "touch canary"), "torch.os.system"),
    "library loader": (_call("torch.ops.load_library", "a.so"), "torch.ops.load_library"),
    "unpickling function": (_call("torch.load", "a.pt"), "torch.load"),
    "file reader": (_call("torch.ops.aten.from_file.default", "a"), "from_file"),
    "operator of an extension": (_call("#extension.a", "a"), "#extension.a"),
    "name of an input": (_rename("x", f"x={TOUCH}"), "the name"),
    "name of a parameter": (
        _rename("0.0.weight", f'0.0.a"),{TOUCH})#'), "the name"
    ),
    "name of an argument": (_model(_argument_names), "the name"),
    "key of an argument": (_model(_structure), "the name"),
    "range of sizes": (
        _model(lambda model: model["range_constraints"].update(u999999999=None)), "u999999999"
    ),
}  # fmt: skip
"""What each crafted file holds, and what its refusal names."""


@functools.cache
def _good() -> Members:
    with tempfile.TemporaryDirectory() as folder:
        good = save(Dropping(), Path(folder) / "good.pt2", dynamic=True)
        with zipfile.ZipFile(good) as archive:
            return {
                f"model/{name.partition('/')[2]}": archive.read(name) for name in archive.namelist()
            }


def _crafted(tmp_path: Path, craft: Callable[[Members], None]) -> Path:
    members, bad = dict(_good()), tmp_path / "bad.pt2"
    craft(members)
    with zipfile.ZipFile(bad, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return bad


@pytest.mark.parametrize("kind", CRAFTED)
def test_nothing_in_a_file_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    craft, named = CRAFTED[kind]
    assert named in refusal(str(_crafted(tmp_path, craft)))
    assert not Path("canary").exists()


def test_guards_of_a_file_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = load_source(str(_crafted(tmp_path, _model(_guards))))
    source.model(*source.args)
    assert not Path("canary").exists()


@pytest.mark.parametrize("kind", ["pickled weight", "size as code"])
def test_the_canaries_sing_in_the_loader_of_torch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(Exception):
        torch.export.load(_crafted(tmp_path, CRAFTED[kind][0]))
    assert Path("canary").exists()


class Recurrent(nn.Module):
    """Calls an operator that trusts the sizes of its weights, and one that takes a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(1, x.shape[1], 6, dtype=torch.float32)
        return self.head(self.lstm(x, (hidden, hidden))[0])


def _flip_direction(inputs: list[dict[str, Any]]) -> None:
    next(i for i in inputs if i["name"] == "bidirectional")["arg"] = {"as_bool": True}


def _number_for_dtype(inputs: list[dict[str, Any]]) -> None:
    next(i for i in inputs if i["name"] == "dtype")["arg"] = {"as_int": 99}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")
@pytest.mark.parametrize(
    ("target", "edit", "named"),
    [
        ("aten.lstm.input", None, ""),
        (
            "aten.lstm.input",
            _flip_direction,
            "aten.lstm.input can run at lstm is not known",
        ),
        ("aten.zeros.default", _number_for_dtype, "dtype=99 of aten.zeros.default"),
    ],
)
def test_operands_that_operators_trust_are_checked(
    target: str, edit: Callable[[list[dict[str, Any]]], None] | None, named: str, tmp_path: Path
) -> None:
    def change(model: Any) -> None:
        (node,) = (n for n in model["graph_module"]["graph"]["nodes"] if target in n["target"])
        if edit is not None:
            edit(node["inputs"])

    saved, path = tmp_path / "saved.pt2", tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Recurrent().eval(), (torch.ones(4, 3, 6),)), saved)
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    _model(change)(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    if not named:
        source = load_source(str(path))
        assert source.model(*source.args).shape == (4, 3, 6)
    else:
        assert named in refusal(str(path))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = save(Dropping(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("model.json"))
        data = archive.read(name)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(name, data)
    assert "model.json" in refusal(str(path))


def test_a_compressed_member_is_refused(tmp_path: Path) -> None:
    path = save(Dropping(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/weights/weight_999", bytes(10**6))
    assert "weight_999" in refusal(str(path))


def test_a_tensor_is_no_larger_than_its_bytes(tmp_path: Path) -> None:
    def craft(members: Members) -> None:
        def enlarge(table: Any) -> None:
            table["config"]["0.0.weight"]["tensor_meta"]["sizes"][0]["as_int"] = 10**12

        _json("_weights_config.json", enlarge)(members)
        members["model/data/weights/weight_0"] = b""

    assert "without its bytes" in refusal(str(_crafted(tmp_path, craft)))


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s31 + 1",
        "-s0//2",
        "FloorDiv(s0 - 1, 4) + Max(1, u3)",
        "s0**2",
        "Eq(s0, 3)",
        "Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))",
        "Pow(Symbol('s0'), Integer(-1))",
    ],
)
def test_sizes_are_arithmetic(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        TOUCH, "s0.real", "os", "__class__", "exec('a')", "f(s0)", "s0[0]", "9**9**9", "s0**99",
        "lambda: 1", "[s0]", "'a'", "s0 if s1 else s2", "(s0 := 1)", "Max(*s0)", "Max(a=s0)",
        "Symbol('a')", "1" * 30, "(" * 1500, "", "s0 +", "s0; s1", "1j", "s0 and s1", "s0 ^ 2",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "Pow(9, 10**9)", "Symbol('__a__')",
        "Symbol('s0', integer=f())", "Integer('9')",
    ],
)  # fmt: skip
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_expression(text)


def test_models_of_many_kinds_are_loaded(tmp_path: Path) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    path = tmp_path / "model.pt2"
    for number, (model, x) in enumerate(
        (
            (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()), torch.randn(2, 3, 9, 9)),
            (encoder.eval(), torch.randn(2, 5, 8)),
            (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), torch.randint(9, (2, 5))),
        )
    ):
        shapes = (dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO),)
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)
        source = load_source(str(path))
        torch.testing.assert_close(source.model.eval()(x), model.eval()(x), msg=str(number))


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    assert "not a file of torch.export.save" in refusal(str(path))
    assert "no such file" in refusal(str(tmp_path / "none.pt2"))
