"""Sequences of any length: the network equals the model at lengths other than the example's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pnn_compile as pnn
from pnn_compile.export.onnx import StageExecutor, export_onnx, lower_network

IDS = torch.randint(11, (2, 8))
FREE = ("batch", "sequence")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inward(x).view(x.shape[0], -1, 3, 2, 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(h[0], h[1], h[2], is_causal=True)
        return x + self.outward(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """A decoder of tokens.

    Args:
        exported: Whether a trace refuses it.
        fixed: Whether its positions have the length of the example.
    """

    def __init__(self, exported: bool = False, fixed: bool = False) -> None:
        super().__init__()
        self.exported, self.fixed = exported, fixed
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(32, 6)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(6, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.exported and ids.shape[1] > 31:
            ids = ids[:, :31]
        order = torch.arange(8) if self.fixed else torch.ones_like(ids).cumsum(1)
        x = self.tokens(ids) + self.positions(order)
        return self.head(self.blocks(x))


@pytest.mark.parametrize("exported", [False, True])
def test_a_decoder_runs_at_other_lengths(exported: bool, tmp_path: Path) -> None:
    model = Decoder(exported)
    compiled = pnn.compile(model, IDS, stages=2, iterations=2, dynamic=FREE)
    compiled.save(tmp_path / "net")

    assert compiled.program.capture.rung == ("torch.export" if exported else "torch.fx trace")
    assert "sequence      free" in compiled.report()
    for network in (compiled, pnn.load(tmp_path / "net")):
        for shape in ((2, 8), (3, 5), (1, 13)):
            ids = torch.randint(11, shape)
            torch.testing.assert_close(network.eval()(ids), model.eval()(ids))  # K = N
            torch.testing.assert_close(network.sequential.eval()(ids), model(ids))


class Tagger(nn.Module):
    """Recurrent layers, whose length torch.export holds fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.LSTM(6, 6, batch_first=True) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def test_onnx_states_no_length_that_is_free(tmp_path: Path) -> None:
    compiled = pnn.compile(Tagger(), IDS[:, :7], stages=2, coarse="linear", dynamic=FREE)
    compiled.export_onnx(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sizes = value.type.tensor_type.shape.dim
        assert not any(size.dim_value == 7 for size in sizes), value.name
        named = {size.dim_param for size in sizes if not size.dim_param.startswith("unk__")}
        assert named <= {"", *FREE}, value.name
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    [found] = session.run(None, {"ids": IDS[:, :5].numpy()})
    expected = compiled.eval()(IDS[:, :5]).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_onnx_has_the_sequence_as_a_symbol(tmp_path: Path) -> None:
    compiled = pnn.compile(Decoder(), IDS, stages=2, dynamic=FREE)
    lowered = lower_network(compiled)
    export_onnx(compiled, tmp_path / "net.onnx", lowered=lowered)
    export_onnx(compiled, tmp_path / "stages", per_stage=True, lowered=lowered)
    ids = torch.randint(11, (3, 19))

    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", "sequence"]
    assert session.get_outputs()[0].shape == ["batch", "sequence", 11]
    whole = session.run(None, {"ids": ids.numpy()})[0]
    with StageExecutor(tmp_path / "stages") as executor:
        (by_stage,) = executor.run({"ids": ids.numpy()}).values()
    expected = compiled.eval()(ids).detach()
    for outputs in (whole, by_stage):
        torch.testing.assert_close(torch.from_numpy(outputs), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_fixes_its_length_is_refused_by_name() -> None:
    message = (
        r"dimension 1 of 'ids', the sequence, is fixed at 8 in Decoder .*test_free_sequence.py"
    )
    with pytest.raises(pnn.CaptureError, match=message):
        pnn.compile(Decoder(fixed=True), IDS, stages=2, dynamic=FREE)


def test_an_operator_of_fixed_length_is_refused_by_name() -> None:
    message = r"another length than 8 .*add of y_1 and c_1.*'linear'"
    with pytest.raises(pnn.SynthesisError, match=message):
        pnn.compile(Decoder(), IDS, stages=2, coarse="lowrank", dynamic=FREE)


class Pooled(nn.Module):
    """Layers of pairs of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = F.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True)
        y: torch.Tensor = self.layers(pairs.transpose(1, 2))
        return y


def test_as_many_pairs_of_one_position_less_do_not_hide_a_fixed_length() -> None:
    for length in (12, 13):
        with pytest.raises(pnn.SynthesisError, match=f"another length than {length}"):
            pnn.compile(Pooled(), torch.randn(2, length, 6), stages=2, dynamic=FREE)


def test_other_names_and_inputs_without_a_sequence_are_refused() -> None:
    wrong: tuple[Any, ...] = (("width",), "batch", 3)
    for names in wrong:
        with pytest.raises(pnn.OptionError, match="'batch' and 'sequence'"):
            pnn.compile(Decoder(), IDS, dynamic=names)
    with pytest.raises(pnn.OptionError, match=r"write dynamic=\(\)"):
        pnn.compile(Decoder(), IDS, dynamic_batch=False)  # type: ignore[call-arg]
    with pytest.raises(pnn.OptionError, match="at least 2 elements"):
        pnn.compile(nn.Linear(1, 1), torch.ones(2, 1), dynamic=FREE)
