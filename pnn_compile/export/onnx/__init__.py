"""ONNX: one annotated model of the whole network, or one model per stage, and what runs them."""

from pnn_compile.export.onnx.check import BATCHES, LIMIT, Checked
from pnn_compile.export.onnx.executor import StageExecutor
from pnn_compile.export.onnx.export import Exported, Lowered, export_onnx, lower_network
from pnn_compile.export.onnx.manifest import Manifest
from pnn_compile.export.onnx.streams import open_streams

__all__ = [
    "BATCHES",
    "LIMIT",
    "Checked",
    "Exported",
    "Lowered",
    "Manifest",
    "StageExecutor",
    "export_onnx",
    "lower_network",
    "open_streams",
]
