"""The checkpoint file of `pnn_compile.fit.train`: tensors and numbers, no code."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from passes.errors import OptionError
from pnn_compile.atomic import replace_file

_log = logging.getLogger(__name__)


class _Stateful(Protocol):
    """A module, optimizer or schedule."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class FitState:
    """The state of a fit, which resumes from a checkpoint file if that exists.

    Args:
        network: The network that is fitted.
        parts: Everything else with a state, by name.
        file: The checkpoint file; None to save nothing.

    Raises:
        OptionError: The file does not hold the state of this fit.
    """

    def __init__(
        self, network: nn.Module, parts: Mapping[str, _Stateful], file: Path | None
    ) -> None:
        self._network = network
        self._parts = {"network": network, **parts}
        self._file = file
        self.step = 0
        self.samples = 0
        self.losses: list[float] = []
        self._random: Mapping[str, Any] | None = None
        if file is not None and file.exists():
            self._load(file)

    def record(self, step: int, loss: float, samples: int) -> None:
        """Record a step of the end-to-end fit."""
        self.step = step
        self.samples += samples
        self.losses.append(loss)

    def save(self) -> None:
        """Write the file atomically; do nothing without one.

        Raises:
            OptionError: It cannot be written; an older one is unchanged.
        """
        if self._file is None:
            return
        saved = {
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "step": self.step,
            "samples": self.samples,
            "losses": self.losses,
            "random": random_state(self._network),
        }
        try:
            with replace_file(self._file) as draft:
                torch.save(saved, draft)
        except (OSError, RuntimeError) as error:  # torch raises the second on a full disk
            raise OptionError(
                f"the fit cannot be saved to {self._file} ({error}): make room or name another "
                "file; a checkpoint from before is unchanged"
            ) from error

    def _load(self, file: Path) -> None:
        try:
            # Modules and optimizers copy what they load to their own device.
            saved = torch.load(file, weights_only=True, map_location="cpu")
            parts = saved["parts"]
            if parts.keys() != self._parts.keys():
                differing = ", ".join(sorted(parts.keys() ^ self._parts.keys()))
                raise ValueError(f"with {differing} in one of them only")
            for name, part in self._parts.items():
                part.load_state_dict(parts[name])
            self.step, self.samples = saved["step"], saved["samples"]
            self.losses = list(saved["losses"])
            self._random = saved["random"]
        except Exception as error:
            raise OptionError(
                f"{file} does not continue this fit ({error}): delete it to start anew"
            ) from error
        _log.info("resuming at step %d from %s", self.step, file)

    @contextmanager
    def random(self) -> Iterator[None]:
        """Resume the random state of an interrupted fit; restore the caller's on exit."""
        resumed = self._random is not None
        with torch.random.fork_rng(devices=_cuda_devices(self._network), enabled=resumed):
            if self._random is not None:
                set_random_state(self._network, self._random)
            yield


def checkpoint_file(checkpoint: str | Path | None) -> Path | None:
    """Return the path of a checkpoint, checked before anything is computed.

    Raises:
        OptionError: It is a directory, or its folder does not exist.
    """
    if checkpoint is None:
        return None
    file = Path(checkpoint)
    if not file.parent.is_dir():
        raise OptionError(
            f"the fit cannot be saved to {file}: {file.parent} is no directory, make it first"
        )
    if file.is_dir():
        raise OptionError(f"the fit cannot be saved to {file}, a directory: name a file in it")
    return file


def random_state(network: nn.Module) -> dict[str, Any]:
    """Return the random state of the CPU and of every CUDA device with a part of the network."""
    cuda = {device: torch.cuda.get_rng_state(device) for device in _cuda_devices(network)}
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Set what `random_state` returned; devices that are not in it keep their state."""
    torch.set_rng_state(state["cpu"])
    for device in _cuda_devices(network):
        if device in state["cuda"]:
            torch.cuda.set_rng_state(state["cuda"][device], device)


def _cuda_devices(network: nn.Module) -> list[int]:
    tensors = itertools.chain(network.parameters(), network.buffers())
    return sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
