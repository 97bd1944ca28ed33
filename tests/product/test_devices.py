"""Where a rank's pieces are, in which precision, and how their tensors are passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pnn_compile as pnn
from pnn_compile.runtime.transport import PointToPoint, backend_of
from tests.distributed.ranks import start
from tests.models.distributed_models import batches, loss, network


def _said(function: Any, *arguments: Any) -> str:
    with pytest.raises(pnn.RuntimeFault) as caught:
        function(*arguments)
    return str(caught.value)


def _conversions(rank: int) -> dict[str, str]:
    result = {}
    module = pnn.runtime.distribute(network(2), placement=[0, 0]).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result["half"] = _said(module.half)
    result["to"] = _said(lambda: module.to(torch.float64))
    assert "meta device" in _said(lambda: module.to("meta"))
    assert module.to("cpu").float() is module  # changes nothing
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    module.network.double()  # by the back door
    result["step"] = _said(module.forward_backward, batches(1)[0].double(), loss)
    return result


def test_precision_does_not_change_behind_distribute(tmp_path: Path) -> None:
    (result,) = start(_conversions, 1, tmp_path)
    assert "states of torch.float32, which cannot become torch.float16" in result["half"]
    assert "cannot become torch.float64" in result["to"]
    assert "rank 0: weights were converted from torch.float32 to torch.float64" in result["step"]
    assert all(
        "before distribute(), or pass distribute(autocast" in message for message in result.values()
    )


def _placed(rank: int, path: str) -> tuple[str, str, Any]:
    wrong = _said(lambda: pnn.runtime.distribute(path, device="cuda:77"))
    unknown = _said(lambda: pnn.runtime.distribute(path, device="toaster"))
    module = pnn.runtime.distribute(path, device="cpu").train()
    assert module.network.device.type == "cpu"
    module.forward_backward(batches(1)[0], loss)
    return wrong, unknown, {p.device.type for p in module.parameters()}


def test_a_device_is_given_by_name(tmp_path: Path) -> None:
    path = str(network(2).save(tmp_path / "artifact"))
    for wrong, unknown, types in start(_placed, 2, tmp_path, path):
        assert "device 'cuda:77' cannot be used" in wrong
        assert "device 'toaster' cannot be used" in unknown
        assert types == {"cpu"}


def test_a_device_that_the_group_cannot_send_from_is_refused(tmp_path: Path) -> None:
    (message,) = start(_on_meta, 1, tmp_path)
    assert "the weights are on meta" in message
    assert "pass distribute(device=...)" in message


def _on_meta(rank: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    assert backend_of(group, torch.device("cpu")) == "gloo"
    return _said(lambda: pnn.runtime.distribute(network(2), placement=[0, 0], device="meta"))


def _by_host(rank: int) -> tuple[list[Tensor], float]:
    """Rank 0 sends, by way of the host, what cannot be sent as it is laid out."""
    group = dist.group.WORLD
    assert group is not None
    transport = PointToPoint(group, torch.device("cpu"), through_host=True)
    sent = [torch.arange(6.0).reshape(2, 3).T, torch.arange(3)]
    like = [torch.empty(3, 2, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")]
    if rank == 0:
        transport.send(1, sent)
        transport.send(1, sent[:1])
        transport.wait()
        return sent, 0.0
    transport.expect(0, like)
    transport.expect(0, like[:1])
    return transport.receive(0, like), transport.receive(0, like[:1])[0].sum().item()


def test_messages_may_go_by_way_of_the_host(tmp_path: Path) -> None:
    (sent, _), (result, total) = start(_by_host, 2, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(sent, result, strict=True))
    assert total == 15
