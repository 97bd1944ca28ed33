"""The training state of a fit: optimizer steps, and the checkpoint file that resumes them.

A step has a learning rate schedule and, in float16, a scaled loss. The checkpoint contains tensors
and numbers, no code.
"""

from __future__ import annotations

import itertools
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from passes.errors import OptionError, why
from pnn_compile.atomic import replace_file

_log = logging.getLogger(__name__)

MakeOptimizer = Callable[[Sequence[nn.Parameter], int], tuple[torch.optim.Optimizer, LambdaLR]]
"""From parameters and a number of steps to an optimizer with its learning rate schedule."""


def warm_cosine(total: int) -> Callable[[int], float]:
    """Return a learning rate factor by step: linear warm-up over a tenth, then a cosine to zero.

    >>> factor = warm_cosine(20)
    >>> [round(factor(step), 2) for step in (0, 1, 2, 11, 20)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos((step - warm) / max(1, total - warm) * math.pi))

    return factor


class OptimizerStep:
    """Optimizer, schedule and gradient scaler of a parameter list; a no-op if the list is empty.

    Args:
        parameters: The parameters to train.
        make_optimizer: Makes the optimizer and its schedule.
        total: Number of training steps.
        autocast: Precision of the forward pass. The loss is scaled for float16, whose small
            gradients would be zero otherwise; a step whose gradients overflow is skipped
            (Micikevicius et al., "Mixed precision training", 2018).
        clip_norm: Largest norm of the gradient, or None.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
        total: int,
        *,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._clip_norm = clip_norm
        if not self.parameters:
            return
        self._optimizer, self._schedule = make_optimizer(self.parameters, total)
        device = self.parameters[0].device.type
        self._scaler = torch.amp.GradScaler(device, enabled=autocast is torch.float16)

    def step(self, loss: torch.Tensor) -> None:
        """Take one step; no tensor but the parameters receives a gradient."""
        if not self.parameters:
            return
        scaler = self._scaler
        self._optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward(inputs=self.parameters)  # type: ignore[no-untyped-call]
        if self._clip_norm is not None:
            scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        scale = scaler.get_scale()
        scaler.step(self._optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # it falls where the step was skipped
            self._schedule.step()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, schedule and scaler; the parameters are not in it."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        if not self.parameters:
            return {}
        return {"optimizer": self._optimizer, "schedule": self._schedule, "scaler": self._scaler}


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
                f"the fit cannot be saved to {self._file} ({why(error)}): make room or name "
                "another file; a checkpoint from before is unchanged"
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
            self.step, self.samples = _count(saved["step"]), _count(saved["samples"])
            self.losses = [float(loss) for loss in saved["losses"]]
            self._random = saved["random"]
            with torch.random.fork_rng(devices=_cuda_devices(self._network)):
                set_random_state(self._network, saved["random"])  # else it would fail later
        except pickle.UnpicklingError as error:  # torch's message says how to run it
            raise OptionError(
                f"{file} does not continue this fit (it is not a file of tensors and numbers "
                "alone): delete it to start anew"
            ) from error
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


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"steps and samples are counts (got {value!r})")
    return value


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
            f"the fit cannot be saved to {file}: {file.parent} is not a directory, make it first"
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
