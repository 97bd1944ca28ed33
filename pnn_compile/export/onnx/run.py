"""Run exported networks in ONNX Runtime with their fine stages side by side.

`StageExecutor` runs the models of a manifest, a thread per stage:

    stage 0  stage_0 ----------------.
    stage 1  stage_1 ---> (waits) stage_1_correct ---.
    stage 2  stage_2 ---> (waits for stage 1) ------ stage_2_correct -> head

`open_streams` opens the single file. By itself ONNX Runtime runs the nodes of a CPU session one
after another; a partition file names the nodes of several streams, each of which runs on a thread
of its own.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from passes.errors import ArtifactError, ExportError, OptionError
from passes.transform.sweep import Role
from pnn_compile.export.onnx.manifest import Manifest
from pnn_compile.export.onnx.read import load_proto, node_metadata

if TYPE_CHECKING:
    import numpy as np

_SWEEP = -1
"""Number of the stream of residuals, corrections and head."""


def session(
    path: Path,
    *,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    options: Callable[[Any], None] | None = None,
) -> Any:
    """Open a model in ONNX Runtime.

    Args:
        path: The model.
        threads: Threads inside an operator.
        providers: Execution providers.
        options: Sets further options of the session.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ExportError: ONNX Runtime is missing.
        ArtifactError: It does not read the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "running ONNX models needs ONNX Runtime: pip install 'pnn-compile[onnx]'"
        ) from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    if options is not None:
        options(settings)
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=[*providers])
    except Exception as error:
        raise ArtifactError(f"ONNX Runtime does not open {path}: {error}") from error


class StageExecutor:
    """Runs a network as one session per stage model, one thread per stage.

    The fine stages run side by side, since ONNX Runtime works outside Python's lock. Then each
    stage corrects as soon as the one before has: the order of a stage's runs is the manifest's, and
    a run waits only for values of other stages.

    Args:
        path: The manifest, or the directory that it is in.
        check: Whether to compare the files with their checksums first.
        providers: ONNX Runtime's execution providers for all stages.

    Raises:
        ExportError: ONNX Runtime is missing.
        ArtifactError: A file is missing or damaged, or ONNX Runtime does not read it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        check: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.manifest = Manifest.read(path)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if check:
            self.manifest.check_files(folder)
        self._sessions = {
            model.name: session(folder / model.files[0].path, providers=providers)
            for model in self.manifest.models
        }
        self._models = {model.name: model for model in self.manifest.models}
        # The last stage works on the thread of the caller.
        self._pool = ThreadPoolExecutor(max(self.manifest.stages - 1, 1), "pnn-stage")
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(tensor.name for tensor in self.manifest.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(tensor.name for tensor in self.manifest.outputs)

    def __enter__(self) -> StageExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the network.

        Args:
            inputs: Arrays by input name.

        Returns:
            Arrays by output name.

        Raises:
            OptionError: An input is missing, or there is one too many.
        """
        if set(inputs) != set(self.inputs):
            raise OptionError(
                f"the network takes {', '.join(self.inputs)} (got {', '.join(inputs) or 'nothing'})"
            )
        with self._lock:  # the threads of the stages belong to one run at a time
            return self._run(inputs)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        manifest = self.manifest
        values: dict[str, Future[np.ndarray]] = {name: Future() for name in inputs}
        values |= {name: Future() for run in manifest.runs for name in run.outputs}
        for name, array in inputs.items():
            values[name].set_result(array)
        last = manifest.stages - 1
        others = [self._pool.submit(self._run_stage, stage, values) for stage in range(last)]
        self._run_stage(last, values)
        for other in others:
            other.result()
        return {name: values[name].result() for name in self.outputs}

    def _run_stage(self, stage: int, values: Mapping[str, Future[np.ndarray]]) -> None:
        """Do the runs of a stage one after another."""
        for run in (run for run in self.manifest.runs if run.stage == stage):
            try:
                arrays = [values[name].result() for name in run.inputs]
                model = self._models[run.model]
                feeds = {slot.name: a for slot, a in zip(model.inputs, arrays, strict=True)}
                names = [slot.name for slot in model.outputs]
                results = self._sessions[run.model].run(names, feeds)
            except BaseException as error:
                # Whoever waits for these values fails as well, with the same error.
                for name in run.outputs:
                    values[name].set_exception(error)
                continue
            for name, result in zip(run.outputs, results, strict=True):
                values[name].set_result(result)


def open_streams(path: str | Path, *, options: Callable[[Any], None] | None = None) -> Any:
    """Open an exported model so that its fine stages run side by side, one thread per stage.

    Args:
        path: The file that `export_onnx` wrote, without `per_stage`.
        options: Sets further options of the session.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ExportError: A package is missing.
        ArtifactError: ONNX Runtime does not read the file, or it says nothing of stages.
    """
    stream_of = _stream_of(Path(path))
    with tempfile.TemporaryDirectory() as name:
        optimized, partition = Path(name) / "model.onnx", Path(name) / "partition.json"

        def save(settings: Any) -> None:
            settings.optimized_model_filepath = str(optimized)

        # The optimizer renames nodes, so it runs first, and the partition uses its names.
        session(Path(path), options=save)
        streams = _streams(optimized, stream_of)
        # ONNX Runtime means a type of device here, and 0 is the CPU.
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
            # The calling thread only waits for the others.
            settings.inter_op_num_threads = len(streams) + 1
            settings.add_session_config_entry("session.node_partition_config_file", str(partition))
            settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
            if options is not None:
                options(settings)

        return session(optimized, options=run_streams)


def _stream_of(path: Path) -> dict[str, int]:
    """Return the stream of every node and value of an exported model, by name.

    ONNX Runtime orders the nodes inside a stream by itself, and would put the correction of a
    stage, which waits for other stages, before the fine stage. So the corrections of all stages
    share another stream.
    """
    streams: dict[str, int] = {}
    for node in load_proto(path).graph.node:
        metadata = node_metadata(node)
        if "pnn.stage" not in metadata:
            raise ArtifactError(
                f"{path} says nothing of stages: give the file that `pnn-compile export` wrote"
            )
        is_fine = metadata["pnn.role"] in (Role.PREPROCESS, Role.FINE)
        stream = int(metadata["pnn.stage"]) if is_fine else _SWEEP
        streams.update(dict.fromkeys((node.name, *node.output), stream))
    return streams


def _streams(path: Path, stream_of: Mapping[str, int]) -> list[list[str]]:
    """List the names of the nodes of each stream in an optimized model."""
    streams: dict[int, list[str]] = {}
    writers: dict[str, int] = {}
    for node in load_proto(path).graph.node:
        names = (node.name, *node.output)
        by_name = (stream_of[old] for n in names for old in _former_names(n) if old in stream_of)
        # A node without a former name joins the stream of the first value that it reads.
        by_input = (writers[name] for name in node.input if name in writers)
        stream = next(by_name, next(by_input, 0))
        writers.update(dict.fromkeys(node.output, stream))
        streams.setdefault(stream, []).append(node.name)
    return [names for _, names in sorted(streams.items())]


def _former_names(name: str) -> Iterator[str]:
    """Iterate over what a name may have been before the optimizer appended words to it."""
    while name:
        yield name
        name = name.rpartition("_")[0]
