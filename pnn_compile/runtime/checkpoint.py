"""`Checkpoints`: save a distributed run, and go on from where it stopped.

A checkpoint is a directory of torch.distributed.checkpoint: every rank writes its own tensors.
Its keys do not depend on the placement of the stages, so another number of ranks can read it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from torch.optim import Optimizer

from passes.errors import RuntimeFault
from pnn_compile.runtime.optimizer_state import OptimizerState

if TYPE_CHECKING:
    from pnn_compile.runtime.distributed import RankModule

__all__ = ["Checkpoints"]

_log = logging.getLogger(__name__)
_STEP = re.compile(r"step-(\d+)")


class Stateful(Protocol):
    """Anything with a state that is the same on all ranks: a schedule of learning rates."""

    def state_dict(self) -> Any:
        """The state, as plain data."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take up a state."""


class Checkpoints:
    """The checkpoints of a run, one directory `step-N` each; all ranks make this and call it alike.

    A checkpoint is complete or absent: it is written beside its place and then renamed, and older
    ones go only after that. It holds the network, the optimizer, the number of steps and the seed,
    so that the run goes on bit by bit as if it had not stopped, given the same batches. It may be
    resumed on another number of ranks. Reading unpickles, as torch.distributed.checkpoint does:
    read your own files only.

    Args:
        folder: Where they are, on a file system that all ranks share; made if need be.
        module: This rank's part of the network.
        optimizer: Of this rank's parameters.
        parts: Whatever else has a state, the same on all ranks, by name.
        keep: How many checkpoints stay.

    Raises:
        RuntimeFault: `keep` is below one.
    """

    def __init__(
        self,
        folder: str | Path,
        module: RankModule,
        optimizer: Optimizer,
        parts: Mapping[str, Stateful] | None = None,
        *,
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise RuntimeFault(f"at least one checkpoint must be kept (keep is {keep})")
        self._folder = Path(folder)
        self._saved = module.saved
        self._group = module.saved.groups.everyone
        self._optimizer = OptimizerState(optimizer, module.saved.parameter_keys())
        self._parts = dict(parts or {})
        self._keep = keep
        self._leads = dist.get_rank(self._group) == 0

    def save(self) -> Path:
        """Write a checkpoint of the step that was taken last.

        Returns:
            Its directory.

        Raises:
            RuntimeFault: There is one of a later step, or it could not be written; older ones are
                as they were.
        """
        target = self._folder / f"step-{self._saved.steps:08d}"
        try:
            newest = self._newest()
            if newest is None or newest <= self._saved.steps:
                self._write(target)
        except Exception as error:
            raise RuntimeFault(
                f"rank {self._saved.rank} could not write the checkpoint {target} "
                f"({type(error).__name__}: {error}): check permissions and free space of "
                f"{self._folder}, and that no rank has died"
            ) from error
        if newest is not None and newest > self._saved.steps:
            raise RuntimeFault(
                f"{self._folder} holds a checkpoint of step {newest}, and this run has taken "
                f"{self._saved.steps}: resume() from it, or choose another folder"
            )
        return target

    def resume(self) -> int:
        """Load the newest checkpoint.

        Returns:
            The number of steps that were taken; 0 if there is no checkpoint.

        Raises:
            RuntimeFault: It does not fit this network or optimizer, or is damaged.
        """
        newest = self._newest()
        if newest is None:
            return 0
        target = self._folder / f"step-{newest:08d}"
        try:
            self._load(target)
        except RuntimeFault:
            raise
        except Exception as error:
            raise RuntimeFault(
                f"{target} cannot be resumed ({type(error).__name__}: {error}): remove it to go on "
                "from an older checkpoint or from the start"
            ) from error
        _log.info("resumed %s", target)
        return self._saved.steps

    def _write(self, target: Path) -> None:
        from pnn_compile.runtime.storage import write

        self._saved.share_buffers()  # any replica may be the one that writes
        values: dict[str, Any] = {**self._saved.tensors(), **self._optimizer.values()}
        values["run"] = self._saved.counters()
        for name, part in self._parts.items():
            values[f"parts.{name}"] = part.state_dict()
        draft = target.with_name(f".{target.name}.part")
        if self._leads:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._drop(".step-*.part")
        dist.barrier(self._group)
        write(draft, values, self._group)
        if self._leads:
            aside = target.with_name(f".{target.name}.old")
            if target.exists():
                self._drop(aside.name)
                os.rename(target, aside)
            os.rename(draft, target)
            self._drop(".step-*.old")
            self._drop_older()
        dist.barrier(self._group)

    def _load(self, target: Path) -> None:
        from pnn_compile.runtime.storage import read

        run = read(target, {"run": None}, self._group)["run"]
        self._saved.load_counters(run)
        wanted: dict[str, Any] = dict(self._saved.tensors())  # they are read in place
        wanted |= {f"parts.{name}": None for name in self._parts}
        found = read(target, wanted, self._group, self._optimizer.keys_in, self._optimizer.empty)
        self._optimizer.load({key: found[key] for key in found.keys() - wanted.keys()})
        for name, part in self._parts.items():
            part.load_state_dict(found[f"parts.{name}"])

    def _newest(self) -> int | None:
        """Number of steps of the newest checkpoint, on all ranks; None if there is none."""
        found: list[int | None] = [None]
        if self._leads:
            self._put_back()
            found = [*self._steps()[-1:]] or [None]
        dist.broadcast_object_list(found, dist.get_global_rank(self._group, 0), self._group)
        return found[0]

    def _put_back(self) -> None:
        """Undo a replacement that was cut off between its two renames."""
        for aside in self._folder.glob(".step-*.old"):
            target = aside.with_name(aside.name[1:].removesuffix(".old"))
            if not target.exists():
                os.rename(aside, target)

    def _steps(self) -> list[int]:
        """Numbers of the steps of all checkpoints, in order."""
        if not self._folder.is_dir():
            return []
        matches = [_STEP.fullmatch(entry.name) for entry in self._folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def _drop(self, pattern: str) -> None:
        for folder in self._folder.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)

    def _drop_older(self) -> None:
        for step in self._steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"step-{step:08d}", ignore_errors=True)
