"""Measured seconds, kept by content in files that users can see and delete.

One file a measurement, in `$PNN_COMPILE_CACHE`, else in `pnn-compile` under `$XDG_CACHE_HOME` or
`~/.cache`. Its name is a digest of everything that the seconds depend on, which it also holds as
text: structure and shapes of the program, segments, training or not, torch, device, threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.cost.measured import Seconds, measure_seconds
from passes.ir.program import Program
from pnn_compile.forecast.processor import processor_name

__all__ = ["TimingCache", "default_folder"]

_LOG = logging.getLogger(__name__)
_FORMAT = 3


def default_folder() -> Path:
    """Where measurements are kept unless somebody says otherwise."""
    if own := os.environ.get("PNN_COMPILE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pnn-compile"


@dataclasses.dataclass
class TimingCache:
    """Measures segments, or reads what was measured before.

    Attributes:
        folder: Where the files are; None to measure every time and keep nothing.
        path: The file of the last measurement; None where it was not kept.
        found: Whether it was there before.
    """

    folder: Path | None = dataclasses.field(default_factory=default_folder)
    path: Path | None = None
    found: bool = False

    @classmethod
    def of(cls, cache: bool | str | Path) -> TimingCache:
        """The cache that a user asks for: the default folder, none, or a folder of their own."""
        if isinstance(cache, bool):
            return cls() if cache else cls(None)
        return cls(Path(cache))

    def __call__(
        self, program: Program, segments: Sequence[Sequence[fx.Node]], *, backward: bool = False
    ) -> list[Seconds]:
        """Seconds of every segment, as `passes.cost.measured.measure_seconds` gives them."""
        self.path, self.found = None, False
        if self.folder is None:
            return measure_seconds(program, segments, backward=backward)
        conditions = _conditions(program, segments, backward)
        digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{digest[:32]}.json"
        known = _read(path, conditions, len(segments))
        if known is not None:
            self.path, self.found = path, True
            return known
        measured = measure_seconds(program, segments, backward=backward)
        if _write(path, conditions, measured):
            self.path = path
        return measured


def _conditions(
    program: Program, segments: Sequence[Sequence[fx.Node]], backward: bool
) -> dict[str, Any]:
    """What the seconds depend on, as plain data."""
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


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _read(path: Path, conditions: dict[str, Any], count: int) -> list[Seconds] | None:
    """What a file holds; None if there is none, or if it is not whole."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        seconds = [Seconds(float(a), float(b)) for a, b in held["seconds"]]
        if held["conditions"] == conditions and len(seconds) == count:
            return seconds
        _LOG.warning("%s holds another measurement: measuring again", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s cannot be read (%s): measuring again", path, error)
    return None


def _write(path: Path, conditions: dict[str, Any], measured: Sequence[Seconds]) -> bool:
    """Write a file as a whole or not at all; a folder that cannot be written is no error."""
    text = json.dumps({"conditions": conditions, "seconds": measured}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".part", delete=False
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        _LOG.warning("measured seconds are not kept: %s", error)
        return False
    return True
