"""Data parallelism beside the stages: replicas that hold all of the weights, or shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import pnn_compile as pnn
from pnn_compile.runtime.data_parallel import full, local
from tests.distributed.ranks import start
from tests.models.distributed_models import batches, loss, network

STEPS = 3


def _mesh(replicas: int, ranks: int) -> Any:
    return init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("data", "stage"))


def _train(rank: int, kind: str, norm: bool) -> dict[str, Any]:
    torch.manual_seed(rank)
    compiled = network(2, kind, norm=norm, dropout=0.0)
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            parameter.add_(0.1 * rank)  # the first replica's are taken
    mesh = _mesh(2, 2)
    module = pnn.runtime.distribute(compiled, mesh=mesh).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    replica = mesh["data"].get_local_rank()
    losses = [
        module.train_step(batch.chunk(2)[replica], loss, optimizer, clip_norm=1.0).item()
        for batch in batches(STEPS)
    ]
    return {"losses": losses, "state": module.network.state_dict()}


def _train_alone(kind: str) -> tuple[list[float], dict[str, Tensor]]:
    compiled = network(2, kind, norm=False, dropout=0.0)
    with torch.no_grad():
        first = {id(p) for p in compiled.stages.fine[0].parameters()}
        for parameter in compiled.module.parameters():
            parameter.add_(0.0 if id(parameter) in first else 0.1)  # those of ranks 0 and 1
    module = compiled.module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for batch in batches(STEPS):
        optimizer.zero_grad()
        value = loss(module(batch), batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses, module.state_dict()


@pytest.mark.parametrize("kind", ["blocks", "tied"])
def test_replicas_equal_one_process_on_all_of_their_data(kind: str, tmp_path: Path) -> None:
    losses, state = _train_alone(kind)
    for rank in start(_train, 4, tmp_path, kind, False):
        assert rank["losses"] == pytest.approx(losses, rel=1e-4)
        for key, value in rank["state"].items():
            torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-6, msg=key)


def test_replicas_keep_their_weights_equal_under_batch_norm(tmp_path: Path) -> None:
    ranks = start(_train, 4, tmp_path, "blocks", True)
    for rank, replica in zip(ranks[:2], ranks[2:], strict=True):
        for key, value in rank["state"].items():
            if "running" not in key:  # these are shared before the next pass
                assert torch.equal(value, replica["state"][key]), key


def _buffers(rank: int) -> list[Tensor]:
    module = pnn.runtime.distribute(network(2), mesh=_mesh(2, 1), placement=[0, 0]).train()
    for batch in batches(2):
        module.forward_backward(batch * (1 + rank), loss)
    module.eval()(batches(1)[0])
    return [buffer.clone() for buffer in module.buffers()]


def test_all_replicas_go_on_with_the_statistics_of_the_first(tmp_path: Path) -> None:
    first, second = start(_buffers, 2, tmp_path)
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _dropout(rank: int) -> float:
    torch.manual_seed(3)
    module = pnn.runtime.distribute(
        network(2, norm=False, dropout=0.5), mesh=_mesh(2, 1), placement=[0, 0]
    ).train()
    visited = []

    def record(outputs: Tensor, batch: Any) -> Tensor:
        visited.append(loss(outputs, batch).item())
        return loss(outputs, batch)

    module.forward_backward(batches(1)[0], record)
    return visited[0]


def test_replicas_drop_different_units(tmp_path: Path) -> None:
    first, second = start(_dropout, 2, tmp_path)
    assert first != second


def _refused(rank: int) -> list[str]:
    compiled, messages = network(2), []
    strange = init_device_mesh("cpu", (2,), mesh_dim_names=("pipe",))
    for options in ({"mesh": strange}, {"mesh": _mesh(1, 2), "group": dist.group.WORLD}):
        with pytest.raises(pnn.RuntimeFault) as caught:
            pnn.runtime.distribute(compiled, **options)
        messages.append(str(caught.value))
    pnn.runtime.distribute(compiled, mesh=_mesh(1, 2))  # one replica is as good as a group
    return messages


def test_a_mesh_of_other_dimensions_is_refused(tmp_path: Path) -> None:
    for strange, both in start(_refused, 2, tmp_path):
        assert "('pipe',)" in strange
        assert "replaces a group" in both


def _train_sharded(rank: int, folder: str, shard: bool, stop: int, options: dict[str, Any]) -> Any:
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


def _compare(result: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert result.keys() == reference.keys()
    for key, value in result.items():
        torch.testing.assert_close(value, reference[key], msg=key)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"recompute": True, "batches": 2}, marks=pytest.mark.slow)]
)
def test_sharded_replicas_train_alike(options: dict[str, Any], tmp_path: Path) -> None:
    whole = start(_train_sharded, 4, tmp_path, str(tmp_path / "whole"), False, STEPS, options)
    folder = str(tmp_path / "shards")
    first = start(_train_sharded, 4, tmp_path, folder, True, 2, options)
    second = start(_train_sharded, 4, tmp_path, folder, True, STEPS, options)  # from the checkpoint
    for begun, ended, expected in zip(first, second, whole, strict=True):
        assert begun["losses"] + ended["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        running = {key for key in expected["state"] if "running" in key}  # each replica's own
        _compare(
            {key: ended["state"][key] for key in ended["state"].keys() - running},
            {key: expected["state"][key] for key in expected["state"].keys() - running},
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


def _unshardable(rank: int) -> list[str]:
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
    for tied, single in start(_unshardable, 2, tmp_path):
        assert "fine_0.stem.weight and" in tied
        assert "there are none" in single
