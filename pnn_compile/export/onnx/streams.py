"""Lets ONNX Runtime run the stages of the single file side by side: a stream a stage.

By itself ONNX Runtime runs all nodes of a CPU session one after another. A partition file names the
nodes of several streams, each of which runs on a thread of its own. Streams wait for each other
where they must, but the order inside a stream is ONNX Runtime's: the sweep, which waits for the
stages before, gets a stream of its own, for it would be put in front of the fine stage that it
corrects. The optimiser renames nodes, so it goes first, and the partition follows its names.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import ArtifactError
from pnn_compile.export.onnx.executor import session
from pnn_compile.export.onnx.read import load_proto

if TYPE_CHECKING:
    import onnx

__all__ = ["open_streams"]

_SWEEP = -1
"""Stands for the stream of residuals, corrections and head."""


def open_streams(path: str | Path, *, options: Callable[[Any], None] | None = None) -> Any:
    """Open an exported model so that its fine stages run side by side, one thread each.

    Args:
        path: The file that `export_onnx` wrote, without `per_stage`.
        options: What else to set in the session's options.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ExportError: A package is missing.
        ArtifactError: ONNX Runtime does not read the file, or it says nothing of stages.
    """
    known = _known(Path(path))
    with tempfile.TemporaryDirectory() as name:
        optimized, partition = Path(name) / "model.onnx", Path(name) / "partition.json"

        def save(settings: Any) -> None:
            settings.optimized_model_filepath = str(optimized)

        session(Path(path), options=save)
        streams = _streams(optimized, known)
        # A device is a type of device here, and 0 the CPU.
        data = {
            "type": "DeviceBasedPartitioner",
            "streams": streams,
            "devices": ["0"] * len(streams),
        }
        partition.write_text(json.dumps(data), encoding="utf-8")

        def run_streams(settings: Any) -> None:
            import onnxruntime

            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings.graph_optimization_level = level
            settings.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
            # The thread that calls waits for the others.
            settings.inter_op_num_threads = len(streams) + 1
            settings.add_session_config_entry("session.node_partition_config_file", str(partition))
            settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
            if options is not None:
                options(settings)

        return session(optimized, options=run_streams)


def _known(path: Path) -> dict[str, int]:
    """The stream of every node and value of an exported model."""
    known: dict[str, int] = {}
    for node in _nodes(path):
        facts = {entry.key: entry.value for entry in node.metadata_props}
        if "pnn.stage" not in facts:
            raise ArtifactError(
                f"{path} says nothing of stages: give the file that `pnn-compile export` wrote"
            )
        fine = facts["pnn.role"] in ("preprocess", "fine")
        stream = int(facts["pnn.stage"]) if fine else _SWEEP
        known.update(dict.fromkeys((node.name, *node.output), stream))
    return known


def _streams(path: Path, known: Mapping[str, int]) -> list[list[str]]:
    """Names of the nodes of each stream in an optimised model."""
    streams: dict[int, list[str]] = {}
    made: dict[str, int] = {}
    for node in _nodes(path):
        names = (node.name, *node.output)
        found = [known[old] for name in names for old in _origins(name) if old in known]
        # What has a new name stands between nodes that have not.
        own = found[0] if found else next((made[n] for n in node.input if n in made), 0)
        made.update(dict.fromkeys(node.output, own))
        streams.setdefault(own, []).append(node.name)
    return [names for _, names in sorted(streams.items())]


def _origins(name: str) -> Iterator[str]:
    """A name, and what it may have been before words were put behind it."""
    while name:
        yield name
        name = name.rpartition("_")[0]


def _nodes(path: Path) -> Iterator[onnx.NodeProto]:
    yield from load_proto(path).graph.node
