# mypy: disable-error-code="arg-type"
"""Ranks on a GPU: NCCL as far as one device allows, and two ranks that share it over Gloo."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pnn_compile as pnn
from pnn_compile.runtime.local_ranks import run_on_ranks
from tests.distributed.ranks import start
from tests.models.distributed_models import WIDTH, Tied, batches, loss, network

DEVICE, BACKEND = "cuda:0", "nccl"
STEPS = 3
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.filterwarnings("default"),  # drivers and compilers warn of what is theirs
]


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only one of a group; NCCL takes a GPU once."""
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    home = torch.device(DEVICE)
    if home.type == "cuda":
        torch.cuda.set_device(home)
    dist.init_process_group(
        BACKEND, store, world_size=1, rank=0, device_id=home if home.type == "cuda" else None
    )
    yield
    dist.destroy_process_group()


def _compiled(stages: int, sweep: str = "chain", tied: bool = False, **model: Any) -> pnn.Compiled:
    if sweep == "chain" and not tied:
        return network(stages, **model)
    torch.manual_seed(0)
    built = Tied(**model)
    example = torch.randn(4, WIDTH)
    return pnn.compile(built, example, stages=stages, coarse_budget=1.0, sweep=sweep)


def _placed(compiled: pnn.Compiled, **options: Any) -> pnn.runtime.RankModule:
    placement = [0] * len(compiled.plan.stages)
    module = pnn.runtime.distribute(compiled, placement=placement, device=DEVICE, **options)
    return module.train()


def _alone(compiled: pnn.Compiled) -> nn.Module:
    """A copy of the parareal network on the device, to compare with."""
    return copy.deepcopy(compiled.module).to(DEVICE).train()


def _same(found: nn.Module, wanted: nn.Module, **tolerance: float) -> None:
    """Compare gradients and buffers; a gradient that is not there is zero."""
    expected = dict(wanted.named_parameters(remove_duplicate=False))  # ranks name ties as they like
    for key, parameter in found.named_parameters():
        zero = torch.zeros_like(parameter)
        own, other = parameter.grad, expected[key].grad
        torch.testing.assert_close(
            zero if own is None else own, zero if other is None else other, msg=key, **tolerance
        )
    buffers = dict(wanted.named_buffers())
    for key, buffer in found.named_buffers():
        torch.testing.assert_close(buffer, buffers[key], msg=key)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_stages_of_one_process_give_outputs_and_gradients_of_the_network(
    sweep: str, tied: bool
) -> None:
    compiled = _compiled(3, sweep, tied, dropout=0.0)
    reference, (batch,) = _alone(compiled), batches(1)
    module = _placed(compiled)
    value = module.forward_backward(batch, loss)
    expected = loss(reference(batch.to(DEVICE)), batch)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    _same(module.network, reference, **CLOSE)
    outputs = module.eval()(batch)
    assert outputs.device == torch.device(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(outputs, reference.eval()(batch.to(DEVICE)))


def test_micro_batches_add_up_on_the_device() -> None:
    compiled = _compiled(2, norm=False, dropout=0.0)
    reference, (batch,) = _alone(compiled), batches(1)
    module = _placed(compiled, batches=2, recompute=True)
    module.forward_backward(batch, loss)
    loss(reference(batch.to(DEVICE)), batch).backward()
    _same(module.network, reference, **CLOSE)


def test_dropout_is_that_of_the_seed_and_leaves_the_generator_alone() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        module = _placed(_compiled(2, dropout=0.5))
        before = _generator_state()
        losses.append([module.forward_backward(batch, loss).item() for batch in batches(2)])
        assert torch.equal(before, _generator_state())
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def _generator_state() -> Tensor:
    if torch.device(DEVICE).type == "cuda":
        return torch.cuda.get_rng_state(DEVICE)
    return torch.get_rng_state()


def _losses(module: pnn.runtime.RankModule, **step: Any) -> list[float]:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    return [module.train_step(batch, loss, optimizer, **step).item() for batch in batches(STEPS)]


def test_bfloat16_is_that_of_one_process() -> None:
    compiled = _compiled(2, norm=False, dropout=0.0)
    reference = _alone(compiled)
    result = _losses(_placed(compiled, autocast=torch.bfloat16))
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for value, batch in zip(result, batches(STEPS), strict=True):
        optimizer.zero_grad()
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            expected = loss(reference(batch.to(DEVICE)), batch)
        expected.backward()
        optimizer.step()
        assert value == pytest.approx(expected.item(), rel=0.02)


def test_float16_trains_under_a_scaler_and_skips_an_overflow() -> None:
    plain = _losses(_placed(_compiled(2, norm=False, dropout=0.0)))
    module = _placed(_compiled(2, norm=False, dropout=0.0), autocast=torch.float16)
    scaler = module.grad_scaler(init_scale=2.0**8)
    assert _losses(module, scaler=scaler, clip_norm=100.0) == pytest.approx(plain, rel=0.02)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    next(module.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module.train_step(batches(1)[0], loss, optimizer, scaler=scaler)
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_pieces_that_torch_compile_made_train_alike() -> None:
    plain = _losses(_placed(_compiled(2, depth=2, norm=False, dropout=0.0)))
    compiled = _compiled(2, depth=2, norm=False, dropout=0.0)
    result = _losses(_placed(compiled, compile_backend="inductor"))
    assert result == pytest.approx(plain, rel=1e-3)


def test_a_run_goes_on_from_its_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    def run(folder: str, steps: int) -> dict[str, Tensor]:
        torch.manual_seed(5)
        module = _placed(_compiled(3))
        optimizer = torch.optim.AdamW(module.parameters(), 0.01)
        checkpoints = pnn.runtime.Checkpoints(tmp_path / folder, module, optimizer)
        for batch in batches(STEPS)[checkpoints.resume() : steps]:
            module.train_step(batch, loss, optimizer)
            checkpoints.save()
        return {key: value.clone() for key, value in module.network.state_dict().items()}

    expected = run("whole", STEPS)
    run("parts", 2)
    result = run("parts", STEPS)
    for key, value in expected.items():
        assert value.device == torch.device(DEVICE)
        assert torch.equal(result[key], value), key


def test_weights_that_the_group_cannot_send_are_refused() -> None:
    if BACKEND != "nccl":
        pytest.skip("Gloo sends from everywhere")
    with pytest.raises(pnn.RuntimeFault, match=r"pass distribute\(device=\.\.\.\)"):
        pnn.runtime.distribute(_compiled(2), placement=[0, 0])


def _shared(rank: int, path: str) -> dict[str, Any]:
    """Two ranks on one GPU, over Gloo: messages go by way of the host."""
    module = pnn.runtime.distribute(path, device=DEVICE, inputs="rank 0").train()
    batch = batches(1)[0] if rank == 0 else None
    value = module.forward_backward(batch, loss)
    outputs = module.eval()(*([batch] if rank == 0 else []))
    gradients = {k: p.grad for k, p in module.network.named_parameters() if p.grad is not None}
    return {
        "loss": value.cpu(), "outputs": None if outputs is None else outputs.cpu(),
        "gradients": {key: gradient.cpu() for key, gradient in gradients.items()},
        "devices": {str(parameter.device) for parameter in module.parameters()},
    }  # fmt: skip


@pytest.mark.parametrize(("sweep", "tied"), [("chain", False), ("collapsed", True)])
def test_two_ranks_share_one_gpu(sweep: str, tied: bool, tmp_path: Path) -> None:
    compiled = _compiled(2, sweep, tied, norm=False, dropout=0.0)
    path = str(compiled.save(tmp_path / "artifact"))
    reference, (batch,) = _alone(compiled), batches(1)
    value = loss(reference(batch.to(DEVICE)), batch)
    value.backward()
    expected = dict(reference.named_parameters(remove_duplicate=False))
    result = start(_shared, 2, tmp_path, path)
    for each in result:
        assert each["devices"] == {DEVICE}
        torch.testing.assert_close(each["loss"], value.detach().cpu())
        assert each["gradients"]
        for key, gradient in each["gradients"].items():
            wanted = expected[key].grad
            assert wanted is not None, key
            torch.testing.assert_close(gradient, wanted.cpu(), msg=key, **CLOSE)
    with torch.no_grad():
        outputs = reference.eval()(batch.to(DEVICE)).cpu()
    torch.testing.assert_close(result[1]["outputs"], outputs, **CLOSE)


def _each_its_own(device: torch.device, path: str) -> tuple[float, str]:
    module = pnn.runtime.distribute(path, device=device).train()
    value = module.forward_backward(batches(1)[0], loss)
    return value.item(), str(dist.get_backend())


@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_two_ranks_on_two_gpus(sweep: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes a GPU once, and there is one")
    compiled = _compiled(2, sweep, norm=False, dropout=0.0)
    path = str(compiled.save(tmp_path / "artifact"))
    expected = loss(_alone(compiled)(batches(1)[0].to(DEVICE)), None).item()
    for value, backend in run_on_ranks(_each_its_own, 2, path, cuda=True):
        assert backend == "nccl"
        assert value == pytest.approx(expected, rel=1e-4)
