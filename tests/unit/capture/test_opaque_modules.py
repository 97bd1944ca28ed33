from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.errors import CaptureError, OptionError
from tests.models.builders import mlp
from tests.support.parity import assert_same_step, step
from tests.support.programs import facts_by_name

WIDTH = 16
WHOLE = "torch.fx trace, modules kept whole"


def body() -> nn.Sequential:
    return mlp(6, WIDTH)


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.gru(packed)
        padded, _ = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        return padded


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.recurrent, self.after = body(), Packed(), body()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.after(self.recurrent(self.before(x), lengths))


class Gate(nn.Module):
    """Asks for a value, in one module of many."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if x.sum() > 0 else x - 1.0


class Around(nn.Module):
    """Holds a gate, and could be traced without it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(WIDTH, WIDTH), Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.linear(x))


class LayerDrop(nn.Module):
    """Leaves out layers at random in training mode, by a Python branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand(()) < 0.3:
                continue
            x = torch.tanh(layer(x))
        return x


class Auxiliary(nn.Module):
    """Gives a second output in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra = body(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (y, self.extra(y)) if self.training else y


X, LENGTHS = torch.randn(4, 5, WIDTH), torch.tensor([5, 3, 2, 4])


def test_a_packed_sequence_is_kept_whole_and_the_rest_is_cut() -> None:
    model = Tagger()
    compiled = pnn.compile(model, (X, LENGTHS), stages=3)

    report = compiled.program.capture
    assert report.rung == WHOLE
    assert [line.partition(":")[0] for line in report.rejected] == [
        "torch.fx trace",
        "torch.export",
    ]
    assert "recurrent (Packed) is kept whole" in report.notes[0]
    assert "test_opaque_modules.py:" in report.notes[0]
    assert report.notes[0] in compiled.plan.notes
    compiled.verify(strict=True)
    x, lengths = torch.randn(3, 7, WIDTH), torch.tensor([2, 7, 5])
    for train in (True, False):
        expected = step(model, (x, lengths), train=train)
        assert_same_step(step(compiled.program.module, (x, lengths), train=train), expected)
        actual = step(compiled.program.module, (x, lengths), train=train,
                      forward=compiled.sequential.train(train))  # fmt: skip
        assert_same_step(actual, expected)


def test_a_network_with_a_whole_module_is_stored_without_its_program(tmp_path: Path) -> None:
    model = Tagger()
    compiled = pnn.compile(model, (X, LENGTHS), stages=3)
    with torch.no_grad():
        compiled.program.module.get_parameter("before.0.weight").mul_(2.0)
    folder = compiled.save(tmp_path / "out")
    with pytest.raises(pnn.ArtifactError, match=r"recurrent: module .*Packed\): use pnn\.load\("):
        pnn.load(folder)
    loaded = pnn.load(folder, model=model)
    inputs = {"x": X, "lengths": LENGTHS}
    torch.testing.assert_close(loaded.module.eval()(**inputs), compiled.module.eval()(**inputs))
    loaded.verify(strict=True)


def test_only_the_smallest_module_is_kept_whole() -> None:
    captured = capture(nn.Sequential(body(), Around(), body(), Around()), (X[:, 0],))

    calls = {str(node.target) for node in captured.graph.nodes if node.op == "call_module"}
    assert {"1.linear", "1.gate", "3.linear", "3.gate"} <= calls
    assert "1.gate, 3.gate (Gate) is kept whole" in captured.capture.notes[0]


def test_what_a_whole_module_returns_may_be_what_it_was_given() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e9 else x + 1.0

    captured = capture(nn.Sequential(body(), Sometimes(), body()), (X[:, 0],))
    facts = facts_by_name(captured)
    assert facts["_1"].storages & facts["_0_11"].storages


def test_a_module_that_holds_most_of_the_model_is_not_kept_whole() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.sum() > 0 else x

    message = r"one module with 9\d% of the parameters would stay whole, 0 \(Inner\): Trace.*\.py:"
    with pytest.raises(CaptureError, match=message):
        capture(nn.Sequential(Inner(), nn.Linear(WIDTH, 4)), (X[:, 0],))


@pytest.mark.parametrize("kind", [LayerDrop, Auxiliary])
def test_the_mode_that_can_be_captured_is_and_a_note_says_so(kind: type[nn.Module]) -> None:
    model = kind().eval()
    compiled = pnn.compile(model, X[:, 0], stages=3)

    assert compiled.program.capture.rung.endswith(", evaluation mode alone")
    assert any("captured for evaluation mode alone" in note for note in compiled.plan.notes)
    compiled.verify(strict=True)
    x = torch.randn(7, WIDTH)
    expected = step(model, (x,), train=False)
    assert_same_step(step(compiled.program.module, (x,), train=False), expected)


def test_a_network_of_one_mode_runs_in_no_other(tmp_path: Path) -> None:
    compiled = pnn.compile(LayerDrop().eval(), X[:, 0], stages=2)
    for network in (compiled, pnn.load(compiled.save(tmp_path / "network"))):
        network(X[:, 0])
        with pytest.raises(OptionError, match=r"evaluation mode alone, .*: call \.eval\(\)"):
            network.train()(X[:, 0])
        with pytest.raises(OptionError, match="evaluation mode alone"):
            network.sequential.train()(X[:, 0])
    report = compiled.eval().fit([X[:, 0]] * 2, epochs=1)
    assert report.steps

    compiled = pnn.compile(Auxiliary(), X[:, 0], stages=2)
    compiled(X[:, 0])
    compiled.verify(strict=True)
    with pytest.raises(OptionError, match=r"training mode alone, .* compile model\.eval\(\)"):
        compiled.eval()(X[:, 0])
    with pytest.raises(OptionError, match="training mode alone"):
        compiled.export_onnx(tmp_path / "network.onnx")
    with pytest.raises(OptionError, match="training mode alone"):
        compiled.calibrate([X[:, 0]] * 5)


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


class PairInEvaluation(Auxiliary):
    """Gives a named tuple in evaluation mode, and a tuple in training mode."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if self.training else Pair(y, [y])


def test_outputs_of_one_mode_have_the_types_of_that_mode() -> None:
    model = PairInEvaluation()
    for train in (True, False):
        compiled = pnn.compile(model.train(train), X[:, 0], stages=2)
        actual, expected = compiled.sequential(X[:, 0]), model(X[:, 0])
        assert type(actual) is type(expected)
        torch.testing.assert_close(tuple(actual), tuple(expected))


def test_training_mode_alone_keeps_both_outputs() -> None:
    model = Auxiliary()
    captured = capture(model, (X[:, 0],))
    x = torch.randn(7, WIDTH)

    assert captured.capture.rung == "torch.fx trace, training mode alone"
    assert "has another graph" in captured.capture.notes[0]
    assert_same_step(step(captured.module, (x,), train=True), step(model, (x,), train=True))


def test_a_model_that_only_evaluation_mode_lets_in_is_told_how() -> None:
    with pytest.raises(CaptureError, match=r"evaluation mode alone: call model\.eval\(\) first$"):
        capture(LayerDrop(), (X[:, 0],))


class Gated(nn.Module):
    """A module that no trace can enter, with a value-dependent argument and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: float, *, positive: bool) -> dict[str, Any]:
        y = self.linear(x) * scale
        if bool(y.sum() > 0):
            y = y - 1.0
        return {"state": y if positive else -y, "parts": (y.mean(1), None)}


class Asking(nn.Module):
    """Asks for a value itself and hands it on, so that no trace can enter it either."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.gates = body(), nn.ModuleList(Gated() for _ in range(2))
        self.after, self.drop = body(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        first, *_ = x.unbind(1)  # not for a symbolic trace
        positive = first.sum().item() > 0
        y = self.drop(self.before(x[:, 0]))
        for gate in self.gates:
            output = gate(y, 0.5, positive=positive)
            y = output["state"] + output["parts"][0][:, None]
        return self.after(y)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_exported_graph_keeps_modules_whole_with_what_they_are_given(sign: float) -> None:
    model, x = Asking(), sign * X.abs()
    compiled = pnn.compile(model, (x,), stages=3)

    report = compiled.program.capture
    assert report.rung == "torch.export, modules kept whole"
    assert "gates.0, gates.1 (Gated) is kept whole" in report.notes[0]
    assert "test_opaque_modules.py:" in report.notes[0]
    compiled.verify(strict=True)
    for other in (x[:3], -x):  # neither the size nor what was asked for is fixed
        for train in (True, False):
            expected = step(model, (other,), train=train)
            assert_same_step(step(compiled.program.module, (other,), train=train), expected)
            actual = step(compiled.program.module, (other,), train=train,
                          forward=compiled.sequential.train(train))  # fmt: skip
            assert_same_step(actual, expected)
