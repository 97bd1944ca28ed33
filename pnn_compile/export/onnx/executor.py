"""Runs the stage models of a manifest in ONNX Runtime, every stage on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from passes.errors import ArtifactError, ExportError, OptionError
from pnn_compile.export.onnx.manifest import MANIFEST, Manifest, ModelEntry

if TYPE_CHECKING:
    import numpy as np

__all__ = ["StageExecutor", "session"]


class StageExecutor:
    """A network as a session per stage model, one thread a stage.

    The fine stages run side by side, for ONNX Runtime works outside Python's lock. Then each stage
    corrects as soon as the one before has: the order of a stage's runs is the manifest's, and a run
    waits for values of other stages alone.

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
        file = Path(path)
        self._folder = file if file.is_dir() else file.parent
        self.manifest = Manifest.read(self._folder / MANIFEST if file.is_dir() else file)
        if check:
            self.manifest.check_files(self._folder)
        self._sessions = {
            model.name: self._open(model, providers) for model in self.manifest.models
        }
        self._entries = {model.name: model for model in self.manifest.models}
        # The last stage works on the thread of the caller.
        self._pool = ThreadPoolExecutor(max(self.manifest.stages - 1, 1), "pnn-stage")
        self._lock = threading.Lock()

    def _open(self, model: ModelEntry, providers: Sequence[str]) -> Any:
        return session(self._folder / model.files[0].path, providers=providers)

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
        others = [self._pool.submit(self._stage, stage, values) for stage in range(last)]
        self._stage(last, values)
        for other in others:
            other.result()
        return {name: values[name].result() for name in self.outputs}

    def _stage(self, stage: int, values: Mapping[str, Future[np.ndarray]]) -> None:
        """Do what a stage does, one run after the other."""
        for run in (run for run in self.manifest.runs if run.stage == stage):
            try:
                given = [values[name].result() for name in run.inputs]
                entry = self._entries[run.model]
                feeds = {slot.name: a for slot, a in zip(entry.inputs, given, strict=True)}
                names = [slot.name for slot in entry.outputs]
                results = self._sessions[run.model].run(names, feeds)
            except BaseException as error:
                # Whoever waits for these values fails too, with the same error.
                for name in run.outputs:
                    values[name].set_exception(error)
                continue
            for name, result in zip(run.outputs, results, strict=True):
                values[name].set_result(result)


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
        options: What else to set.

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
