"""The file that an interrupted fit goes on from: tensors and numbers, no code."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from passes.errors import OptionError

__all__ = ["FitState", "checkpoint_file", "random_state", "set_random_state"]

_log = logging.getLogger(__name__)


class _Part(Protocol):
    """Anything with a state: modules, optimizers, schedules."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class FitState:
    """What a fit needs to go on where it stopped; read from the file if there is one.

    Args:
        network: The network that is fitted.
        parts: Everything else with a state, by name.
        file: Where to save it; None to save nothing.

    Raises:
        OptionError: The file does not hold the state of this fit.
    """

    def __init__(self, network: nn.Module, parts: Mapping[str, _Part], file: Path | None) -> None:
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
        """Note a step of the end-to-end fit."""
        self.step = step
        self.samples += samples
        self.losses.append(loss)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._file is None:
            return
        saved = {
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "step": self.step,
            "samples": self.samples,
            "losses": self.losses,
            "random": random_state(self._network),
        }
        draft = self._file.with_name(self._file.name + ".part")
        torch.save(saved, draft)
        os.replace(draft, self._file)

    def _load(self, file: Path) -> None:
        try:
            # Weights and optimizers bring what they load to their own device.
            found = torch.load(file, weights_only=True, map_location="cpu")
            saved = found["parts"]
            if saved.keys() != self._parts.keys():
                strange = ", ".join(sorted(saved.keys() ^ self._parts.keys()))
                raise ValueError(f"with {strange} in one of them only")
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
            self.step, self.samples = found["step"], found["samples"]
            self.losses = list(found["losses"])
            self._random = found["random"]
        except Exception as error:
            raise OptionError(
                f"{file} does not continue this fit ({error}): delete it to start anew"
            ) from error
        _log.info("resuming at step %d from %s", self.step, file)

    @contextmanager
    def random(self) -> Iterator[None]:
        """Go on with the random state of an interrupted fit; put the caller's back behind it."""
        resumed = self._random is not None
        with torch.random.fork_rng(devices=_cuda_devices(self._network), enabled=resumed):
            if self._random is not None:
                set_random_state(self._network, self._random)
            yield


def checkpoint_file(checkpoint: str | Path | None) -> Path | None:
    """Check the name of a checkpoint before anything is computed.

    Raises:
        OptionError: It is a directory, or lies in none.
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
    """Random state of the CPU and of every CUDA device that holds a part of the network."""
    cuda = {device: torch.cuda.get_rng_state(device) for device in _cuda_devices(network)}
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Set what `random_state` gave; a device that it does not know goes on as it is."""
    torch.set_rng_state(state["cpu"])
    for device in _cuda_devices(network):
        if device in state["cuda"]:
            torch.cuda.set_rng_state(state["cuda"][device], device)


def _cuda_devices(network: nn.Module) -> list[int]:
    tensors = itertools.chain(network.parameters(), network.buffers())
    return sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
