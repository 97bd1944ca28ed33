"""How ranks run their pieces: in another precision, again in the backward pass, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pnn_compile as pnn
from pnn_compile.runtime.transport import PointToPoint
from tests.distributed.ranks import start
from tests.models.distributed_models import batches, loss, network

STEPS = 3


def _train(options: dict[str, Any], **model: Any) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, weights and buffers, and how often the first layer of the rank ran."""
    compiled = network(2, **model)
    torch.manual_seed(3)
    module = pnn.runtime.distribute(compiled, **options).train()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    linear = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
    handle = linear.register_forward_hook(count)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = [module.train_step(batch, loss, optimizer).item() for batch in batches(STEPS)]
    handle.remove()
    return losses, module.network.state_dict(), calls


def _recomputed(rank: int) -> list[Any]:
    return [_train({"recompute": recompute, "batches": 2}) for recompute in (False, True)]


def test_recomputed_stages_draw_the_same_and_count_once(tmp_path: Path) -> None:
    for kept, again in start(_recomputed, 2, tmp_path):
        assert kept[0] == again[0]
        tried = 6  # the first step runs two micro-batches apart and together, in both modes
        assert kept[2] == tried + STEPS * 2
        assert again[2] == tried + 2 * STEPS * 2
        for key, value in kept[1].items():
            assert torch.equal(value, again[1][key]), key


def _compiled(rank: int, recompute: bool) -> list[Any]:
    plain = _train({}, norm=False, dropout=0.0, depth=2)
    options = {"compile_backend": "aot_eager", "recompute": recompute}
    return [plain, _train(options, norm=False, dropout=0.0, depth=2)]


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_pieces_train_alike(recompute: bool, tmp_path: Path) -> None:
    for plain, compiled in start(_compiled, 2, tmp_path, recompute):
        assert plain[0] == pytest.approx(compiled[0], rel=1e-5)
        assert plain[1].keys() == compiled[1].keys()
        for key, value in plain[1].items():
            torch.testing.assert_close(value, compiled[1][key], msg=key)


def _bfloat16(rank: int) -> dict[str, Any]:
    sent: set[torch.dtype] = set()
    send = PointToPoint.send

    def record(transport: PointToPoint, peer: int, tensors: Any) -> None:
        sent.update(tensor.dtype for tensor in tensors if tensor.dim())  # all but the loss
        send(transport, peer, tensors)

    PointToPoint.send = record  # type: ignore[method-assign, assignment]
    losses, state, _ = _train({"autocast": torch.bfloat16}, norm=False, dropout=0.0)
    return {"losses": losses, "state": state, "sent": sent}


def test_autocast_is_that_of_one_process(tmp_path: Path) -> None:
    module = network(2, norm=False, dropout=0.0).module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for batch in batches(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(module(batch), batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    expected = module.state_dict()
    for rank in start(_bfloat16, 2, tmp_path):
        assert rank["sent"] == {torch.bfloat16}
        assert rank["losses"] == pytest.approx(losses, rel=0.02)
        for key, value in rank["state"].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[key], rtol=0.05, atol=0.01, msg=key)


def _overflow(rank: int) -> dict[str, Any]:
    """An infinite gradient on rank 0 in the second step."""
    module = pnn.runtime.distribute(network(2, norm=False), autocast=torch.bfloat16).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = module.grad_scaler(init_scale=8.0)
    if rank == 0:
        first = next(module.parameters())
        first.register_hook(lambda g: g * float("inf") if module.steps == 2 else g)
    moved, losses = [], []
    for batch in batches(STEPS):
        before = [parameter.detach().clone() for parameter in module.parameters()]
        losses.append(module.train_step(batch, loss, optimizer, clip_norm=10.0, scaler=scaler))
        after = zip(before, module.parameters(), strict=True)
        moved.append(any(not torch.equal(a, b) for a, b in after))
    with pytest.raises(pnn.RuntimeFault, match=r"create it with module\.grad_scaler\(\)"):
        module.train_step(batches(1)[0], loss, optimizer, scaler=torch.amp.GradScaler("cpu"))
    return {"moved": moved, "scale": scaler.get_scale(), "losses": losses}


def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    for rank in start(_overflow, 2, tmp_path):
        assert rank["moved"] == [True, False, True]
        assert rank["scale"] == 4.0
        assert all(value < 10 for value in rank["losses"])  # not scaled


def _converted(rank: int) -> tuple[Any, Any]:
    compiled = network(2, norm=False)
    compiled.module.double()
    module = pnn.runtime.distribute(compiled).eval()
    batch = batches(1)[0].double()
    with torch.no_grad():
        return module(batch), compiled.module.eval()(batch)


def test_states_cross_in_the_precision_of_the_weights(tmp_path: Path) -> None:
    _, (result, expected) = start(_converted, 2, tmp_path)
    torch.testing.assert_close(result, expected)
    assert result.dtype == torch.float64


def test_other_types_are_refused() -> None:
    from pnn_compile.runtime.rank_pieces import PieceOptions

    with pytest.raises(pnn.RuntimeFault, match=r"got torch\.int8"):
        PieceOptions(autocast=torch.int8)
