"""`Saved`: what a checkpoint holds of a rank, by keys that do not depend on the placement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RuntimeFault
from pnn_compile.runtime.groups import Groups, plan_digest
from pnn_compile.runtime.names import MODEL, Names, key_of
from pnn_compile.runtime.sharding import full

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.runtime.rank import RankNetwork
    from pnn_compile.runtime.replicas import Replicas

__all__ = ["Saved"]


class Saved:
    """The state of a run on one rank: its tensors, the number of steps and the seed.

    Args:
        compiled: The whole network.
        network: This rank's part.
        groups: The processes of the run.
        replicas: Other processes with the same part.

    Attributes:
        steps: Number of steps that were taken.
        groups: The processes of the run.
        rank: This rank.
    """

    def __init__(
        self, compiled: Compiled, network: RankNetwork, groups: Groups, replicas: Replicas
    ) -> None:
        self.groups = groups
        self.rank = network.rank
        self.steps = 0
        self._seed = groups.common_seed()
        self._network = network
        self._replicas = replicas
        self._keys = Names(compiled)
        self._plan = plan_digest(compiled)
        # Weights of the model that no stage reads stay with the first rank.
        self._unused = dict(compiled.program.unused) if network.rank == 0 else {}

    def step_seed(self) -> int:
        """The seed of the next step; replicas draw different numbers."""
        return self._seed + self.steps + (self.groups.replica << 50)

    def parameter_keys(self) -> dict[nn.Parameter, str]:
        """Key of every parameter of this rank."""
        return self._keys.parameters(self._network)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of this rank by key; they share its memory."""
        unused = {MODEL + name: tensor for name, tensor in self._unused.items()}
        return {**unused, **{key_of(n): t for n, t in self._network.state_dict().items()}}

    def share_buffers(self) -> None:
        """Give all replicas the buffers of the first one, which every step begins with."""
        self._replicas.share_buffers()

    def counters(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        return {"steps": self.steps, "seed": self._seed, "plan": self._plan}

    def load_counters(self, found: dict[str, Any]) -> None:
        """Take up what `counters` gave.

        Raises:
            RuntimeFault: It is of another plan.
        """
        if found["plan"] != self._plan:
            raise RuntimeFault(
                "the checkpoint is of another plan: compile with the options that it was made "
                "with, or load its weights alone, by their original names"
            )
        self.steps, self._seed = found["steps"], found["seed"]

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights of all stages and the head by the model's own keys, on rank 0."""
        own = {
            key.removeprefix(MODEL): full(tensor.detach()).cpu()
            for key, tensor in self.tensors().items()
            if key.startswith(MODEL)
        }
        group = self.groups.stages
        found: list[Any] | None = None
        if self.rank == 0:
            found = [None] * dist.get_world_size(group)
        dist.gather_object(own, found, dist.get_global_rank(group, 0), group)
        return {key: tensor for part in found or () for key, tensor in part.items()}
