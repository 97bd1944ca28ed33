"""Save a distributed run to checkpoints, and resume it.

A checkpoint is a directory of torch.distributed.checkpoint: every rank writes its own tensors. Its
keys do not depend on the placement of the stages, so another number of ranks can read it: tensors
of fine stages and the head have the keys of the original model under `model.`, those of operators
names of piece and stage under `operators.`, and the state of the optimizer the keys of its
parameters.

`set_optimizer_state_dict` of torch would load the last of these, but takes an optimizer step at
rate zero to allocate the state, which runs the hooks of the step, and uses names that depend on the
placement where weights are tied.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from passes.errors import RuntimeFault
from passes.ir.checked_json import decode
from passes.transform.original_weights import to_state_dict
from pnn_compile.atomic import recover, replace_directory
from pnn_compile.runtime.checkpoint_files import check_plain, read, write
from pnn_compile.runtime.data_parallel import full

if TYPE_CHECKING:
    from pnn_compile.runtime.rank_module import RankModule

_log = logging.getLogger(__name__)
_STEP = re.compile(r"step-(\d+)")
_MODEL, _STATE, _OPTIONS = "model.", "optimizer.state.", "optimizer.options."
_ORIGINAL = re.compile(r"(?:fine_\d+|head)\.(.+)", re.DOTALL)


class _Run(TypedDict):
    steps: int
    seed: int
    plan: str


class Stateful(Protocol):
    """Anything with a state that is the same on all ranks: a schedule of learning rates."""

    def state_dict(self) -> Any:
        """Return the state, as plain data."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Load a state."""


class Checkpoints:
    """Save and resume a run, one directory `step-N` per checkpoint; all ranks must call this.

    A checkpoint is complete or absent: it is written beside its place and then renamed, and older
    ones are deleted only after that. It contains the network, the optimizer, the number of steps
    and the seed, so that with the same batches the run continues bit by bit as if it had not
    stopped. It may be resumed on another number of ranks. Reading runs nothing: of its pickles,
    only plain data, tensors and torch.distributed.checkpoint's own records are read.

    Args:
        folder: Directory of all checkpoints, on a file system that all ranks share.
        module: This rank's part of the network.
        optimizer: Optimizer of this rank's parameters.
        parts: Other objects with a state, the same on all ranks, by name.
        keep: Number of checkpoints to keep.

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
        self._module = module
        self._optimizer = _OptimizerState(optimizer, _parameter_keys(module))
        self._parts = dict(parts or {})
        self._keep = keep
        self._leads = dist.get_rank(module.groups.everyone) == 0
        self._first = dist.get_global_rank(module.groups.everyone, 0)

    def save(self) -> Path:
        """Write a checkpoint of the last step.

        Returns:
            Its directory.

        Raises:
            RuntimeFault: There is one of a later step, or it could not be written; older ones are
                unchanged.
        """
        steps = self._module.steps
        target = self._folder / f"step-{steps:08d}"
        try:
            newest = self._newest()
            if newest is None or newest <= steps:
                self._write(target)
        except Exception as error:
            fault = RuntimeFault(
                f"rank {self._module.rank} could not write the checkpoint {target} "
                f"({type(error).__name__}: {error}): check permissions and free space of "
                f"{self._folder}, and that no rank has died"
            )
            raise self._module.peers.explain(fault) from error
        if newest is not None and newest > steps:
            raise RuntimeFault(
                f"{self._folder} has a checkpoint of step {newest}, and this run has taken "
                f"{steps}: resume() from it, or choose another folder"
            )
        return target

    def resume(self) -> int:
        """Load the newest checkpoint.

        Returns:
            The number of steps so far; 0 if there is no checkpoint.

        Raises:
            RuntimeFault: It does not fit this network or optimizer, or is damaged.
        """
        with self._module.exchanging("the step of the newest checkpoint"):
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
        return self._module.steps

    def _write(self, target: Path) -> None:
        module = self._module
        module.replicas.share_buffers()  # any replica may be the one that writes
        values: dict[str, Any] = {**_tensors(module), **self._optimizer.values()}
        values["run"] = {"steps": module.steps, "seed": module.seed, "plan": module.plan_digest}
        for name, part in self._parts.items():
            values[f"parts.{name}"] = part.state_dict()
        check_plain(values)
        with ExitStack() as stack:
            draft: list[str | None] = [None]
            if self._leads:
                draft = [str(stack.enter_context(replace_directory(target.resolve(), _keep_none)))]
            dist.broadcast_object_list(draft, self._first, self._module.groups.everyone)
            write(Path(str(draft[0])), values, self._module.groups.everyone)
        if self._leads:
            self._drop_older()
        dist.barrier(self._module.groups.everyone)

    def _load(self, target: Path) -> None:
        module = self._module
        stored = read(target, {"run": None}, self._module.groups.everyone)["run"]
        run = decode(_Run, stored, "run")
        if run["plan"] != module.plan_digest:
            raise RuntimeFault(
                "the checkpoint belongs to another plan: compile with the options of that plan "
                "(stages= stays, also on another number of ranks), or load its weights alone, by "
                "their original names"
            )
        module.steps, module.seed = run["steps"], run["seed"]
        named: dict[str, Any] = dict(_tensors(module))  # read in place
        named |= {f"parts.{name}": None for name in self._parts}
        values = read(target, named, self._module.groups.everyone, self._optimizer)
        self._optimizer.load({key: values[key] for key in values.keys() - named.keys()})
        for name, part in self._parts.items():
            part.load_state_dict(values[f"parts.{name}"])

    def _newest(self) -> int | None:
        """Return the step of the newest checkpoint, on all ranks; None if there is none."""
        newest: list[int | None] = [None]
        if self._leads:
            for hidden in self._folder.glob(".step-*"):  # left by a process that was killed
                recover(self._folder.resolve() / hidden.name.split(".")[1], _keep_none)
            newest = [*self._steps()[-1:]] or [None]
        dist.broadcast_object_list(newest, self._first, self._module.groups.everyone)
        return newest[0]

    def _steps(self) -> list[int]:
        """List the steps of all checkpoints, in order."""
        if not self._folder.is_dir():
            return []
        matches = [_STEP.fullmatch(entry.name) for entry in self._folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def _drop_older(self) -> None:
        for step in self._steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"step-{step:08d}", ignore_errors=True)


def _keep_none(entry: Path) -> bool:
    """Carry nothing over from an older checkpoint."""
    return False


def _key_of(name: str) -> str:
    """Turn the name of a tensor of the pieces (`fine_0.stem.weight`) into its key."""
    original = _ORIGINAL.fullmatch(name)
    return _MODEL + original[1] if original else f"operators.{name}"


def _parameter_keys(module: RankModule) -> dict[nn.Parameter, str]:
    """Return the key of every parameter of a rank.

    One with several keys (a tied weight) has the first key in the whole network, on all ranks.
    """
    first: dict[nn.Parameter, str] = {}
    keys: dict[str, str] = {}
    for name, parameter in module.whole.module.named_parameters(remove_duplicate=False):
        key = _key_of(name)
        keys[key] = first.setdefault(parameter, key)
    return {p: keys[_key_of(name)] for name, p in module.network.named_parameters()}


def _tensors(module: RankModule) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a rank by key; they share its memory."""
    # Weights of the model that no stage reads belong to the first rank.
    unused = {} if module.rank else module.whole.program.unused
    return {
        **{_MODEL + name: tensor for name, tensor in unused.items()},
        **{_key_of(name): tensor for name, tensor in module.network.state_dict().items()},
    }


def gather_original_weights(module: RankModule) -> dict[str, torch.Tensor]:
    """Collect the weights of all stages and the head by the model's own keys, on rank 0."""
    weights = {
        key.removeprefix(_MODEL): full(tensor.detach()).cpu()
        for key, tensor in _tensors(module).items()
        if key.startswith(_MODEL)
    }
    group = module.groups.stages
    parts: list[Any] | None = None if module.rank else [None] * dist.get_world_size(group)
    dist.gather_object(weights, parts, dist.get_global_rank(group, 0), group)
    gathered = {key: tensor for part in parts or () for key, tensor in part.items()}
    return to_state_dict(module.whole.program, gathered) if gathered else {}


class _OptimizerState:
    """The state of an optimizer by the keys of its parameters, as one flat dict.

    Args:
        optimizer: The optimizer of a rank.
        keys: Key of every parameter of the rank.

    Raises:
        RuntimeFault: The optimizer has parameters that are not of this rank.
    """

    def __init__(self, optimizer: Optimizer, keys: Mapping[nn.Parameter, str]) -> None:
        self._optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = [p for p in parameters if p not in keys]
        if foreign:
            raise RuntimeFault(
                f"the optimizer has {len(foreign)} parameters that are not of this rank, the "
                f"first of shape {list(foreign[0].shape)}: create it from module.parameters()"
            )
        self._keys = keys
        self._parameters = {key: parameter for parameter, key in keys.items()}

    def values(self) -> dict[str, Any]:
        """Return state and options of every parameter."""
        values: dict[str, Any] = {}
        for group in self._optimizer.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                key = self._keys[parameter]
                values[_OPTIONS + key] = options
                for name, value in self._optimizer.state.get(parameter, {}).items():
                    values[f"{_STATE}{key}.{name}"] = value
        return values

    def keys_in(self, stored: Iterable[str]) -> list[str]:
        """Select the keys that belong to parameters of this rank."""
        local = {self._keys[p] for group in self._optimizer.param_groups for p in group["params"]}

        def belongs(key: str) -> bool:
            if key.startswith(_OPTIONS):
                return key.removeprefix(_OPTIONS) in local
            return key.startswith(_STATE) and _split(key)[0] in local

        return [key for key in stored if belongs(key)]

    def empty(self, key: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Create a tensor to read a state into, sharded as its parameter if it has its shape."""
        parameter = self._parameters[_split(key)[0]]
        if parameter.shape == size:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype, device="cpu")

    def load(self, values: Mapping[str, Any]) -> None:
        """Load what `values` returned, on this or another rank.

        Raises:
            RuntimeFault: A parameter is missing, or the parameters of one group had different
                options.
        """
        states: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name.startswith(_STATE):
                key, leaf = _split(name)
                states.setdefault(key, {})[leaf] = value
        saved = self._optimizer.state_dict()
        by_number: dict[Any, dict[str, Any]] = {}
        groups = zip(self._optimizer.param_groups, saved["param_groups"], strict=True)
        for group, described in groups:
            keys = [self._keys[parameter] for parameter in group["params"]]
            described.update(_common_options(keys, values))
            numbers = zip(keys, described["params"], strict=True)
            by_number |= {number: states[key] for key, number in numbers if key in states}
        self._optimizer.load_state_dict({**saved, "state": by_number})


def _split(key: str) -> tuple[str, str]:
    """Split the key of an optimizer's state into that of the parameter and a name."""
    parameter, _, name = key.removeprefix(_STATE).rpartition(".")
    return parameter, name


def _common_options(keys: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in keys if _OPTIONS + key not in values]
    if missing:
        raise RuntimeFault(
            f"the checkpoint has no optimizer state of {missing[0]} ({len(missing)} such): create "
            "the optimizer with the same parameters"
        )
    options = [values[_OPTIONS + key] for key in keys]
    for key, other in zip(keys, options, strict=True):
        if other != options[0]:
            raise RuntimeFault(
                f"{keys[0]} and {key} are in one group of the optimizer, and had different "
                "options in the checkpoint: create the same groups"
            )
    return options[0] if options else {}
