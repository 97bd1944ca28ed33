"""Write a compiled network as ONNX, one annotated model or one model per stage, and run it.

In: a compiled network. Out: files (docs/onnx.md), and what runs them in ONNX Runtime. This is the
path of an export, `compiled.export_onnx(path)`:

    export_onnx             export.py     the steps below; files move into place once they pass
      lower_network         lower.py      operations over named values, read off the sweep's graph
        segments            pieces.py     pieces as flat graphs, cut where they repeat
        translate           translate.py  one segment of each kind to ONNX, by torch's exporter
      write_model           write.py      nodes with stage, role, iteration and origin; weights
      write_stages          stages.py     the same per stage, with a manifest (manifest.py)
      check_form and
        check_values        export.py     onnx's checker; outputs against torch (run.py)

`read_summary` in `read.py` reads the files back for `pnn-compile inspect`. Read `export.py` first.
"""

from pnn_compile.export.onnx.export import (
    BATCHES,
    LIMIT,
    Checked,
    Exported,
    export_onnx,
    in_half_precision,
)
from pnn_compile.export.onnx.lower import Lowered, lower_network
from pnn_compile.export.onnx.manifest import Manifest
from pnn_compile.export.onnx.read import OnnxSummary, read_summary
from pnn_compile.export.onnx.run import StageExecutor, open_streams, session

__all__ = [
    "BATCHES",
    "LIMIT",
    "Checked",
    "Exported",
    "Lowered",
    "Manifest",
    "OnnxSummary",
    "StageExecutor",
    "export_onnx",
    "in_half_precision",
    "lower_network",
    "open_streams",
    "read_summary",
    "session",
]
