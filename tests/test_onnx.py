"""The ONNX file, read back with ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder, unet


@pytest.mark.parametrize("name", ["unet", "decoder"])
def test_onnx_runtime_agrees_with_torch_on_other_batch_sizes(name: str, tmp_path: Path) -> None:
    model: nn.Module
    if name == "unet":
        model, inputs = unet.build_model(depth=2, width=4), unet.example_inputs()
    else:
        model, inputs = decoder.build_model(layers=4, width=32), decoder.example_inputs()
    compiled = pnn.compile(model, inputs, stages=2)
    file = compiled.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 5):
        x = inputs[0].repeat(3, *[1] * (inputs[0].dim() - 1))[:batch]
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            wanted = compiled.module.eval()(x).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_a_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    class Unexportable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x @ x.mT).real + x.sum(-1)

    blocks = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Unexportable()]
    compiled = pnn.compile(nn.Sequential(*blocks), torch.randn(2, 4, 4), stages=2)
    old = tmp_path / "model.onnx"
    old.write_bytes(b"old")
    with pytest.raises(pnn.ExportError, match="no ONNX form"):
        compiled.export_onnx(old)
    assert old.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
