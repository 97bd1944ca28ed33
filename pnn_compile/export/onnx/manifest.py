"""The manifest of a set of stage models: all that a program needs to run them, as plain data.

It is one JSON file, one model and one run a line; docs/onnx.md describes its keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from passes.errors import ArtifactError, why
from passes.ir.checked_json import decode, parse
from pnn_compile.atomic import recover_entries

SCHEMA = 1
"""Version of the format."""

MANIFEST = "manifest.json"
"""Name of the file."""

_INSIDE = re.compile(r"(?!/)(?!.*(^|/)\.\.(/|$))[^\\\0:]+")
"""A relative path that does not lead out of its directory."""


@dataclass(frozen=True)
class TensorEntry:
    """Name of a tensor, sizes (numbers, or text over the batch size), and type of its elements."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class FileEntry:
    """Path of a file from the manifest's directory, number of bytes, and their SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelEntry:
    """A model.

    Attributes:
        name: Its name in the runs.
        stage: The stage that it belongs to.
        roles: Roles of its nodes: "preprocess", "fine", "residual", "coarse", "correct", "head".
        inputs: Its inputs, in the order of a run's inputs.
        outputs: Its outputs, in the order of a run's outputs.
        files: The model first, then the files of its weights, if any.
    """

    name: str
    stage: int
    roles: tuple[str, ...]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class RunEntry:
    """One run of a model.

    Attributes:
        model: Name of the model.
        stage: The stage that runs it.
        iteration: Number of the parareal iteration, from 0.
        inputs: Names of the values that it reads, by position.
        outputs: Names of the values that it computes, by position.
    """

    model: str
    stage: int
    iteration: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A network as models and the order in which they run.

    Attributes:
        network: Name of the network.
        stages: Number of stages.
        correction: "residual" or "difference".
        sweep: "chain" or "collapsed".
        iterations: Number of parareal iterations.
        opset: Version of the default operator set.
        ir_version: Version of the ONNX format.
        inputs: Inputs of the network; runs read the values of these names.
        outputs: Outputs of the network; runs compute the values of these names.
        models: The models.
        runs: The runs of all stages, in an order in which one thread could do them. A stage does
            its runs in this order, each as soon as its inputs are there.
        schema: Version of this format.
    """

    network: str
    stages: int
    correction: str
    sweep: str
    iterations: int
    opset: int
    ir_version: int
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    models: tuple[ModelEntry, ...]
    runs: tuple[RunEntry, ...]
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return the text of the file."""
        data = {"schema": self.schema} | dataclasses.asdict(self)
        lines = []
        for key, value in data.items():
            text = json.dumps(value)
            if key in ("inputs", "outputs", "models", "runs"):
                items = ",\n".join(f"    {json.dumps(item)}" for item in value)
                text = f"[\n{items}\n  ]" if value else "[]"
            lines.append(f"  {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a manifest from a file, or from the directory that it is in.

        Raises:
            ArtifactError: It is missing, damaged, or of another version.
        """
        file = Path(path)
        file = file / MANIFEST if file.is_dir() else file
        recover_entries(file.parent)
        try:
            data = parse(file.read_text(encoding="utf-8"))
            if isinstance(data, dict) and data.get("schema") != SCHEMA:
                raise ArtifactError(
                    f"it has schema {data.get('schema')!r}, this version reads {SCHEMA}"
                )
            manifest: Manifest = decode(cls, data, "manifest")
            for entry in (entry for model in manifest.models for entry in model.files):
                if not _INSIDE.fullmatch(entry.path):
                    raise ArtifactError(f"{entry.path!r} is not a file below its directory")
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {why(error)}") from error
        except (ArtifactError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{file} is not a manifest of stage models ({error}): export it again"
            ) from error
        return manifest

    def check_files(self, folder: Path) -> None:
        """Compare the files with their checksums.

        Raises:
            ArtifactError: A file is missing or is not the one that was exported.
        """
        for file in (file for model in self.models for file in model.files):
            path = folder / file.path
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: restore it, or export again")
            if path.stat().st_size != file.bytes or checksum(path) != file.sha256:
                raise ArtifactError(
                    f"{path} is not the file that was exported ({path.stat().st_size} bytes, "
                    f"{file.bytes} in the manifest): restore it, or export again"
                )


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
