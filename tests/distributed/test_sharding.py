"""Replicas that hold a share of the weights each (FSDP2) train as those that hold all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import pnn_compile as pnn
from pnn_compile.runtime.data_parallel import full, local
from tests.distributed.ranks import start
from tests.models.distributed_models import batches, loss, network

STEPS = 3


def _train(rank: int, folder: str, shard: bool, stop: int, options: dict[str, Any]) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    torch.manual_seed(0)
    # Adam blows up the rounding in the gradient of a bias in front of BatchNorm, which is zero.
    compiled = network(2, dropout=0.0, norm=not options)
    module = pnn.runtime.distribute(compiled, mesh=mesh, shard=shard, **options).train()
    optimizer = torch.optim.AdamW(module.parameters(), 0.01)
    checkpoints = pnn.runtime.Checkpoints(folder, module, optimizer)
    replica, begun = mesh["data"].get_local_rank(), checkpoints.resume()
    losses = [
        module.train_step(batch.chunk(2)[replica], loss, optimizer, clip_norm=0.1).item()
        for batch in batches(STEPS, 8)[begun:stop]
    ]
    checkpoints.save()
    return {
        "losses": losses,
        "state": {k: full(v).clone() for k, v in module.network.state_dict().items()},
        "held": sum(local(parameter.detach()).numel() for parameter in module.parameters()),
        "original": module.original_state_dict(),
    }


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], msg=key)


@pytest.mark.parametrize("options", [{}, {"recompute": True, "batches": 2}])
def test_sharded_replicas_train_alike(options: dict[str, Any], tmp_path: Path) -> None:
    whole = start(_train, 4, tmp_path, str(tmp_path / "whole"), False, STEPS, options)
    folder = str(tmp_path / "shards")
    first = start(_train, 4, tmp_path, folder, True, 2, options)
    second = start(_train, 4, tmp_path, folder, True, STEPS, options)  # from the checkpoint
    for begun, ended, wanted in zip(first, second, whole, strict=True):
        assert begun["losses"] + ended["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        running = {key for key in wanted["state"] if "running" in key}  # each replica's own
        _compare(
            {key: ended["state"][key] for key in ended["state"].keys() - running},
            {key: wanted["state"][key] for key in wanted["state"].keys() - running},
        )
    for rank in (0, 1):
        assert second[rank]["held"] + second[rank + 2]["held"] == whole[rank]["held"]
    assert second[0]["original"].keys() == whole[0]["original"].keys()


def _late_optimizer(rank: int) -> bool:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "stage"))
    module = pnn.runtime.distribute(network(2), mesh=mesh, placement=[0, 0], shard=True)
    batch = batches(1)[0]
    module.eval()(batch)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = {key: full(value).clone() for key, value in module.network.named_parameters()}
    module.train().train_step(batch, loss, optimizer)
    trained = {key: full(value) for key, value in module.network.named_parameters()}
    return not torch.equal(before["fine_0.stem.weight"], trained["fine_0.stem.weight"])


def test_an_optimizer_made_after_a_forward_pass_trains(tmp_path: Path) -> None:
    assert start(_late_optimizer, 2, tmp_path) == [True, True]


def _refused(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "stage"))
    messages = []
    for options in (
        {"compiled": network(2, "tied"), "mesh": mesh, "placement": [0, 0]},
        {"compiled": network(2)},
    ):
        with pytest.raises(pnn.RuntimeFault) as caught:
            pnn.runtime.distribute(shard=True, **options)
        messages.append(str(caught.value))
    module = pnn.runtime.distribute(network(2), mesh=mesh, placement=[0, 0], shard=True)
    with pytest.raises(pnn.RuntimeFault, match=r"before distribute\(\)"):
        module.load_original_state_dict({})
    return messages


def test_ties_and_single_replicas_are_not_sharded(tmp_path: Path) -> None:
    for tied, single in start(_refused, 2, tmp_path):
        assert "fine_0.stem.weight and" in tied
        assert "there are none" in single
