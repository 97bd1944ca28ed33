"""Export models to ONNX, as one file and per stage, and print what the checks found as a table.

python -m examples.studies.onnx_export            # all of them
python -m examples.studies.onnx_export vit unet   # those whose name holds one of the words
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

import pnn_compile as pnn
from examples.coverage.operators import declare
from pnn_compile.export.onnx import Checked, Exported
from pnn_compile.sources import Source, load_source

MODELS = (
    "examples/vgg16.py",
    "examples/resnet1001.py",
    "examples/unet.py",
    "examples/decoder.py",
    "timm:resnet26 --input 2x3x64x64",
    "timm:vit_tiny_patch16_224 --arg img_size=64",
    "timm:convnext_atto --input 2x3x64x64",
    "timm:densenet121 --input 2x3x64x64",
    "timm:darknet17 --input 2x3x64x64",
    "timm:efficientnet_b0 --input 2x3x64x64",
    "torchvision:mobilenet_v3_small --input 2x3x64x64",
    "torchvision:swin_t --input 2x3x64x64",
    "hf:bert",
    "hf:llama",
    "hf:t5",
    "hf:whisper",
)
STAGES = 4

_COLUMNS = ("model", "N", "nodes", "seconds", "batch sizes", "one file", "per stage", "top-1")


def main() -> None:
    words = sys.argv[1:]
    chosen = [text for text in MODELS if not words or any(word in text for word in words)]
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    for text in chosen:
        print(f"| {' | '.join(row(text))} |", flush=True)


def row(text: str) -> list[str]:
    """Export one model; what failed stands in the row."""
    try:
        source = load(text)
        compiled = pnn.compile(source.model, args=source.args, kwargs=source.kwargs, stages=STAGES)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            whole = compiled.export_onnx(Path(folder) / "model.onnx")
            seconds = time.process_time() - start
            stages = compiled.export_onnx(folder, per_stage=True)
    except pnn.PnnError as error:
        return [text, str(STAGES), "", "", "", f"{type(error).__name__}: {error}", "", ""]
    return [
        text,
        str(len(compiled.plan.stages)),
        f"{whole.nodes:,}",
        f"{seconds:.0f}",
        *_checks(whole, stages),
    ]


def load(text: str) -> Source:
    """Build a model with random weights from the words behind `pnn-compile`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--arg", action="append", default=[])
    words = parser.parse_args(shlex.split(text))
    torch.manual_seed(0)
    declare()
    return load_source(words.model, words.input, words.arg)


def _checks(whole: Exported, stages: Exported) -> list[str]:
    checked, apart = whole.checked, stages.checked
    assert isinstance(checked, Checked)
    assert isinstance(apart, Checked)
    shares = [each.agreement for each in (checked, apart)]
    return [
        ", ".join(map(str, checked.batches)),
        f"{checked.error:.1e}",
        f"{apart.error:.1e}",
        "" if None in shares else " and ".join(dict.fromkeys(f"{share:.1%}" for share in shares)),
    ]


if __name__ == "__main__":
    main()
