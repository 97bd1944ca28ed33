"""Cache measured seconds in files that users can read and delete.

One file a measurement, in `$PNN_COMPILE_CACHE`, else in `pnn-compile` under `$XDG_CACHE_HOME` or
`~/.cache`. Its name is a digest of everything that the seconds depend on, which the file also
contains as text: structure and shapes of the program, segments, training, torch, device, threads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.cost.measured import Seconds, measure_seconds
from passes.errors import ArtifactError
from passes.ir.checked_json import decode, parse
from passes.ir.program import Program
from passes.ir.structure_hash import digest
from pnn_compile.atomic import write_text

_LOG = logging.getLogger(__name__)
_FORMAT = 4


def processor_name(device: torch.device) -> str:
    """Return the name of a device: of a GPU, or of the processor of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def default_folder() -> Path:
    """Return the folder of the cache, which environment variables may set."""
    if folder := os.environ.get("PNN_COMPILE_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pnn-compile"


@dataclasses.dataclass
class TimingCache:
    """Measure segments, or read an earlier measurement.

    Attributes:
        folder: Folder of the files; None to measure every time and write nothing.
        path: File of the last measurement; None if it was not written.
    """

    folder: Path | None = dataclasses.field(default_factory=default_folder)
    path: Path | None = None

    @classmethod
    def of(cls, cache: bool | str | Path) -> TimingCache:
        """Return the cache of an option: True: the default folder, False: none, or a folder."""
        if isinstance(cache, bool):
            return cls() if cache else cls(None)
        return cls(Path(cache))

    def __call__(
        self, program: Program, segments: Sequence[Sequence[fx.Node]], *, backward: bool = False
    ) -> list[Seconds]:
        """Return the seconds of every segment; see `passes.cost.measured.measure_seconds`."""
        self.path = None
        if self.folder is None:
            return measure_seconds(program, segments, backward=backward)
        conditions = _conditions(program, segments, backward)
        path = self.folder / f"{_digest([json.dumps(conditions, sort_keys=True)])}.json"
        cached = _read(path, conditions, len(segments))
        if cached is not None:
            self.path = path
            return cached
        measured = measure_seconds(program, segments, backward=backward)
        if _write(path, conditions, measured):
            self.path = path
        return measured


def _conditions(
    program: Program, segments: Sequence[Sequence[fx.Node]], backward: bool
) -> dict[str, Any]:
    """Return all that the seconds depend on, as plain data."""
    leaves = pytree.tree_leaves(dict(program.args))
    return {
        "format": _FORMAT,
        "model": program.name,
        "program": program.fingerprint,
        "weights": _digest(
            f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}"
            for name, p in program.module.named_parameters()
        ),
        "inputs": [
            f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
            for leaf in leaves
        ],
        "segments": _digest(f"{segment[0].name} {segment[-1].name}" for segment in segments),
        "training": backward,
        "torch": torch.__version__,
        "device": processor_name(program.device),
        "threads": torch.get_num_threads(),
    }


def _digest(lines: Iterable[str]) -> str:
    return digest(lines)[:32]


def _read(path: Path, conditions: dict[str, Any], count: int) -> list[Seconds] | None:
    """Return the seconds in a file; None if it does not exist or is damaged."""
    try:
        data = parse(path.read_text(encoding="utf-8"))
        rows = decode(list[tuple[float, float, float]], data["seconds"], "seconds")
        seconds = [Seconds(*row) for row in rows]
        if data["conditions"] == conditions and len(seconds) == count:
            return seconds
        _LOG.warning("%s is of another measurement: measuring again", path)
    except FileNotFoundError:
        pass
    except (ArtifactError, OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s cannot be read (%s): measuring again", path, error)
    return None


def _write(path: Path, conditions: dict[str, Any], measured: Sequence[Seconds]) -> bool:
    """Write a file atomically; return whether that worked: a read-only folder is not an error."""
    text = json.dumps({"conditions": conditions, "seconds": measured}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        _LOG.warning("measured seconds are not cached: %s", error)
        return False
    return True
